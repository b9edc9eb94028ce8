"""Every kind of file of a workdir, damaged in every way: the same numbers as before, or a sentence that names it.

`pytest -m soak -s tests/pipeline/test_damage.py` prints what happens to which file.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import MICRO

from ctpd_jax.cli import main

STAGES = ("teacher_sft", "student_sft", "positive", "negative", "student_dpo", "train")
# What is looked at where many are alike: a stage that others begin with, and the one that is exported.
ALIKE = {
    "teacher_sft/": None, "student_sft/": None, "negative/": None, "student_dpo/": None, "prepared/test/": None,
    r"positive/params/.*": "positive/params/*", r"(annotations|evaluation)/columns/\w+": r"\1/columns/*",
    r"samples/\w+": "samples/*", r"tensorboard/.*": "tensorboard/*", r"\w+\.npy": "*.npy", r"[0-9a-f]{32}|\d+": "#",
}  # fmt: skip
# Command -> what it reads; everything is read by `run`, and the page and the status are quickly made.
READS = {"inspect": ("annotations/", "prepared/"), "generate": ("train/",), "generate --folder": ("export/",)}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def remove(path: Path) -> None:
    path.unlink()


def holding(text: str) -> Callable[[Path], None]:
    return lambda path: path.write_text(text) and None


ANY = {"cut to half": cut, "emptied": empty, "a bit flipped": flip, "a folder": folder, "removed": remove}
JSON = {"a list": holding("[]"), "no fields": holding("{}"), "deep": holding("[" * 100_000 + "]" * 100_000)}


def kinds(workdir: Path, under: str = "") -> dict[str, str]:
    """Kind -> the first file of that kind: names with digits and digests folded, and what is alike."""
    files = sorted(path.relative_to(workdir).as_posix() for path in (workdir / under).rglob("*") if path.is_file())
    found: dict[str, str] = {}
    for name in files:
        kind: str = name
        for pattern, folded in ALIKE.items():
            if folded is None and kind.startswith(pattern):
                break
            kind = re.sub(pattern, folded, kind) if folded else kind
        else:
            found.setdefault(kind, name)
    return found


def carried_out(*arguments: str) -> tuple[int, str]:
    """The exit code of a command, and what it said: standard output, errors and warnings."""
    out, told = io.StringIO(), warnings.catch_warnings(record=True)
    with told as heard, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        warnings.simplefilter("always", UserWarning)
        code = main(list(arguments))
    return code, out.getvalue() + "".join(str(one.message) for one in heard if one.category is UserWarning)


def results(workdir: Path) -> dict[str, object]:
    """What a run is for: parameters, evaluation, export, curves."""
    found: dict[str, object] = {
        stage: json.loads((workdir / stage / "done.json").read_text())["params"] for stage in STAGES
    }
    evaluation = json.loads((workdir / "evaluation.json").read_text())
    found["evaluation"] = {name: value for name, value in evaluation.items() if name not in ("sha256", "training")}
    exported = {path.name: path.read_bytes() for path in (workdir / "export").iterdir()}
    return found | {"card": exported.pop("README.md"), "export": exported}


def looks(workdir: Path) -> dict[str, tuple[str, ...]]:
    """The commands that read a workdir."""
    run = ("--config", MICRO, "--workdir", str(workdir))
    return {
        "status": ("status", "--workdir", str(workdir)),
        "report": ("report", "--workdir", str(workdir)),
        "inspect": ("inspect", *run, "--pair", "1"),
        "generate": ("generate", *run, "--prompt", "Tell me about tea.", "--max-new-tokens", "4"),
        "generate --folder": (
            "generate", "--folder", str(workdir / "export"), "--prompt", "Tell me about tea.", "--max-new-tokens", "4",
        ),
    }  # fmt: skip


def plain(text: str) -> str:
    """What was said, without what every moment changes."""
    return re.sub(r"last heard .* ago", "", text)


@pytest.fixture(scope="module")
def whole(finished_micro, tmp_path_factory):
    """The workdir, and what is said and found of it undamaged."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    shutil.copytree(finished_micro, workdir)
    said = {name: carried_out(*command) for name, command in looks(workdir).items()}
    assert {code for code, _ in said.values()} == {0}, said
    assert carried_out("run", "--config", MICRO, "--workdir", str(workdir))[0] == 0
    return workdir, {name: plain(text) for name, (_, text) in said.items()}, results(workdir)


