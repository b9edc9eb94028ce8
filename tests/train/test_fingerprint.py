"""Fingerprints: those of a loop over the elements, the same however an array is cut, and moved by every flipped bit."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.eight_devices import run_on_eight_devices
from hypothesis import given, settings
from hypothesis import strategies as st

from ctpd_jax.train.fingerprint import fingerprints

LARGE = 2**32


def mixed(x: int) -> int:
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) % LARGE
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) % LARGE
    return x ^ (x >> 16)


def reference(words: np.ndarray) -> str:
    """Element by element in Python's integers, from an array of unsigned ones."""
    first = second = 0
    row = max(1, math.prod(words.shape[1:]))
    for number, word in enumerate(words.ravel().tolist()):
        place = mixed((number // row + 0x27D4EB2F) % LARGE) + number % row
        one = mixed((place + 0x9E3779B9) % LARGE)
        first += mixed(word ^ one)
        second += mixed(word ^ mixed((one + 0x85EBCA77) % LARGE))
    return f"{first % LARGE:08x}{second % LARGE:08x}"


def of(array, rounded: bool = False) -> str:
    return fingerprints({"x": array}, rounded)["x"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8", "uint32"])
@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (2, 3, 4), (0, 3)])
def test_it_is_that_of_a_loop_over_the_elements(dtype, shape):
    x = np.random.default_rng(1).normal(0, 50, shape).astype(jnp.dtype(dtype))
    words = x.view(f"uint{8 * x.itemsize}")
    assert of(jnp.asarray(x)) == of(x) == reference(words)


def test_arrays_of_64_bits_are_two_words_an_element():
    x = np.arange(5, dtype=np.int64) << 33
    assert of(x) == reference(x.view(np.uint32).reshape(5, 2)) != of(np.zeros_like(x))
    assert of(np.array([True, False])) == reference(np.array([[1], [0]]))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 32 * 24 - 1), st.integers(0, 23), st.integers(0, 23))
def test_a_flipped_bit_and_two_swapped_elements_show(seed, bit, one, other):
    x = np.random.default_rng(seed).integers(0, LARGE, (4, 6), np.uint32)
    flipped, swapped = x.copy(), x.copy()
    flipped.flat[bit // 32] ^= np.uint32(1 << bit % 32)
    swapped.flat[[one, other]] = x.flat[[other, one]]
    before = of(x)
    assert of(flipped)[:8] != before[:8] and of(flipped)[8:] != before[8:]
    assert (of(swapped) == before) == bool(np.array_equal(swapped, x))


@pytest.mark.parametrize("bit", [0, 15, 23, 29, 30, 31])
def test_the_same_bit_flipped_in_several_elements_shows(bit):
    """What is added for one must not be taken away by another: two signs, all signs."""
    x = np.random.default_rng(bit).normal(size=(20, 10)).astype(np.float32).view(np.uint32)
    before, seen = of(x), set()
    for one in range(60):
        flipped = x.copy()
        flipped.flat[[one, 199 - one]] ^= np.uint32(1 << bit)
        seen.add(of(flipped))
        assert seen.isdisjoint({before})
    assert len(seen) == 60 and of(x ^ np.uint32(1 << bit)) != before


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, LARGE - 1), min_size=8, max_size=8))
def test_rounded_it_is_that_of_the_array_as_bfloat16(bits):
    # NaN is one NaN, with whatever bits.
    special = [np.nan, -np.nan, np.inf, -np.inf, 1e-42, -1e-39, 3.4e38, -0.0]  # and ties, among all bits
    for x in (np.array(bits, np.uint32).view(np.float32), np.array(special, np.float32)):
        with np.errstate(invalid="ignore"):
            assert of(jnp.asarray(x), rounded=True) == of(jnp.asarray(x.astype(jnp.bfloat16)), rounded=True)
    assert fingerprints({"x": np.zeros(3, np.int32)}, rounded=True) == {}


def test_it_is_the_same_however_the_array_is_cut():
    assert "one fingerprint" in run_on_eight_devices("fingerprint_checks")
