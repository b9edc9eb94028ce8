"""The compiled programs of the real pair hold no logits, only one block of them at a time.

Nothing is loaded: the programs are compiled for the shapes of Gemma 3 270M and SmolLM2 135M.
"""

import re
from functools import partial
from math import prod

import jax
import jax.numpy as jnp
import pytest
from helpers.recipes import recipe_of

from ctpd_jax.annotate.scorer import make_scorer
from ctpd_jax.core import logprobs
from ctpd_jax.models.compute import Compute
from ctpd_jax.models.config import DecoderConfig
from ctpd_jax.models.decoder import param_shapes
from ctpd_jax.models.hf.config import from_hf
from ctpd_jax.schema import Batch, RowLayout
from ctpd_jax.settings import preference
from ctpd_jax.train.loop import init_state
from ctpd_jax.train.sums import Objective, preference_sums

SMOLLM2 = {
    "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0, "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GEMMA3 = {
    "model_type": "gemma3_text", "vocab_size": 262144, "hidden_size": 640, "intermediate_size": 2048,
    "num_hidden_layers": 18, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256,
    "query_pre_attn_scalar": 256, "sliding_window": 512, "max_position_embeddings": 32768,
    "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3, "tie_word_embeddings": True,
    "bos_token_id": 2, "eos_token_id": 1,
}  # fmt: skip
LENGTH, SCORED = 608, 512


def abstract_batch() -> Batch:
    row, slot = jax.ShapeDtypeStruct((1, LENGTH), jnp.int32), jax.ShapeDtypeStruct((1, SCORED), jnp.int32)
    pair = jax.ShapeDtypeStruct((1, 2), jnp.float32)
    weight, real = jax.ShapeDtypeStruct((1, SCORED), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.float32)
    return Batch(row, RowLayout(row, row, row), slot, slot, slot, slot, weight, pair, pair, pair, real)


def forbidden(text: str, config: DecoderConfig) -> set[tuple[int, ...]]:
    """Array shapes of a compiled program in which more logits could be alive than one block has."""
    vocabulary, width = config.vocab_size, config.hidden_size
    groups = logprobs.number_of_groups(SCORED, vocabulary, None)
    shapes = {tuple(map(int, dims.split(","))) for dims in re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", text)}
    found = set()
    for shape in shapes:
        of_vocabulary = (
            vocabulary in shape or vocabulary // groups in shape or {vocabulary // groups, groups} <= {*shape}
        )
        # The unembedding or its gradient: whole, one group of its rows, or one number an entry.
        is_embedding = prod(shape) in (vocabulary * width, vocabulary // groups * width, vocabulary)
        if of_vocabulary and not is_embedding and 4 * prod(shape) > logprobs.BLOCK_BYTES:
            found.add(shape)
    return found


@pytest.mark.parametrize("raw", [SMOLLM2, GEMMA3], ids=["smollm2", "gemma3"])
def test_no_logits_in_the_compiled_step(raw):
    config = from_hf(raw)
    params = param_shapes(config)
    loss = partial(preference_sums, config, Objective(0.1), Compute())
    recipe = recipe_of(loss, params, preference(1e-5, 0.1), 60)
    accumulate, update = recipe.programs()
    state = jax.eval_shape(lambda p: init_state(p, recipe.optimizer), params)
    programs = {
        "accumulate": accumulate.lower(params, {}, params, abstract_batch()),
        "update": update.lower(state, params, jax.ShapeDtypeStruct((), jnp.float32)),
        "score": make_scorer(config, Compute()).lower(
            {}, params, abstract_batch(), jax.ShapeDtypeStruct((1, SCORED), jnp.int32)
        ),
    }
    for name, lowered in programs.items():
        text = lowered.compile().as_text()
        assert f"[{config.vocab_size},{config.hidden_size}]" in text, name  # the check sees the vocabulary at all
        assert not forbidden(text, config), name


def test_the_check_sees_logits_where_there_are_some():
    config = from_hf(SMOLLM2 | {"num_hidden_layers": 1})

    def naive(hidden, unembedding, targets):
        return jnp.take_along_axis(jax.nn.log_softmax(hidden @ unembedding.T), targets[:, None], 1).sum()

    hidden = jax.ShapeDtypeStruct((SCORED, config.hidden_size), jnp.float32)
    unembedding = jax.ShapeDtypeStruct((config.vocab_size, config.hidden_size), jnp.float32)
    targets = jax.ShapeDtypeStruct((SCORED,), jnp.int32)
    text = jax.jit(jax.grad(naive)).lower(hidden, unembedding, targets).compile().as_text()
    assert forbidden(text, config)
