"""What `ctpd export` leaves: a model with the template and the ends that it was trained with, and a true card."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import MICRO
from helpers.jobs import stored_params
from toy import world_on_disk
from toy.models import STUDENT_TEMPLATE
from transformers import AutoTokenizer

from ctpd_jax.artifacts import write_record
from ctpd_jax.cli import main
from ctpd_jax.models.hf import load_hf
from ctpd_jax.schema import Message
from ctpd_jax.text.prompts import load_text_model

SHORT = [
    "--config.weights.source=uniform",
    *(f"--config.{stage}.steps=-1" for stage in ("teacher_sft", "student_sft", "student_dpo")),
    "--config.evaluate.max_new_tokens=2",
]


@pytest.fixture(scope="module")
def trained(new_workdir, tmp_path_factory):
    """A short run with a template of its own, evaluated and exported, and its settings."""
    workdir, template = new_workdir("export"), tmp_path_factory.mktemp("template") / "own.jinja"
    template.write_bytes(STUDENT_TEMPLATE.encode() + b"{# mine #}\n")
    overrides = [*SHORT, f"--config.student.template={template}"]
    assert main(["run", "--config", MICRO, "--workdir", str(workdir), *overrides]) == 0
    return workdir, overrides


def _export(workdir, overrides):
    assert main(["export", "--config", MICRO, "--workdir", str(workdir), *overrides]) == 0
    return (workdir / "export" / "README.md").read_text("utf-8")


def test_the_template_file_is_exported_and_the_tokenizer_is_the_source(trained):
    workdir, overrides = trained
    template = Path(overrides[-1].partition("=")[2])
    assert (workdir / "export" / "chat_template.jinja").read_bytes() == template.read_bytes()
    source = Path(world_on_disk().student)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (workdir / "export" / name).read_bytes() == (source / name).read_bytes()
    config, exported = load_hf(workdir / "export")
    assert load_text_model(str(source), str(template)).end_of_turn in config.eos_ids
    jax.tree.map(np.testing.assert_array_equal, exported, stored_params(workdir / "train" / "params"))


def test_the_card_tells_this_run(trained):
    workdir, overrides = trained
    text = _export(workdir, overrides)
    found = json.loads((workdir / "evaluation.json").read_text())
    bits = found["models"]["ctpd"]["bits_per_byte"]
    assert f"| {bits:.3f} |" in text and "**`ctpd`**" in text
    assert (
        "every span counts alike" in text
        and "48 pairs" in text
        and "| student, CTPD on the annotated data | 4 | 8 |" in text
    )


def test_what_is_exported_already_is_left_alone(trained):
    workdir, overrides = trained
    _export(workdir, overrides)
    before = {path.name: path.stat().st_mtime_ns for path in (workdir / "export").iterdir()}
    _export(workdir, overrides)
    assert {path.name: path.stat().st_mtime_ns for path in (workdir / "export").iterdir()} == before
    _export(workdir, [*overrides, "--config.export.dtype=bfloat16"])
    assert json.loads((workdir / "export" / "config.json").read_text())["dtype"] == "bfloat16"


def test_an_evaluation_of_other_parameters_is_not_told(trained):
    workdir, overrides = trained
    samples = workdir / "evaluation" / "samples" / "ctpd.json"
    content = json.loads(samples.read_text())
    del content["sha256"]
    other = content | {"inputs": content["inputs"] | {"params": "0" * 64}}
    write_record(samples, other)
    assert "was not evaluated" in _export(workdir, overrides)
    write_record(samples, content)
    assert "was not evaluated" not in _export(workdir, overrides)


def test_the_export_asks_as_training_asked_whatever_the_source_holds(tmp_path):
    """A byte order mark in the source's template, or a template that has a name and is no default."""
    source = Path(world_on_disk().student)
    turns = [{"role": "user", "content": "tea"}]
    for case in ("mark", "named"):
        folder = tmp_path / case
        shutil.copytree(source, folder)
        template = (folder / "chat_template.jinja").read_bytes()
        if case == "mark":
            (folder / "chat_template.jinja").write_bytes(b"\xef\xbb\xbf" + template)
        else:
            (folder / "additional_chat_templates").mkdir()
            (folder / "chat_template.jinja").rename(folder / "additional_chat_templates" / "mine.jinja")
        run = ["export", "--config", MICRO, "--workdir", str(tmp_path / f"run {case}")]
        overrides = [*SHORT, "--config.train.steps=-1", f"--config.student.path={folder}"]
        assert main([*run, *overrides]) == 0
        exported = tmp_path / f"run {case}" / "export"
        asked = AutoTokenizer.from_pretrained(exported).apply_chat_template(turns, add_generation_prompt=True)
        assert asked["input_ids"] == load_text_model(str(folder)).prompt([Message("user", "tea")]).tolist()
