"""The steps: the same numbers for every layout and every split, the identity inside the model, no [B, T, V]."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.recipes import recipe_of
from toy.models import student_config, teacher_config

from ctpd_jax.core.losses import ctpd_loss
from ctpd_jax.core.projection import span_sums
from ctpd_jax.data.loader import micro_batches, plan_shapes
from ctpd_jax.data.packing import PackingConfig
from ctpd_jax.data.rows import LAYOUTS, BatchShape, PairItem, ScoredResponse, build_batch
from ctpd_jax.models.compute import Compute
from ctpd_jax.models.decoder import apply, init_params, param_shapes
from ctpd_jax.models.hf.config import from_hf
from ctpd_jax.settings import preference
from ctpd_jax.train.loop import init_state
from ctpd_jax.train.optimizer import decay_mask, learning_rate
from ctpd_jax.train.sums import Objective, mean_of, preference_sums, sft_sums

VOCABULARY = 512
IDS = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


LLAMA = from_hf(student_config() | IDS)
GEMMA = from_hf(teacher_config() | IDS | {"sliding_window": 5})  # shorter than most responses
MODELS = {"plain": LLAMA, "window": GEMMA, "window_and_caps": replace(GEMMA, attention_softcap=0.5, final_softcap=2.0)}


sums_of = jax.jit(preference_sums, static_argnums=(0, 1, 2))


def start(config):
    """Larger than fresh weights, so that the caps bend what they cap."""
    return jax.tree.map(lambda leaf: 2 * leaf, init_params(config, jax.random.key(0)))


def random_items(count: int, seed: int = 0, beyond: bool = False) -> list[PairItem]:
    """`beyond`: with targets of spans, a label and a weight, as some objectives have."""
    rng = np.random.default_rng(seed)

    def response() -> ScoredResponse:
        n = int(rng.integers(3, 20))
        ids, weights = rng.integers(3, VOCABULARY, n).astype(np.int32), rng.uniform(0.5, 2, n).astype(np.float32)
        both = ids, weights, float(rng.normal(-80, 5)), float(rng.normal(-80, 5)), 0.0
        if not beyond:
            return ScoredResponse(*both)
        spans = np.unique(np.sort(rng.integers(0, n, n)), return_inverse=True)[1].astype(np.int32)
        return ScoredResponse(*both, spans, rng.normal(-8, 3, spans.max() + 1).astype(np.float32))

    prompts = [rng.integers(3, VOCABULARY, int(rng.integers(2, 12))).astype(np.int32) for _ in range(count)]
    own = (0.7, 1.5) if beyond else ()
    return [PairItem(prompt, response(), response(), *own) for prompt in prompts]


def relative(a, b) -> float:
    """The largest difference, relative to the largest entry."""
    return float(jnp.max(jnp.abs(a - b)) / jnp.maximum(jnp.max(jnp.abs(b)), 1e-12))


@cache
def update(config, layout, micro=4, remat="dots", beyond=False):
    """The gradient and the metrics of one update of 4 pairs."""
    items, params = random_items(4, beyond=beyond), start(config)
    objective = Objective(0.1, label_smoothing=0.1, sft_weight=0.3, regression=0.5 if beyond else 0.0)
    sums_in = partial(preference_sums, config, objective, Compute(remat=remat))
    accumulate, _ = recipe_of(sums_in, param_shapes(config), preference(1e-3, 0.1), 10).programs()
    gradient, sums = jax.tree.map(jnp.zeros_like, params), {}
    rows = PackingConfig(layout, buckets=1, multiple=8)
    for batch, _ in micro_batches(items, micro, rows, plan_shapes(items, [range(4)], micro, rows)):
        gradient, new = accumulate(params, {}, gradient, batch)
        sums = {name: value + sums.get(name, 0.0) for name, value in new.items()}
    return gradient, mean_of(sums)


def assert_same_update(one, other):
    for a, b in zip(jax.tree.leaves(one[0]), jax.tree.leaves(other[0])):
        assert relative(a, b) < 1e-4
    for name in ("loss", "rewards/chosen", "rewards/margins", "logps/rejected", "lambda/mean", "num_scored_tokens"):
        assert one[1][name] == pytest.approx(other[1][name], rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("name", MODELS)
def test_layouts_give_the_same_update(name):
    first, *others = (update(MODELS[name], layout) for layout in LAYOUTS)
    for other in others:
        assert_same_update(other, first)


def test_what_objectives_beyond_need_lies_beside_the_tokens_in_every_layout():
    first, *others = (update(LLAMA, layout, beyond=True) for layout in LAYOUTS)
    for other in (*others, update(LLAMA, "shared", micro=3, beyond=True)):
        assert_same_update(other, first)
        assert other[1]["regression/error"] == pytest.approx(first[1]["regression/error"], rel=1e-5)


def test_a_mixture_is_its_parts():
    """Soft label, pair weight, regression and SFT term, against the definitions on each response's log-probs."""
    items, params = random_items(3, beyond=True), start(LLAMA)
    items[1] = items[1]._replace(label=0.2, weight=0.0)
    batch = build_batch(items, "shared", BatchShape(4, 64, 40), 4)
    logits_of = jax.jit(lambda tokens: apply(LLAMA, params, tokens))
    preferred, rest = 0.0, 0.0
    for item in items:
        returns, errors, fluency = [], [], 0.0
        for response in item.responses:
            tokens = np.zeros((1, 40), np.int32)  # one length, one program
            end = len(item.prompt) + len(response.tokens)
            tokens[0, :end] = np.concatenate([item.prompt, response.tokens])
            logps = jax.nn.log_softmax(logits_of(tokens)[0])[len(item.prompt) - 1 : end - 1]
            logps = np.asarray(jnp.take_along_axis(logps, response.tokens[:, None], 1)[:, 0])
            returns.append(logps @ response.weights - response.constant)
            sums = np.bincount(response.span_ids, logps)
            errors.append(np.mean((sums - response.targets) ** 2))
            fluency = fluency or -logps.mean()
        h = 0.1 * (returns[0] - returns[1])
        soft = item.label * np.logaddexp(0, -h) + (1 - item.label) * np.logaddexp(0, h)
        preferred += item.weight * soft
        rest += item.weight * (0.5 * np.mean(errors) + 0.3 * fluency)
    for preferring, expected in ((True, preferred + rest), (False, rest)):
        objective = Objective(0.1, sft_weight=0.3, preference=preferring, regression=0.5)
        total, sums = sums_of(LLAMA, objective, Compute(), params, batch)
        assert float(total) == pytest.approx(expected, rel=1e-5)
        assert ("lambda/mean" in sums) == preferring


