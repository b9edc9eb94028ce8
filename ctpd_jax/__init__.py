"""ctpd_jax: Cross-Tokenizer Preference Distillation in JAX (arXiv 2601.11865).

    import ctpd_jax as ctpd

The names below are the public interface. Each is imported when it is first used, so that `ctpd --help` and the text
half need neither JAX nor the models.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ctpd_jax.core.logprobs import token_logprobs as token_logprobs
    from ctpd_jax.core.losses import (
        LossOutput as LossOutput,
    )
    from ctpd_jax.core.losses import (
        ctpd_loss as ctpd_loss,
    )
    from ctpd_jax.core.losses import (
        dpo_loss as dpo_loss,
    )
    from ctpd_jax.core.losses import (
        preference_loss as preference_loss,
    )
    from ctpd_jax.core.losses import (
        response_return as response_return,
    )
    from ctpd_jax.core.losses import (
        reward_coefficients as reward_coefficients,
    )
    from ctpd_jax.core.losses import (
        sft_loss as sft_loss,
    )
    from ctpd_jax.core.losses import (
        tis_dpo_loss as tis_dpo_loss,
    )
    from ctpd_jax.core.projection import project_to_tokens as project_to_tokens
    from ctpd_jax.core.projection import span_sums as span_sums
    from ctpd_jax.core.weights import importance_weights as importance_weights
    from ctpd_jax.errors import UserError as UserError
    from ctpd_jax.models.decoder import apply as apply
    from ctpd_jax.models.generate import generate as generate
    from ctpd_jax.models.hf import load_hf as load_hf
    from ctpd_jax.models.hf import save_hf as save_hf
    from ctpd_jax.schema import Aligned as Aligned
    from ctpd_jax.schema import PreferencePair as PreferencePair
    from ctpd_jax.text.preferences import load_preferences as load_preferences
    from ctpd_jax.text.spans import align as align
    from ctpd_jax.text.spans import align_batch as align_batch
    from ctpd_jax.text.tokens import load_tokenizer as load_tokenizer

__version__ = "0.1.0"

_HOME = {
    "errors": ("UserError",),
    "schema": ("Aligned", "PreferencePair"),
    "text.preferences": ("load_preferences",),
    "text.tokens": ("load_tokenizer",),
    "text.spans": ("align", "align_batch"),
    "core.logprobs": ("token_logprobs",),
    "core.projection": ("span_sums", "project_to_tokens"),
    "core.weights": ("importance_weights",),
    "core.losses": (
        "LossOutput",
        "ctpd_loss",
        "dpo_loss",
        "preference_loss",
        "response_return",
        "reward_coefficients",
        "sft_loss",
        "tis_dpo_loss",
    ),
    "models.hf": ("load_hf", "save_hf"),
    "models.decoder": ("apply",),
    "models.generate": ("generate",),
}
_WHERE = {name: module for module, names in _HOME.items() for name in names}
__all__ = ["__version__", *_WHERE]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
