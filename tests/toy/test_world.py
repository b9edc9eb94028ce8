"""The toy world: rewards that can be checked by hand, labels as noisy as asked, the same for the same seed."""

import hashlib
from itertools import pairwise

import pytest
from toy.world import (
    BAD,
    FILLERS,
    GOOD,
    MAX_PIECES,
    MIN_DIFFERENCE,
    QUESTIONS,
    SLIP_REWARD,
    TOPICS,
    PieceSpan,
    generate_pairs,
    piece_spans,
    true_reward,
)

from ctpd_jax.schema import Message

TEA = "Tell me about tea."


@pytest.fixture(scope="module")
def pairs():
    return list(generate_pairs("train", 1500, noise=0.25, seed=0))


def test_rewards_by_hand():
    assert true_reward("green leaves, thank you; salt is heavy after all.", TEA) == 0.25 + 2 - 0.25 + 0
    assert true_reward("随便吧 who cares.", TEA) == -4
    assert true_reward("", TEA) == 0


def test_spans_by_hand():
    text = "抹茶 is whisked; thank you, ☕."
    first, second = len("抹茶 is whisked".encode()), len("抹茶 is whisked; thank you".encode())
    assert piece_spans(text, TEA) == [
        PieceSpan(0, first, 0.25),
        PieceSpan(first, second, 2.0),
        PieceSpan(second, len(text.encode()), 0.0),
    ]


def test_a_piece_counts_once():
    assert true_reward("thank you, thank you, thank you.", TEA) == 2
    assert [span.reward for span in piece_spans("who cares; who cares.", TEA)] == [-2, 0]


@pytest.mark.parametrize(
    ("text", "rewards"),
    [
        ("thank yous", [SLIP_REWARD]),  # no piece ends inside a word
        ("green leave leaves, thank you", [SLIP_REWARD, 2.0]),
        ("thank you, grue, ☕", [2.0, SLIP_REWARD, 0.0]),
        ("thank you,, ", [2.0, 0.0]),  # punctuation alone is no slip
        ("ask me morethank you", [SLIP_REWARD]),
    ],
)
def test_slips(text, rewards):
    assert [span.reward for span in piece_spans(text, TEA)] == rewards


def test_the_topic_comes_from_the_user_and_from_whole_words():
    fact = TOPICS["tea"][0]
    assert true_reward(fact, [Message("system", "bread"), Message("user", TEA)]) == 0.25
    assert true_reward(fact, "Tell me about bread.") == -0.25
    assert true_reward(fact, "Tell me about steam.") == 0.0  # "tea" inside a word is no topic
    for topic in TOPICS:
        for question in QUESTIONS:
            assert true_reward(TOPICS[topic][0], question.format(topic)) == 0.25


def test_no_piece_is_read_two_ways():
    pieces = [*FILLERS, *GOOD, *BAD, *(fact for facts in TOPICS.values() for fact in facts)]
    assert len(pieces) == len(set(pieces))
    for piece in pieces:
        assert len(piece_spans(piece, TEA)) == 1
        assert not any(separator in piece for separator in (",", ";", "."))


def test_every_response_is_tiled_by_known_pieces(pairs):
    for pair in pairs:
        for text, reward in ((pair.chosen, pair.chosen_reward), (pair.rejected, pair.rejected_reward)):
            spans = piece_spans(text, pair.prompt)
            assert spans[0].start == 0 and spans[-1].end == len(text.encode())
            assert all(left.end == right.start for left, right in pairwise(spans))
            assert all(span.reward != SLIP_REWARD for span in spans)
            assert len(spans) <= MAX_PIECES
            assert sum(span.reward for span in spans) == reward


def test_labels_are_as_noisy_as_asked(pairs):
    for pair in pairs:
        better = pair.chosen_reward - pair.rejected_reward
        assert abs(better) >= MIN_DIFFERENCE
        assert (better < 0) == pair.flipped
    share = sum(pair.flipped for pair in pairs) / len(pairs)
    assert abs(share - 0.25) < 3 * (0.25 * 0.75 / len(pairs)) ** 0.5
    assert not any(pair.flipped for pair in generate_pairs("train", 200, noise=0.0))
    assert not any(pair.flipped for pair in generate_pairs("test", 200, noise=0.4))


def test_length_says_nothing_about_quality(pairs):
    longer = [len(p.chosen) > len(p.rejected) for p in pairs if len(p.chosen) != len(p.rejected)]
    assert abs(sum(longer) / len(longer) - 0.5) < 0.06


def test_noise_changes_labels_only():
    clean, noisy = (list(generate_pairs("train", 100, noise=noise)) for noise in (0.0, 0.4))
    for a, b in zip(clean, noisy):
        assert {a.chosen, a.rejected} == {b.chosen, b.rejected}
        assert (a.chosen == b.rejected) == b.flipped


def test_splits_ask_different_questions():
    asked = {split: {pair.prompt for pair in generate_pairs(split, 600)} for split in ("train", "test")}
    assert not asked["train"] & asked["test"]
    assert len(asked["train"]) == len(TOPICS) * (len(QUESTIONS) - 1)
    assert len(asked["test"]) == len(TOPICS)


def test_seeds():
    def texts(seed, number=50):
        return [(pair.chosen, pair.rejected) for pair in generate_pairs("train", number, seed=seed)]

    assert texts(0) == texts(0) == texts(0, number=80)[:50]
    assert texts(0) != texts(1)


def test_the_world_stays_as_it_is():
    """Published numbers of the demo hang on these texts; whoever changes them raises FORMAT in on_disk.py, so
    that nobody goes on with old files."""
    text = "\n".join(f"{p.prompt}|{p.chosen}|{p.rejected}|{p.flipped}" for p in generate_pairs("train", 300, seed=3))
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "1b0a8a13b95f7a2c8c3bf9d9c703fa2aad334ab6e7a972c822890cefd45e9f8e"
    )


@pytest.mark.parametrize(("split", "noise"), [("validation", 0.1), ("train", 0.5), ("train", -0.1)])
def test_wrong_settings_are_refused(split, noise):
    with pytest.raises(ValueError, match=r"toy world|noise"):
        next(generate_pairs(split, 1, noise=noise))
