"""The whole chain on the micro configuration: what it leaves, and that a second call finds nothing to do."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import MICRO
from helpers.jobs import stored_params
from toy import world_on_disk

from ctpd_jax.cli import main
from ctpd_jax.job.lineage import params_digest
from ctpd_jax.models.hf import load_hf
from ctpd_jax.train.metrics import read_metrics


@pytest.fixture(scope="module")
def finished(finished_micro, tmp_path_factory) -> Path:
    """A copy: some of the tests call commands on it."""
    return shutil.copytree(finished_micro, tmp_path_factory.mktemp("micro") / "run")


def test_every_stage_logs_each_update_once(finished):
    for stage in ("teacher_sft", "student_sft", "positive", "negative", "student_dpo", "train"):
        lines = read_metrics(finished, stage)
        assert [line["step"] for line in lines] == [0, 1, 2, 3]
        assert all(np.isfinite(line["loss"]) and line["num_tokens"] > 0 for line in lines)


def test_preference_stages_start_where_their_reference_says(finished):
    for stage in ("positive", "negative", "student_dpo"):
        first = read_metrics(finished, stage)[0]
        assert first["loss"] == pytest.approx(np.log(2), abs=1e-4)  # the reference is the start itself
        assert first["rewards/margins"] == pytest.approx(0, abs=1e-3)
    first = read_metrics(finished, "train")[0]
    assert abs(first["rewards/margins"]) > 1e-2  # the reference is another model
    assert first["rewards/margins"] != first["rewards/weighted_margins"] and first["weights/chosen"] > 0
    assert first["rewards/margin_from_start"] == pytest.approx(0, abs=1e-3)


def test_evaluation_and_report(finished):
    found = json.loads((finished / "evaluation.json").read_text())
    assert set(found["models"]) == {"student_start", "student_dpo", "ctpd", "teacher", "teacher_dpo"}
    assert found["models"]["student_start"]["all"]["vs_start"] is None
    accuracy = found["models"]["ctpd"]["all"]["per_byte"]
    assert 0 <= accuracy["low"] <= accuracy["value"] <= accuracy["high"] <= 1 and accuracy["count"] == 16
    assert len(found["samples"]["ctpd"]) == 2
    told = found["data"]
    assert told["end_of_turn"] == "end of turn on neither side"
    assert 0 <= told["one_side_cut"] + told["both_cut"] <= 16 and 0 <= told["in_train"]["pairs"] <= 1
    assert (finished / "report.html").stat().st_size > 10_000


def test_the_truth_is_told_beside_the_run(finished):
    """The script that the demo's header names, as it is called there."""
    script = Path(MICRO).parents[1] / "examples" / "toy" / "truth.py"
    done = subprocess.run([sys.executable, script, finished], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rewarded, _, found = done.stdout.partition("How well the contrastive pair")
    names = [line.split()[0] for line in rewarded.splitlines() if "n = 2" in line]
    assert names == ["student_start", "student_dpo", "ctpd", "teacher", "teacher_dpo"]
    figures = {line[2:28].strip(): float(line[28:]) for line in found.splitlines()[2:]}
    assert len(figures) == 6 and figures["pieces"] > 48
    assert 0 <= figures["AUC, good against neutral"] <= 1 and 0 <= figures["AUC, neutral against bad"] <= 1


def test_export_is_the_trained_student(finished):
    _, exported = load_hf(finished / "export")
    trained = stored_params(finished / "train" / "params")
    assert jax.tree.structure(exported) == jax.tree.structure(trained)
    jax.tree.map(np.testing.assert_array_equal, exported, trained)
    assert params_digest(trained) == json.loads((finished / "train" / "done.json").read_text())["params"]


def test_a_second_call_changes_nothing(finished, capsys):
    def state() -> dict[str, int]:
        return {str(f): f.stat().st_mtime_ns for f in finished.rglob("*") if f.is_file() and "params" in f.parts}

    before, metrics = state(), (finished / "metrics.jsonl").read_bytes()
    assert main(["run", "--config", MICRO, "--workdir", str(finished)]) == 0
    assert state() == before
    assert (finished / "metrics.jsonl").read_bytes() == metrics
    assert "of the prompts are in the training data too" in capsys.readouterr().out


def test_another_setting_in_the_same_folder_is_named(finished, capsys):
    assert main(["sft", "--config", MICRO, "--workdir", str(finished), "--config.teacher_sft.lr=0.5"]) == 2
    assert "settings.lr is 0.001 there and 0.5 here" in capsys.readouterr().err


def test_a_store_made_otherwise_is_named(finished, capsys):
    arguments = ["train", "--config", MICRO, "--workdir", str(finished), "--config.data.max_response_tokens=32"]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "settings.data.max_response_tokens" in error and "64" in error and "32" in error
    assert main([*arguments[:-1], "--config.data.end_of_turn_both=False"]) == 2
    assert "settings.data.end_of_turn_both" in capsys.readouterr().err


def test_what_changes_numbers_by_rounding_alone_is_no_difference(finished):
    """A run that ran out of memory goes on with smaller batches, and finished work stays finished."""
    arguments = ["--config", MICRO, "--workdir", str(finished), "--config.rows.layout=response"]
    arguments += [f"--config.{stage}.micro_batch=2" for stage in ("positive", "student_dpo", "train", "annotate")]
    arguments += ["--config.annotate.pairs_per_shard=7", "--config.train.epochs=9", "--config.train.lora.alpha=3"]
    before = {str(file): file.stat().st_mtime_ns for file in finished.rglob("*.f32")}
    for command in ("dpo", "annotate", "train"):
        assert main([command, *arguments]) == 0
    assert before == {str(file): file.stat().st_mtime_ns for file in finished.rglob("*.f32")}


def test_other_data_than_the_stores_is_named(finished, tmp_path, capsys):
    (tmp_path / "other.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    arguments = ["train", "--config", MICRO, "--workdir", str(finished)]
    assert main([*arguments, f"--config.data.train={tmp_path / 'other.jsonl'}"]) == 2
    error = capsys.readouterr().err
    assert f"source.train is '{world_on_disk(48, 16).train}' there" in error and "other.jsonl" in error
    assert main([*arguments[:2], f"{MICRO}:pairs=47", *arguments[3:]]) == 2
    error = capsys.readouterr().err
    assert f"'{world_on_disk(48, 16).train}' there and '{world_on_disk(47, 16).train}' here" in error


def test_training_needs_nothing_of_the_teacher(finished, tmp_path):
    arguments = ["train", "--config", MICRO, "--workdir", str(finished)]
    assert main([*arguments, f"--config.teacher.path={tmp_path / 'gone'}"]) == 0


def test_a_store_written_by_other_versions_is_the_same_store(finished, capsys):
    path = finished / "annotations" / "manifest.json"
    text = path.read_text()
    told = json.loads(text)
    told["written_with"]["jax"] = "99.0"
    del told["sha256"]  # of itself: an edit is found by it
    path.write_text(json.dumps(told))
    try:
        assert main(["train", "--config", MICRO, "--workdir", str(finished)]) == 0
        told["data"]["rules"] -= 1  # spans that are not made any more
        path.write_text(json.dumps(told))
        assert main(["train", "--config", MICRO, "--workdir", str(finished)]) == 2
        assert "data.rules is" in capsys.readouterr().err
        told["data"]["rules"] += 1
        told["measured_by"]["positive"] = "another"
        path.write_text(json.dumps(told))
        assert main(["train", "--config", MICRO, "--workdir", str(finished)]) == 2
    finally:
        path.write_text(text)


def test_inspect_and_generate(finished, capsys):
    assert main(["inspect", "--config", MICRO, "--workdir", str(finished), "--pair", "3"]) == 0
    shown = capsys.readouterr().out
    assert "teacher reads" in shown and "weight" in shown and "log π" in shown
    arguments = ["generate", "--config", MICRO, "--workdir", str(finished), "--prompt", "Tell me about tea."]
    assert main([*arguments, "--max-new-tokens", "4"]) == 0
    assert main([*arguments, "--model", "nobody"]) == 2
    assert "no model 'nobody'" in capsys.readouterr().err


def test_what_decides_no_number_may_change(finished):
    arguments = ["sft", "--config", MICRO, "--workdir", str(finished)]
    assert main([*arguments, "--config.teacher_sft.save_every=7", "--config.log_every=2"]) == 0


def test_the_store_knows_who_measured_it(finished):
    manifest = json.loads((finished / "annotations" / "manifest.json").read_text())
    made = {
        stage: json.loads((finished / stage / "done.json").read_text())["params"] for stage in ("positive", "negative")
    }
    assert manifest["measured_by"]["positive"] == made["positive"] != made["negative"]
    assert manifest["scorers"] == ["reference", "start", "positive", "negative"]
    assert {"weights", "tokenizer", "template", "end_of_turn"} <= set(manifest["teacher"])
