"""Checkpoints on Orbax that are whole or not there, by checksums of our own.

Orbax raises on a truncated file but restores a flipped byte silently, so a step counts only once `checksums.json` lies
in its folder: written last, it holds the size of every file and the SHA-256 of the small ones, shape, dtype and
fingerprint of every leaf, the caller's meta, and a hash of itself. A kill at any moment leaves the last step that has
it. Values are not read to be checked: their fingerprints are taken on the devices, before and after.

    <directory>/00000010/{Orbax's files}, checksums.json

A tree is stored flat, leaf by leaf under its path ("opt_state/0/mu/model/norm/weight"). The structure comes from the
tree that the caller restores into, so NamedTuples of optax and empty states need no code here.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from ctpd_jax.artifacts import PARTIAL, Broken, canonical_json, local_path, seal, unseal
from ctpd_jax.errors import UserError
from ctpd_jax.processes.loops import let_go
from ctpd_jax.sharding import all_processes, barrier, first_process, gathered, patiently, spread, told_by_first
from ctpd_jax.train.fingerprint import fingerprints

CHECKSUMS = "checksums.json"
READ_AGAIN = 2**20  # bytes up to which a file's SHA-256 is taken; larger ones hold values, which have fingerprints
_STEP = re.compile(r"\d{8,}")
_UNFINISHED = re.compile(r"\d{8,}\.orbax-checkpoint-tmp.*")  # what Orbax calls a step until it is committed

# How TensorStore speaks of bytes that nobody wrote so.
_NOT_AS_WRITTEN = re.compile(r"\b(FAILED_PRECONDITION|DATA_LOSS|INVALID_ARGUMENT|OUT_OF_RANGE)\b")

PyTree = Any
Shape = tuple[list[int], str]  # of a leaf: sizes and dtype, as JSON holds them


# ---------------------------------------------------------------------------------------------- trees


def abstract(tree: PyTree) -> PyTree:
    """Return what `tree` is restored into: jax.ShapeDtypeStruct for its JAX arrays, everything else as it is."""

    def leaf(x: Any) -> Any:
        if not isinstance(x, jax.Array):
            return x
        # An array that nobody placed on purpose goes wherever JAX likes, also when it comes back.
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding if x.committed else None)

    return jax.tree.map(leaf, tree)


def _named_leaves(tree: PyTree) -> dict[str, Any]:
    """Return {"opt_state/0/mu/w": leaf}, in the tree's order."""
    named: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name in named:
            raise ValueError(f"Two leaves of the tree have the same path {name!r}; rename one of the keys.")
        named[name] = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    return named


def _shapes(leaves: Mapping[str, Any]) -> dict[str, Shape]:
    return {name: (list(np.shape(leaf)), str(np.dtype(leaf.dtype))) for name, leaf in leaves.items()}


