"""The toy world as a TFDS data set."""

import subprocess
import sys
from dataclasses import asdict

import pytest
import tensorflow_datasets as tfds

from ctpd_jax.errors import UserError
from ctpd_jax.schema import Message
from ctpd_jax.text.preferences import load_preferences
from ctpd_jax.toy.builder import prepare_toy
from ctpd_jax.toy.world import generate_pairs


def test_what_is_read_is_what_was_generated(tmp_path):
    spec = prepare_toy(tmp_path, pairs=40, test_pairs=10, noise=0.3, seed=5)
    for split, number in (("train", 40), ("test", 10)):
        pairs, report = load_preferences(spec, split=split)
        expected = list(generate_pairs(split, number, noise=0.3, seed=5))
        assert [(p.chosen, p.rejected) for p in pairs] == [(p.chosen, p.rejected) for p in expected]
        assert [p.prompt for p in pairs] == [(Message("user", p.prompt),) for p in expected]
        assert report.counts == {"rows": number, "kept": number}
    rows = tfds.builder_from_directory(spec.removeprefix("tfds:")).as_data_source("train")
    first = rows[0]
    assert {
        name: value.decode() if isinstance(value, bytes) else value for name, value in first.items()
    } == pytest.approx(asdict(next(generate_pairs("train", 1, noise=0.3, seed=5))))


def test_a_named_configuration_is_made_when_first_asked_for(tmp_path):
    spec = "tfds:ctpd_jax.toy.builder:ctpd_toy/noise10"
    pairs, _ = load_preferences(spec, split="train[:3]", data_dir=tmp_path)
    assert [p.chosen for p in pairs] == [p.chosen for p in generate_pairs("train", 3, noise=0.1)]
    assert pairs[1].source == f"{spec}[train[:3]]:1"


def test_settings_have_folders_of_their_own_and_are_written_once(tmp_path):
    first = prepare_toy(tmp_path, pairs=4, test_pairs=2)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.array_record*")}
    assert files
    assert prepare_toy(tmp_path, pairs=4, test_pairs=2) == first
    assert {path: path.stat().st_mtime_ns for path in files} == files
    assert len({first, prepare_toy(tmp_path, pairs=4, test_pairs=2, noise=0.1), prepare_toy(tmp_path, 5, 2)}) == 3


def test_an_unknown_split_is_named(tmp_path):
    with pytest.raises(UserError, match="validation"):
        load_preferences(prepare_toy(tmp_path, 2, 2), split="validation")


@pytest.mark.parametrize("settings", [{"pairs": 0}, {"test_pairs": 0}, {"noise": 0.5}, {"noise": -0.1}])
def test_wrong_settings_are_refused(tmp_path, settings):
    with pytest.raises(UserError, match="toy world"):
        prepare_toy(tmp_path, **settings)


def test_it_works_without_tensorflow_and_says_nothing(tmp_path):
    code = (
        "import sys; from ctpd_jax.toy.builder import prepare_toy;"
        "from ctpd_jax.text.preferences import load_preferences;"
        f"pairs, _ = load_preferences(prepare_toy({str(tmp_path)!r}, 3, 2));"
        "assert len(pairs) == 3; assert 'tensorflow' not in sys.modules; assert 'jax' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
