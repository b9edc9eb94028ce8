"""Generation with the cache against plain forward passes, draws against exact probabilities, the ends of answers."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.tiny import random_model

from ctpd_jax.errors import UserError
from ctpd_jax.models import sampling as module
from ctpd_jax.models.decoder import apply, hidden_states
from ctpd_jax.models.sampling import cut_at_stop, generate
from ctpd_jax.schema import RowLayout

PROMPTS = [[3], [5, 6, 7, 8, 9, 10, 11, 12], [4, 80, 33]]


def _greedy(config, params, prompts, count):
    """All prompts as segments of one row, run anew for every token; so it is compiled once."""
    places = np.cumsum([0] + [len(prompt) + count for prompt in prompts])
    tokens, segment, positions = np.zeros((3, 1, places[-1]), np.int32)
    for number, (start, end, prompt) in enumerate(zip(places, places[1:], prompts)):
        tokens[0, start : start + len(prompt)] = prompt
        segment[0, start:end] = number + 1
        positions[0, start:end] = np.arange(end - start)
    run = jax.jit(lambda tokens: apply(config, params, tokens, RowLayout(positions, segment, segment)).argmax(-1))
    for step in range(count):
        likeliest = np.asarray(run(tokens))[0]
        for start, prompt in zip(places, prompts):
            tokens[0, start + len(prompt) + step] = likeliest[start + len(prompt) + step - 1]
    return [tokens[0, end - count : end].tolist() for end in places[1:]]


FEATURES = ("smollm3_windows", "gemma3_softcaps", "phi3_longrope", "gpt_neox", "mixtral")


@pytest.mark.parametrize("name", FEATURES)
def test_greedy_with_cache_is_greedy_without(name):
    """Prompts shorter and longer than the windows of 5, and answers that outgrow them."""
    config, params = random_model(name)
    assert generate(config, params, PROMPTS, 12, stop_ids=()) == _greedy(config, params, PROMPTS, 12)


def test_layers_in_a_stack_answer_as_layers_one_by_one(monkeypatch):
    """The way of the accelerators, which the CPU does not go by itself."""
    config, params = random_model("smollm3_windows")
    config = replace(config, max_positions=501)  # a config that no other test has compiled
    attend, traced = module.attention.attend, []
    monkeypatch.setattr(module.attention, "attend", lambda *args, **more: traced.append(1) or attend(*args, **more))
    answers = generate(config, params, PROMPTS, 12, stop_ids=())
    one_by_one = len(traced)
    monkeypatch.setattr(jax, "default_backend", lambda: "some accelerator")
    assert generate(config, params, PROMPTS, 12, stop_ids=()) == answers
    assert one_by_one < len(traced) < 2 * one_by_one  # a layer of a stack is traced once for all


def test_layers_one_by_one_share_the_memory_of_the_stack():
    """Looked at in the middle of an answer, when it is shown to `decode`."""
    config, params = random_model("llama_biases")
    stack = params["model"]["layers"]["mlp"]["down_proj"]["weight"]  # 6144 bytes a layer: no part is out of line
    size, places = stack.nbytes // len(stack), set()

    def look(_):
        layers = [array for array in jax.live_arrays() if array.shape == stack.shape[1:]]
        places.update(layer.unsafe_buffer_pointer() - stack.unsafe_buffer_pointer() for layer in layers)
        return ""

    generate(config, params, PROMPTS, 2, stop_ids=(), stop_strings=["never"], decode=look)
    assert {number * size for number in range(len(stack))} <= places


def test_an_answer_does_not_depend_on_what_else_is_asked():
    config, params = random_model("smollm3_windows")
    long = list(range(2, 72))  # for it the others are padded to 128
    together = generate(config, params, [*PROMPTS, long], 12, stop_ids=())
    assert generate(config, params, PROMPTS, 12, stop_ids=()) == together[:3]
    assert generate(config, params, [PROMPTS[2]], 12, stop_ids=())[0] == together[2]
    assert generate(config, params, PROMPTS, 12, stop_ids=(), prompt_room=17) == together[:3]


def test_an_answer_ends_before_its_stop_token_and_the_others_go_on():
    config, params = random_model("smollm3_windows")
    whole = generate(config, params, PROMPTS, 10, stop_ids=())
    stop = whole[0][4]
    stopped = generate(config, params, PROMPTS, 10, stop_ids=[stop, 10**6])
    for before, after in zip(whole, stopped):
        end = before.index(stop) if stop in before else len(before)
        assert after == before[:end]
    assert len(stopped[0]) <= 4
    assert generate(config, params, PROMPTS, 0) == [[], [], []] and generate(config, params, [], 5) == []


@pytest.fixture
def passes(monkeypatch):
    """(one entry for each pass that is traced, one for each that runs): of the prompts, and of one token each after."""
    logits_of, traced, ran = module.decoder.logits_of, [], []

    def spy(*args):
        traced.append(1)
        jax.debug.callback(lambda: ran.append(1))
        return logits_of(*args)

    monkeypatch.setattr(module.decoder, "logits_of", spy)
    return traced, ran


def test_numbers_of_prompts_share_a_program_and_no_token_is_run_in_vain(passes):
    """One program for 3 and 4 prompts; a decode step only where a further token is wanted by a real prompt."""
    config, params = random_model("llama_biases")
    config = replace(config, max_positions=500)  # a config that no other test has compiled
    traced, ran = passes

    def steps(prompts, count, stop):
        ran.clear()
        answers = generate(config, params, prompts, count, stop_ids=[stop])
        jax.effects_barrier()
        return answers, len(ran) - 1

    prompts = [[3, 4], [5, 6, 7], [8], [9, 10]]
    four, taken = steps(prompts, 9, 10**6)
    programs = len(traced)
    assert programs and taken == 8 and [len(answer) for answer in four] == [9] * 4
    assert steps(prompts[:3], 9, 10**6) == (four[:3], 8)
    stop = next(token for token in four[0][1:] if token not in four[0][:1])
    assert steps(prompts[:1] * 3, 9, stop) == ([four[0][: four[0].index(stop)]] * 3, four[0].index(stop))
    assert len(traced) == programs


def test_the_config_s_own_stop_tokens_are_the_default():
    config, params = random_model("smollm3_windows")
    whole = generate(config, params, PROMPTS, 8, stop_ids=())[0]
    stopping = replace(config, eos_ids=(whole[3],))
    assert generate(stopping, params, PROMPTS, 8)[0] == whole[: whole.index(whole[3])]


# ------------------------------------------------------------------------------------------------ stop strings


def _spell(ids):
    """Every token with its number in the answer: each stands in one place alone."""
    return "".join(f"{number}:{token};" for number, token in enumerate(ids, 1))


@pytest.mark.parametrize("place", [1, 2, 16, 17, 18, 33, 40])
def test_an_answer_ends_with_the_token_that_completes_a_stop_string(place):
    """Wherever it stands: first or last, before, at and after the border of a block; the draws stay what they were."""
    config, params = random_model("llama")
    drawn = {"temperature": 1.0, "key": jax.random.key(5), "stop_ids": ()}
    whole = generate(config, params, PROMPTS, 40, **drawn)
    assert whole[0] != whole[1] != whole[2]
    stop = f"{place}:{whole[1][place - 1]}"
    assert [_spell(answer).find(stop) >= 0 for answer in whole] == [False, True, False]
    stopped = generate(config, params, PROMPTS, 40, stop_strings=["not there", stop], decode=_spell, **drawn)
    assert stopped == [whole[0], whole[1][:place], whole[2]]


def test_a_stop_string_may_span_tokens_and_blocks_end_when_all_answers_have(passes):
    config, params = random_model("smollm3_windows")
    config = replace(config, max_positions=502)  # a config that no other test has compiled
    whole = generate(config, params, PROMPTS, 60, stop_ids=())
    jax.effects_barrier()
    _, ran = passes
    ran.clear()
    # From the middle of token 17, over 18, to the colon of 19; the answers draw their own tokens.
    texts = [_spell(answer) for answer in whole]
    stops = [text[text.index("17:") + 1 : text.index("19:") + 3] for text in texts]
    answers = generate(config, params, PROMPTS, 60, stop_ids=(), stop_strings=stops, decode=_spell)
    assert answers == [answer[:19] for answer in whole]
    jax.effects_barrier()
    assert len(ran) == 25  # the blocks end with tokens 9, 17, 25, 33 ...
    for stop, text, answer in zip(stops, texts, answers):
        assert cut_at_stop(_spell(answer), [stop]) == text[: text.index("17:") + 1]


def test_a_stop_token_counts_beside_stop_strings():
    config, params = random_model("smollm3_windows")
    whole = generate(config, params, PROMPTS, 10, stop_ids=())[0]
    end = whole.index(whole[6])
    for place in (end - 1, end + 3):  # the string first, the token first
        stop = {"stop_strings": [f"{place}:{whole[place - 1]};"], "decode": _spell}
        answer = generate(config, params, PROMPTS, 10, stop_ids=[whole[6]], **stop)[0]
        assert answer == whole[: min(place, end)]


def test_text_is_cut_at_the_first_stop_string_of_any():
    assert cut_at_stop("one two three two", ["three", "two", "four"]) == "one "
    assert cut_at_stop("one", ["two"]) == "one" == cut_at_stop("one", [])
    assert cut_at_stop("one", ["one"]) == ""


# ------------------------------------------------------------------------------------------------ draws


def test_sampling_repeats_with_its_key_and_differs_with_another():
    config, params = random_model("llama")
    first, again, other = (
        generate(config, params, PROMPTS, 16, temperature=1.0, key=jax.random.key(seed), stop_ids=())
        for seed in (0, 0, 1)
    )
    assert first == again != other


def test_a_choice_of_one_is_greedy():
    config, params = random_model("smollm3_windows")
    for narrow in ({"top_p": 1e-6, "top_k": 9}, {"top_p": 0.999, "top_k": 1}):
        sampled = generate(config, params, PROMPTS, 8, temperature=1.0, key=jax.random.key(0), stop_ids=(), **narrow)
        assert sampled == generate(config, params, PROMPTS, 8, stop_ids=())


def _exact(logits, temperature, top_k, top_p):
    """The probabilities of the tokens, by sorting."""
    scaled = np.asarray(logits, np.float64) / temperature
    order = np.argsort(-scaled, kind="stable")[: top_k or None]
    probs = np.exp(scaled[order] - scaled[order].max())
    probs /= probs.sum()
    kept = np.cumsum(probs) - probs < top_p
    out = np.zeros_like(scaled)
    out[order[kept]] = probs[kept] / probs[kept].sum()
    return out


def _deviation(counts, probs):
    """Chi-square of the counts, in standard deviations from its mean; infinite if what cannot be was drawn."""
    if counts[probs == 0].any():
        return np.inf
    expected, degrees = counts.sum() * probs[probs > 0], (probs > 0).sum() - 1
    return (((counts[probs > 0] - expected) ** 2 / expected).sum() - degrees) / np.sqrt(2 * degrees)


SETTINGS = [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.0, 5, 1.0), (1.0, 0, 0.8), (1.3, 6, 0.8), (0.8, 3, 0.95)]


@pytest.mark.parametrize("temperature, top_k, top_p", SETTINGS)
def test_draws_follow_the_exact_probabilities(temperature, top_k, top_p):
    """And they do not fit any other of the settings. All tokens have one embedding, so that all draws are alike."""
    config, params = random_model("llama")
    embedding = params["model"]["embed_tokens"]["weight"]
    params["model"]["embed_tokens"]["weight"] = jnp.tile(embedding[3], (len(embedding), 1))
    hidden = np.asarray(hidden_states(config, params, np.array([[3, 4]])))[0, -1]
    logits = np.float32(np.random.default_rng(2).normal(size=97, scale=2.0))
    params["lm_head"]["weight"] = jnp.asarray(np.outer(logits, hidden / (hidden @ hidden)))
    np.testing.assert_allclose(apply(config, params, np.array([[8, 7, 6]]))[0, 2], logits, atol=1e-5)
    drawn = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "key": jax.random.key(1), "stop_ids": ()}
    answers = np.array(generate(config, params, [[3]] * 64, 64, **drawn))
    counts = np.bincount(answers.flat, minlength=97)
    for other in SETTINGS:
        deviation = _deviation(counts, _exact(logits, *other))
        assert (deviation < 4) == (other == (temperature, top_k, top_p)), (other, deviation)


def test_what_is_kept_is_what_sorting_keeps():
    """The search bit by bit, over values of both signs, far apart and equal."""
    random = np.random.default_rng(0)
    values = np.float32(random.normal(size=(200, 31)) * 10.0 ** random.integers(-6, 7, (200, 31)))
    values[::2, :20] = np.round(values[::2, :20])
    values[::3, 5:10] = -np.inf
    weights = np.float32(random.uniform(size=values.shape))
    targets = np.float32(random.uniform(0.1, 15, size=200))
    found = np.asarray(jax.jit(module.least_kept)(values, weights, targets[:, None]))[:, 0]
    for row, own, target, least in zip(values, weights, targets, found):
        enough = [value for value in row if own[row >= value].sum() >= target]
        assert least == max(enough, default=row.min())


@pytest.mark.parametrize(
    "prompts, settings, words",
    [
        ([[1], []], {}, "Prompt 1 is empty"),
        ([[1] * 510], {}, "512"),
        ([[1, 97]], {}, "outside the model's vocabulary of 97"),
        ([[1]], {"temperature": 1.0}, "random key"),
        ([[1]], {"temperature": -1.0}, "temperature"),
        ([[1]], {"temperature": float("nan")}, "temperature"),
        ([[1]], {"top_p": 0.0}, "top_p"),
        ([[1]], {"top_p": 1.1}, "top_p"),
        ([[1]], {"top_k": -1}, "top_k"),
        ([[1]], {"top_k": 98}, "vocabulary of 97"),
        ([[1]], {"stop_strings": ["x"]}, "pass decode"),
        ([[1]], {"decode": str}, "pass stop_strings"),
        ([[1]], {"decode": str, "stop_strings": "x"}, "not the one string 'x'"),
        ([[1]], {"decode": str, "stop_strings": ["x", ""]}, "must not be empty"),
    ],
)
def test_refusals(prompts, settings, words):
    config, params = random_model("llama")
    with pytest.raises(UserError, match=words):
        generate(config, params, prompts, 8, **settings)


def test_products_are_of_the_dtype_that_is_asked_for(monkeypatch):
    """Whatever the parameters were loaded as: float32 ones in bfloat16, bfloat16 ones in float32."""
    config, params = random_model("llama_biases")
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    seen, attend = [], module.attention.attend

    def spy(q, *rest, **more):
        seen.append(q.dtype)
        return attend(q, *rest, **more)

    monkeypatch.setattr(module.attention, "attend", spy)
    for given, dtype in ((params, "bfloat16"), (half, "float32"), (half, None)):
        seen.clear()
        other = replace(config, max_positions=400 + len(str(dtype)))  # compiled by no other test
        generate(other, given, [[3, 4]], 2, compute_dtype=dtype)
        assert set(seen) == {jnp.dtype(dtype or "bfloat16")}