def _with_values(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out the arrays of size zero, which Orbax refuses; their shape and dtype are in the checksums file."""
    return {name: leaf for name, leaf in leaves.items() if leaf.size}


def _check_leaves(where: Path, stored: Mapping[str, Shape], wanted: Mapping[str, Shape], cast: bool) -> None:
    """Raise UserError naming the first leaf that is missing, unasked for, or of another shape or dtype.

    With `cast` a float32 may be wanted as bfloat16.
    """
    # Both ways: a leaf too many is as wrong as one that is missing.
    for name in [*wanted, *stored]:
        if name not in wanted or name not in stored:
            what = f"no leaf {name!r}" if name in wanted else f"a leaf {name!r} that nobody asked for"
            raise UserError(f"The checkpoint {where} has {what}; another model or optimizer wrote it.")
        (shape, dtype), (stored_shape, stored_dtype) = wanted[name], stored[name]
        rounded = cast and (stored_dtype, dtype) == ("float32", "bfloat16")
        if stored_shape != shape or (stored_dtype != dtype and not rounded):
            raise UserError(
                f"The leaf {name!r} is {stored_dtype}{stored_shape} in the checkpoint {where}, but {dtype}{shape} is "
                "wanted; restore with the settings it was saved with, or start in another folder."
            )


def _unseal_patiently(folder: Path) -> dict[str, Any]:
    """Return what `seal` wrote of a folder that another process may just have written (see `patiently`)."""

    def look() -> dict[str, Any] | None:
        with contextlib.suppress(Broken):
            return unseal(folder / CHECKSUMS)
        return None

    return patiently(look) or unseal(folder / CHECKSUMS)


def _remove(folder: Path) -> None:
    # The seal goes first: a removal cut short must not leave what looks whole.
    (folder / CHECKSUMS).unlink(missing_ok=True)
    shutil.rmtree(folder)


def _remove_broken(folder: Path, reason: str) -> None:
    warnings.warn(f"Removed the checkpoint {folder}, which is not whole: {reason}.", stacklevel=5)
    _remove(folder)


# ---------------------------------------------------------------------------------------------- restoring


def _restore(
    folder: Path, record: Mapping[str, Any], target: PyTree, alone: bool = False, cast: bool = False
) -> PyTree:
    """Read every leaf: NumPy where NumPy is wanted, else a JAX array with the sharding asked for.

    Bit for bit; where another dtype is asked for, Orbax rounds on the host, and nothing wider goes to the device.
    Without a sharding it lies on the default device, uncommitted, as if `jnp` had made it.

    Raises:
        UserError: leaves that are not those of `target`.
        Broken: what was read is not what was written; of several processes that read together all of them say so.
    """
    # 1. The leaves must be those that are wanted. Orbax would fill in, or leave out, without a word.
    wanted = _named_leaves(abstract(target))
    _check_leaves(folder, record["leaves"], _shapes(wanted), cast)
    # 2. Each process reads for itself, so that one that cannot does not leave the others waiting in Orbax.
    failed, leaves = "", {}
    try:
        leaves = {name: _placed(wanted[name], value) for name, value in _read(folder, wanted).items()}
    except Exception as error:  # Orbax wraps what TensorStore says in a plain one
        said = str(error.__cause__ or error) if isinstance(error.__cause__ or error, ValueError) else ""
        # A disk that has gone, or memory, says nothing about the checkpoint.
        if not _NOT_AS_WRITTEN.search(said):
            raise
        failed = f"{folder} is damaged ({said.strip().splitlines()[0]})"
        let_go(error)
    _agree(failed, alone)
    # 3. Every device gets its part over the links, and says what it holds.
    for name, leaf in wanted.items():  # one by one: pieces and wholes would be too much for a device
        leaf = leaves[name] = gathered(leaves.pop(name), getattr(leaf, "sharding", None))
        rounded = str(leaf.dtype) != record["leaves"][name][1]
        noted = record.get("rounded" if rounded else "values")
        if noted and fingerprints({name: leaf}, rounded)[name] != noted[name]:  # earlier versions hashed every file
            failed = f"{folder} is damaged (the values of {name} are not those that were saved)"
    _agree(failed, alone)
    # 4. Each goes to its place in the target's structure.
    return jax.tree.unflatten(jax.tree.structure(target), [leaves[name] for name in wanted])


def _read(folder: Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Read this process's parts of all leaves, each part once, and make those of size zero, which are not stored."""

    # What has no sharding comes to the host.
    def arguments(leaf: Any) -> ocp.RestoreArgs:
        sharding = getattr(leaf, "sharding", None)
        if sharding is None:
            return ocp.RestoreArgs(restore_type=np.ndarray, dtype=np.dtype(leaf.dtype))
        return ocp.ArrayRestoreArgs(sharding=spread(sharding, leaf.shape), global_shape=leaf.shape, dtype=leaf.dtype)

    # Orbax waits for all processes unless it is told who takes part.
    options, me = {}, jax.process_index()
    if jax.process_count() > 1:
        options["multiprocessing_options"] = ocp.options.MultiprocessingOptions(
            primary_host=me, active_processes={me}, barrier_sync_key_prefix=str(me)
        )
    stored = _with_values(wanted)
    restore_args = {name: arguments(leaf) for name, leaf in stored.items()}
    with ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(), **options) as checkpointer:
        values = checkpointer.restore(folder, args=ocp.args.PyTreeRestore(item=stored, restore_args=restore_args))
    return values | {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in wanted.items() if name not in stored}


