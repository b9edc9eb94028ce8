"""Keys and passwords of the environment and of addresses stay where they are: in no file of a run, on no screen."""

from __future__ import annotations

import json
import shutil
import sys
from types import SimpleNamespace

import pytest
from helpers import MICRO

from ctpd_jax.cli import main
from ctpd_jax.errors import UserError, without_secrets

KEYS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY", "SOME_TOKEN", "SOME_API_KEY")
HIDDEN = "hidden-5f2c"
ADDRESS = f"https://somebody:{HIDDEN}@host/teacher"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"see {ADDRESS}.", "see https://***@host/teacher."),
        (f"http://{HIDDEN}@host:80/x and hf://a@b", "http://***@host:80/x and hf://***@b"),
        (f"https:/somebody:{HIDDEN}@host/pairs.jsonl", "https:/***@host/pairs.jsonl"),
        ("mail me@home, https://host/@user, 3 @ 4", "mail me@home, https://host/@user, 3 @ 4"),
        (json.dumps({"a": "x://", "b": "c@d"}), json.dumps({"a": "x://", "b": "c@d"})),
    ],
)
def test_names_and_passwords_of_addresses_are_left_out(text, shown):
    assert without_secrets(text) == shown and str(UserError(text)) == shown


def test_no_file_and_no_screen_has_them(finished_micro, tmp_path, monkeypatch, capsys):
    """Training, evaluation, card and pages with keys in the environment; the settings name an address with a password.

    The teacher's folder need not be on the machine that trains the student: nobody looks at it.
    """
    for key in KEYS:
        monkeypatch.setenv(key, f"{HIDDEN}-{key}")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    logged: list[object] = []
    wandb = SimpleNamespace(
        init=lambda **settings: logged.append(settings) or wandb,
        define_metric=lambda *names, **more: logged.append((names, more)),
        log=logged.append,
        finish=lambda: None,
    )
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    workdir = tmp_path / "run"
    shutil.copytree(finished_micro, workdir)
    shutil.rmtree(workdir / "train")
    (workdir / "evaluation.json").unlink()
    shutil.rmtree(workdir / "export")
    command = ["--config", MICRO, "--workdir", str(workdir), "--config.wandb=project"]
    assert main(["run", *command]) == 0
    shutil.rmtree(workdir / "train")
    assert main(["train", *command, f"--config.teacher.path={ADDRESS}"]) == 0
    assert main(["report", "--workdir", str(workdir)]) == 0
    assert main(["status", "--workdir", str(workdir)]) == 0
    assert main(["export", *command, "--push", "me/student", "--dry-run"]) == 0
    assert main(["annotate", *command, f"--config.teacher.path={ADDRESS}"]) == 2
    assert main(["annotate", *command, f"--config.data.train={ADDRESS}.jsonl"]) == 2
    told = "".join(capsys.readouterr())
    assert "https://***@host/teacher" in told and HIDDEN not in told
    assert len(logged) > 2 and HIDDEN not in repr(logged)
    for path in workdir.rglob("*"):
        assert not path.is_file() or HIDDEN.encode() not in path.read_bytes(), path
