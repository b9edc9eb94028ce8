"""How a data set is cut, against counts by hand."""

from __future__ import annotations

import numpy as np
import pytest

from ctpd_jax.schema import Aligned, AlignedPair, PreferencePair, TokenSide
from ctpd_jax.text.statistics import script_of, span_statistics


def aligned(teacher: list[int], student: list[int], sizes: list[int]) -> Aligned:
    """Spans with so many tokens of the teacher, of the student, and so many bytes."""
    sides = [TokenSide(np.zeros(sum(own), np.int32), np.repeat(np.arange(len(own)), own)) for own in (teacher, student)]
    return Aligned(np.cumsum([0, *sizes]).astype(np.int32), *sides)


def test_figures_by_hand():
    prompt = np.zeros(1, np.int32)
    pair = AlignedPair(
        "a",
        prompt,
        prompt,
        chosen=aligned([1, 1, 2, 2], [1, 3, 1, 2], [4, 4, 4, 4]),
        rejected=aligned([1], [1], [8]),
        chosen_bytes=32,
        rejected_bytes=8,
        truncated=(True, False),
    )
    found = span_statistics([pair], {"a": PreferencePair("a", (), "x" * 32, "слово во")})
    assert found["chosen"] == {
        "responses": 1,
        "spans": 4,
        **dict.fromkeys(("one_one", "one_many", "many_one", "many_many"), 0.25),
        "teacher": 1.5,
        "student": 1.75,
        "bytes_kept": 0.5,
        "cut": 1.0,
    }
    assert found["all"]["one_one"] == pytest.approx(0.4) and found["all"]["bytes_kept"] == pytest.approx(0.6)
    assert found["latin"] == found["chosen"] and found["cyrillic"] == found["rejected"]
    # Every response is in one quarter of the lengths.
    assert sum(group["responses"] for name, group in found.items() if name.endswith("bytes")) == 2


@pytest.mark.parametrize(
    ("text", "script"), [("abc дж", "latin"), ("你好 a", "cjk"), ("١٢ 🥐", "no letters"), ("مرحبا", "arabic")]
)
def test_the_script_of_a_text(text, script):
    assert script_of(text) == script