def _placed(leaf: Any, value: Any) -> Any:
    if isinstance(value, jax.Array) or isinstance(leaf, np.ndarray | np.generic):
        return value
    if leaf.sharding is not None:
        return jax.make_array_from_callback(value.shape, leaf.sharding, lambda index: value[index])
    # JAX would halve 64-bit values: those stay with NumPy.
    representable = jax.dtypes.canonicalize_dtype(value.dtype) == value.dtype
    return jnp.asarray(value) if representable else value


def _agree(failed: str, alone: bool) -> None:
    """Raise Broken where this process, or one of those that read with it, `failed`."""
    fine = not failed
    if not (fine if alone else all_processes(fine)):
        raise Broken(failed or "another process could not read it")


# ---------------------------------------------------------------------------------------------- steps of a run


class Checkpoints:
    """The `keep` newest steps of a run in `directory`. One object per folder and run; use `with`, or `close()`.

    On several hosts the folder is shared, every host makes every call, and the first one judges, seals and removes.
    """

    def __init__(self, directory: str | os.PathLike[str], keep: int = 2) -> None:
        self.directory = local_path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self.keep = keep
        self._checkpointer = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())
        self._background = ThreadPoolExecutor(1)  # seals a step as soon as Orbax has committed it
        self._sealing: Future[None] | None = None

    def save(self, step: int, tree: PyTree) -> None:
        """Start saving `tree` as `step`; return once its values are safe from donation.

        Waits for the save before it, and raises what went wrong there. A step that exists already is replaced.
        """
        # 1. What cannot be saved fails here, not in the background.
        leaves = _named_leaves(tree)
        content = {"meta": {}, "leaves": _shapes(leaves), "values": fingerprints(leaves)}
        # 2. The place must be free.
        self.wait()
        folder = self._folder(step)
        if folder.exists() and first_process():
            _remove(folder)
        barrier(f"ctpd-save-{step}")
        # 3. Orbax copies the values and writes on its own; the seal follows.
        self._checkpointer.save(folder, args=ocp.args.PyTreeSave(_with_values(leaves)))
        self._sealing = self._background.submit(self._seal_committed, step, content)

    def wait(self) -> None:
        """Block until the step being saved is whole on disk; raise what went wrong in the background."""
        if self._sealing is not None:
            sealing, self._sealing = self._sealing, None
            sealing.result()

    def steps(self) -> list[int]:
        """Return the steps that carry checksums, oldest first; only `restore_latest` checks their files."""
        return [step for step, folder in self._step_folders() if (folder / CHECKSUMS).is_file()]

    def restore_latest(self, target: PyTree) -> PyTree | None:
        """Return the tree of the newest whole step, or None. Remove newer ones, with a warning each.

        `target` gives the structure, and per leaf shape, dtype and sharding: jax.ShapeDtypeStruct (see `abstract`) or
        arrays. Raises UserError naming the leaf that differs.
        """
        self.wait()
        doubted = None
        while True:
            # One process judges: each from its own view of a shared folder could take another step.
            step = told_by_first(self._newest_whole_step)
            if step is None:
                return None
            folder = self._folder(step)
            record = _unseal_patiently(folder)
            try:
                return _restore(folder, record, target)
            except Broken as reason:
                # What is removed is lost: it has to be found broken twice.
                if step == doubted:
                    told_by_first(partial(_remove_broken, folder, str(reason)))
                doubted = step

    def close(self) -> None:
        """Wait, then free Orbax's threads."""
        try:
            self.wait()
        finally:
            self._background.shutdown()
            self._checkpointer.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _folder(self, step: int) -> Path:
        return self.directory / f"{step:08d}"

    def _step_folders(self) -> list[tuple[int, Path]]:
        return sorted((int(p.name), p) for p in self.directory.iterdir() if _STEP.fullmatch(p.name))

    def _seal_committed(self, step: int, content: Mapping[str, Any]) -> None:
        """Run in the background: a step is whole as early as it can be, not only when somebody next waits."""
        self._checkpointer.wait_until_finished()
        if not first_process():
            return
        seal(self._folder(step) / CHECKSUMS, content, READ_AGAIN)
        whole = self.steps()
        kept = {step, *whole[-self.keep :]}
        for other, folder in self._step_folders():
            # An older one without a seal is what a removal cut short has left.
            if other not in kept and (other in whole or other < step):
                _remove(folder)

    def _newest_whole_step(self) -> int | None:
        # Orbax renames a step when it is committed.
        for path in self.directory.iterdir():
            if _UNFINISHED.fullmatch(path.name):
                warnings.warn(f"Removed {path}: the process ended while it was being written.", stacklevel=4)
                shutil.rmtree(path)
        # From the newest backwards, up to the first that is whole.
        for step, folder in reversed(self._step_folders()):
            try:
                unseal(folder / CHECKSUMS)
                return step
            except Broken as reason:
                _remove_broken(folder, str(reason))
        return None


