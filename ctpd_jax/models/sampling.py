"""Sampling with a key-value cache: the prompts under one jit, all steps of the answers under another.

Letters: B prompts, P length of the padded prompts, S slots of the cache (prompt and room for the answer), L layers,
K key-value heads, V vocabulary.

Prompts of different length are padded on the right; answer token n of every prompt goes to slot P + n, whatever its
position is, and the padding between is masked. So all shapes are static, and one slot is written at a time. Lengths and
the number of prompts are rounded up, so that calls of about the same size share one compiled program.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ctpd_jax.errors import UserError
from ctpd_jax.models import attention, decoder
from ctpd_jax.models.config import DecoderConfig
from ctpd_jax.models.decoder import Params
from ctpd_jax.models.layers import Layer
from ctpd_jax.schema import RowLayout

BUCKET = 64  # lengths that nobody rounds for us are rounded up to a multiple of it
STOP_BLOCK = 8  # steps between two looks for stop strings
Decode = Callable[[list[int]], str]


class _Program(NamedTuple):
    """What is compiled for: static."""

    config: DecoderConfig
    room: int  # answer tokens that the arrays have room for
    draw: bool  # else greedy; the passes over the vocabulary that follow are paid only where they are used
    top_k: bool
    top_p: bool
    dtype: str  # of the activations


class _Inputs(NamedTuple):
    """What does not change from step to step."""

    params: Params
    layers: Any  # the weights of the layers, stacked as in params or one by one: see `_one_by_one`
    lengths: jax.Array  # int32 [B]: the prompts', without padding
    width: jax.Array  # int32 []: P
    stops: jax.Array  # int32 [number of stop tokens]
    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    key: jax.Array


class _State(NamedTuple):
    """What a step of the loop hands to the next."""

    step: jax.Array  # int32 []: answer tokens already chosen, at least one
    cache: Any  # keys and values of the prompt and of all answer tokens but the last, [L, B, K, S, head_dim] each; or
    # one such pair for each layer, without the L, where the layers are one by one
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
    top_k: int = 0,
    stop_strings: Sequence[str] = (),
    decode: Decode | None = None,
    compute_dtype: str | None = None,
    prompt_room: int = 0,
) -> list[list[int]]:
    """Continue prompts, which may differ in length, in one batch.

    Args:
        config: the model.
        params: its parameters.
        prompts: token ids, each prompt with at least one.
        max_new_tokens: the most tokens an answer may have.
        temperature: 0 takes the likeliest token (greedy); otherwise logits are divided by it and a token is drawn.
        top_p: draw from the smallest set of likeliest tokens whose probability reaches top_p. Tokens as likely as the
            least likely one of the set belong to it too.
        key: a JAX random key, required if temperature > 0.
        stop_ids: an answer ends before the first of these; None means the config's end-of-sequence ids.
        top_k: draw from the top_k likeliest tokens, and those as likely as the last of them; 0: from all. With both,
            top_p is a share of what top_k leaves.
        stop_strings: an answer ends with the token that completes one of these in its text. Every 8 tokens the answers
            so far are decoded on the host; without stop strings the device is left alone until the end.
        decode: token ids -> text; with stop_strings, and only then.
        compute_dtype: the dtype of the activations; None: the parameters' own.
        prompt_room: the length, in tokens, that shorter prompts are padded to: calls of the same share their programs.
            0: that of the longest, rounded up.

    Returns:
        The answers' token ids, without prompt and without the stop token, but with all tokens of a stop string:
        `cut_at_stop` cuts it off the text.

    Raises:
        UserError: an empty prompt, an answer that would not fit `config.longest`, a setting out of its range.
    """
    _check_settings(config, max_new_tokens, temperature, top_k, top_p, key)
    _check_texts(config, prompts, max_new_tokens, stop_strings, decode)
    if not prompts or max_new_tokens == 0:
        return [[] for _ in prompts]
    # 1. Prompts as one array: a power of two of rows, of which those beyond the prompts are dummies.
    batch = 1 << (len(prompts) - 1).bit_length()
    lengths = np.ones(batch, np.int32)
    lengths[: len(prompts)] = [len(prompt) for prompt in prompts]
    longest = max(map(len, prompts))
    tokens = np.zeros((batch, max(prompt_room, longest) if prompt_room else _round_up(longest)), np.int32)
    for row, prompt in zip(tokens, prompts):
        row[: len(prompt)] = prompt
    # 2. What is compiled for, and what is handed in.
    dtype = str(jnp.dtype(compute_dtype or params["model"]["norm"]["weight"].dtype))
    program = _Program(config, _round_up(max_new_tokens), temperature > 0, top_k > 0, top_p < 1, dtype)
    inputs = _Inputs(
        params,
        _one_by_one(params["model"]["layers"]) if jax.default_backend() == "cpu" else params["model"]["layers"],
        jnp.asarray(lengths),
        jnp.int32(tokens.shape[1]),
        jnp.asarray(config.eos_ids if stop_ids is None else tuple(stop_ids), jnp.int32),
        jnp.float32(temperature),
        jnp.int32(top_k),
        jnp.float32(top_p),
        jax.random.key(0) if key is None else key,
    )
    # 3. The prompts, and with them the first token of every answer; then the others, in blocks of steps between which
    # the host looks for stop strings. Without any there is one block. The state stays on the device.
    state, step, looked_at = _begin(program, inputs, tokens, np.arange(batch) >= len(prompts)), 1, 0
    block = max_new_tokens if decode is None else STOP_BLOCK
    ends = np.full(batch, max_new_tokens)
    while True:
        answers, done = np.array(state.answers), np.array(state.done)  # copies: the arrays are given away below
        rows = [row[row >= 0].tolist() for row in answers]
        if decode is not None:
            for number, ids in enumerate(rows):
                end = _first_stop(ids, looked_at, stop_strings, decode)
                if end is not None:
                    ends[number], done[number] = end, True
        if step == max_new_tokens or done.all():
            return [ids[:end] for ids, end in zip(rows[: len(prompts)], ends)]
        looked_at, step = step, min(step + block, max_new_tokens)
        state = _go_on(program, inputs, state._replace(done=done), step)


def _first_stop(ids: list[int], looked_at: int, stop_strings: Sequence[str], decode: Decode) -> int | None:
    """Return how many tokens an answer has until a stop string is complete; the first `looked_at` hold none."""
    for end in range(looked_at + 1, len(ids) + 1):
        text = decode(ids[:end])
        if any(stop in text for stop in stop_strings):
            return end
    return None


def cut_at_stop(text: str, stops: Sequence[str]) -> str:
    """Return the text before the first stop string; all of it where there is none."""
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))]


# ------------------------------------------------------------------------------------------------ checks


def _check_settings(
    config: DecoderConfig, max_new_tokens: int, temperature: float, top_k: int, top_p: float, key: jax.Array | None
) -> None:
    if max_new_tokens < 0:
        raise UserError(f"max_new_tokens must not be negative, but is {max_new_tokens}.")
    if not 0 <= temperature < math.inf:
        raise UserError(f"temperature must be a number from 0 (greedy) on, but is {temperature}.")
    if not 0 <= top_k <= config.vocab_size:
        raise UserError(
            f"top_k must lie between 0 (all tokens) and the model's vocabulary of {config.vocab_size}, but is {top_k}."
        )
    if not 0 < top_p <= 1:
        raise UserError(f"top_p must lie in (0, 1], but is {top_p}.")
    if temperature > 0 and key is None:
        raise UserError("Sampling with temperature > 0 needs a random key: pass key=jax.random.key(seed).")


def _check_texts(
    config: DecoderConfig,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop_strings: Sequence[str],
    decode: Decode | None,
) -> None:
    if isinstance(stop_strings, str):
        raise UserError(f"stop_strings must be a list of strings, not the one string {stop_strings!r}.")
    if "" in stop_strings:
        raise UserError("A stop string must not be empty: every answer would end at once.")
    if stop_strings and decode is None:
        raise UserError("stop_strings are looked for in text: pass decode, a function from token ids to text, too.")
    if decode is not None and not stop_strings:
        raise UserError("decode is used for stop strings alone: pass stop_strings too, or leave decode out.")
    for number, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise UserError(f"Prompt {number} is empty: the first token needs one before it, such as BOS.")
        if len(prompt) + max_new_tokens > config.longest:
            raise UserError(
                f"Prompt {number} has {len(prompt)} tokens; with {max_new_tokens} new ones it exceeds the model's "
                f"{config.longest} positions. Shorten the prompt or lower max_new_tokens."
            )
        if min(prompt) < 0 or max(prompt) >= config.vocab_size:
            raise UserError(f"Prompt {number} has a token id outside the model's vocabulary of {config.vocab_size}.")


def _round_up(length: int) -> int:
    return -(-length // BUCKET) * BUCKET


# ------------------------------------------------------------------------------------------------ the loop


@partial(jax.jit, static_argnums=0)
def _begin(program: _Program, inputs: _Inputs, tokens: jax.Array, done: jax.Array) -> _State:
    """Run the prompts tokens [B, P] and choose the first token of every answer; a row that is `done` gets none."""
    logits, cache = _prefill(program, inputs, tokens)
    cache = jax.tree.map(lambda part: jnp.pad(part, ((0, 0),) * 3 + ((0, program.room), (0, 0))), cache)
    if isinstance(inputs.layers, tuple):
        cache = tuple(zip(*map(tuple, cache)))
    answers = jnp.full((len(tokens), program.room), -1, jnp.int32)
    return _State(jnp.int32(1), cache, *_append(program, inputs, jnp.int32(0), logits, done, answers))


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _go_on(program: _Program, inputs: _Inputs, state: _State, until: jax.Array) -> _State:
    """Choose token after token until there are `until`, at most `program.room`, or all answers are done."""

    def step(state: _State) -> _State:
        logits, cache = _decode(program, inputs, state)
        return _State(state.step + 1, cache, *_append(program, inputs, state.step, logits, state.done, state.answers))

    return jax.lax.while_loop(lambda state: (state.step < until) & ~state.done.all(), step, state)


def _append(
    program: _Program, inputs: _Inputs, step: jax.Array, logits: jax.Array, done: jax.Array, answers: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Choose answer token number `step` of every row; return the tokens, who is done now, and the answers."""
    token = _choose(program, inputs, logits, jax.random.fold_in(inputs.key, step))
    done = done | jnp.isin(token, inputs.stops)
    return token, done, answers.at[:, step].set(jnp.where(done, -1, token))


