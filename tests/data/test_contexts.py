"""Contexts and continuations in rows: what is shared, what is cut, and which shapes batches have."""

import jax
import numpy as np
import pytest
from helpers.tiny import random_model

from ctpd_jax.data.contexts import TOGETHER, batches_by_length, bucket, build_rows, needs_of, shared_rows
from ctpd_jax.errors import UserError
from ctpd_jax.models.compute import Compute, scored_and_likeliest
from ctpd_jax.models.decoder import apply


def _alone(config, params, questions, length):
    """Of each question, in a row of its own, the log-probability and whether each token is the likeliest."""
    ids = np.zeros((len(questions), length), np.int32)
    for row, (context, continuation) in zip(ids, questions):
        row[: len(context) + len(continuation)] = [*context, *continuation]
    logits = np.asarray(jax.jit(apply, static_argnums=0)(config, params, ids))
    found = []
    for row, (context, continuation) in zip(logits, questions):
        own = row[len(context) - 1 :][: len(continuation)]
        logps = np.asarray(jax.nn.log_softmax(own))[np.arange(len(own)), continuation]
        found.append((logps.sum(), own.argmax(-1).tolist() == continuation))
    return found


def test_questions_of_one_context_are_scored_as_if_they_were_alone():
    """Of a model with sliding windows shorter than the rows."""
    config, params = random_model("gemma3")
    random = np.random.default_rng(0)
    contexts = [random.integers(3, config.vocab_size, size).tolist() for size in (37, 1, 20)]
    questions = [
        (contexts[place], random.integers(3, config.vocab_size, size).tolist())
        for place, size in ((0, 5), (0, 1), (1, 4), (0, 12), (2, 1), (2, 1))
    ]
    questions += [(contexts[2], [token]) for token in range(config.vocab_size)]  # one of them is the likeliest
    rows = shared_rows(questions, 512)
    assert [numbers for _, numbers in rows] == [[0, 1, 3], [2], list(range(4, len(questions)))]
    assert [needs_of(row, questions) for row in rows[:2]] == [(37 + 4 + 11, 18), (1 + 3, 4)]
    assert needs_of(rows[2], questions) == (20, len(questions) - 4)

    batch = build_rows(rows, questions, (4, 64, len(questions)))
    score = jax.jit(scored_and_likeliest, static_argnums=(0, 3))
    logps, likeliest = map(np.asarray, score(config, params, batch, Compute()))
    for number, (total, greedy) in enumerate(_alone(config, params, questions, 64)):
        own = batch.pair == number
        assert logps[own].sum() == pytest.approx(total, abs=1e-4)
        assert likeliest[own].all() == greedy
    assert likeliest[batch.pair > 5].sum() == 1


def test_what_is_too_long_loses_its_beginning_and_no_target():
    context = list(range(10, 20))
    assert shared_rows([(context, [1, 2, 3])], 12) == [(tuple(context), [0])]
    assert shared_rows([(context, [1, 2, 3])], 8) == [(tuple(context[-6:]), [0])]
    # Continuations of unequal length leave unequal contexts.
    assert len(shared_rows([(context, [1, 2, 3]), (context, [4])], 8)) == 2
    assert shared_rows([(context, [1] * 8)], 8) == [((19,), [0])]
    with pytest.raises(UserError, match="9 tokens; it needs one, and the model has 8"):
        shared_rows([(context, [1] * 9)], 8)
    with pytest.raises(UserError, match="0 tokens"):
        shared_rows([(context, [])], 8)


def test_many_continuations_take_several_rows():
    questions = [([7], [1] * 200)] * 5 + [([7], [1] * (TOGETHER + 1))]
    assert [numbers for _, numbers in shared_rows(questions, 4096)] == [[0, 1], [2, 3], [4], [5]]


def test_batches_hold_their_tokens_in_few_shapes():
    lengths = np.random.default_rng(0).integers(1, 1500, 700).tolist()
    batches = batches_by_length(lengths, 4096, multiple=2)
    assert sorted(place for *_, places in batches for place in places) == list(range(700))
    assert len({(rows, length) for rows, length, _ in batches}) <= 20
    longest = [max(lengths[place] for place in places) for *_, places in batches]
    assert longest == sorted(longest, reverse=True)
    for rows, length, places in batches:
        assert len(places) <= rows and max(lengths[place] for place in places) <= length
        assert rows == 2 or rows * length <= 4096
        assert rows < 4 or rows < 2 * len(places)
    # Room behind the rows counts too.
    assert batches_by_length([60] * 9, 1024, room=192) == [(4, 64, [0, 1, 2, 3]), (4, 64, [4, 5, 6, 7]), (1, 64, [8])]


def test_a_size_is_rounded_up_by_a_quarter_at_most():
    for size in range(1, 5000):
        assert 0 <= bucket(size, 8) - size < max(8, size / 4)
    assert len({bucket(size, 64) for size in range(1, 4097)}) <= 4 * 4 + 4
    assert [bucket(size, 16) for size in (1, 17, 80, 129, 161)] == [16, 32, 80, 160, 192]
