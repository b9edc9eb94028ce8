# The public interface: __init__.py reads this file, so a name is public where, and only where, it stands here.
from ctpd_jax.core.logprobs import token_logprobs
from ctpd_jax.core.losses import (
    LossOutput,
    ctpd_loss,
    dpo_loss,
    preference_loss,
    response_return,
    reward_coefficients,
    sft_loss,
    tis_dpo_loss,
)
from ctpd_jax.core.projection import project_to_tokens, span_sums
from ctpd_jax.core.weights import importance_weights
from ctpd_jax.errors import UserError
from ctpd_jax.models.decoder import apply
from ctpd_jax.models.generate import generate
from ctpd_jax.models.hf import load_hf, save_hf
from ctpd_jax.schema import Aligned, PreferencePair
from ctpd_jax.text.preferences import load_preferences
from ctpd_jax.text.spans import align, align_batch
from ctpd_jax.text.tokens import load_tokenizer

__all__ = [
    "Aligned",
    "LossOutput",
    "PreferencePair",
    "UserError",
    "__version__",
    "align",
    "align_batch",
    "apply",
    "ctpd_loss",
    "dpo_loss",
    "generate",
    "importance_weights",
    "load_hf",
    "load_preferences",
    "load_tokenizer",
    "preference_loss",
    "project_to_tokens",
    "response_return",
    "reward_coefficients",
    "save_hf",
    "sft_loss",
    "span_sums",
    "tis_dpo_loss",
    "token_logprobs",
]

__version__: str
