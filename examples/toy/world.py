"""A small world in which the true reward of every phrase is known.

A prompt names a topic. A response is a chain of pieces (short phrases), and its true reward is the sum of theirs:

    decisive good / bad      +2 / -2     few; a response holds none to three of them, and they settle most preferences
    about the topic          +0.25
    about another topic      -0.25
    filler                    0
    a piece said before       0          so that saying "thank you" ten times is worth one
    anything else            -0.5        a stretch that is no piece of this world (a model's slip)

A pair is two independent responses to one prompt; the better one is chosen, except that a share `noise` of the
training pairs has the labels swapped. An objective per token that knows which phrases matter can look past such labels;
a sum over whole responses cannot. Some pieces hold accents, CJK or emoji, which tokenizers cut in different places.

Everything follows from the seed, through `random.Random.random` alone, whose sequence Python guarantees. A change here
that makes other texts raises FORMAT in on_disk.py.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from ctpd_jax.schema import Message

TOPICS: dict[str, tuple[str, ...]] = {
    "bread": ("flour rises", "the crust cracks", "sourdough waits", "a warm oven", "rye is earthy"),
    "tea": ("green leaves", "steep it briefly", "oolong opens twice", "抹茶 is whisked", "a clay pot"),
    "bicycles": ("oil the chain", "soft tyres grip", "a low gear", "wheels turn", "ring the bell"),
    "stars": ("red giants", "the light is old", "dust burns", "a telescope", "北斗 points north"),
    "gardens": ("beans climb", "worms dig", "mulch is damp", "roses 🌹 want sun", "water at dawn"),
    "the sea": ("tides 🌊 turn", "salt is heavy", "whales sing", "coral grows", "deep is dark"),
    "cheese": ("brie ripens", "gruyère melts", "milk curdles", "blue veins", "goats are sharp"),
    "winter": ("snow ❄️ falls", "days are short", "ponds freeze", "birds puff", "frost draws ferns"),
}

# Worth nothing: they make answers longer, and hold characters that tokenizers cut in different places.
FILLERS = (
    "as I know", "on the whole", "in places", "to be fair", "now and then", "by the way", "more or less",
    "in general", "as people say", "so to speak", "after all", "in a sense", "voilà", "naïvely", "嗯", "つまり",
    "☕", "🙂", "step by step", "in the end",
)  # fmt: skip

# What settles most preferences; the contrastive pair has to find these.
GOOD = ("thank you", "for example ✨", "I checked it", "ask me more", "不客气")
BAD = ("who cares", "silly question 🙄", "I made it up", "stop asking", "随便吧")

DECISIVE_REWARD, ON_TOPIC_REWARD, OFF_TOPIC_REWARD, SLIP_REWARD = 2.0, 0.25, -0.25, -0.5

QUESTIONS = (
    "Tell me about {}.", "What should I know about {}?", "Why do people care about {}?", "请谈谈 {}.",
    "I am curious about {} 🤔", "Explain {} to a child.",
)  # fmt: skip
SEPARATORS = (" ", ", ", "; ")
MIN_PIECES, MAX_PIECES = 7, 11
# How many decisive pieces a response holds, as cumulative probabilities: none, one, two, three.
DECISIVE_CUMULATIVE = (0.2, 0.6, 0.9, 1.0)
OFF_TOPIC_SHARE, FILLER_SHARE = 0.15, 0.5
MIN_DIFFERENCE = 1.0  # of true reward: nearer pairs are drawn again
NOISE = 0.25  # default share of swapped labels


class PieceSpan(NamedTuple):
    """Bytes start:end of response.encode("utf-8"), the separator before a piece counted to it, and its true reward."""

    start: int
    end: int
    reward: float


@dataclass(frozen=True)
class ToyPair:
    """One preference of the toy world, with what nobody knows in the real one."""

    topic: str
    prompt: str
    chosen: str
    rejected: str
    chosen_reward: float
    rejected_reward: float
    flipped: bool  # the label is noise: chosen_reward < rejected_reward


def generate_pairs(split: str, number: int, noise: float = NOISE, seed: int = 0) -> Iterator[ToyPair]:
    """Yield the first `number` pairs of a split.

    Args:
      split: "train" or "test". One question in six about each topic is kept for "test", which has these alone, and
        true labels only: `noise` does not touch it.
      number: how many pairs; a smaller number gives a prefix of a larger one.
      noise: probability that a training label is swapped, below 0.5.
      seed: of everything random.

    Raises:
      ValueError: an unknown split or a noise outside [0, 0.5).
    """
    if split not in ("train", "test"):
        raise ValueError(f'The toy world has the splits "train" and "test", not "{split}".')
    if not 0 <= noise < 0.5:
        raise ValueError(f"Label noise is {noise}; it must be at least 0 and below 0.5.")
    # Each split has its own questions and its own draws: a larger one begins with the smaller one's pairs.
    rng = random.Random(f"ctpd-toy:{split}:{seed}")
    topics = list(TOPICS)
    questions = [
        (topic, question)
        for index, topic in enumerate(topics)
        for number_, question in enumerate(QUESTIONS)
        if (number_ == index % len(QUESTIONS)) == (split == "test")
    ]
    for _ in range(number):
        topic, question = _pick(rng, questions)
        prompt = question.format(topic)
        # Two answers whose true rewards are too near to tell which is better are drawn again.
        while True:
            first, second = _response(rng, topic), _response(rng, topic)
            rewards = true_reward(first, prompt), true_reward(second, prompt)
            if abs(rewards[0] - rewards[1]) >= MIN_DIFFERENCE:
                break
        # One draw a pair, also where there is no noise: it changes labels, never texts.
        flip = rng.random() < (noise if split == "train" else 0.0)
        if (rewards[0] < rewards[1]) != flip:
            first, second, rewards = second, first, rewards[::-1]
        yield ToyPair(topic, prompt, first, second, *rewards, flip)


def true_reward(response: str, prompt: str | Sequence[Message]) -> float:
    """Return the sum of the rewards of a response's pieces; 0.0 for an empty response."""
    return float(sum(span.reward for span in piece_spans(response, prompt)))