# ------------------------------------------------------------------------------------------------ the model


def _one_by_one(layers: Params) -> Any:
    """Split stacked weights into a tuple with those of each layer, which share their memory; for the CPU."""
    # There a scan copies the weights of every layer out of the stack at every step, which for one token a row takes
    # longer than to multiply by them. Arrays on several devices stay as they are.
    leaves, tree = jax.tree.flatten(layers)
    if any(isinstance(leaf, jax.Array) and len(leaf.sharding.device_set) > 1 for leaf in leaves):
        return layers
    # A NumPy view of a CPU array is no copy, nor is a device array of an aligned view.
    split = [[jax.device_put(part) for part in np.asarray(leaf)] for leaf in leaves]
    return tuple(jax.tree.unflatten(tree, parts) for parts in zip(*split))


def _prefill(program: _Program, inputs: _Inputs, tokens: jax.Array) -> tuple[jax.Array, Any]:
    """Run the prompts; return logits [B, V] after each one's last token, and keys and values [L, B, K, P, head_dim]."""
    config, params = program.config, inputs.params
    # Each prompt is a segment of its own row; its padding is segment 0.
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    segment = (positions < inputs.lengths[:, None]).astype(jnp.int32)
    seen = attention.masks(config, RowLayout(positions, segment, segment))
    attend = partial(attention.attend, scale=config.attention_scale, softcap=config.attention_softcap)

    def layer(module: Layer, x: jax.Array, cos: jax.Array, sin: jax.Array, kind: jax.Array, _: Any) -> Any:
        q, k, v = module.attention_input(x, lambda heads: attention.rotate(heads, cos, sin))
        return module.rest(x, attend(q, k, v, seen[kind])), (k.swapaxes(1, 2), v.swapaxes(1, 2))

    x, cache = _run_layers(program, params, params["model"]["layers"], tokens, positions, layer, None)
    last = x[jnp.arange(len(tokens)), inputs.lengths - 1]
    return decoder.logits_of(config, params, decoder.final_norm(config, params, last)), cache


