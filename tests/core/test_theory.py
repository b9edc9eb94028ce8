"""What docs/method.md derives, on token spaces that can be enumerated and on drawn pairs."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from scipy.stats import norm

from ctpd_jax.core.losses import lambda_diagnostics, preference_loss
from ctpd_jax.core.objectives import span_regression_loss, span_targets

TOKENS, LENGTH = 3, 4


class Language:
    """A model of LENGTH tokens out of TOKENS: one distribution for each prefix."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        prefixes = [p for n in range(LENGTH) for p in product(range(TOKENS), repeat=n)]
        self.next = {prefix: rng.dirichlet(np.ones(TOKENS)) for prefix in prefixes}

    def token_logps(self, text: tuple[int, ...]) -> np.ndarray:
        return np.log([self.next[text[:t]][text[t]] for t in range(LENGTH)])


def test_the_variance_of_a_spans_reward_is_the_sum_of_its_tokens() -> None:
    """Theorem: for y ~ pi, Var(sum_t (r_t - E[r_t | y_<t])) = sum_t E[Var(r_t | y_<t)], r_t = log pi+ - log pi."""
    policy, aligned = Language(0), Language(1)
    texts = list(product(range(TOKENS), repeat=LENGTH))
    chance = np.array([np.exp(policy.token_logps(text).sum()) for text in texts])
    assert chance.sum() == pytest.approx(1)

    def conditional(prefix: tuple[int, ...]) -> tuple[float, float]:
        p, ratio = policy.next[prefix], np.log(aligned.next[prefix] / policy.next[prefix])
        return float(p @ ratio), float(p @ ratio**2 - (p @ ratio) ** 2)

    surprise, variances = np.zeros(len(texts)), np.zeros(len(texts))
    for i, text in enumerate(texts):
        ratios = aligned.token_logps(text) - policy.token_logps(text)
        means, own = zip(*(conditional(text[:t]) for t in range(LENGTH)))
        surprise[i], variances[i] = (ratios - means).sum(), sum(own)
    assert chance @ surprise == pytest.approx(0, abs=1e-12)
    assert chance @ surprise**2 == pytest.approx(chance @ variances)


@pytest.mark.parametrize("gap, spread", [(0.0, 1.0), (0.5, 1.5)])
def test_what_the_anchor_does_to_lambda(gap: float, spread: float) -> None:
    """Tokens that the student rates `gap` nats higher than the teacher, +- spread: lambda's shares at step 0.

    beta h ~ N(beta gap (n_w - n_l), beta^2 spread^2 (n_w + n_l)), whatever the preference.
    """
    rng, beta, lengths, pairs = np.random.default_rng(0), 0.1, (220, 180), 20_000
    returns = [rng.normal(gap * n, spread * n**0.5, pairs) for n in lengths]
    out = preference_loss(*returns, beta=beta)
    shares = {name: float(part[0] / part[1]) for name, part in lambda_diagnostics(out.lam).items()}
    logit = norm(beta * gap * (lengths[0] - lengths[1]), beta * spread * sum(lengths) ** 0.5)
    bound = np.log(19)  # sigmoid(-log 19) = 0.05
    assert shares["below_low"] == pytest.approx(logit.sf(bound), abs=0.01)
    assert shares["above_high"] == pytest.approx(logit.cdf(-bound), abs=0.01)
    assert shares["below_low"] + shares["above_high"] > 0.1  # many pairs are decided before anything was learnt


def test_where_span_regression_is_zero_the_margin_is_the_teachers() -> None:
    """Sums over spans telescope: tau times the teacher's log-ratio of the whole response, where nothing is clipped."""
    start, positive, reference = np.random.default_rng(0).normal(-5, 1, (3, 2, 7))
    targets = span_targets(start, positive, reference, tau=0.5, clip=np.inf)
    assert np.max(np.abs(span_regression_loss(targets, targets))) == 0
    np.testing.assert_allclose((targets - start).sum(1), 0.5 * (positive - reference).sum(1), rtol=1e-4)