def test_splits_and_remat_give_the_same_update():
    whole = update(GEMMA, "shared")
    for other in (update(GEMMA, "shared", micro=3), update(GEMMA, "shared", remat="full")):
        assert_same_update(other, whole)


def test_window_and_caps_act_on_these_pairs():
    """Else the tests of them would say nothing."""
    everywhere = tuple(replace(kind, window=None) for kind in GEMMA.kinds)
    batch = build_batch(random_items(4), "shared", BatchShape(4, 64, 40), 4)

    def loss(config):
        return float(sums_of(config, Objective(0.1), Compute(), start(GEMMA), batch)[0])

    capped = MODELS["window_and_caps"]
    assert abs(loss(replace(GEMMA, kinds=everywhere)) - loss(GEMMA)) > 1e-3
    assert abs(loss(replace(capped, attention_softcap=None)) - loss(capped)) > 1e-3
    assert abs(loss(replace(capped, final_softcap=None)) - loss(capped)) > 1e-3


@pytest.mark.parametrize("name", ["plain", "window_and_caps"])
def test_the_step_agrees_with_the_span_form_on_plain_logits(name):
    """r by one weight a token and one constant a response is r over spans, in value and gradient."""
    config, params = MODELS[name], start(MODELS[name])
    rng = np.random.default_rng(1)
    spans = [np.sort(rng.integers(0, 5, n)) for n in (9, 12)]
    spans = [np.unique(s, return_inverse=True)[1].astype(np.int32) for s in spans]  # 0..S-1, none empty
    counts = [int(s.max()) + 1 for s in spans]
    weights = [rng.uniform(0.3, 2, n).astype(np.float32) for n in counts]
    reference = [rng.normal(-8, 1, n).astype(np.float32) for n in counts]
    prompt = rng.integers(3, VOCABULARY, 6).astype(np.int32)
    tokens = [rng.integers(3, VOCABULARY, len(s)).astype(np.int32) for s in spans]
    responses = [
        ScoredResponse(t, w[s], float(w @ r)) for t, w, s, r in zip(tokens, weights, spans, reference, strict=True)
    ]
    batch = build_batch([PairItem(prompt, *responses)], "shared", BatchShape(1, 32, 24), 1)

    def by_step(p):
        return preference_sums(config, Objective(0.1), Compute(), p, batch)[0]

    def by_spans(p):
        def policy(t, s, n):
            logits = apply(config, p, jnp.concatenate([prompt, t])[None])[0]
            logps = jax.nn.log_softmax(logits)[len(prompt) - 1 : -1]
            return span_sums(jnp.take_along_axis(logps, t[:, None], 1)[:, 0], s, n)[None]

        policies = [policy(t, s, n) for t, s, n in zip(tokens, spans, counts)]
        return ctpd_loss(*policies, *(r[None] for r in reference), *(w[None] for w in weights)).loss[0]

    a, gradient_a = jax.jit(jax.value_and_grad(by_step))(params)
    b, gradient_b = jax.jit(jax.value_and_grad(by_spans))(params)
    assert relative(a, b) < 1e-5
    for x, y in zip(jax.tree.leaves(gradient_a), jax.tree.leaves(gradient_b)):
        assert relative(x, y) < 1e-4