def _decode(program: _Program, inputs: _Inputs, state: _State) -> tuple[jax.Array, Any]:
    """Take the token chosen last into the cache; return logits [B, V] for the next one, and the cache."""
    # 1. Who sees whom: one query a row, and all slots that are filled.
    config, params, lengths, width = program.config, inputs.params, inputs.lengths[:, None], inputs.width
    slot = width + state.step - 1
    position = lengths + state.step - 1
    slots = jnp.arange(jax.tree.leaves(state.cache)[0].shape[-2])[None]
    # The prompt's slots count from 0, the answer's from the prompt's own length; what lies between is padding.
    positions = jnp.where(slots < width, slots, slots - width + lengths)
    filled = ((slots < lengths) | ((slots >= width) & (slots <= slot))).astype(jnp.int32)
    one = jnp.ones_like(position)
    seen = attention.masks(config, RowLayout(position, one, one), keys=RowLayout(positions, filled, filled))

    # 2. The layers, each with its keys and values out of the cache and the new ones among them.
    def attend(q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array) -> jax.Array:
        """Attend in one row: q [1, H, head_dim], k and v [K, S, head_dim], seen [1, S]."""
        row = (q[None], k.swapaxes(0, 1)[None], v.swapaxes(0, 1)[None], seen[None])
        return attention.attend(*row, config.attention_scale, config.attention_softcap, causal=False)[0]

    write = partial(jax.lax.dynamic_update_slice_in_dim, start_index=slot, axis=-2)

    def layer(module: Layer, x: jax.Array, cos: jax.Array, sin: jax.Array, kind: jax.Array, cache: Any) -> Any:
        q, k, v = module.attention_input(x, lambda heads: attention.rotate(heads, cos, sin))
        new = (k.swapaxes(1, 2), v.swapaxes(1, 2))
        keys, values = map(write, cache, new)
        # With one query each, the rows together are faster than one after the other, as `attention.attend` takes them.
        return module.rest(x, jax.vmap(attend)(q, keys, values, seen[kind])), new

    x, new = _run_layers(program, params, inputs.layers, state.token[:, None], position, layer, state.cache)
    # 3. Only the new slot is written back: the cache itself is changed in place, not copied.
    cache = jax.tree.map(write, state.cache, new)
    return decoder.logits_of(config, params, decoder.final_norm(config, params, x[:, 0])), cache


