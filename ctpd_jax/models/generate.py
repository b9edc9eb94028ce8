"""Sampling with a key-value cache, the whole loop under one jit.

Letters: B prompts, P length of the padded prompts, S slots of the cache (prompt and room for the answer), L layers,
K key-value heads, V vocabulary.

Prompts of different length are padded on the right; answer token n of every prompt goes to slot P + n, whatever its
position is, and the padding between is masked. So all shapes are static, and one slot is written at a time. Lengths and
the number of prompts are rounded up, so that calls of about the same size share one compiled program.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ctpd_jax.errors import UserError
from ctpd_jax.models import decoder
from ctpd_jax.models.config import DecoderConfig
from ctpd_jax.models.decoder import Params
from ctpd_jax.schema import RowLayout

BUCKET = 64  # lengths are rounded up to a multiple of it


class _State(NamedTuple):
    """What a step of the loop hands to the next."""

    step: jax.Array  # int32 []: answer tokens already chosen, at least one
    keys: jax.Array  # [L, B, S, K, head_dim]: the prompt's and those of all answer tokens but the last
    values: jax.Array
    token: jax.Array  # int32 [B]: the answer token chosen last
    done: jax.Array  # bool [B]
    answers: jax.Array  # int32 [B, S - P]; -1 where nothing was written


def generate(
    config: DecoderConfig,
    params: Params,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    key: jax.Array | None = None,
    stop_ids: Sequence[int] | None = None,
) -> list[list[int]]:
    """Continue prompts, which may differ in length, in one batch.

    Args:
        config: the model.
        params: its parameters; activations have their dtype.
        prompts: token ids, each prompt with at least one.
        max_new_tokens: the most tokens an answer may have.
        temperature: 0 takes the likeliest token (greedy); otherwise logits are divided by it and a token is drawn.
        top_p: draw from the smallest set of likeliest tokens whose probability reaches top_p.
        key: a JAX random key, required if temperature > 0.
        stop_ids: an answer ends before the first of these; None means the config's end-of-sequence ids.

    Returns:
        The answers' token ids, without prompt and without the stop token.

    Raises:
        UserError: an empty prompt, an answer that would not fit `config.max_positions`, a setting out of its range.
    """
    _check(config, prompts, max_new_tokens, temperature, top_p, key)
    if not prompts or max_new_tokens == 0:
        return [[] for _ in prompts]
    batch = 1 << (len(prompts) - 1).bit_length()  # the next power of two: the rows beyond the prompts are dummies
    lengths = np.ones(batch, np.int32)
    lengths[: len(prompts)] = [len(prompt) for prompt in prompts]
    tokens = np.zeros((batch, _round_up(int(lengths.max()))), np.int32)
    for row, prompt in zip(tokens, prompts):
        row[: len(prompt)] = prompt
    stops = np.array(config.eos_ids if stop_ids is None else tuple(stop_ids), np.int32)
    answers = np.asarray(
        _generate(
            config,
            _round_up(max_new_tokens),
            _sampler(temperature, top_p),
            params,
            tokens,
            lengths,
            np.arange(batch) >= len(prompts),
            max_new_tokens,
            stops,
            temperature,
            top_p,
            jax.random.key(0) if key is None else key,
        )
    )
    return [row[row >= 0].tolist() for row in answers[: len(prompts)]]


def _check(
    config: DecoderConfig,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    key: jax.Array | None,
) -> None:
    if max_new_tokens < 0:
        raise UserError(f"max_new_tokens must not be negative, but is {max_new_tokens}.")
    if temperature < 0:
        raise UserError(f"temperature must not be negative, but is {temperature}; 0 is greedy.")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p must lie in (0, 1], but is {top_p}.")
    if temperature > 0 and key is None:
        raise UserError("Sampling with temperature > 0 needs a random key: pass key=jax.random.key(seed).")
    for number, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise UserError(f"Prompt {number} is empty: the first token needs one before it, such as BOS.")
        if len(prompt) + max_new_tokens > config.max_positions:
            raise UserError(
                f"Prompt {number} has {len(prompt)} tokens; with {max_new_tokens} new ones it exceeds the model's "
                f"{config.max_positions} positions. Shorten the prompt or lower max_new_tokens."
            )
        if min(prompt) < 0 or max(prompt) >= config.vocab_size:
            raise UserError(f"Prompt {number} has a token id outside the model's vocabulary of {config.vocab_size}.")


def _round_up(length: int) -> int:
    return -(-length // BUCKET) * BUCKET


def _sampler(temperature: float, top_p: float) -> str:
    """Which program to compile: the sort over the vocabulary that top_p needs is paid only where it is used."""
    return "greedy" if temperature == 0 else "sample" if top_p == 1 else "top_p"


@partial(jax.jit, static_argnums=(0, 1, 2))
def _generate(
    config: DecoderConfig,
    room: int,
    sampler: str,
    params: Params,
    tokens: jax.Array,
    lengths: jax.Array,
    done: jax.Array,
    limit: jax.Array,
    stops: jax.Array,
    temperature: jax.Array,
    top_p: jax.Array,
    key: jax.Array,
) -> jax.Array:
    """int32 [B, room]: the answers, -1 after their end.

    `room` is the static size of an answer, `limit` in 1..room the most tokens; a row that is `done` gets no answer.
    """
    batch, width = tokens.shape
    logits, keys, values = _prefill(config, params, tokens, lengths)

    def choose(
        step: jax.Array, logits: jax.Array, done: jax.Array, answers: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        token = _choose(sampler, logits, temperature, top_p, jax.random.fold_in(key, step))
        done = done | jnp.isin(token, stops)
        return token, done, answers.at[:, step].set(jnp.where(done, -1, token))

    def step(state: _State) -> _State:
        logits, keys, values = _decode(config, params, lengths, width, state)
        return _State(state.step + 1, keys, values, *choose(state.step, logits, state.done, state.answers))

    answers = jnp.full((batch, room), -1, jnp.int32)
    pad = ((0, 0), (0, 0), (0, room), (0, 0), (0, 0))
    state = _State(jnp.int32(1), jnp.pad(keys, pad), jnp.pad(values, pad), *choose(jnp.int32(0), logits, done, answers))
    return jax.lax.while_loop(lambda state: (state.step < limit) & ~state.done.all(), step, state).answers


def _prefill(
    config: DecoderConfig, params: Params, tokens: jax.Array, lengths: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Run the prompts: logits [B, V] after each prompt's last token, and the keys and values of all layers."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    segment = (positions < lengths[:, None]).astype(jnp.int32)
    seen = decoder.masks(config, RowLayout(positions, segment, segment))

    def layer(module: decoder.Layer, x: jax.Array, cos: jax.Array, sin: jax.Array, kind: jax.Array, _: Any) -> Any:
        q, k, v = module.attention_input(x, cos, sin)
        return module.rest(x, q, k, v, seen[kind], causal=True), (k, v)

    x, (keys, values) = _run_layers(config, params, tokens, positions, layer, None)
    last = x[jnp.arange(len(tokens)), lengths - 1]
    return decoder.logits_of(config, params, decoder.final_norm(config, params, last)), keys, values


def _decode(
    config: DecoderConfig, params: Params, lengths: jax.Array, width: int, state: _State
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The token chosen last enters the cache: logits [B, V] for the next one, and the keys and values with it."""
    slot = width + state.step - 1
    position = (lengths + state.step - 1)[:, None]
    slots = jnp.arange(state.keys.shape[2])[None]
    # The prompt's slots count from 0, the answer's from the prompt's own length; what lies between is padding.
    positions = jnp.where(slots < width, slots, slots - width + lengths[:, None])
    filled = ((slots < lengths[:, None]) | ((slots >= width) & (slots <= slot))).astype(jnp.int32)
    one = jnp.ones_like(position)
    seen = decoder.masks(config, RowLayout(position, one, one), keys=RowLayout(positions, filled, filled))

    def layer(module: decoder.Layer, x: jax.Array, cos: jax.Array, sin: jax.Array, kind: jax.Array, cache: Any) -> Any:
        q, k, v = module.attention_input(x, cos, sin)
        keys, values = (jax.lax.dynamic_update_slice_in_dim(old, new, slot, 1) for old, new in zip(cache, (k, v)))
        return module.rest(x, q, keys, values, seen[kind], causal=False), (k, v)

    x, (k, v) = _run_layers(config, params, state.token[:, None], position, layer, (state.keys, state.values))
    # Only the new slot is written back: the cache itself is changed in place, not copied.
    keys = jax.lax.dynamic_update_slice_in_dim(state.keys, k, slot, 2)
    values = jax.lax.dynamic_update_slice_in_dim(state.values, v, slot, 2)
    return decoder.logits_of(config, params, decoder.final_norm(config, params, x[:, 0])), keys, values


