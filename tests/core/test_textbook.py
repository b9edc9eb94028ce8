"""Core as a textbook: its examples run, and its signatures hold for every call of a test."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from ctpd_jax import core
from ctpd_jax.core import losses
from ctpd_jax.core.projection import project_to_tokens, span_sums
from ctpd_jax.core.weights import importance_weights

MODULES = sorted(path.stem for path in Path(core.__path__[0]).glob("[a-z]*.py"))


@pytest.mark.parametrize("name", MODULES)
def test_examples_print_what_they_say(name: str) -> None:
    module = importlib.import_module(f"ctpd_jax.core.{name}")
    found = doctest.testmod(module, extraglobs={"jnp": jnp})
    assert found.failed == 0
    assert found.attempted or name == "arrays"


@pytest.mark.parametrize(
    "call",
    [
        lambda: span_sums(np.zeros(3), np.zeros(4, int), 2),
        lambda: span_sums(np.zeros(3), np.zeros(3), 2),  # ids that are no integers
        lambda: project_to_tokens(np.zeros(2), np.zeros((), int)),
        lambda: importance_weights(np.zeros(3), np.zeros(4)),
        lambda: losses.dpo_loss(*(np.zeros(2),) * 3, np.zeros(3)),
        lambda: losses.ctpd_loss(*(np.zeros((2, 4)),) * 5, np.zeros((2, 5))),
    ],
)
def test_a_call_that_breaks_a_signature_is_found(call) -> None:
    with pytest.raises(TypeCheckError):
        call()
