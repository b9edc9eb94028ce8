"""A model goes from stage to stage in memory: what it is read for, how often, and that nothing else changes."""

import json
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ADAPTED, MICRO

from ctpd_jax.cli import main
from ctpd_jax.job import held, lineage
from ctpd_jax.job.held import Held
from ctpd_jax.job.job import open_job
from ctpd_jax.settings import default_config


def digests(workdir: Path) -> dict[str, object]:
    """What a run has computed, without times and names of folders."""
    done = {path.parent.name: json.loads(path.read_text()) for path in workdir.glob("*/done.json")}
    found = {stage: record["params"] for stage, record in done.items() if "params" in record}
    evaluation = json.loads((workdir / "evaluation.json").read_text())
    return found | {part: evaluation[part] for part in ("models", "samples")}


@pytest.fixture
def reads(monkeypatch) -> Counter:
    """How often each folder of a model was read."""
    count: Counter = Counter()

    def counting(read):
        def counted(folder, *args, **kwargs):
            count[str(folder)] += 1
            return read(folder, *args, **kwargs)

        return counted

    for name in ("load_hf", "load_params"):
        monkeypatch.setattr(lineage, name, counting(getattr(lineage, name)))
    return count


@pytest.mark.slow
def test_a_run_reads_each_model_once(tmp_path, reads):
    assert main(["run", "--config", MICRO, "--workdir", str(tmp_path), *ADAPTED]) == 0
    assert len(reads) == 2 and set(reads.values()) == {1}, reads  # the user's two models


@pytest.mark.slow
def test_the_disk_gives_the_same_as_memory(tmp_path, finished_micro, reads):
    reads.clear()
    assert main(["run", "--config", MICRO, "--workdir", str(tmp_path), "--config.models_in_memory=0"]) == 0
    assert sum(reads.values()) > 10
    assert digests(tmp_path) == digests(finished_micro)


def tree(value: float, size: int = 1000, dtype=jnp.float32):
    return {"a": {"norm": jnp.full(3, value, jnp.float32), "weight": jnp.full(size, value, dtype)}}


def shapes(params):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), params)


def test_what_is_kept_is_a_copy_and_comes_back_as_it_is_wanted():
    params, kept = tree(1.00390625), Held()
    kept.keep("one", params)
    wanted = shapes(params)
    jax.jit(lambda x: jax.tree.map(lambda leaf: leaf * 0, x), donate_argnums=0)(params)
    found = kept.get("one", wanted)
    assert found["a"]["weight"].sharding == wanted["a"]["weight"].sharding
    np.testing.assert_array_equal(found["a"]["weight"], np.full(1000, 1.00390625, np.float32))
    narrow = shapes(tree(0, dtype=jnp.bfloat16))
    np.testing.assert_array_equal(kept.get("one", narrow)["a"]["weight"], jnp.full(1000, 1.00390625, jnp.bfloat16))
    # What it cannot give is not there.
    assert kept.get("one", {"b": wanted["a"]}) is None
    assert kept.get("two", wanted) is None and kept.get("one", shapes(tree(0, size=5))) is None
    kept.keep("one", tree(2, dtype=jnp.bfloat16))
    assert kept.get("one", wanted) is None


def test_what_was_asked_for_longest_ago_makes_room(monkeypatch):
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(tree(0)))
    monkeypatch.setattr(held, "free_memory", lambda: 6 * size)
    kept, wanted = Held(0.5), shapes(tree(0))  # two of them: 2 sizes are at most half of the 5 that are left
    for number, name in enumerate("abc"):
        kept.keep(name, tree(number))
        if name == "b":
            assert kept.get("a", wanted) is not None
    assert [name for name in "abc" if kept.get(name, wanted) is not None] == ["a", "c"]
    monkeypatch.setattr(held, "free_memory", lambda: 0)
    kept.keep("d", tree(3))
    assert [name for name in "abcd" if kept.get(name, wanted) is not None] == []
    assert held.free_memory() == 0


def test_nothing_is_kept_after_the_command(tmp_path):
    wanted = shapes(tree(0))
    with open_job(default_config(), tmp_path, say=lambda text: None) as job:
        job.held.keep("one", tree(1))
        assert job.held.get("one", wanted) is not None
    assert job.held.get("one", wanted) is None


def test_the_host_says_what_is_free():
    assert 2**20 < held.free_memory() < 2**50