def _run_layers(
    config: DecoderConfig, params: Params, tokens: jax.Array, positions: jax.Array, layer: Any, cache: Any
) -> tuple[jax.Array, Any]:
    """Embed tokens [B, T] and scan `layer` over the layers: the residual stream, and what each layer gave besides."""
    graph, _ = decoder.layer_graph(config)
    cos, sin = decoder.rope_tables(config, positions)

    def body(x: jax.Array, scanned: Any) -> Any:
        weights, kind, own_cache = scanned
        return layer(nnx.merge(graph, weights), x, cos[kind], sin[kind], kind, own_cache)

    x = decoder.embed(config, params, tokens, params["model"]["norm"]["weight"].dtype)
    kinds = np.asarray(config.layer_kinds, np.int32)
    return jax.lax.scan(body, x, (params["model"]["layers"], kinds, cache))


def _choose(sampler: str, logits: jax.Array, temperature: jax.Array, top_p: jax.Array, key: jax.Array) -> jax.Array:
    """int32 [B]: the next token of each answer, from float32 logits [B, V]."""
    if sampler == "greedy":
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / temperature
    if sampler == "top_p":
        ranked = jnp.sort(logits, axis=-1, descending=True)
        probs = jax.nn.softmax(ranked, axis=-1)
        # A token stays if those before it do not reach top_p; the first always does.
        kept = (jnp.cumsum(probs, axis=-1) - probs < top_p).sum(axis=-1, keepdims=True)
        logits = jnp.where(logits < jnp.take_along_axis(ranked, kept - 1, axis=-1), -jnp.inf, logits)
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)