def _run_layers(
    program: _Program, params: Params, layers: Any, tokens: jax.Array, positions: jax.Array, layer: Any, cache: Any
) -> tuple[jax.Array, Any]:
    """Take tokens [B, T] through the layers; return the residual stream, and what each layer gave besides."""
    config = program.config
    graph, _ = decoder.layer_graph(config)
    cos, sin = decoder.rope_tables(config, positions)

    def body(x: jax.Array, own: Any) -> Any:
        weights, kind, own_cache = own
        return layer(nnx.merge(graph, weights), x, cos[kind], sin[kind], kind, own_cache)

    x = decoder.embed(config, params, tokens, jnp.dtype(program.dtype))
    # One program for all layers where they are alike, or each in turn where their caches differ in length.
    if not isinstance(layers, tuple):
        return jax.lax.scan(body, x, (layers, np.asarray(config.layer_kinds, np.int32), cache))
    given = []
    for own in zip(layers, config.layer_kinds, cache, strict=True):
        x, besides = body(x, own)
        given.append(besides)
    return x, tuple(given)


# ------------------------------------------------------------------------------------------------ the next token


def _choose(program: _Program, inputs: _Inputs, logits: jax.Array, key: jax.Array) -> jax.Array:
    """Return the next token of each answer, int32 [B], from float32 logits [B, V]."""
    if not program.draw:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / inputs.temperature
    # Each filter finds the least logit that it lets through; the second sees what the first one left.
    if program.top_k:
        least = least_kept(logits, jnp.ones_like(logits, jnp.int32), inputs.top_k)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if program.top_p:
        least = least_kept(logits, jax.nn.softmax(logits, axis=-1), inputs.top_p)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)


def least_kept(values: jax.Array, weights: jax.Array, target: jax.Array) -> jax.Array:
    """Return the largest number, float32 [B, 1], such that the weights of the values that reach it sum to `target`."""
    # Found bit by bit, in 32 passes over values [B, V]: dozens of times as fast as to sort them.
    # As integers, floats keep their order once those below zero are turned around.
    order = jax.lax.bitcast_convert_type(values, jnp.int32)
    order = jnp.where(order < 0, order ^ 0x7FFFFFFF, order)

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low | high) - ((low ^ high) >> 1)  # rounded up, without overflow
        enough = jnp.where(order >= middle, weights, 0).sum(axis=-1, keepdims=True) >= target
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle - 1)

    low, high = order.min(axis=-1, keepdims=True), order.max(axis=-1, keepdims=True)
    least, _ = jax.lax.fori_loop(0, 32, halve, (low, high))
    return jax.lax.bitcast_convert_type(jnp.where(least < 0, least ^ 0x7FFFFFFF, least), jnp.float32)
