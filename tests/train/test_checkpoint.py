"""Checkpoints are whole or not there, bit exact, and go where they are asked to."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ctpd_jax.artifacts import seal
from ctpd_jax.errors import UserError
from ctpd_jax.train import checkpoint as module
from ctpd_jax.train.checkpoint import CHECKSUMS, Checkpoints, abstract, load_params, read_meta, save_params


def make_state(step: int):
    """A state of every kind of leaf, its values a function of the step."""
    params = {
        "model": {
            "weight.with.dots": jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3) * step,
            "minus_zero": jnp.full((4,), -0.0),
            "special": jnp.array([jnp.nan, -jnp.nan, jnp.inf, 1e-42, step + 0.1], jnp.float32),
        }
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.constant_schedule(1e-3)))
    opt_state = optimizer.init(params)
    _, opt_state = optimizer.update(jax.tree.map(jnp.ones_like, params), opt_state, params)
    host = {"count": np.int64(2**40 + step), "table": np.array([True, False])}
    return {"params": params, "opt": opt_state, "step": jnp.int32(step), "empty": jnp.zeros((0, 3)), "host": host}


def bits(tree):
    return [(np.asarray(x).dtype, np.shape(x), np.asarray(x).tobytes()) for x in jax.tree.leaves(tree)]


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert bits(found) == bits(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        assert isinstance(a, jax.Array) == isinstance(b, jax.Array)


def save_steps(directory, *steps, keep=3):
    with Checkpoints(directory, keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step))


def largest_file(folder: Path) -> Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_state_comes_back_bit_for_bit_with_its_structure(tmp_path):
    save_steps(tmp_path, 7)
    with Checkpoints(tmp_path) as checkpoints:
        tree = checkpoints.restore_latest(abstract(make_state(0)))
        assert_same(tree, make_state(7))
        assert isinstance(tree["opt"][1][0], optax.ScaleByAdamState)
        assert_same(checkpoints.restore_latest(make_state(0)), make_state(7))  # concrete arrays do as a target


def test_an_empty_folder_has_no_step(tmp_path):
    with Checkpoints(tmp_path / "new") as checkpoints:
        assert checkpoints.restore_latest(abstract(make_state(0))) is None
        assert checkpoints.steps() == []


def test_the_newest_are_kept_and_foreign_files_stay(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "backup").mkdir()
    save_steps(tmp_path, 1, 2, 3, 4, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000003", "00000004", "backup", "notes.txt"]


def test_a_step_that_exists_is_replaced(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": jnp.zeros(3)})
        checkpoints.save(1, {"x": jnp.ones(3)})
        tree = checkpoints.restore_latest({"x": jax.ShapeDtypeStruct((3,), jnp.float32)})
        assert (checkpoints.steps(), tree["x"].tolist()) == ([1], [1, 1, 1])


def test_a_step_becomes_whole_without_anybody_waiting(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(1))
        deadline = time.monotonic() + 60
        while not (tmp_path / "00000001" / CHECKSUMS).exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert checkpoints.steps() == [1]


def test_values_may_be_donated_as_soon_as_save_returns(tmp_path):
    spoil = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    value = jax.device_put(jnp.arange(1 << 20, dtype=jnp.float32))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": value})
        spoiled = spoil(value).block_until_ready()
        tree = checkpoints.restore_latest({"x": jax.ShapeDtypeStruct(spoiled.shape, spoiled.dtype)})
    np.testing.assert_array_equal(tree["x"], np.arange(1 << 20, dtype=np.float32))


def damage_flip(folder):
    path = largest_file(folder)
    flip(path, path.stat().st_size // 2)


def damage_truncate(folder):
    path = largest_file(folder)
    path.write_bytes(path.read_bytes()[:-1])


def damage_missing_file(folder):
    largest_file(folder).unlink()


def damage_no_checksums(folder):
    (folder / CHECKSUMS).unlink()


def damage_half_written(folder):
    for path in sorted(p for p in folder.rglob("*") if p.is_file())[::2]:
        path.unlink()
    (folder / CHECKSUMS).unlink(missing_ok=True)


def damage_seal(folder):
    path = folder / CHECKSUMS
    path.write_bytes(path.read_bytes().replace(b'"meta":{}', b'"meta":{"step":4}'))


def damage_checksums_truncated(folder):
    path = folder / CHECKSUMS
    path.write_bytes(path.read_bytes()[:40])


def damage_checksums_no_object(folder):
    (folder / CHECKSUMS).write_text("[1]")


DAMAGES = [value for name, value in dict(globals()).items() if name.startswith("damage_")]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_a_damaged_newest_step_goes_with_a_warning_and_the_one_before_is_used(tmp_path, damage):
    save_steps(tmp_path, 1, 2, 3)
    damage(tmp_path / "00000003")
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        with pytest.warns(UserWarning, match="00000003"):
            tree = checkpoints.restore_latest(abstract(make_state(0)))
        assert_same(tree, make_state(2))
        assert not (tmp_path / "00000003").exists()
        checkpoints.save(3, make_state(3))  # and the step can be taken again
        assert checkpoints.restore_latest(abstract(make_state(0)))["step"] == 3


def test_every_flipped_byte_of_every_file_is_noticed(tmp_path):
    folder, target = tmp_path / "params", abstract(make_state(0)["params"])
    save_params(folder, make_state(1)["params"])
    files = [p for p in folder.rglob("*") if p.is_file()]
    assert len(files) > 3
    for path in files:
        for at in {0, path.stat().st_size // 2, path.stat().st_size - 1} if path.stat().st_size else set():
            flip(path, at)
            with pytest.raises(UserError, match="not whole"):
                load_params(folder, target)
            flip(path, at)
    assert bits(load_params(folder, target)) == bits(make_state(1)["params"])


needs_proc = pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the bytes read stand in Linux's /proc")


def read_so_far() -> int:
    """The bytes that this process has read, from files and else."""
    return int(Path("/proc/self/io").read_text().split()[1])


def large_state(step: int):
    values = np.random.default_rng(step).normal(size=(3, 1000, 400)).astype(np.float32)
    return {"large": jnp.asarray(values), "small": jnp.arange(5) + step}


@needs_proc
def test_values_are_not_read_to_be_checked_and_once_to_be_restored(tmp_path):
    size = large_state(0)["large"].nbytes
    with Checkpoints(tmp_path) as checkpoints:
        before = read_so_far()
        for step in (1, 2):
            checkpoints.save(step, large_state(step))
        checkpoints.wait()
        assert read_so_far() - before < size / 20
        before = read_so_far()
        assert_same(checkpoints.restore_latest(abstract(large_state(0))), large_state(2))
        assert read_so_far() - before < 1.05 * size


def test_a_flipped_byte_of_a_large_file_never_gives_another_value(tmp_path):
    save_params(tmp_path / "params", {"params": large_state(1)})
    path = max((p for p in (tmp_path / "params").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    record = json.loads((tmp_path / "params" / CHECKSUMS).read_text())["files"]
    assert record[path.relative_to(tmp_path / "params").as_posix()] == [path.stat().st_size, ""]  # no SHA-256
    target = abstract({"params": large_state(0)})
    narrow = {"params": target["params"] | {"large": jax.ShapeDtypeStruct((3, 1000, 400), jnp.bfloat16)}}
    rounded = load_params(tmp_path / "params", narrow, cast=True)
    assert_same(rounded["params"]["large"], large_state(1)["large"].astype(jnp.bfloat16))
    # Either it is refused, or nothing of the values has changed: the file ends with bytes that mean nothing, and
    # rounding takes away what may be wrong.
    rng, refused = np.random.default_rng(0), [0, 0]
    for at in [0, path.stat().st_size - 1, *rng.integers(path.stat().st_size, size=20).tolist()]:
        flip(path, at)
        for kind, (wanted, right) in enumerate([(target, {"params": large_state(1)}), (narrow, rounded)]):
            try:
                assert_same(load_params(tmp_path / "params", wanted, cast=True), right)
            except UserError as error:
                assert "not whole" in str(error)
                refused[kind] += 1
        flip(path, at)
    assert refused[0] >= 20 and refused[1] > 3


@pytest.mark.parametrize("damage", [damage_flip, damage_truncate, damage_missing_file], ids=lambda f: f.__name__)
def test_a_large_step_that_is_damaged_goes_and_the_one_before_is_used(tmp_path, damage):
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, large_state(step))
        checkpoints.wait()
        damage(tmp_path / "00000002")
        with pytest.warns(UserWarning, match="00000002"):
            assert_same(checkpoints.restore_latest(abstract(large_state(0))), large_state(1))
        assert checkpoints.steps() == [1]


DAMAGED = """
import sys, jax.numpy as jnp, numpy as np
from pathlib import Path
from ctpd_jax.train.checkpoint import Checkpoints, abstract
tree = {f"x{i}": jnp.asarray(np.random.default_rng(i).normal(size=(3, 300, 400)).astype(np.float32)) for i in range(8)}
with Checkpoints(sys.argv[1]) as checkpoints:
    for step in (1, 2):
        checkpoints.save(step, tree)
    checkpoints.wait()
    path = max((p for p in Path(sys.argv[1], "00000002").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[4] ^= 1  # where a compressed piece begins: it cannot be read at all, while others are being read
    path.write_bytes(data)
    checkpoints.restore_latest(abstract(tree))
    print(checkpoints.steps())
"""


def test_of_a_damaged_step_nothing_is_said_but_the_warning(tmp_path):
    done = subprocess.run([sys.executable, "-c", DAMAGED, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.stdout == "[1]\n", done.stderr
    told = done.stderr.strip().splitlines()
    assert len(told) == 1 and "Removed the checkpoint" in told[0] and "ZSTD" in told[0], done.stderr


def test_a_checkpoint_of_an_earlier_version_is_read_by_its_files(tmp_path):
    folder, target = tmp_path / "params", abstract(make_state(0)["params"])
    save_params(folder, make_state(1)["params"])
    record = json.loads((folder / CHECKSUMS).read_text())
    for name in ("values", "rounded", "files", "sha256"):
        del record[name]
    seal(folder / CHECKSUMS, record | {"format": 1})
    assert bits(load_params(folder, target)) == bits(make_state(1)["params"])
    flip(largest_file(folder), 10)
    with pytest.raises(UserError, match="not whole"):
        load_params(folder, target)


def test_what_cannot_be_read_for_another_reason_is_not_removed(tmp_path, monkeypatch):
    save_steps(tmp_path, 1)
    for error in (OSError("the share has gone"), ValueError("NOT_FOUND: no file"), MemoryError()):

        def fail(*_, error=error):
            raise error

        with Checkpoints(tmp_path) as checkpoints, monkeypatch.context() as patch:
            patch.setattr(module, "_read", fail)
            with pytest.raises(type(error)):
                checkpoints.restore_latest(abstract(make_state(0)))
    # And what was misread once is read again.
    read, times = module._read, []

    def misread(*arguments):
        found = read(*arguments)
        times.append(1)
        return found | {"step": found["step"] + 1} if len(times) == 1 else found

    monkeypatch.setattr(module, "_read", misread)
    with Checkpoints(tmp_path) as checkpoints:
        assert_same(checkpoints.restore_latest(abstract(make_state(0))), make_state(1))
    assert len(times) == 2


def test_parameters_that_are_no_numbers_are_not_called_damaged(tmp_path):
    values = np.array([np.nan, -np.nan, np.inf, 1e-42, 3.4e38, 1.00390625], np.float32)
    values[0:1].view(np.uint32)[0] |= 7  # what a NaN carries
    save_params(tmp_path / "params", {"x": jnp.asarray(values)})
    narrow = {"x": jax.ShapeDtypeStruct(values.shape, jnp.bfloat16)}
    found = np.asarray(load_params(tmp_path / "params", narrow, cast=True)["x"])
    np.testing.assert_array_equal(found.astype(np.float32), values.astype(jnp.bfloat16).astype(np.float32))


def test_two_damaged_steps_fall_back_twice_and_all_damaged_is_none(tmp_path):
    save_steps(tmp_path, 1, 2, 3)
    damage_flip(tmp_path / "00000003")
    damage_truncate(tmp_path / "00000002")
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.warns(UserWarning):
            assert checkpoints.restore_latest(abstract(make_state(0)))["step"] == 1
        damage_no_checksums(tmp_path / "00000001")
        with pytest.warns(UserWarning):
            assert checkpoints.restore_latest(abstract(make_state(0))) is None


def test_what_orbax_left_unfinished_is_removed_by_name(tmp_path):
    save_steps(tmp_path, 1)
    unfinished = tmp_path / "00000002.orbax-checkpoint-tmp-1234"
    (unfinished / "d").mkdir(parents=True)
    with Checkpoints(tmp_path) as checkpoints, pytest.warns(UserWarning, match="00000002.orbax"):
        assert checkpoints.restore_latest(abstract(make_state(0)))["step"] == 1
    assert not unfinished.exists()


def test_a_step_of_another_version_is_refused_and_stays(tmp_path):
    save_steps(tmp_path, 1, 2)
    seal(tmp_path / "00000002" / CHECKSUMS, {"format": 99, "meta": {}, "leaves": {}})
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(UserError, match="format 99"):
            checkpoints.restore_latest(abstract(make_state(0)))
        assert checkpoints.steps() == [1, 2]


def mutate(change):
    target = abstract(make_state(0))
    change(target)
    return target


@pytest.mark.parametrize(
    ("change", "leaf"),
    [
        (lambda t: t["params"]["model"].update(minus_zero=jax.ShapeDtypeStruct((5,), jnp.float32)), "model/minus_zero"),
        (lambda t: t["params"]["model"].update(minus_zero=jax.ShapeDtypeStruct((4,), jnp.int32)), "model/minus_zero"),
        (lambda t: t["params"]["model"].update(more=jax.ShapeDtypeStruct((4,), jnp.int32)), "params/model/more"),
        (lambda t: t["params"]["model"].pop("special"), "params/model/special"),
        (lambda t: t.update(empty=jax.ShapeDtypeStruct((0, 4), jnp.float32)), "empty"),
        (lambda t: t.update(opt=optax.sgd(0.1, momentum=0.9).init(t["params"])), "opt/"),
    ],
    ids=["shape", "dtype", "missing", "unasked", "empty", "optimizer"],
)
def test_a_leaf_that_does_not_fit_is_named_and_nothing_is_removed(tmp_path, change, leaf):
    save_steps(tmp_path, 1)
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(UserError, match=leaf):
            checkpoints.restore_latest(mutate(change))
        assert checkpoints.steps() == [1]


def test_an_error_in_the_background_is_raised_by_the_next_call(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(module, "seal", fail)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"x": jnp.zeros(3)})
    with pytest.raises(OSError, match="disk full"):
        checkpoints.wait()
    checkpoints.close()
    assert checkpoints.steps() == []


def test_what_cannot_be_saved_fails_at_once(tmp_path):
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(ValueError, match="same path"):
        checkpoints.save(1, {"a/b": jnp.zeros(3), "a": {"b": jnp.zeros(3)}})
    with pytest.raises(ValueError, match="JSON"):
        save_params(tmp_path / "params", {"x": jnp.zeros(3)}, {"loss": float("nan")})
    with pytest.raises(UserError, match="gs://bucket"):
        Checkpoints("gs://bucket/run")


# ---------------------------------------------------------------------------------------------- kill -9

CHILD = """
import sys
import jax.numpy as jnp
import numpy as np
from ctpd_jax.train.checkpoint import Checkpoints
with Checkpoints(sys.argv[1], keep=2) as checkpoints:
    found = checkpoints.restore_latest({"x": np.zeros(2000, np.float32)})
    first = int(found["x"][0]) + 1 if found else 0
    for step in range(first, first + 100_000):
        checkpoints.save(step, {"x": jnp.full(2000, step, jnp.float32)})
        print(step, flush=True)
"""


def test_a_kill_at_any_moment_leaves_whole_steps_only(tmp_path):
    """Each run goes on from the last; the kills fall at different moments of writing, sealing and pruning."""
    last = -1
    for number, delay in enumerate((0.0, 0.004, 0.011, 0.019)):
        child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for line in child.stdout:
            if int(line) >= last + 4 + number:
                break
        time.sleep(delay)
        child.kill()
        printed = [int(line) for line in child.stdout] or [int(line)]
        assert child.wait() == -signal.SIGKILL
        with Checkpoints(tmp_path) as checkpoints, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = checkpoints.restore_latest({"x": np.zeros(2000, np.float32)})
            step = checkpoints.steps()[-1]
        assert set(tree["x"].tolist()) == {step}
        assert step >= printed[-1] - 1  # `save` waits for the save before it: at most the last one is lost
        assert step > last
        last = step


class Dead(BaseException):
    """From here on the process changes no name on the disk any more."""


def die_at(patch: pytest.MonkeyPatch, moment: int) -> list[int]:
    """From the `moment`-th rename, unlink or removal on, every one of them raises. Returns the count so far, [n]."""
    count = [0]

    def dying(function):
        def call(*args, **kwargs):
            count[0] += 1
            if count[0] >= moment:
                raise Dead
            return function(*args, **kwargs)

        return call

    for owner, name in ((os, "replace"), (os, "rename"), (os, "unlink"), (os, "rmdir"), (shutil, "rmtree")):
        patch.setattr(owner, name, dying(getattr(owner, name)))
    return count


def test_a_death_at_each_change_of_a_name_leaves_whole_steps_only(tmp_path, monkeypatch):
    """For every rename, unlink and removal of a save with keep=1: what lies on the disk if the process ends there."""
    seen = set()
    for moment in range(1, 100):
        folder = tmp_path / str(moment)
        with Checkpoints(folder, keep=1) as checkpoints:
            checkpoints.save(1, {"x": np.full(3, 1.0)})
        with monkeypatch.context() as patch:
            count = die_at(patch, moment)
            with contextlib.suppress(Dead), Checkpoints(folder, keep=1) as checkpoints:
                checkpoints.save(2, {"x": np.full(3, 2.0)})
        with Checkpoints(folder) as checkpoints, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = checkpoints.restore_latest({"x": np.zeros(3)})
            step = checkpoints.steps()[-1]
        assert tree["x"].tolist() == [step] * 3
        seen.add(step)
        if count[0] < moment:  # the save came to its end
            break
    assert seen == {1, 2} and moment > 4


# ---------------------------------------------------------------------------------------------- several devices

DEVICES = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from ctpd_jax.train.checkpoint import Checkpoints, abstract, load_params, save_params
assert jax.device_count() == 8
devices = np.array(jax.devices())
wide, square = Mesh(devices, ("d",)), Mesh(devices.reshape(4, 2), ("d", "t"))
x = np.arange(64 * 6, dtype=np.float32).reshape(64, 6)
tree = {
    "rows": jax.device_put(x, NamedSharding(wide, P("d"))),
    "both": jax.device_put(x.astype(jnp.bfloat16), NamedSharding(square, P("d", "t"))),
    "everywhere": jax.device_put(x, NamedSharding(wide, P())),
}
def check(found, target):
    for name in tree:
        assert found[name].sharding == target[name].sharding, name
        assert np.asarray(found[name]).tobytes() == np.asarray(tree[name]).tobytes(), name
other = {
    "rows": jax.ShapeDtypeStruct(x.shape, np.float32, sharding=NamedSharding(square, P("t", None))),
    "both": jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=NamedSharding(wide, P())),
    "everywhere": jax.ShapeDtypeStruct(x.shape, np.float32, sharding=NamedSharding(wide, P("d"))),
}
with Checkpoints(sys.argv[1]) as checkpoints:
    checkpoints.save(5, tree)
    check(checkpoints.restore_latest(abstract(tree)), tree)
    check(checkpoints.restore_latest(other), other)
save_params(sys.argv[1] + "/params", tree)
check(load_params(sys.argv[1] + "/params", other), other)
print("good")
"""


def test_sharded_arrays_are_saved_and_restored_to_any_sharding(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    done = subprocess.run([sys.executable, "-c", DEVICES, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "good", done.stderr
    # and with another number of devices: here, on one
    target = {name: jax.ShapeDtypeStruct((64, 6), jnp.float32) for name in ("rows", "everywhere")}
    target["both"] = jax.ShapeDtypeStruct((64, 6), jnp.bfloat16)
    with Checkpoints(tmp_path) as checkpoints:
        tree = checkpoints.restore_latest(target)
    for value in tree.values():
        np.testing.assert_array_equal(
            np.asarray(value, np.float32),
            np.arange(384, dtype=np.float32).reshape(64, 6).astype(value.dtype).astype(np.float32),
        )
        assert not value.committed


PROCESSES = """
import sys, warnings
import jax, jax.numpy as jnp, numpy as np
from pathlib import Path
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from ctpd_jax.train.checkpoint import Checkpoints, abstract, load_params, read_meta, save_params
def read_so_far():
    return int(Path("/proc/self/io").read_text().split()[1])
folder, port, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=rank)
assert jax.device_count() == 4 and jax.process_count() == 2
sharding = NamedSharding(Mesh(np.array(jax.devices()), ("d",)), P("d"))
x = np.arange(48, dtype=np.float32).reshape(8, 6)
def tree(k):
    return {"x": jax.make_array_from_callback(x.shape, sharding, lambda index: x[index] * k)}
def check(found, k):
    for shard in found["x"].addressable_shards:
        np.testing.assert_array_equal(shard.data, x[shard.index] * k)
with Checkpoints(folder, keep=2) as checkpoints:
    for step in (1, 2, 3):
        checkpoints.save(step, tree(step))
    check(checkpoints.restore_latest(abstract(tree(0))), 3)
    if rank == 0:
        (Path(folder) / "00000003" / "checksums.json").unlink()
    warnings.simplefilter("ignore")
    check(checkpoints.restore_latest(abstract(tree(0))), 2)
for k in (4, 5):
    save_params(folder + "/params", tree(k), {"k": k})
assert read_meta(folder + "/params") == {"k": 5}
check(load_params(folder + "/params", abstract(tree(0))), 5)
# Copies of a part, on both processes, are read once.
mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
values = np.random.default_rng(0).normal(size=(4, 500, 1000)).astype(np.float32)
for name, spec in {"cut": P(None, None, "fsdp"), "copies": P()}.items():
    place = NamedSharding(mesh, spec)
    whole = {"x": jax.make_array_from_callback(values.shape, place, lambda index: values[index])}
    with Checkpoints(f"{folder}/{name}") as checkpoints:
        checkpoints.save(1, whole)
        checkpoints.wait()
        before = read_so_far()
        found = checkpoints.restore_latest(abstract(whole))
    assert (read_so_far() - before) / values.nbytes < 0.55, (name, (read_so_far() - before) / values.nbytes)
    assert found["x"].sharding == place
    for shard in found["x"].addressable_shards:
        np.testing.assert_array_equal(shard.data, values[shard.index])
    # What one of them reads otherwise, all of them refuse.
    if rank == 0:
        files = [p for p in Path(f"{folder}/{name}/00000001").rglob("*") if p.is_file()]
        path = max(files, key=lambda p: p.stat().st_size)
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    with Checkpoints(f"{folder}/{name}") as checkpoints:
        assert checkpoints.restore_latest(abstract(whole)) is None
    assert not Path(f"{folder}/{name}/00000001").exists()
print("good")
"""


@needs_proc
def test_two_processes_share_one_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    children = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESSES, str(tmp_path), str(port), str(rank)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for child in children:
            out, errors = child.communicate(timeout=120)
            assert out.strip().endswith("good"), errors
    finally:
        for child in children:
            child.kill()
            child.wait()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000002", "copies", "cut", "params"]


# ---------------------------------------------------------------------------------------------- params


def test_params_come_back_and_are_replaced(tmp_path):
    folder = tmp_path / "deep" / "params"
    save_params(folder, make_state(1)["params"], {"stage": "sft"})
    save_params(folder, make_state(2)["params"], {"stage": "dpo"})
    assert read_meta(folder) == {"stage": "dpo"}
    assert_same(load_params(folder, abstract(make_state(0)["params"])), make_state(2)["params"])
    assert [p.name for p in folder.parent.iterdir()] == ["params"]


def test_params_that_are_damaged_missing_or_do_not_fit_are_refused_by_name(tmp_path):
    folder = tmp_path / "params"
    with pytest.raises(UserError, match=r"no parameters at .*params"):
        load_params(folder, {})
    save_params(folder, {"w": jnp.zeros((2, 3))})
    with pytest.raises(UserError, match=r"'w' is float32\[2, 3\].*float32\[3, 2\]"):
        load_params(folder, {"w": jax.ShapeDtypeStruct((3, 2), jnp.float32)})
    damage_flip(folder)
    with pytest.raises(UserError, match="not whole"):
        load_params(folder, {"w": jnp.zeros((2, 3))})


def test_params_that_fail_halfway_leave_the_old_ones(tmp_path, monkeypatch):
    folder = tmp_path / "params"
    save_params(folder, {"w": jnp.zeros(3)}, {"n": 1})

    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(module, "seal", fail)
        with pytest.raises(OSError, match="disk full"):
            save_params(folder, {"w": jnp.ones(3)}, {"n": 2})
    assert read_meta(folder) == {"n": 1}
    save_params(folder, {"w": jnp.ones(3)}, {"n": 3})  # over what the failure left behind
    assert read_meta(folder) == {"n": 3}
    assert load_params(folder, {"w": jnp.zeros(3)})["w"].tolist() == [1, 1, 1]


def test_the_checksums_file_is_plain_json(tmp_path):
    save_steps(tmp_path, 1)
    body = json.loads((tmp_path / "00000001" / CHECKSUMS).read_text())
    assert body["leaves"]["params/model/weight.with.dots"] == [[2, 3], "bfloat16"]
    assert body["meta"] == {}
