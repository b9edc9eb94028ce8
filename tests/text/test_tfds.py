"""TFDS data sets: a module that registers a builder, a prepared folder, slices of a split; without TensorFlow."""

import os
import subprocess
import sys

import pytest
from helpers import HELPERS
from helpers.tfds_package.pairs import rows

from ctpd_jax.errors import UserError
from ctpd_jax.schema import Message
from ctpd_jax.text.preferences import load_preferences

SPEC = "tfds:helpers.tfds_package.pairs:few_pairs/small"


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    load_preferences(SPEC, data_dir=folder)
    return folder


def test_a_builder_is_made_ready_when_first_asked_for(data_dir):
    for split, number in (("train", 9), ("test", 3)):
        pairs, report = load_preferences(SPEC, split=split, data_dir=data_dir)
        expected = rows(split, number)
        assert [(p.chosen, p.rejected) for p in pairs] == [(row["chosen"], row["rejected"]) for row in expected]
        assert [p.prompt for p in pairs] == [(Message("user", row["prompt"]),) for row in expected]
        assert report.counts == {"rows": number, "kept": number}


def test_a_slice_and_where_its_rows_stand(data_dir):
    pairs, _ = load_preferences(SPEC, split="train[:3]", data_dir=data_dir)
    assert [p.chosen for p in pairs] == [row["chosen"] for row in rows("train", 3)]
    assert pairs[1].source == f"{SPEC}[train[:3]]:1"


def test_a_prepared_folder_is_read_as_it_lies(data_dir):
    (info,) = data_dir.rglob("dataset_info.json")
    files = {path: path.stat().st_mtime_ns for path in data_dir.rglob("*.array_record*")}
    pairs, _ = load_preferences(f"tfds:{info.parent}", split="test")
    assert [p.chosen for p in pairs] == [row["chosen"] for row in rows("test", 3)]
    assert files and {path: path.stat().st_mtime_ns for path in files} == files


def test_an_unknown_split_is_named(data_dir):
    with pytest.raises(UserError, match="validation"):
        load_preferences(SPEC, split="validation", data_dir=data_dir)


def test_neither_tensorflow_nor_jax_is_imported(data_dir):
    code = (
        "import sys; from ctpd_jax.text.preferences import load_preferences;"
        f"pairs, _ = load_preferences({SPEC!r}, data_dir={str(data_dir)!r});"
        "assert len(pairs) == 9; assert 'tensorflow' not in sys.modules; assert 'jax' not in sys.modules"
    )
    path = os.pathsep.join([str(HELPERS.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
