"""Bad input ends in one sentence that says what to do, with exit code 2 and nothing half-written."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from helpers import MICRO, ROOT
from ml_collections import ConfigDict

from ctpd_jax.artifacts import begin, finish, first_difference
from ctpd_jax.cli import load_config, main
from ctpd_jax.errors import UserError
from ctpd_jax.settings import default_config
from ctpd_jax.stages.annotate import same_source, source_of

CONFIGS = ROOT / "configs"


def run(tmp_path, *arguments: str, command: str = "run") -> int:
    return main([command, "--config", MICRO, "--workdir", str(tmp_path / "run"), *arguments])


def jsonl(path: Path, *rows: object) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


GOOD = {"prompt": "Tell me about tea.", "chosen": "green leaves", "rejected": "who cares"}


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_every_config_has_only_known_keys_and_says_its_command(config):
    loaded = load_config(str(config), [])
    assert set(loaded.to_dict()) == set(default_config().to_dict())
    assert f"--config configs/{config.name}" in config.read_text()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--config.train.bta=1", "bta"),
        ("--config.train.beta=much", "beta"),
        ("--config.nothing.x=1", "nothing"),
        ("--confg.seed=1", "confg"),
        ("seed=1", "Settings are written --config.key=value"),
        ("--config.weights.transform=softmax", "weights.transform is 'softmax'"),
        ("--config.weights.source=oracle", "weights.source is 'oracle'"),
        ("--config.train.loss=kto", "train.loss is 'kto'"),
        ("--config.train.objective=best", "train.objective is 'best'"),
        ("--config.train.objective=regression --config.weights.source=uniform", "follows a teacher"),
        ("--config.train.margin_as=label --config.train.loss=ipo", "train.loss is 'ipo'"),
        ("--config.train.margin_as=weight --config.train.trust=2.0", "train.trust is 2.0"),
        ("--config.train.objective=regression --config.train.margin_as=label", "train.margin_as is 'label'"),
        ("--config.train.contrast=negative --config.weights.source=dpo_reference", "train.contrast is 'negative'"),
        ("--config.train.reference=teachers", "train.reference is 'teachers'"),
        ("--config.rows.layout=packed", "rows.layout is 'packed'"),
        ("--config.data.unit=word", "data.unit is 'word'"),
        ("--config.data.ranked=some", "data.ranked is 'some'"),
        ("--config.data.min_kept=2.0", "data.min_kept is 2.0"),
        ("--config.data.columns=prompt", "write name=column"),
        ("--config.compute_dtype=float8", "compute_dtype is 'float8'"),
        ("--config.platform=tpu", "tpu"),
        ("--config.train.label_smoothing=0.7", "label_smoothing"),
        ("--config.weights.upper=inf", "weights.upper"),
        ("--config.positive.steps=-1", "positive.steps"),
        ("--config.data.test=nowhere.jsonl", "nowhere.jsonl"),
        ("--config.data.train=", "data.train is empty"),
        ("--config.teacher.path=nowhere", "nowhere"),
    ],
)
def test_a_setting_that_cannot_be_is_named(tmp_path, capsys, monkeypatch, override, message):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # config.platform changes it, and other tests' processes inherit it
    assert run(tmp_path, *override.split()) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_settings_behind_the_colon_are_the_config_files_own(tmp_path, capsys):
    for settings, message in (("pairs=4", "do not fill one batch of 8"), ("pears=4", "does not understand 'pears=4'")):
        assert main(["run", "--config", f"{MICRO}:{settings}", "--workdir", str(tmp_path / "run")]) == 2
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error


def test_no_such_config(tmp_path, capsys):
    assert main(["run", "--config", "configs/none.py", "--workdir", str(tmp_path)]) == 2
    assert "no config file configs/none.py" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([GOOD, "{not json"], "pairs.jsonl:2"),
        ([GOOD, {"prompt": "x", "chosen": "y"}], "rejected"),
        ([GOOD, {"prompt": "x", "chosen": [1, 2], "rejected": [3]}], "pairs.jsonl:2"),
        ([GOOD | {"rejected": GOOD["chosen"]}], "identical"),
    ],
)
def test_a_bad_row_is_named(tmp_path, toy_models, capsys, rows, message):
    path = jsonl(tmp_path / "pairs.jsonl", *rows)
    teacher, student = toy_models
    arguments = [f"--config.teacher.path={teacher}", f"--config.student.path={student}", f"--config.data.train={path}"]
    assert run(tmp_path, *arguments, command="inspect") == 2
    assert message in capsys.readouterr().err


def test_a_few_bad_rows_are_told_and_do_not_end_a_run(tmp_path, toy_models, capsys):
    asked = [GOOD | {"chosen": f"green leaves {i}"} for i in range(9)]
    path = jsonl(tmp_path / "pairs.jsonl", *asked, "{not json")
    teacher, student = toy_models
    arguments = [f"--config.teacher.path={teacher}", f"--config.student.path={student}", f"--config.data.train={path}"]
    assert run(tmp_path, *arguments, command="inspect") == 0
    assert f"left out: the line is not valid JSON: 1 ({path}:10" in capsys.readouterr().out
    written = json.loads((tmp_path / "run" / "data_train.json").read_text())
    assert written["left out: the line is not valid JSON"] == 1 and written["pairs"] == 9
    assert written["first"]["left out: the line is not valid JSON"][0].startswith(f"{path}:10")
    assert run(tmp_path, *arguments, "--config.data.min_kept=0.95", command="inspect") == 2
    assert "fewer than config.data.min_kept=0.95" in capsys.readouterr().err


def test_inspect_shows_what_becomes_of_rows_without_a_model(tmp_path, toy_models, capsys):
    folders = []
    for model in toy_models:  # tokenizers alone
        folders.append(tmp_path / model.name)
        folders[-1].mkdir()
        for file in [*model.glob("*token*"), *model.glob("*.jinja")]:
            shutil.copy(file, folders[-1])
    asked = [GOOD | {"chosen": f"green leaves {i}", "score": i, "notes": "x" if i > 7 else ""} for i in range(10)]
    path = jsonl(tmp_path / "pairs.jsonl", *asked)
    arguments = ["inspect", "--data", path, "--teacher", str(folders[0]), "--student", str(folders[1])]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^ +10  rows$", shown, re.M) and re.search(r"^ +8  pairs used$", shown, re.M)
    assert f'2  left out: column "notes" is not understood ({path}:9; {path}:10)' in shown
    assert "--config.data.ignore=notes" in shown and "harmless columns: score" in shown
    assert re.search(r"^ +16  responses$", shown, re.M)
    assert main([*arguments, "--config.data.ignore=notes"]) == 0
    assert re.search(r"^ +10  pairs used$", capsys.readouterr().out, re.M)
    assert main([*arguments, "--config.data.min_kept=0.9"]) == 2
    assert "only 8 of 10 pairs can be used" in capsys.readouterr().err
    page = tmp_path / "pages" / "pair.html"
    assert main([*arguments, "--html", str(page)]) == 0 and "green leaves 0" in capsys.readouterr().out
    assert page.read_text("utf-8").startswith("<!DOCTYPE html>")
    assert main([*arguments, "--stats"]) == 0 and "1:1 %" in capsys.readouterr().out
    assert main([*arguments, "--pair", "77"]) == 2 and "There is no pair 77" in capsys.readouterr().err
    assert main(["inspect", "--data", path, "--stats"]) == 2 and "two tokenizers" in capsys.readouterr().err
    assert main(["inspect", "--data", path]) == 0  # the rows alone
    assert main(["inspect", "--data", path, "--teacher", str(folders[0])]) == 2
    assert main(["inspect"]) == 2
    assert "give --config and --workdir of a run, or --data" in capsys.readouterr().err


def test_swapped_folders_are_noticed(tmp_path, toy_models, capsys):
    teacher, student = toy_models
    path = jsonl(tmp_path / "pairs.jsonl", GOOD)
    swapped = [f"--config.teacher.path={student}", f"--config.student.path={teacher}", f"--config.data.train={path}"]
    assert run(tmp_path, *swapped) == 2
    assert "are they swapped?" in capsys.readouterr().err


def test_a_stage_names_the_one_that_it_waits_for(tmp_path, capsys):
    assert run(tmp_path, command="train") == 2
    assert "ctpd sft --model student" in capsys.readouterr().err
    assert run(tmp_path, command="dpo") == 2
    assert "ctpd sft --model teacher" in capsys.readouterr().err


def test_a_folder_of_other_inputs_is_refused_with_the_field(tmp_path):
    assert begin(tmp_path / "stage", {"settings": {"lr": 1.0}}) is None
    finish(tmp_path / "stage", {"params": "abc"})
    assert begin(tmp_path / "stage", {"settings": {"lr": 1.0}}) == {"params": "abc"}
    with pytest.raises(UserError, match=r"settings\.lr is 1\.0 there and 2\.0 here"):
        begin(tmp_path / "stage", {"settings": {"lr": 2.0}})


def test_what_changes_no_number_beyond_rounding_is_noted_not_refused(tmp_path):
    """What a stage that ran out of memory is repeated with."""
    folder, told, inputs = tmp_path / "stage", [], {"settings": {"lr": 1.0}}
    assert begin(folder, inputs, {"micro_batch": 8}, told.append) is None and not told
    assert begin(folder, inputs, {"micro_batch": 4}, told.append) is None
    assert len(told) == 1 and "micro_batch 4" in told[0] and "begun with 8" in told[0]
    assert begin(folder, inputs, {"micro_batch": 4}, told.append) is None and len(told) == 1
    with pytest.raises(UserError, match=r"settings\.lr"):
        begin(folder, {"settings": {"lr": 2.0}}, {"micro_batch": 4}, told.append)
    finish(folder, {"params": "abc"})
    assert begin(folder, inputs, {"micro_batch": 2}, told.append) == {"params": "abc"} and len(told) == 1


def test_training_data_are_the_same_by_their_bytes(tmp_path):
    """A file may lie elsewhere, or be gone where only the store is needed; it may not say something else."""

    def config_of(spec: Path) -> ConfigDict:
        return load_config(MICRO, [f"--config.data.train={spec}"])

    here, there, other = (tmp_path / name for name in ("here.jsonl", "there.jsonl", "other.jsonl"))
    for path, text in ((here, "a"), (there, "a"), (other, "b")):
        path.write_text(text)
    stored = source_of(config_of(here))
    assert first_difference(same_source(config_of(there), stored), stored) is None
    assert first_difference(same_source(config_of(other), stored), stored)[0] == "train"
    here.write_text("b")
    assert first_difference(same_source(config_of(here), stored), stored)[0] == "sha256"
    here.unlink()
    assert first_difference(same_source(config_of(here), stored), stored) is None
    assert first_difference(same_source(config_of(tmp_path / "gone.jsonl"), stored), stored)[0] == "train"


def test_an_accelerator_that_is_not_there(tmp_path):
    command = [sys.executable, "-m", "ctpd_jax.cli", "run", "--config", MICRO, "--workdir", str(tmp_path / "run")]
    found = subprocess.run([*command, "--config.platform=tpu"], capture_output=True, text=True, check=False)
    assert found.returncode == 2
    assert "config.platform" in found.stderr and "Traceback" not in found.stderr


def test_a_config_file_that_does_not_load_is_told(tmp_path, capsys):
    for source, message in {
        "import nothing_of_that_name": "nothing_of_that_name",
        "def get_config(": "SyntaxError",
        "from ml_collections import ConfigDict\ndef get_config(): return ConfigDict({'seed': 1})": "is missing",
    }.items():
        file = tmp_path / "config.py"
        file.write_text(source)
        assert main(["run", "--config", str(file), "--workdir", str(tmp_path / "run")]) == 2
        assert message in capsys.readouterr().err


def test_a_workdir_that_is_a_file(tmp_path, capsys):
    (tmp_path / "run").write_text("")
    assert run(tmp_path) == 2
    assert "cannot be made" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("missing", "message"), [("model.safetensors", "neither model.safetensors"), ("tokenizer.json", "tokenizer")]
)
def test_a_model_folder_without_a_file_is_named_before_anything_runs(tmp_path, toy_models, capsys, missing, message):
    student = tmp_path / "student"
    shutil.copytree(toy_models[1], student)
    (student / missing).unlink()
    path = jsonl(tmp_path / "pairs.jsonl", *[GOOD | {"chosen": f"green leaves {i}"} for i in range(8)])
    data = [f"--config.data.train={path}", f"--config.data.test={path}"]
    assert run(tmp_path, f"--config.teacher.path={toy_models[0]}", f"--config.student.path={student}", *data) == 2
    error = capsys.readouterr().err
    assert message in error and str(student) in error
    assert not (tmp_path / "run" / "teacher_sft").exists()


def test_a_hub_that_cannot_be_reached(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    arguments = ["--config.teacher.path=nobody/nothing", "--config.student.path=nobody/nothing"]
    assert run(tmp_path, "--config.data.train=pairs.jsonl", *arguments) == 2
    assert "could not be fetched from the Hugging Face hub" in capsys.readouterr().err


@pytest.mark.parametrize("told", ["", "shared"])
def test_programs_are_kept_in_the_workdir_unless_jax_is_told_where(tmp_path, monkeypatch, told):
    folder, before = told and str(tmp_path / told), jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", folder)
    jax.config.update("jax_compilation_cache_dir", folder)  # JAX has read the variable when it was imported
    try:
        assert run(tmp_path, "--config.data.train=nowhere.jsonl", command="inspect") == 2
        assert jax.config.jax_compilation_cache_dir == (folder or str(tmp_path / "run" / "compile_cache"))
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
