"""What benchmarks/quality.py measures of a trained student, held against what is true in the toy world.

N pairs; sides are chosen and rejected. On the held-out pairs the chosen response is truly the better one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from toy.truth import mean_and_error, piece_ratios
from toy.world import true_reward

from ctpd_jax.annotate.coefficients import Example, span_values, training_items
from ctpd_jax.evaluate.accuracy import difference, lambda_shares, length_matched
from ctpd_jax.job.job import Job
from ctpd_jax.job.models import dtype_of, text_of
from ctpd_jax.job.pairs import load_pairs
from ctpd_jax.job.score import score
from ctpd_jax.job.table import trained_model
from ctpd_jax.schema import CHOSEN, REJECTED, SIDES
from ctpd_jax.stages.evaluate import prompts_of
from ctpd_jax.stages.generate import Sampling, reading_model, sample
from ctpd_jax.text.preferences import load_preferences

BINS = 10  # of the expected calibration error


def of_test_pairs(job: Job, stage: str) -> dict[str, float]:
    """Accuracies, calibration and fluency on the held-out pairs, whose labels are true."""
    config = job.config
    pairs, start = load_pairs(job, "test"), f"{trained_model(config, stage)}_sft"
    covered = np.array([[pair.response(side).bounds[-1] for side in (CHOSEN, REJECTED)] for pair in pairs.aligned])
    lengths = np.array([[pair.chosen_bytes, pair.rejected_bytes] for pair in pairs.aligned])

    def logps(name: str) -> np.ndarray:  # float64 [N, 2]
        column = score(job, pairs, {name: name}, "float32")[name]
        return np.array([[scores.sum(dtype=np.float64) for scores in both] for both in column])

    # Rewards against the model's own start, every token counting one: the same for all methods.
    own, before = logps(stage), logps(start)
    margins = difference(own - before)
    similar = length_matched(lengths, config.evaluate.length_tolerance)

    # What the method takes for a reward, weights left at one, says how probably the better response is the better one.
    scale, size = config[stage].get("beta", config.train.beta), np.ones_like(own)
    if stage == "train" and config.train.objective == "regression":  # the log-ratio is tau times the teacher's
        scale = config.positive.beta / config.train.tau
    if stage == "train" and config.train.normalize == "byte":
        size = covered
    if stage == "train" and config.train.normalize == "span":
        size = np.array([[pair.response(side).num_spans for side in (CHOSEN, REJECTED)] for pair in pairs.aligned])
    rewards = scale * difference((own - before) / size)
    probability = 1 / (1 + np.exp(-np.clip(rewards, -60, 60)))
    return {
        "accuracy": share(margins),
        "accuracy_length_matched": share(margins[similar]),
        "accuracy_per_byte": share(difference(own / covered)),
        "brier": float(np.mean((1 - probability) ** 2)),
        "ece": calibration_error(probability),
        "margin": float(rewards.mean()),
        "bits_per_byte": float(-own[:, CHOSEN].sum() / covered[:, CHOSEN].sum() / np.log(2)),
    }


def share(margins: np.ndarray) -> float:
    """Return the share of positive margins, ties one half."""
    return float(np.mean((margins > 0) + 0.5 * (margins == 0)))


def calibration_error(probability: np.ndarray) -> float:
    """Return the expected calibration error of float [N], the probabilities given to what is true.

    A prediction is as sure as its likelier side; in each bin its mean is held against how often that side is true.
    """
    sure, right = np.maximum(probability, 1 - probability), (probability > 0.5) + 0.5 * (probability == 0.5)
    which = np.minimum(((sure - 0.5) * 2 * BINS).astype(int), BINS - 1)
    gaps = [abs((sure - right)[which == number].sum()) for number in range(BINS)]
    return float(sum(gaps) / len(probability))


def of_samples(job: Job, stage: str, count: int, max_new_tokens: int) -> dict[str, float]:
    """The mean true reward of answers to the held-out prompts, and their mean length in characters."""
    prompts = prompts_of(load_pairs(job, "test"))
    asked = [prompts[number % len(prompts)] for number in range(count)]
    sampling = Sampling(max_new_tokens, 1.0, seed=job.config.seed)
    text = text_of(job, trained_model(job.config, stage))
    answers = sample(text, *reading_model(job, stage, job.own), asked, sampling, dtype_of(job.config, job.mesh))
    rewards = mean_and_error([true_reward(answer, prompt) for answer, prompt in zip(answers, asked)])
    length = float(np.mean([len(answer) for answer in answers]))
    return {"reward": rewards["mean"], "reward_error": rewards["error"], "answer_length": length}


def of_weights(examples: Sequence[Example], config: ConfigDict) -> dict[str, float]:
    """How the teacher's signal follows the true rewards of the pieces, and how lambda is spread before training.

    A chosen piece should weigh more the better it is, a rejected one the worse it is; of the regression's target both
    should be higher. The correlation is the mean of both sides'.
    """
    settings = config.weights, config.train, config.seed
    values, _ = span_values(examples, *settings)
    regression = config.train.objective == "regression"
    raw = raw_pairs(config.data.train)
    correlations = []
    for side, name in enumerate(SIDES):
        pieces: list[tuple[float, float]] = []
        for (pair, scores), both in zip(examples, values):
            own, text = both[side], (raw[pair.id].chosen, raw[pair.id].rejected)[side]
            signal = own.targets - scores[name]["start"] if regression else own.weights * (1 if side == CHOSEN else -1)
            question, bounds = raw[pair.id].prompt[-1].content, pair.response(side).bounds
            summed, counts = (piece_ratios(text, question, bounds, each) for each in (signal, np.ones(len(signal))))
            pieces += [(reward, total / count) for (reward, total), (_, count) in zip(summed, counts)]
        rewards, signals = np.array(pieces).T
        # Uniform weights follow nothing.
        correlations.append(0.0 if np.ptp(signals) < 1e-6 else float(np.corrcoef(rewards, signals)[0, 1]))
    found = {"weights_follow_truth": float(np.mean(correlations))}
    if regression:  # it has no lambda
        return found
    return found | lambda_at_start(examples, config)


def lambda_at_start(examples: Sequence[Example], config: ConfigDict) -> dict[str, float]:
    """How lambda is spread over the pairs before the first update: the untouched student's scores are in the store."""
    items, _ = training_items(examples, config.weights, config.train, config.seed)
    margins = []
    for item, (pair, scores) in zip(items, examples):
        returns = []
        for side, name in enumerate(SIDES):
            span_ids = pair.response(side).student.span_ids
            firsts = np.searchsorted(span_ids, np.arange(pair.response(side).num_spans))
            response = item.responses[side]
            returns.append(float(response.weights[firsts] @ scores[name]["start"]) - response.constant)
        margins.append(returns[CHOSEN] - returns[REJECTED])
    shares = lambda_shares(np.array(margins), config.train.beta)
    return {f"lambda_{name}": value for name, value in shares.items()}


@lru_cache(maxsize=2)
def raw_pairs(path: str) -> dict[str, Any]:
    """The training pairs as they were written, by id."""
    return {pair.id: pair for pair in load_preferences(path, "train")[0]}
