# The public interface: __init__.py reads this file, so a name is public where, and only where, it stands here.
from .core.logprobs import token_logprobs
from .core.losses import (
    LossOutput,
    ctpd_loss,
    dpo_loss,
    preference_loss,
    response_return,
    reward_coefficients,
    sft_loss,
    tis_dpo_loss,
)
from .core.projection import project_to_tokens, span_sums
from .core.weights import importance_weights
from .errors import UserError
from .models.decoder import apply
from .models.hf import load_hf, save_hf
from .models.sampling import generate
from .schema import Aligned, PreferencePair
from .text.preferences import load_preferences
from .text.spans import align, align_batch
from .text.tokens import load_tokenizer

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