def outcome(workdir: Path, name: str, said: dict[str, str], wanted: dict[str, object]) -> dict[str, str]:
    """Command -> "same", "told" or the sentence, of a workdir in which the file `name` is damaged."""
    found, there = {}, (workdir / name).exists() and name != "metrics.jsonl"
    for command, arguments in looks(workdir).items():
        if not name.startswith(READS.get(command, "")):
            continue
        code, text = carried_out(*arguments)
        assert code in (0, 2), f"{command}: exit code {code}\n{text}"
        found[command] = "same" if code == 0 else named(command, name, text)
        if code == 0 and plain(text) != said[command]:
            # Hugging Face's format has no checksums; `run` and `export` have. What is gone is not told of.
            unseen = "not seen" if command == "generate --folder" else ""
            gone = "as before it was made" if not there else ""
            assert unseen or gone or Path(name).name in text, f"{command} says otherwise:\n{text}"
            found[command] = unseen or gone or "told"
    code, text = carried_out("run", "--config", MICRO, "--workdir", str(workdir))
    found["run"] = "same" if code == 0 else named("run", name, text)
    if code == 0 and name in text:
        found["run"] += ", told: " + next(line for line in text.splitlines() if name in line)
    assert code in (0, 2), f"run: exit code {code}\n{text}"
    # What it says is done, and what another command says; a folder in the place of a file is two steps.
    sentences = [found["run"]] if code == 2 else [one for one in found.values() if "emove" in one]
    for _ in range(2):
        if sentences and follow(sentences[-1], workdir):
            code, text = carried_out("run", "--config", MICRO, "--workdir", str(workdir))
            sentences = [named("run", name, text)] if code == 2 else []
            found["run"] += " Then the same." if code == 0 else f" Then: {sentences[0]}"
    assert code == 0, f"run, as it was told: {text}"
    if code == 0:
        now = results(workdir)
        differ = [each for each in wanted if now[each] != wanted[each]]
        assert not differ or (name in text and differ == ["card"]), f"run: other results in {differ}\n{text}"
    return found


def named(command: str, name: str, text: str) -> str:
    """The sentence of exit code 2, once it was found to name the file, or the folder that it belongs to."""
    (sentence,) = [line for line in text.splitlines() if line.startswith("ctpd ")]
    file, folder_of_it = Path(name).name, next((one for one in ("params", "columns") if f"/{one}/" in name), None)
    parts = {file, folder_of_it or f"/{Path(name).parent} ", file.removesuffix(".jinja").replace("_", " ")}
    assert any(part in sentence for part in parts), f"{command}: {sentence}"
    return sentence


def follow(sentence: str, workdir: Path) -> bool:
    """Does what the sentence says; False where that is not to remove something."""
    if line := re.search(r"(\S+):(\d+) .*remove that line", sentence):
        lines = Path(line[1]).read_bytes().split(b"\n")
        Path(line[1]).write_bytes(b"\n".join(lines[: int(line[2]) - 1] + lines[int(line[2]) :]))
        return True
    if told := re.search(r"[Rr]emove (/\S+)", sentence) or re.search(
        r"(/\S+) (?:is|cannot|exists) .*remove it", sentence
    ):
        path = Path(told[1].rstrip(",.;:"))
        assert path.is_relative_to(workdir) and path != workdir
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        return True
    return False


@pytest.mark.soak
@pytest.mark.parametrize("damage", [*ANY, "another kind of JSON"])
def test_a_damaged_file_is_mended_or_named(whole, tmp_path, damage, capsys):
    workdir, said, wanted = whole
    aside, rows, faults = tmp_path / "whole", [], []
    shutil.copytree(workdir, aside)
    for number, (kind, name) in enumerate(kinds(aside).items()):
        if damage in ANY or name.endswith(".json"):
            done = damage if damage in ANY else list(JSON)[number % len(JSON)]
            (ANY | JSON)[done](workdir / name)
            try:
                found = outcome(workdir, name, said, wanted)
                rows.append(f"{done} | {kind} | " + "; ".join(f"{what}: {found[what]}" for what in found))
            except Exception as error:  # a traceback is what must not be: all of them are told together
                faults.append(f"{kind}: {type(error).__name__}: {error}")
            shutil.rmtree(workdir)
            shutil.copytree(aside, workdir)
    with capsys.disabled():
        print("", *[row.replace(str(workdir), "RUN") for row in rows], sep="\n")
    assert not faults, "\n".join(faults)


@pytest.mark.soak
def test_a_damaged_file_of_a_half_trained_stage(whole, tmp_path, monkeypatch, capsys):
    """Of a checkpoint that is not whole the one before is taken; what the stage is made from has to be known."""
    workdir, _, wanted = whole
    aside, half, rows = tmp_path / "whole", tmp_path / "half", []
    shutil.copytree(workdir, aside)

    # A stage that was interrupted between its last update and its end.
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    command = ("train", "--config", MICRO, "--workdir", str(workdir))
    (workdir / "train" / "done.json").unlink()
    shutil.rmtree(workdir / "train" / "params")
    with monkeypatch.context() as patch:
        patch.setattr("ctpd_jax.job.training.leave", interrupt)
        assert carried_out(*command)[0] == 130
    shutil.copytree(workdir, half)
    names = kinds(half, "train")
    assert any("checkpoints/00000002/checksums.json" in name for name in names.values())
    for damage, spoil in ANY.items():
        for kind, name in names.items():
            spoil(workdir / name)
            code, text = carried_out(*command)
            found = "same" if code == 0 else named("train", name, text)
            if code == 2:
                assert follow(found, workdir) and carried_out(*command)[0] == 0, f"{damage} {name}: {text}"
            done = json.loads((workdir / "train" / "done.json").read_text())
            assert done["params"] == wanted["train"], f"{damage} {name}: {text}"
            rows.append(f"{damage} | {kind} | train: {found}" + ", told" * ("Removed" in text))
            shutil.rmtree(workdir)
            shutil.copytree(half, workdir)
    shutil.rmtree(workdir)
    shutil.copytree(aside, workdir)
    with capsys.disabled():
        print("", *[row.replace(str(workdir), "RUN") for row in rows], sep="\n")
