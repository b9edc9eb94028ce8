"""`ctpd propose`: from prompts alone to pairs and their store, whatever the labels say, and again after a stop."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import MICRO
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import world_on_disk

from ctpd_jax.annotate.store import open_store
from ctpd_jax.cli import load_config, main
from ctpd_jax.errors import UserError
from ctpd_jax.job.check import check_config
from ctpd_jax.schema import SIDES, Message
from ctpd_jax.stages.propose import best_and_worst, high_and_low
from ctpd_jax.text.preferences import load_preferences

SETTINGS = ["--config", MICRO, "--config.student_proposed.steps=1", "--config.student_proposed.batch_size=4"]
SETTINGS += ["--config.propose.limit=6", "--config.propose.answers=3", "--config.propose.batch=8"]
STAGES = ("teacher_sft", "student_sft", "positive", "negative")
PROMPT = (Message("user", "Tell me about tea."),)


# ------------------------------------------------------------------------------------------------ which become pairs


@settings(max_examples=40)
@given(st.dictionaries(st.text(max_size=3), st.integers(-5, 5).map(float)), st.integers(1, 4), st.integers(0, 3))
def test_best_and_worst(found, most, least):
    rows, counts = best_and_worst({PROMPT: found}, most, least)
    values = sorted(found.values())
    wanted = [(high, low) for high, low in list(zip(values[::-1], values))[: len(values) // 2] if high - low > least]
    assert [(row["contrast_chosen"], row["contrast_rejected"]) for row in rows] == wanted[:most]
    assert all(found[row["chosen"]] == row["contrast_chosen"] for row in rows)
    texts = [row[side] for row in rows for side in SIDES]
    assert len(texts) == len(set(texts))  # no answer is in two pairs
    left = (counts["prompts without two answers to compare"], counts["prompts below min_contrast"])
    assert left == (int(len(found) < 2), int(len(found) > 1 and not rows))


@pytest.mark.parametrize(
    ("source", "scorer", "contrast", "low"),
    [
        ("dpo", "teacher", "weights", "negative"),
        ("prompts", "teacher", "weights", "negative"),
        ("dpo_reference", "teacher", "weights", "reference"),
        ("dpo_reference", "student", "weights", "start"),
        ("dpo", "teacher", "start", "reference"),
        ("sft", "student", "start", "start"),
    ],
)
def test_what_ranks(source, scorer, contrast, low):
    config = load_config(MICRO, [f"--config.weights.source={source}", f"--config.propose.contrast={contrast}"])
    config.weights.positive_scorer = scorer
    assert high_and_low(config) == ("positive", low)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("propose.answers=1", "config.propose.answers is 1; one answer"),
        ("propose.temperature=0.0", "propose.temperature"),
        ("propose.contrast=best", "propose.contrast"),
        ("weights.source=uniform", "proposals are ranked by the contrast of two models"),
        ("student_proposed.reference=teachers", "config.student_proposed.reference is 'teachers'"),
        ("student_proposed.tau=-1.0", "config.student_proposed.tau is -1.0"),
    ],
)
def test_settings_that_cannot_be_are_named(override, message):
    check_config(load_config(MICRO, ["--config.student_proposed.steps=1"]))
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        check_config(load_config(MICRO, ["--config.student_proposed.steps=1", f"--config.{override}"]))


# ------------------------------------------------------------------------------------------------ the stage


def propose(workdir: Path, *arguments: str) -> int:
    return main(["propose", "--workdir", str(workdir), *SETTINGS, *arguments])


def made(workdir: Path) -> dict[str, bytes]:
    """What the stage leaves: answers, pairs and the shards of the store."""
    files = [*workdir.glob("proposals/answers/*"), *workdir.glob("proposals/*.array_record-*")]
    return {path.name: path.read_bytes() for path in [*files, workdir / "proposals" / "pairs.jsonl"]}


@pytest.fixture(scope="module")
def finished(finished_micro, tmp_path_factory) -> Path:
    """The models of a run, and proposals made by them."""
    workdir = tmp_path_factory.mktemp("propose") / "run"
    for stage in STAGES:
        shutil.copytree(finished_micro / stage, workdir / stage)
    assert propose(workdir) == 0
    return workdir


def test_proposals_are_pairs_and_a_store(finished):
    rows = [json.loads(line) for line in (finished / "proposals" / "pairs.jsonl").read_text().splitlines()]
    pairs, _ = load_preferences(str(finished / "proposals" / "pairs.jsonl"))
    told = json.loads((finished / "proposals" / "done.json").read_text())
    assert len(rows) == len(pairs) == told["pairs"] and told["prompts"] == 6
    assert [(row["chosen"], row["rejected"]) for row in rows] == [(pair.chosen, pair.rejected) for pair in pairs]
    # Every answer is one that the student gave to that prompt, and the best of its answers is the chosen one.
    files = sorted(finished.glob("proposals/answers/*"))
    drawn = [each for path in files for each in json.loads(path.read_text())["answers"]]
    for row in rows:
        assert row["contrast_chosen"] > row["contrast_rejected"]
        assert {row["chosen"], row["rejected"]} <= {text for text, _ in drawn}
    # The store has measured what has ranked: a response that the limit cuts has the same spans in both.
    store, seen = open_store(finished / "proposals"), 0
    for i, row in enumerate(rows):
        pair, scores = store[i]
        for side, name in enumerate(SIDES):
            if pair.truncated[side]:
                ratio = scores[name]["positive"] - scores[name]["negative"]
                contrast = ratio.sum(dtype=np.float64) / pair.response(side).bounds[-1]
                np.testing.assert_allclose(contrast, row[f"contrast_{name}"], atol=1e-5)
                seen += 1
    assert seen > 4


def test_no_labels_are_read(finished, tmp_path):
    """A third of the rows with their sides swapped, a third prompts alone: the same proposals, byte for byte."""
    rows = [json.loads(line) for line in Path(world_on_disk(48, 16).train).read_text().splitlines()]
    for i, row in enumerate(rows):
        if i % 3 == 1:
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
        elif i % 3 == 2:
            del row["chosen"], row["rejected"]
    file, workdir = tmp_path / "other.jsonl", tmp_path / "run"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for stage in STAGES:
        shutil.copytree(finished / stage, workdir / stage)
    assert propose(workdir, f"--config.data.train={file}") == 0
    assert made(workdir) == made(finished)


def test_a_stopped_stage_goes_on_to_the_same_bytes(finished, tmp_path):
    workdir = shutil.copytree(finished, tmp_path / "run")
    folder = workdir / "proposals"
    for path in [*folder.glob("*.array_record-00000*"), *folder.glob("manifest.json"), folder / "done.json"]:
        path.unlink()
    (folder / "answers" / "00001.json").unlink()
    (folder / "ranking" / "columns" / "negative" / "00000.f32").unlink()
    (folder / "pairs.jsonl").unlink()
    assert propose(workdir) == 0
    assert made(workdir) == made(finished)


def test_the_student_learns_from_them(finished, tmp_path, capsys):
    workdir = shutil.copytree(finished, tmp_path / "run")
    train = ["train", "--proposed", "--workdir", str(workdir), *SETTINGS]
    assert main(train) == 0
    told = json.loads((workdir / "student_proposed" / "done.json").read_text())
    assert told["steps"] == 1 and told["weights/chosen"] > 0 and not (workdir / "train").exists()
    assert main([*train, "--config.student_proposed.beta=0.2"]) == 2
    assert "settings.beta is 0.1 there and 0.2 here" in capsys.readouterr().err
    assert propose(workdir, "--config.propose.temperature=0.5") == 2
    assert "settings.temperature is 1.0 there and 0.5 here" in capsys.readouterr().err
    # The export is the one student that CTPD has made here.
    assert main(["export", "--workdir", str(workdir), *SETTINGS, "--config.train.steps=-1"]) == 0
    assert "ranks them" in (workdir / "export" / "README.md").read_text()


def test_without_proposals_the_command_is_named(tmp_path, capsys):
    assert main(["train", "--proposed", "--workdir", str(tmp_path), *SETTINGS, "--config.student_sft.steps=-1"]) == 2
    assert "run `ctpd propose` first" in capsys.readouterr().err