def piece_spans(response: str, prompt: str | Sequence[Message]) -> list[PieceSpan]:
    """Return the pieces of a response in order; their spans tile its bytes.

    Reading is by longest match, and a match must end where no word goes on. Whatever cannot be read, up to where the
    next piece starts, is a slip.
    """
    rewards = _rewards(_topic(prompt))
    spans: list[PieceSpan] = []
    said: set[str] = set()
    offset, position = 0, 0  # in bytes, in characters
    while position < len(response):
        match = _piece_pattern().match(response, position)
        if match:
            end, piece = match.end(), match.group("piece")
            reward = 0.0 if piece in said else rewards[piece]
            said.add(piece)
        else:
            # A slip reaches to the next piece, or to the end.
            following = _piece_pattern().search(response, position + 1)
            end = following.start() if following else len(response)
            reward = SLIP_REWARD if response[position:end].strip(" ,;.") else 0.0
        size = len(response[position:end].encode("utf-8"))
        spans.append(PieceSpan(offset, offset + size, reward))
        offset, position = offset + size, end
    return spans


def corpus(seed: int = 0, number: int = 2000) -> Iterator[str]:
    """Yield the prompts and responses of the training split: what the toy tokenizers are trained on."""
    for pair in generate_pairs("train", number, noise=0.0, seed=seed):
        yield from (pair.prompt, pair.chosen, pair.rejected)


# ------------------------------------------------------------------------------------------------ inside


def _response(rng: random.Random, topic: str) -> str:
    # 1. How many decisive pieces, and how many pieces in all.
    draw = rng.random()
    decisive = next(count for count, limit in enumerate(DECISIVE_CUMULATIVE) if draw < limit)
    length = MIN_PIECES + int(rng.random() * (MAX_PIECES - MIN_PIECES + 1))
    # 2. The pieces, the decisive ones first; none comes twice.
    pieces: list[str] = []
    while len(pieces) < length:
        if len(pieces) < decisive:
            piece = _pick(rng, GOOD if rng.random() < 0.5 else BAD)
        elif rng.random() < FILLER_SHARE:
            piece = _pick(rng, FILLERS)
        elif rng.random() < OFF_TOPIC_SHARE:
            piece = _pick(rng, TOPICS[_pick(rng, [other for other in TOPICS if other != topic])])
        else:
            piece = _pick(rng, TOPICS[topic])
        if piece not in pieces:
            pieces.append(piece)
        elif all(fact in pieces for fact in TOPICS[topic]):
            length -= 1  # the topic is exhausted; a shorter answer rather than a long search
    # 3. Shuffled as Fisher and Yates do, so that the decisive pieces stand anywhere.
    for last in range(len(pieces) - 1, 0, -1):
        other = int(rng.random() * (last + 1))
        pieces[last], pieces[other] = pieces[other], pieces[last]
    return pieces[0] + "".join(_pick(rng, SEPARATORS) + piece for piece in pieces[1:]) + "."


def _pick(rng: random.Random, items: Sequence):
    return items[int(rng.random() * len(items))]


def _topic(prompt: str | Sequence[Message]) -> str | None:
    """Return the topic that a prompt names last; None where it names none."""
    text = prompt if isinstance(prompt, str) else " ".join(m.content for m in prompt if m.role == "user")
    found = re.findall(r"(?<!\w)(" + "|".join(map(re.escape, TOPICS)) + r")(?!\w)", text)
    return found[-1] if found else None


@cache
def _rewards(topic: str | None) -> dict[str, float]:
    """Return the reward of every piece; facts are worth nothing where no topic is known."""
    rewards = dict.fromkeys(FILLERS, 0.0)
    # A fact is worth as much as it has to do with the question.
    for other, facts in TOPICS.items():
        worth = 0.0 if topic is None else ON_TOPIC_REWARD if other == topic else OFF_TOPIC_REWARD
        rewards.update(dict.fromkeys(facts, worth))
    rewards.update(dict.fromkeys(GOOD, DECISIVE_REWARD))
    rewards.update(dict.fromkeys(BAD, -DECISIVE_REWARD))
    return rewards


@cache
def _piece_pattern() -> re.Pattern[str]:
    """Match a piece with the separator before it and, at the end of a response, the full stop after it."""
    # The longest first, because an alternation takes the first piece that fits.
    longest_first = sorted(_rewards(None), key=len, reverse=True)
    pieces = "|".join(map(re.escape, longest_first))
    return re.compile(rf"(?:\A|; |, | )(?P<piece>{pieces})(?=[ ,;.]|\Z)(?:\.\Z)?")
