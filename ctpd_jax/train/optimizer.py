"""AdamW with warmup and cosine decay, from a stage's settings."""

from __future__ import annotations

import jax
import optax
from ml_collections import ConfigDict


def learning_rate(settings: ConfigDict, steps: int) -> optax.Schedule:
    """Linear warmup over `settings.warmup` of the steps to `settings.lr`, then cosine to zero; update 0 moves."""
    warmup = max(1, round(settings.warmup * steps))
    return optax.join_schedules(
        [
            optax.linear_schedule(settings.lr / warmup, settings.lr, max(warmup - 1, 1)),
            optax.cosine_decay_schedule(settings.lr, max(steps - warmup, 1)),
        ],
        [warmup],
    )


def decay_mask(params: dict) -> dict:
    """True where weight decay applies: matrices, not norms and biases."""

    def decays(path: tuple, _: object) -> bool:
        names = [str(getattr(key, "key", key)) for key in path]
        return not any("norm" in name or name.endswith("bias") for name in names)

    return jax.tree_util.tree_map_with_path(decays, params)


def make_optimizer(settings: ConfigDict, steps: int) -> optax.GradientTransformation:
    """Returns clip by global norm -> AdamW; moments are float32 like the parameters."""
    return optax.chain(
        optax.clip_by_global_norm(settings.clip),
        optax.adamw(
            learning_rate(settings, steps),
            b1=settings.adam_b1,
            b2=settings.adam_b2,
            weight_decay=settings.weight_decay,
            mask=decay_mask,
        ),
    )
