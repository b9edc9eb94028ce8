"""A teacher that is elsewhere: a server or a table measures it, and what follows is what a teacher here would give."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from helpers import MICRO
from helpers.jobs import files_of, job_in
from helpers.scoring_server import ScoringServer, serving

from ctpd_jax.annotate.coefficients import training_items
from ctpd_jax.annotate.store import open_store
from ctpd_jax.cli import load_config, main
from ctpd_jax.job.lineage import merged
from ctpd_jax.models.hf import load_hf
from ctpd_jax.schema import SIDES

SERVED = [f"--config.annotate.served.{name}={name}" for name in ("reference", "positive", "negative")]
OWN = ("annotations", "train", "evaluation", "evaluation.json", "student_dpo", "export", "report.html")


@pytest.fixture(scope="module")
def server(finished_micro):
    """The three models of the teacher that the micro run has trained."""
    job = job_in(finished_micro, load_config(MICRO, []))
    stages = {"reference": "teacher_sft", "positive": "positive", "negative": "negative"}
    decoder = files_of(job).decoder("teacher")
    with serving({name: (decoder, merged(files_of(job), job.config, one)) for name, one in stages.items()}) as made:
        yield made


@pytest.fixture
def workdir(finished_micro, tmp_path) -> Path:
    """The micro run before its annotation: the student has its SFT."""
    return Path(shutil.copytree(finished_micro, tmp_path / "run", ignore=shutil.ignore_patterns(*OWN)))


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr("ctpd_jax.processes.server.time.sleep", lambda seconds: None)


def annotate(workdir: Path, *settings: str) -> int:
    return main(["annotate", "--config", MICRO, "--workdir", str(workdir), *settings])


def elsewhere(server: ScoringServer) -> list[str]:
    return [f"--config.annotate.endpoint={server.url}", *SERVED, "--config.annotate.pairs_per_shard=8"]


def same_scores(one: Path, other: Path, within: float) -> None:
    stores = open_store(one / "annotations"), open_store(other / "annotations")
    assert len(stores[0]) == len(stores[1]) and stores[0].manifest["scorers"] == stores[1].manifest["scorers"]
    for (pair, ours), (same, theirs) in zip(*stores):
        assert pair.id == same.id
        for side in SIDES:
            for name, values in ours[side].items():
                np.testing.assert_allclose(values, theirs[side][name], atol=within, rtol=0)


def test_a_server_measures_what_the_teacher_here_would(finished_micro, workdir, server, capsys):
    """It dies in the middle; the shards that were whole are not asked for again; a teacher's weights are not needed."""
    server.asked.clear()
    server.limit = 3 * 2 * 48 // 2  # half of the second column
    assert annotate(workdir, *elsewhere(server)) == 2
    assert "does not answer (status 503); the same command goes on" in capsys.readouterr().err
    before = {(body["model"], tuple(body["prompt"])) for body in server.asked[: 2 * 48]}  # the reference, whole
    answered = len(server.asked)
    server.limit = 10**9
    assert annotate(workdir, *elsewhere(server)) == 0
    same_scores(finished_micro, workdir, 1e-4)
    again = {(body["model"], tuple(body["prompt"])) for body in server.asked[answered:]}
    assert not before & again
    asked = len(server.asked)
    assert annotate(workdir, *elsewhere(server)) == 0 and len(server.asked) == asked

    # The whole of it as a table, which can be given back: the same numbers to the bit.
    out = workdir / "pairs.parquet"
    assert main(["table", "--config", MICRO, "--workdir", str(workdir), "--out", str(out), *elsewhere(server)]) == 0
    other = Path(shutil.copytree(workdir, workdir.with_name("other"), ignore=shutil.ignore_patterns(*OWN)))
    assert annotate(other, f"--config.annotate.table={out}", "--config.annotate.pairs_per_shard=8") == 0
    same_scores(workdir, other, 0)

    # Another table is not what was trained on; where it is gone, nobody can tell.
    train = ["train", "--config", MICRO, "--workdir", str(other), f"--config.annotate.table={out}"]
    pyarrow.parquet.write_table(pyarrow.parquet.read_table(out)[::-1], out)
    assert main(train) == 2 and "measured_by.reference is 'table: " in capsys.readouterr().err
    out.unlink()
    assert main(train) == 0

    # What is trained from it needs the settings that it was made with, and the server no more.
    server.limit = 0
    train = ["train", "--config", MICRO, "--workdir", str(workdir)]
    assert main(train) == 2 and "settings.scorers.reference.weights" in capsys.readouterr().err
    assert main([*train, *elsewhere(server)]) == 0
    assert (workdir / "train" / "done.json").exists()