def test_accuracies_do_not_know_the_label():
    """For labels drawn at random: the accuracy and that of all labels swapped sum to one, as the margins to nothing.

    Annotated weights follow the label, so with them both accuracies lie on one side of one half.
    """
    rng = np.random.default_rng(3)

    def response(label: int) -> tuple[ScoredResponse, ScoredResponse]:
        """The response as the chosen one and as the rejected one."""
        n = int(rng.integers(3, 20))
        ids, ratio = rng.integers(3, VOCABULARY, n).astype(np.int32), rng.normal(0, 0.6, n).clip(-0.5, 1.5)
        reference = -6.24 * n + float(rng.normal())
        both = [np.exp(mu * ratio).astype(np.float32) for mu in (1, -1)]
        return tuple(ScoredResponse(ids, w, float(w.mean() * reference), reference, reference) for w in both)

    pairs = [(rng.integers(3, VOCABULARY, 5).astype(np.int32), response(0), response(1)) for _ in range(24)]
    batches = [
        build_batch([PairItem(p, a[0], b[1]) if right else PairItem(p, b[0], a[1]) for p, a, b in pairs],
                    "shared", BatchShape(24, 64, 40), 24)
        for right in (True, False)
    ]  # fmt: skip
    params = init_params(LLAMA, jax.random.key(0))
    one, other = (mean_of(sums_of(LLAMA, Objective(0.1), Compute(), params, batch)[1]) for batch in batches)
    assert one["rewards/accuracies"] + other["rewards/accuracies"] == pytest.approx(1, abs=1e-6)
    for name in ("rewards/margins", "rewards/margin_from_start"):
        assert one[name] == pytest.approx(-other[name], abs=1e-5) and abs(one[name]) > 1e-3
    assert one["rewards/chosen"] == pytest.approx(other["rewards/rejected"], abs=1e-5)
    assert abs(one["rewards/weighted_margins"] + other["rewards/weighted_margins"]) > 1e-2


def test_lambda_is_the_pairs_weight_in_the_gradient():
    batch = build_batch(random_items(4), "shared", BatchShape(4, 64, 40), 4)
    for loss in ("ipo", "hinge"):
        sums = sums_of(LLAMA, Objective(0.1, loss=loss), Compute(), start(LLAMA), batch)[1]
        assert not [name for name in sums if name.startswith("lambda/")]
    plain, smoothed = (
        sums_of(LLAMA, Objective(0.1, label_smoothing=e), Compute(), start(LLAMA), batch)[1]["lambda/mean"]
        for e in (0.0, 0.2)
    )
    np.testing.assert_allclose(smoothed[0], plain[0] - 0.2 * 4, rtol=1e-5)  # d loss / d logit of cDPO


def test_padding_pairs_change_nothing():
    config, params = LLAMA, start(LLAMA)
    items = random_items(2)
    whole, padded = (
        sums_of(config, Objective(0.1), Compute(), params, build_batch(items, "shared", BatchShape(n, 64, 40), n))
        for n in (2, 5)
    )
    assert relative(padded[0], whole[0]) < 1e-6
    for name, value in whole[1].items():
        if name != "padding":
            np.testing.assert_allclose(padded[1][name], value, rtol=1e-5, err_msg=name)


def test_sft_counts_tokens_and_update_moves_every_matrix():
    config, params = GEMMA, start(GEMMA)
    items = [PairItem(i.prompt, ScoredResponse(i.chosen.tokens, np.ones(len(i.chosen.tokens), np.float32)), None)
             for i in random_items(3)]  # fmt: skip
    batch = build_batch(items, "response", BatchShape(3, 32, 24), 3)
    recipe = recipe_of(partial(sft_sums, config, Compute()), param_shapes(config), preference(1e-3, 0.1), 10)
    accumulate, update = recipe.programs()
    before = jax.tree.map(np.asarray, params)
    gradient, sums = accumulate(params, {}, jax.tree.map(jnp.zeros_like, params), batch)
    assert float(sums["loss"][1]) == sum(len(i.chosen.tokens) for i in items)
    state = init_state(jax.tree.map(jnp.array, before), recipe.optimizer)
    state, cleared, norm = update(state, gradient, sums["loss"][1])
    assert int(state.step) == 1 and float(norm) > 0
    assert not any(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(cleared))
    for path, value in jax.tree_util.tree_leaves_with_path(state.params):
        old = before
        for key in path:
            old = old[key.key]
        assert np.any(np.asarray(value) != old), jax.tree_util.keystr(path)


def test_learning_rate_and_decay_mask():
    settings = preference(1e-3, 0.1, warmup=0.1)
    schedule = learning_rate(settings, 100)
    rates = [float(schedule(step)) for step in range(100)]
    assert rates[0] == pytest.approx(1e-4) and max(rates) == pytest.approx(1e-3) and rates[9] == pytest.approx(1e-3)
    assert rates[99] < 1e-5 and rates == sorted(rates[:10]) + sorted(rates[10:], reverse=True)
    params = start(GEMMA)
    kept = jax.tree_util.tree_leaves_with_path(decay_mask(params))
    assert {jax.tree_util.keystr(path) for path, decays in kept if not decays} == {
        jax.tree_util.keystr(path) for path, _ in kept if "norm" in jax.tree_util.keystr(path)
    }