# ---------------------------------------------------------------------------------------------- parameters of a stage


def save_params(directory: str | os.PathLike[str], params: PyTree, meta: Mapping[str, Any] | None = None) -> None:
    """Write a nested dict of arrays and its `meta` (plain JSON) as the folder `directory`, replacing what was there.

    Whole or not there: written and sealed beside, then renamed. Bit exact; sharded arrays are never gathered.
    """
    final = local_path(directory)
    beside, old = final.with_name(final.name + PARTIAL), final.with_name(final.name + ".old")
    leaves = _named_leaves(params)
    content = {"meta": dict(meta or {}), "leaves": _shapes(leaves)}
    canonical_json(content)
    # 1. The first process clears what a killed one has left.
    if first_process():
        final.parent.mkdir(parents=True, exist_ok=True)
        for leftover in (old, *final.parent.glob(f"{beside.name}*")):
            shutil.rmtree(leftover, ignore_errors=True)
    barrier(f"ctpd-params-begin-{final.name}")
    # 2. Every process writes its shards.
    told = {"values": fingerprints(leaves), "rounded": fingerprints(leaves, rounded=True)}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(beside, args=ocp.args.PyTreeSave(_with_values(leaves)))
    # 3. The first one seals the folder and puts it in its place.
    if first_process():
        seal(beside / CHECKSUMS, content | told, READ_AGAIN)
        if final.exists():
            os.rename(final, old)
        os.rename(beside, final)
        shutil.rmtree(old, ignore_errors=True)
    barrier(f"ctpd-params-end-{final.name}")


def read_meta(directory: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Return the meta of `save_params`, or None where no whole folder is; the first process's word for all."""

    def look() -> dict[str, Any] | None:
        with contextlib.suppress(Broken):
            return unseal(local_path(directory) / CHECKSUMS)["meta"]
        return None

    return told_by_first(look)


def load_params(
    directory: str | os.PathLike[str], target: PyTree, alone: bool = False, cast: bool = False, advice: str = ""
) -> PyTree:
    """Return the parameters of `save_params`, found to be those that were saved.

    `target` gives structure, shapes, dtypes and shardings as in `Checkpoints.restore_latest`. With `cast`, float32
    parameters fit a bfloat16 target and are rounded. Raises UserError if the folder is not there, is not whole, or does
    not fit `target` (naming the leaf). Of several processes all load together, unless `alone` says that this one loads
    for itself, onto its own devices.
    """
    folder = local_path(directory)
    if not patiently(lambda: folder.is_dir() or None):
        raise UserError(f"There are no parameters at {folder}; remove {folder.parent} and run its stage.")
    try:
        return _restore(folder, _unseal_patiently(folder), target, alone, cast)
    except Broken as reason:
        advice = advice or f"Remove {folder.parent} and run its stage again."
        raise UserError(f"The parameters at {folder} are not whole: {reason}. {advice}") from None
