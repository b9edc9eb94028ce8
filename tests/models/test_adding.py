"""A gradient that is added inside the backward pass: the same sums, and no second gradient of the layers."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from toy.models import student_config, teacher_config

from ctpd_jax.models.adding import add_gradient
from ctpd_jax.models.config import DecoderConfig
from ctpd_jax.models.decoder import hidden_states, init_params, logits_of
from ctpd_jax.models.hf.config import from_hf

IDS = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA, GEMMA = from_hf(student_config() | IDS), from_hf(teacher_config() | IDS)
TOKENS = jnp.arange(24, dtype=jnp.int32).reshape(2, 12) % 60


def loss(config: DecoderConfig, remat, params):
    hidden = hidden_states(config, params, TOKENS, remat=remat)
    logps = jax.nn.log_softmax(logits_of(config, params, hidden))
    return -jnp.take_along_axis(logps[:, :-1], TOKENS[:, 1:, None], axis=-1).sum(), logps.mean()


@pytest.mark.parametrize("remat", ["full", "dots", "none"])
@pytest.mark.parametrize("config", [LLAMA, GEMMA], ids=["llama", "gemma"])
def test_the_sum_is_that_of_both_gradients(config, remat):
    params, earlier = (init_params(config, jax.random.key(seed)) for seed in (0, 1))
    own = partial(loss, config, remat)
    inside, beside = jax.jit(partial(add_gradient, own, layers=True))(params, earlier)
    after, value = jax.jit(partial(add_gradient, own, layers=False))(params, earlier)
    assert jax.tree.structure(inside) == jax.tree.structure(earlier) and float(beside) == float(value)
    for one, other, before in zip(*map(jax.tree.leaves, (inside, after, earlier)), strict=True):
        assert jnp.abs(other - before).max() > 0  # every leaf has a gradient
        assert jnp.abs(one - other).max() <= 1e-6 * jnp.abs(other).max()


def test_it_takes_no_second_gradient_of_the_layers():
    deep = replace(LLAMA, num_layers=12, layer_kinds=LLAMA.layer_kinds[:1] * 12)
    params = init_params(deep, jax.random.key(0))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params["model"]["layers"]))

    def beside(layers: bool) -> int:
        adding = jax.jit(partial(add_gradient, partial(loss, deep, "full"), layers=layers), donate_argnums=1)
        return adding.lower(params, params).compile().memory_analysis().temp_size_in_bytes

    assert beside(True) < beside(False) - 0.8 * size


@pytest.mark.parametrize("times", [0, 2])
def test_a_loss_that_does_not_run_the_layers_once_is_refused(times):
    params = init_params(LLAMA, jax.random.key(0))

    def several(params):
        total = params["model"]["norm"]["weight"].sum()
        return total + sum(loss(LLAMA, "full", params)[0] for _ in range(times)), None

    with pytest.raises(RuntimeError, match=f"ran the layers {times} times"):
        add_gradient(several, params, params, layers=True)