def test_a_table_holds_what_training_reads(finished_micro, tmp_path):
    out = tmp_path / "made" / "pairs.parquet"
    assert main(["table", "--config", MICRO, "--workdir", str(finished_micro), "--out", str(out)]) == 0
    rows, store = pyarrow.parquet.read_table(out).to_pylist(), open_store(finished_micro / "annotations")
    assert len(rows) == len(store) == 48
    for row, (pair, scores) in zip(rows, store):
        assert row["id"] == pair.id and row["teacher_prompt"] == pair.teacher_prompt.tolist()
        for side, name in enumerate(SIDES):
            aligned = pair.response(side)
            assert row[f"{name}_bounds"] == aligned.bounds.tolist()
            assert row[f"{name}_student_ids"] == aligned.student.ids.tolist()
            # log pi+ less log pi-, clipped, with the sign of the side: the paper's weights.
            ratio = scores[name]["positive"] - scores[name]["negative"]
            expected = np.exp((1, -1)[side] * np.clip(ratio, -0.5, 1.5))
            np.testing.assert_allclose(row[f"{name}_weights"], expected, rtol=1e-5)
            token_weights = np.asarray(row[f"{name}_weights"])[aligned.student.span_ids]
            np.testing.assert_allclose(row[f"{name}_token_weights"], token_weights, rtol=1e-6)
            constant = float((expected * scores[name]["reference"]).sum())
            assert row[f"{name}_constant"] == pytest.approx(constant, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("settings", [["train.objective=regression", "train.offset=0.5"], ["weights.source=random"]])
def test_a_table_holds_the_numbers_of_training_to_the_bit(finished_micro, tmp_path, settings):
    """What the objective follows besides, and by how much the chosen response has to lead."""
    settings, out = [f"--config.{setting}" for setting in settings], tmp_path / "pairs.parquet"
    assert main(["table", "--config", MICRO, "--workdir", str(finished_micro), "--out", str(out), *settings]) == 0
    config = load_config(MICRO, settings)
    items, _ = training_items(open_store(finished_micro / "annotations"), config.weights, config.train, config.seed)
    for row, item in zip(pyarrow.parquet.read_table(out).to_pylist(), items, strict=True):
        assert (row["id"], row["label"], row["pair_weight"]) == (item.id, 1, 1)
        for name, response in zip(SIDES, item.responses):
            np.testing.assert_array_equal(np.float32(row[f"{name}_token_weights"]), response.weights)
            assert row[f"{name}_constant"] == response.constant
            assert (response.targets is None) == (f"{name}_targets" not in row)
            np.testing.assert_array_equal(row.get(f"{name}_targets"), response.targets)


def test_a_place_where_no_table_can_lie(workdir, tmp_path, capsys):
    given = tmp_path / "scored.parquet"
    given.write_bytes(b"measured for days")
    (tmp_path / "file").touch()
    for out, sentence in (
        (tmp_path, "is no file, and nothing else is replaced by one"),
        ("/dev/null", "is no file, and nothing else is replaced by one"),
        (tmp_path / "file" / "x.parquet", "cannot be written: "),
        ("/proc/none/x.parquet", "cannot be written: No such file"),
        (given, "is config.annotate.table: what was measured would be lost"),
    ):
        table = ["table", "--config", MICRO, "--workdir", str(workdir), f"--config.annotate.table={given}"]
        assert main([*table, "--out", str(out)]) == 2
        assert sentence in capsys.readouterr().err
    assert given.read_bytes() == b"measured for days" and Path("/dev/null").is_char_device()


def test_a_table_that_lacks_a_pair_is_met_before_anything_is_trained(finished_micro, tmp_path, capsys):
    out = tmp_path / "pairs.parquet"
    assert main(["table", "--config", MICRO, "--workdir", str(finished_micro), "--out", str(out)]) == 0
    pyarrow.parquet.write_table(pyarrow.parquet.read_table(out)[:-1], out)
    run = ["run", "--config", MICRO, "--workdir", str(tmp_path / "run"), f"--config.annotate.table={out}"]
    assert main(run) == 2
    assert "has no row of pair" in capsys.readouterr().err and not (tmp_path / "run" / "student_sft").exists()


def test_a_whole_run_without_the_weights_of_the_teacher(toy_models, tmp_path, capsys):
    """A teacher of a family that is not known here, by its tokenizer alone; the pair is made by two instructions."""
    teacher, _ = toy_models
    folder = Path(shutil.copytree(teacher, tmp_path / "teacher", ignore=shutil.ignore_patterns("*.safetensors")))
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(told | {"model_type": "unheard_of", "architectures": ["UnheardOf"]}))
    settings = [f"--config.teacher.path={folder}", "--config.weights.source=prompts"]
    settings += ["--config.student_sft.steps=-1", "--config.student_dpo.steps=-1"]
    run = ["run", "--config", MICRO, "--workdir", str(tmp_path / "run"), *settings]
    table = ["table", *run[1:], "--out", str(tmp_path / "asked.parquet"), "--config.annotate.table=none.parquet"]
    with serving({"big": load_hf(teacher)}) as server:
        served = [f"--config.annotate.endpoint={server.url}", "--config.annotate.served.reference=big"]
        assert main([*run, f"--config.annotate.endpoint={server.url}", "--config.annotate.served.reference=huge"]) == 2
        assert f"config.annotate.served.reference is 'huge'; {server.url} has big." in capsys.readouterr().err
        assert main([*run, *served]) == 0
    said = capsys.readouterr().out
    assert "positive: left out (config.annotate.endpoint: the teacher is elsewhere)" in said
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert set(found["models"]) == {"student_start", "ctpd"} and found["models"]["ctpd"]["lambda"] is None
    # What a table has to hold, before it holds it: the prompts behind both instructions among it.
    assert main(table) == 0
    row = pyarrow.parquet.read_table(tmp_path / "asked.parquet").to_pylist()[0]
    prompts = [tuple(row[f"{name}_prompt"]) for name in ("teacher", "positive", "negative")]
    read = {tuple(body["prompt"]) for body in server.asked}
    assert len(set(prompts)) == 3
    assert all((*prompt, *row[f"{side}_teacher_ids"]) in read for prompt in prompts for side in SIDES)
    # The server is gone, and nobody needs it any more.
    capsys.readouterr()
    assert main([*run, *served]) == 0 and "annotate: 48 pairs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["endpoint=http://127.0.0.1:9"], "config.annotate.served.reference is ''; name the model on the server"),
        (
            ["endpoint=http://127.0.0.1:9", "table=x"],
            "config.annotate.table is 'x'; annotate.endpoint measures the same",
        ),
        (["table=/nowhere.parquet"], "There is no table /nowhere.parquet"),
        (["endpoint=127.0.0.1:9/v1"], "config.annotate.endpoint is '127.0.0.1:9/v1'; the address of a server begins"),
        (["parallel=0"], "config.annotate.parallel is 0; it has to be positive"),
    ],
)
def test_what_does_not_go_together_is_a_sentence(settings, sentence, workdir, capsys):
    assert annotate(workdir, *(f"--config.annotate.{setting}" for setting in settings)) == 2
    assert sentence in capsys.readouterr().err


def test_distillation_needs_the_weights(workdir, capsys):
    assert annotate(workdir, "--config.annotate.table=x", "--config.student_uld.steps=2") == 2
    assert "config.student_uld.steps is 2; it learns from all probabilities of a teacher" in capsys.readouterr().err
