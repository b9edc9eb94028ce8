"""Prepared pairs in the workdir: made once, mapped into memory by every later stage, restart and process.

WORKDIR/prepared/SPLIT/values.npy   int32 [N]: every array of every pair, one behind the other
                      /ends.npy     int64 [pairs, ARRAYS]: where each of them ends in `values`
                      /numbers.npy  int64 [pairs, 5]: bytes of the responses, what was cut of them and of the prompt
                      /worth.npy    float64 [pairs, 2]: weight and margin, which is NaN where there is none
                      /told.json    the pairs' ids, and what was counted on the way
                      /seal.json    what they were made from, and checksums
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from ctpd_jax.artifacts import first_difference, read_record, replacing_folder, seal, unseal, write_record
from ctpd_jax.errors import UserError
from ctpd_jax.schema import CHOSEN, REJECTED, Aligned, AlignedPair, Counters, PreferencePair, TokenSide

SEAL = "seal.json"
ARRAYS = 12  # of a pair: two prompts, then bounds and both models' ids and span ids of the chosen and the rejected


class PreparedPairs(Sequence[AlignedPair]):
    """Pairs whose arrays are read from the disk when they are looked at."""

    def __init__(
        self, ids: Sequence[str], values: np.ndarray, ends: np.ndarray, numbers: np.ndarray, worth: np.ndarray
    ) -> None:
        self._ids, self._values, self._numbers, self._worth = ids, values, numbers, worth
        self._bounds = np.concatenate([np.zeros(1, np.int64), ends.ravel()])

    def __len__(self) -> int:
        return len(self._ids)

    @overload
    def __getitem__(self, place: int) -> AlignedPair: ...
    @overload
    def __getitem__(self, place: slice) -> list[AlignedPair]: ...
    def __getitem__(self, place: int | slice) -> AlignedPair | list[AlignedPair]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        i = range(len(self))[place]
        own = self._bounds[ARRAYS * i : ARRAYS * (i + 1) + 1].tolist()
        teacher_prompt, student_prompt, *arrays = (self._values[a:b] for a, b in itertools.pairwise(own))
        chosen, rejected = (Aligned(a[0], TokenSide(*a[1:3]), TokenSide(*a[3:])) for a in (arrays[:5], arrays[5:]))
        chosen_bytes, rejected_bytes, chosen_cut, rejected_cut, dropped = self._numbers[i].tolist()
        weight, margin = self._worth[i].tolist()
        return AlignedPair(
            self._ids[i], teacher_prompt, student_prompt, chosen, rejected, chosen_bytes, rejected_bytes,
            (bool(chosen_cut), bool(rejected_cut)), dropped, weight, None if math.isnan(margin) else margin,
        )  # fmt: skip


def digest(pairs: Iterable[PreferencePair]) -> str:
    """Return the SHA-256 over all that is known of pairs that are to be prepared: texts, and where they stand."""
    found = hashlib.sha256()
    for pair in pairs:
        found.update(repr(pair).encode(errors="backslashreplace"))
    return found.hexdigest()


def prepared_once(
    folder: Path,
    made_from: Mapping[str, Any],
    prepare: Callable[[], tuple[list[AlignedPair], Counters]],
    writes: bool,
) -> tuple[Sequence[AlignedPair], Counters]:
    """Return what lies in `folder` if it was made from the same things; else prepare it, and if it `writes`, keep it.

    Several processes: the first one writes, the others come after it (job.preflight.in_turn).
    """
    if found := read(folder, made_from):
        return found
    made = prepare()
    if not writes:
        return made
    write(folder, *made, made_from)
    return read(folder, made_from) or made  # the memory that they took is free again


def write(folder: Path, pairs: Sequence[AlignedPair], counters: Counters, made_from: Mapping[str, Any]) -> None:
    """Write pairs and what was counted of them as `folder`, which is whole or not there."""
    arrays = [_arrays(pair) for pair in pairs]
    numbers = [(pair.chosen_bytes, pair.rejected_bytes, *pair.truncated, pair.dropped) for pair in pairs]
    worth = [(pair.weight, math.nan if pair.margin is None else pair.margin) for pair in pairs]
    told = {"ids": [pair.id for pair in pairs], "counts": counters.counts, "notes": counters.notes}
    with replacing_folder(folder, SEAL, "a folder of prepared pairs", ours=lambda name: True) as beside:
        lengths = np.array([[len(array) for array in own] for own in arrays], np.int64)
        np.save(beside / "values.npy", np.concatenate([array for own in arrays for array in own]).astype(np.int32))
        np.save(beside / "ends.npy", np.cumsum(lengths).reshape(lengths.shape))
        np.save(beside / "numbers.npy", np.array(numbers, np.int64))
        np.save(beside / "worth.npy", np.array(worth, np.float64))
        write_record(beside / "told.json", told)
        seal(beside / SEAL, {"made_from": dict(made_from)})


def read(folder: Path, made_from: Mapping[str, Any]) -> tuple[PreparedPairs, Counters] | None:
    """Return what lies in `folder` if it was made from the same things and is whole; None: prepare them."""
    # Whatever is wrong with it, it can be made again.
    with contextlib.suppress(UserError):
        if first_difference(dict(made_from), unseal(folder / SEAL)["made_from"], exactly=True) is None:
            return _mapped(folder)
    return None


def _mapped(folder: Path) -> tuple[PreparedPairs, Counters]:
    told = read_record(folder / "told.json") or {}  # which the seal has vouched for
    names = ("values", "ends", "numbers", "worth")
    mapped = (np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False).view(np.ndarray) for name in names)
    return PreparedPairs(told["ids"], *mapped), Counters(told["counts"], told["notes"])


def _arrays(pair: AlignedPair) -> list[np.ndarray]:
    """The arrays of a pair in the order of the file."""
    found = [pair.teacher_prompt, pair.student_prompt]
    for side in (CHOSEN, REJECTED):
        own = pair.response(side)
        found += [own.bounds, own.teacher.ids, own.teacher.span_ids, own.student.ids, own.student.span_ids]
    return found
