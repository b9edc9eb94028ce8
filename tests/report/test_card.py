"""The model card: true to the run, readable by the hub, and with nothing from data that could leave its place."""

from __future__ import annotations

import re

import pytest
from helpers import made_up
from huggingface_hub import ModelCard

from ctpd_jax.job.table import way_to
from ctpd_jax.report.card import model_card
from ctpd_jax.settings import default_config

UPDATES = {"student_sft": 40, "positive": 1_200, "negative": 1_300, "train": 5_000}


def card(changes=None, row="ctpd", updates=None, template="chat", evaluation=None, pairs=1234):
    config = default_config()
    config.data.train = "hf:owner/some-pairs:helpful"
    config.teacher.path, config.student.path = "maker/big-teacher", "maker/small-student"
    config.update_from_flattened_dict(changes or {})
    versions = {"ctpd-jax": "0.1.0", "jax": "0.10.2"}
    return model_card(
        config.to_dict(),
        row,
        UPDATES if updates is None else updates,
        way_to(config, row),
        pairs,
        template,
        evaluation,
        versions,
    )


def test_the_hub_reads_the_front_matter():
    data = ModelCard(card()).data
    assert data.library_name == "transformers" and data.pipeline_tag == "text-generation"
    assert data.base_model == "maker/small-student" and data.datasets == ["owner/some-pairs"]
    assert data.tags == ["ctpd", "preference-distillation"]
    assert ModelCard(card()).text.strip().startswith("# small-student (CTPD)")


def test_it_says_how_the_model_was_made():
    text = card({"train.beta": 0.07, "weights.lower": -0.25, "seed": 17, "train.lora.rank": 8})
    for said in (
        *("`maker/big-teacher`", "`maker/small-student`", "arxiv.org/abs/2601.11865", "1,234 pairs", "seed: 17"),
        *("mu 1, k 1, exponents between -0.25 and 1.5", "reference: the teacher", "`0.10.2`", "`0.1.0`"),
        "| student, CTPD on the annotated data | 5,000 | 16 | 1e-06 | 0.07 | `sigmoid` | adapters, rank 8, alpha 16 |",
        "| student, SFT on the chosen responses | 40 | 16 | 2e-06 |  |  | all parameters |",
        "| teacher, leaning to the rejected responses | 1,300 |",
        "This model was not evaluated",
        "apply_chat_template",
    ):
        assert said in text, said
    assert "teacher, SFT" not in text  # that stage was left out


def test_other_sources_of_weights_are_told():
    assert "leaning to" not in card({"weights.source": "uniform"}, updates={"train": 3})
    assert "every span counts alike" in card({"weights.source": "uniform"}, updates={"train": 3})
    half = "parameters in bfloat16"
    assert half in card({"annotate.teacher_weights": "bfloat16"}) and half not in card()
    # An int8 model is another one: who read, and what adapters were trained over, is told.
    rounded, told = (
        "the teacher read with its layers' matrices rounded to int8",
        "alpha 16, over matrices rounded to int8 |",
    )
    text = card({"annotate.teacher_weights": "int8", "positive.lora.rank": 8, "positive.lora.base": "int8"})
    assert rounded in text and text.count(told) == 1 and "rounded" not in card()
    mixed = card({"weights.negative_scorer": "student"})
    assert "student, leaning to the rejected responses" in mixed
    assert "| teacher, leaning to the chosen responses | 1,200 | 16 | 2e-06 |  |  |" in card({"weights.source": "sft"})


def test_a_student_without_distillation_is_not_called_distilled():
    text = card(row="student_start", updates={"student_sft": 40, "positive": 7})
    assert "left out" in text and "(CTPD)" not in text and ModelCard(text).data.tags is None
    assert "leaning to" not in text and "SFT on the chosen responses | 40" in text
    assert "No stage of this run trained it." in card(row="student_start", updates={})


def test_the_evaluation_is_the_runs():
    text = card(evaluation=made_up.evaluation())
    assert "| **`ctpd`** | 78.0 [71.0, 84.0] | 83.0 [76.0, 89.0] | 68.0 [61.0, 74.0] | 1.414 |" in text
    assert "| `teacher` | 60.0 [53.0, 66.0] | n/a | n/a | 1.414 |" in text
    assert "on 200 held-out pairs" in text and "in 71.0 [64.0, 77.0] %" in text


def test_a_folder_of_this_machine_is_told_by_its_name_alone(tmp_path):
    (tmp_path / "student-folder").mkdir()
    text = card(
        {
            "student.path": str(tmp_path / "student-folder"),
            "teacher.path": "/home/somebody/secret/teacher-folder",
            "data.train": "/home/somebody/pairs.jsonl",
        }
    )
    assert "`student-folder`" in text and "`teacher-folder`" in text and "`pairs.jsonl`" in text
    assert str(tmp_path) not in text and "somebody" not in text
    assert ModelCard(text).data.base_model is None and ModelCard(text).data.datasets is None


def test_plain_text_is_asked_without_a_template():
    text = card(template="plain", pairs=None)
    assert "by plain text, without a template" in text and "apply_chat_template" not in text
    assert "split `train`; at most" in text


@pytest.mark.parametrize(
    "hostile",
    [
        "x`](http://evil) <script>alert(1)</script>",
        "a\n---\nlicense: mit\n# Heading",
        "a | b ||",
        "\x1b[31m\u202e" * 99,
    ],
)
def test_data_stays_in_its_place(hostile):
    text = card(
        {"data.train_split": hostile, "train.normalize": hostile, "teacher.path": "folder/of/" + hostile},
        evaluation=made_up.evaluation() | {"models": {hostile: made_up.row(0.5), "ctpd": made_up.row(0.6)}},
    )
    plain = card(evaluation=made_up.evaluation())
    assert ModelCard(text).data.to_dict() == ModelCard(plain).data.to_dict()
    outside = re.sub(r"`[^`\n]*`", "", text)
    for part in ("evil", "script", "license", "Heading", "\x1b", "\u202e"):
        assert part not in outside
    assert "\x1b" not in text and "\u202e" not in text
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert headings == [line for line in plain.splitlines() if line.startswith("#")]
    for line in text.splitlines():
        if line.startswith("|"):
            assert line.count("|") in (6, 8)  # five or seven columns
    assert max(map(len, text.splitlines())) < 700
