"""The decoder by itself: which token sees which, and what does not depend on how a batch is laid out."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.tiny import CONFIGS, layout, random_model

from ctpd_jax.models import attention, decoder
from ctpd_jax.models.config import Rope
from ctpd_jax.models.decoder import hidden_states, init_params, layer_graph, param_shapes, unembedding

NAMES = sorted(CONFIGS)
apply = jax.jit(decoder.apply, static_argnums=0)


def _tokens(config, count, seed=0):
    return np.random.default_rng(seed).integers(0, config.vocab_size, count).astype(np.int32)


def _logits(config, params, tokens, segment=None, parent=None, positions=None):
    """[T, V] of one row, padded to 30 tokens: a config needs one program for all of them. By default one sequence."""
    count = len(tokens)
    segment, positions = segment or [1] * count, positions or [*range(count)]
    pad = [0] * (30 - count)
    row = layout(segment + pad, (parent or segment) + pad, positions + pad)
    logits = apply(config, params, np.concatenate([tokens, np.zeros(len(pad), np.int32)])[None], row)[0]
    assert np.isfinite(logits).all()  # in padding too
    return logits[:count]


@pytest.mark.parametrize("name", NAMES)
def test_later_tokens_do_not_change_earlier_logits(name):
    config, params = random_model(name)
    tokens = _tokens(config, 24)
    changed = tokens.copy()
    changed[15:] = (changed[15:] + 1) % config.vocab_size
    first, second = apply(config, params, tokens[None]), apply(config, params, changed[None])
    assert first.shape == (1, 24, config.vocab_size) and first.dtype == jnp.float32
    np.testing.assert_array_equal(first[0, :15], second[0, :15])
    assert not np.allclose(first[0, 15:], second[0, 15:])
    np.testing.assert_allclose(_logits(config, params, tokens), first[0], atol=2e-5)  # padding behind changes nothing


@pytest.mark.parametrize("name", NAMES)
def test_two_segments_in_a_row_are_two_sequences(name):
    config, params = random_model(name)
    a, b = _tokens(config, 11, 1), _tokens(config, 14, 2)
    segment, positions = [1] * 11 + [2] * 14, [*range(11), *range(14)]
    together = _logits(config, params, np.concatenate([a, b]), segment, positions=positions)
    np.testing.assert_allclose(together[:11], _logits(config, params, a), atol=2e-5)
    np.testing.assert_allclose(together[11:], _logits(config, params, b), atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_shared_prompt_is_the_prompt_of_both_answers(name):
    """Longer than the window of the Gemma configs, so that the window must count positions, not places in the row."""
    config, params = random_model(name)
    prompt, a, b = _tokens(config, 9, 1), _tokens(config, 7, 2), _tokens(config, 6, 3)
    segment = [1] * 9 + [2] * 7 + [3] * 6
    parent = [1] * 9 + [1] * 7 + [1] * 6
    positions = [*range(9), *range(9, 16), *range(9, 15)]
    shared = _logits(config, params, np.concatenate([prompt, a, b]), segment, parent, positions)
    alone_a = _logits(config, params, np.concatenate([prompt, a]))
    alone_b = _logits(config, params, np.concatenate([prompt, b]))
    np.testing.assert_allclose(shared[:16], alone_a, atol=2e-5)
    np.testing.assert_allclose(shared[16:], alone_b[9:], atol=2e-5)


@pytest.mark.parametrize("name", ["llama_biases", "gemma3"])
def test_rows_do_not_touch_each_other_and_gradients_agree(name):
    """Several rows take the path row by row on a CPU; remat recomputes; neither may change a value or a gradient."""
    config, params = random_model(name)
    tokens = _tokens(config, 3 * 10).reshape(3, 10)

    @partial(jax.jit, static_argnums=2)
    def run(params, tokens, remat):
        # Squared, so that nothing cancels: a sum near zero would be compared by its rounding, which differs by machine.
        def total(params):
            return jnp.sum(jnp.sin(hidden_states(config, params, tokens, remat=remat)) ** 2)

        return jax.value_and_grad(total)(params)

    value, grad = run(params, tokens, "dots")
    value_remat, grad_remat = run(params, tokens, "full")
    singles = [run(params, tokens[i : i + 1], "none") for i in range(3)]
    np.testing.assert_allclose(value, sum(single[0] for single in singles), rtol=1e-5)
    np.testing.assert_allclose(value, value_remat, rtol=1e-5)
    for whole, remat, *parts in zip(*(jax.tree.leaves(g) for g in (grad, grad_remat, *(s[1] for s in singles)))):
        np.testing.assert_allclose(whole, sum(parts), atol=2e-4, rtol=1e-4)
        np.testing.assert_allclose(whole, remat, atol=2e-4, rtol=1e-4)


def test_padding_gives_no_gradient():
    config, params = random_model("gemma3")
    row = layout([1] * 6 + [0] * 4, [1] * 6 + [0] * 4, [*range(6), 0, 0, 0, 0])

    def loss(params, tokens):
        return jnp.sum(hidden_states(config, params, tokens, row)[:, :6])

    used, unused = np.full(6, 7), np.full(4, 33)
    grad = jax.jit(jax.grad(loss))(params, np.concatenate([used, unused])[None])
    embedding = grad["model"]["embed_tokens"]["weight"]
    assert np.abs(embedding[7]).max() > 0 and np.abs(embedding[33]).max() == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grad))


@pytest.mark.parametrize("window", [None, 3])
def test_attend_against_its_definition(window):
    """Blocks of queries, grouped heads and the mask against a plain softmax over the keys each query sees."""
    rows, length, heads, kv_heads, dim = 2, attention.QUERY_BLOCK + 9, 4, 2, 8
    random = np.random.default_rng(0)
    q = random.normal(size=(rows, length, heads, dim)).astype(np.float32)
    k, v = random.normal(size=(2, rows, length, kv_heads, dim)).astype(np.float32)
    segment = np.sort(random.integers(1, 4, (rows, length)), axis=1).astype(np.int32)
    parent = np.where(segment == 3, 1, segment).astype(np.int32)
    positions = random.integers(0, 9, (rows, length)).astype(np.int32)
    mask = attention.visible(attention.RowLayout(positions, segment, parent), window)
    out = attention.attend(q, k, v, mask, scale=0.7, softcap=2.0)
    for r in range(rows):
        for i in range(0, length, 7):
            seen = [
                j
                for j in range(i + 1)
                if segment[r, j] in (segment[r, i], parent[r, i])
                and (window is None or positions[r, i] - positions[r, j] < window)
            ]
            if not seen:
                continue
            for h in range(heads):
                scores = 2.0 * np.tanh(0.7 * k[r, seen, h // 2] @ q[r, i, h] / 2.0)
                weights = np.exp(scores) / np.exp(scores).sum()
                np.testing.assert_allclose(out[r, i, h], weights @ v[r, seen, h // 2], atol=1e-5)


def test_a_cap_of_the_scores_and_a_window_change_what_is_computed():
    """So that the tests over these configs say something about them."""
    config, params = random_model("gemma3_softcaps")
    tokens = _tokens(config, 16)[None]
    logits = apply(config, params, tokens)
    everywhere = tuple(replace(kind, window=None) for kind in config.kinds)
    for other in (replace(config, attention_softcap=None), replace(config, kinds=everywhere)):
        assert np.abs(apply(other, params, tokens) - logits).max() > 0.1
    np.testing.assert_allclose(apply(other, params, tokens)[:, :5], logits[:, :5], atol=2e-5)  # within the window


def test_llama3_frequencies_keep_short_and_stretch_long_wavelengths():
    rope = Rope(500_000.0, "llama3", 8.0, 1.0, 4.0, 8192)
    scaled = attention.rope_frequencies(rope, 128)
    plain = attention.rope_frequencies(Rope(500_000.0), 128)
    turns = 8192 * plain / (2 * np.pi)
    np.testing.assert_array_equal(scaled[turns > 4], plain[turns > 4])
    np.testing.assert_allclose(scaled[turns < 1], plain[turns < 1] / 8, rtol=1e-6)
    between = (turns >= 1) & (turns <= 4)
    assert between.any() and (scaled[between] < plain[between]).all() and (scaled[between] > plain[between] / 8).all()


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_bfloat16_activations_stay_near_float32(name):
    config, params = random_model(name)
    tokens = _tokens(config, 20)[None]
    exact = hidden_states(config, params, tokens)
    rough = hidden_states(config, params, tokens, compute_dtype=jnp.bfloat16)
    assert rough.dtype == jnp.bfloat16 and exact.dtype == jnp.float32
    # bfloat16 has 8 bits; a few layers of it leave a few per cent
    error = np.linalg.norm(rough.astype(jnp.float32) - exact) / np.linalg.norm(exact)
    assert 0 < error < 0.1


@pytest.mark.parametrize("name", ["llama_biases", "gemma3"])
def test_init_params_has_the_shapes_and_a_useful_start(name):
    config, _ = random_model(name)
    init = jax.jit(partial(init_params, config))
    params = init(jax.random.key(0))
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), params)
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), param_shapes(config))
    again = init(jax.random.key(0))
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(again)))
    q_proj = params["model"]["layers"]["self_attn"]["q_proj"]["weight"]
    assert abs(float(q_proj.std()) - config.initializer_range) < 0.1 * config.initializer_range
    assert not np.array_equal(q_proj[0], q_proj[1])
    norm = params["model"]["norm"]["weight"]
    np.testing.assert_array_equal(norm, np.full_like(norm, 1.0 - config.norm_offset))


def test_tied_unembedding_is_the_embedding_without_a_copy():
    config, params = random_model("llama_llama3_tied")
    assert "lm_head" not in params
    assert unembedding(config, params) is params["model"]["embed_tokens"]["weight"]
    untied, params = random_model("llama")
    assert unembedding(untied, params) is params["lm_head"]["weight"]


def test_the_layer_graph_is_made_once_per_config():
    config, _ = random_model("llama")
    assert layer_graph(config) is layer_graph(random_model("llama")[0])
