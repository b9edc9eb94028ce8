"""Generation with the cache against plain forward passes, and the ends of answers."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_model

from ctpd_jax.errors import UserError
from ctpd_jax.models import generate as module
from ctpd_jax.models.decoder import apply
from ctpd_jax.models.generate import _choose, generate


def _greedy(config, params, prompt, count):
    """One forward pass over everything for each token, padded to one length so that it is compiled once."""
    run = jax.jit(lambda tokens: apply(config, params, tokens))
    tokens = list(prompt)
    for _ in range(count):
        padded = np.zeros((1, len(prompt) + count), np.int32)
        padded[0, : len(tokens)] = tokens
        tokens.append(int(np.argmax(run(padded)[0, len(tokens) - 1])))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("name", ["llama_biases", "gemma3_softcaps"])
def test_greedy_with_cache_is_greedy_without(name):
    """Prompts shorter and longer than Gemma's window of 5, and answers that outgrow it."""
    config, params = random_model(name)
    prompts = [[3], [5, 6, 7, 8, 9, 10, 11, 12], [4, 80, 33]]
    answers = generate(config, params, prompts, 12, stop_ids=())
    assert [len(answer) for answer in answers] == [12, 12, 12]
    for prompt, answer in zip(prompts, answers):
        assert answer == _greedy(config, params, prompt, 12)


def test_an_answer_ends_before_its_stop_token_and_the_others_go_on():
    config, params = random_model("llama_biases")
    prompts = [[3, 4], [5, 6, 7]]
    whole = generate(config, params, prompts, 10, stop_ids=())
    stop = whole[0][4]
    stopped = generate(config, params, prompts, 10, stop_ids=[stop, 10**6])
    for before, after in zip(whole, stopped):
        end = before.index(stop) if stop in before else len(before)
        assert after == before[:end]
    assert len(stopped[0]) <= 4
    assert generate(config, params, prompts, 0) == [[], []] and generate(config, params, [], 5) == []


def test_numbers_of_prompts_share_a_program_and_no_token_is_run_in_vain(monkeypatch):
    """One program for 3 and 4 prompts; a decode step only where a further token is wanted by a real prompt."""
    config, params = random_model("llama_biases")
    config = replace(config, max_positions=500)  # a config that no other test has compiled
    traced, decoded = [], []
    prefill, decode = module._prefill, module._decode

    def counting_decode(*args):
        jax.debug.callback(lambda: decoded.append(1))
        return decode(*args)

    monkeypatch.setattr(module, "_prefill", lambda *args: traced.append(1) or prefill(*args))
    monkeypatch.setattr(module, "_decode", counting_decode)

    def steps(prompts, count, stop):
        decoded.clear()
        answers = generate(config, params, prompts, count, stop_ids=[stop])
        jax.effects_barrier()
        return answers, len(decoded)

    prompts = [[3, 4], [5, 6, 7], [8], [9, 10]]
    four, taken = steps(prompts, 9, 10**6)
    assert taken == 8 and [len(answer) for answer in four] == [9] * 4
    assert steps(prompts[:3], 9, 10**6) == (four[:3], 8)
    assert len(traced) == 1
    stop = next(token for token in four[0][1:] if token not in four[0][:1])
    assert steps(prompts[:1] * 3, 9, stop) == ([four[0][: four[0].index(stop)]] * 3, four[0].index(stop))


def test_the_config_s_own_stop_tokens_are_the_default():
    config, params = random_model("llama_biases")
    whole = generate(config, params, [[3, 4]], 8, stop_ids=())[0]
    stopping = replace(config, eos_ids=(whole[3],))
    assert generate(stopping, params, [[3, 4]], 8)[0] == whole[: whole.index(whole[3])]


def test_sampling_repeats_with_its_key_and_differs_with_another():
    config, params = random_model("llama")
    first, again, other = (
        generate(config, params, [[3, 4]], 16, temperature=1.0, key=jax.random.key(seed), stop_ids=())
        for seed in (0, 0, 1)
    )
    assert first == again != other


def test_a_tiny_nucleus_is_greedy():
    config, params = random_model("llama")
    sampled = generate(config, params, [[3, 4]], 8, temperature=1.0, top_p=1e-6, key=jax.random.key(0), stop_ids=())
    assert sampled == generate(config, params, [[3, 4]], 8, stop_ids=())


def test_draws_follow_the_temperature_and_the_nucleus():
    probs = np.array([0.5, 0.3, 0.15, 0.05])
    logits = jnp.log(jnp.asarray(probs, jnp.float32))[None]
    keys = jax.random.split(jax.random.key(0), 4000)

    def shares(sampler, temperature, top_p):
        draws = jax.vmap(lambda key: _choose(sampler, logits, temperature, top_p, key)[0])(keys)
        return np.bincount(draws, minlength=4) / len(keys)

    # 4000 draws: a standard error below 0.008
    np.testing.assert_allclose(shares("sample", 1.0, 1.0), probs, atol=0.04)
    np.testing.assert_allclose(shares("sample", 0.5, 1.0), probs**2 / (probs**2).sum(), atol=0.04)
    nucleus = shares("top_p", 1.0, 0.7)
    np.testing.assert_allclose(nucleus, [0.625, 0.375, 0, 0], atol=0.04)
    assert nucleus[2:].sum() == 0


@pytest.mark.parametrize(
    "prompts, settings, words",
    [
        ([[1], []], {}, "Prompt 1 is empty"),
        ([[1] * 510], {}, "512"),
        ([[1, 97]], {}, "outside the model's vocabulary of 97"),
        ([[1]], {"temperature": 1.0}, "random key"),
        ([[1]], {"temperature": -1.0}, "temperature"),
        ([[1]], {"top_p": 0.0}, "top_p"),
    ],
)
def test_refusals(prompts, settings, words):
    config, params = random_model("llama")
    with pytest.raises(UserError, match=words):
        generate(config, params, prompts, 8, **settings)
