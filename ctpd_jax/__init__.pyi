# The public interface: __init__.py reads this file, so a name is public where, and only where, it stands here.
from .core.logprobs import token_logprobs
from .core.losses import (
    LossOutput,
    ctpd_loss,
    dpo_loss,
    preference_loss,
    response_returns,
    reward_coefficients,
    sft_loss,
    span_return,
    tis_dpo_loss,
)
from .core.objectives import span_regression_loss, span_targets
from .core.projection import project_to_tokens, span_sums
from .core.weights import importance_weights
from .errors import UserError
from .models.decoder import apply, hidden_states, unembedding
from .models.hf import load_hf, save_hf
from .models.sampling import generate
from .schema import Aligned, Message, PreferencePair
from .text.preferences import load_preferences
from .text.prompts import load_text_model
from .text.spans import align, align_batch
from .text.tokens import load_tokenizer

__all__ = [
    "Aligned",
    "LossOutput",
    "Message",
    "PreferencePair",
    "UserError",
    "__version__",
    "align",
    "align_batch",
    "apply",
    "ctpd_loss",
    "dpo_loss",
    "generate",
    "hidden_states",
    "importance_weights",
    "load_hf",
    "load_preferences",
    "load_text_model",
    "load_tokenizer",
    "preference_loss",
    "project_to_tokens",
    "response_returns",
    "reward_coefficients",
    "save_hf",
    "sft_loss",
    "span_regression_loss",
    "span_return",
    "span_sums",
    "span_targets",
    "tis_dpo_loss",
    "token_logprobs",
    "unembedding",
]

__version__: str
