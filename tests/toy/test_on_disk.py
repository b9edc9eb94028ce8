"""The toy world as files: made once, whole or not there, and without a word of JAX where a config is read."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import toy.on_disk
from toy import settings_in, world_on_disk
from toy.on_disk import cache_folder
from toy.world import generate_pairs

from ctpd_jax.errors import UserError
from ctpd_jax.models.hf import load_hf
from ctpd_jax.schema import Message
from ctpd_jax.text.preferences import load_preferences

EXAMPLES = Path(toy.__file__).parents[1]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, in which the models are quickly made."""

    def make(folder: Path, seed: int) -> None:
        for model in ("teacher", "student"):
            (folder / model).mkdir()
            (folder / model / "seed").write_text(str(seed))

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(toy.on_disk, "_make_models_apart", make)
    return tmp_path / "ctpd_jax" / "toy"


def times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_what_is_read_is_what_was_generated(cache):
    world = world_on_disk(pairs=40, test_pairs=10, noise=0.3, seed=5)
    for path, split, number in ((world.train, "train", 40), (world.test, "test", 10)):
        pairs, report = load_preferences(path, split=split)
        expected = list(generate_pairs(split, number, noise=0.3, seed=5))
        assert [(p.chosen, p.rejected) for p in pairs] == [(p.chosen, p.rejected) for p in expected]
        assert [p.prompt for p in pairs] == [(Message("user", p.prompt),) for p in expected]
        assert report.counts == {"rows": number, "kept": number}
    first = json.loads(Path(world.train).read_text("utf-8").splitlines()[0])
    assert first == asdict(next(generate_pairs("train", 1, noise=0.3, seed=5)))


def test_settings_have_folders_of_their_own_and_are_written_once(cache, capsys):
    first = world_on_disk(pairs=4, test_pairs=2)
    assert capsys.readouterr().err.count("toy: making") == 2
    before = times(cache)
    assert world_on_disk(pairs=4, test_pairs=2) == first and times(cache) == before
    assert capsys.readouterr() == ("", "")
    others = [world_on_disk(4, 2, noise=0.1), world_on_disk(5, 2), world_on_disk(4, 3), world_on_disk(4, 2, seed=1)]
    assert len({world.train for world in (first, *others)}) == 5
    assert [world.teacher == first.teacher for world in others] == [True, True, True, False]


def test_another_format_is_another_folder(cache, monkeypatch):
    first = world_on_disk(4, 2)
    monkeypatch.setattr(toy.on_disk, "FORMAT", toy.on_disk.FORMAT + 1)
    again = world_on_disk(4, 2)
    assert again.train != first.train and again.student != first.student


def test_a_mismatch_has_models_of_its_own_and_the_same_pairs(cache, monkeypatch):
    first, made = world_on_disk(4, 2, seed=3), []
    monkeypatch.setattr(toy.on_disk, "_make_models_apart", lambda folder, *told: made.append((folder.name, *told)))
    near, word = world_on_disk(4, 2, seed=3, mismatch="near"), world_on_disk(4, 2, seed=3, mismatch="word")
    assert word == first and near.train == first.train and near.teacher != first.teacher
    assert [(name.rpartition("-")[2], seed, mismatch) for name, seed, mismatch in made] == [("near", 3, "near")]
    with pytest.raises(UserError, match="near, word, unigram"):
        world_on_disk(4, 2, mismatch="none")


def test_what_was_not_finished_is_not_there(cache, monkeypatch):
    def stopped(folder: Path, seed: int) -> None:
        (folder / "teacher").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(toy.on_disk, "_make_models_apart", stopped)
    with pytest.raises(KeyboardInterrupt):
        world_on_disk(4, 2)
    assert list(cache.iterdir()) == []


def test_who_is_slower_takes_what_the_other_made(cache, monkeypatch):
    def overtaken(folder: Path, seed: int) -> None:
        (folder / "teacher").mkdir()
        place = cache / folder.name
        (place / "teacher").mkdir(parents=True)
        (place / "teacher" / "theirs").touch()

    monkeypatch.setattr(toy.on_disk, "_make_models_apart", overtaken)
    world = world_on_disk(4, 2)
    assert (Path(world.teacher) / "theirs").exists()
    assert not [path for path in cache.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("settings", [{"pairs": 0}, {"test_pairs": 0}, {"noise": 0.5}, {"noise": -0.1}])
def test_wrong_settings_are_refused(cache, settings):
    with pytest.raises(UserError, match="toy world"):
        world_on_disk(**settings)


def test_settings_behind_a_colon():
    defaults = {"pairs": 48, "noise": 0.25}
    assert settings_in("", **defaults) == defaults
    assert settings_in("noise=0.3,pairs=100", **defaults) == {"pairs": 100, "noise": 0.3}
    for wrong in ("pears=3", "pairs=many", "pairs", "pairs=1.5"):
        with pytest.raises(UserError, match=rf"'{wrong}'.*pairs=48,noise=0\.25"):
            settings_in(wrong, **defaults)


def test_models_that_cannot_be_made_are_told_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(toy.on_disk, "EXAMPLES", tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if Path(path).resolve() != EXAMPLES])
    with pytest.raises(UserError, match=r"cannot be made in .*No module named"):
        toy.on_disk._make_models_apart(tmp_path / "models", 0)


@pytest.mark.slow
def test_the_models_are_those_of_an_undisturbed_jax(tmp_path, monkeypatch):
    """Two processes at once, told other things about JAX: one world, which both find; no JAX in either."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import toy; world = toy.world_on_disk(3, 2);"
        "assert 'tensorflow' not in sys.modules; assert 'jax' not in sys.modules; print(world.student)"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(EXAMPLES)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"XDG_CACHE_HOME": str(tmp_path), **told},
        )
        for told in ({"XLA_FLAGS": "--xla_cpu_max_isa=AVX"}, {"JAX_PLATFORMS": "tpu", "JAX_ENABLE_X64": "1"})
    ]
    said = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert said[0][0] == said[1][0]
    folder = Path(said[0][0].strip())
    assert sorted(path.name for path in (tmp_path / "ctpd_jax" / "toy").iterdir()) == sorted(
        {folder.parent.name, "pairs-1-seed0-3-2-noise0.25"}
    )
    config, _ = load_hf(folder)
    assert config.num_layers == 3


def test_the_cache_has_a_place_of_its_own(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == Path.home() / ".cache" / "ctpd_jax" / "toy"
