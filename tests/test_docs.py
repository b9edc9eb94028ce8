"""The documents: settings as the source says them, commands and settings that exist, messages that are said."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys

import pytest
from helpers import ROOT

from ctpd_jax.cli import load_config
from ctpd_jax.job.arguments import parser

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCE = "\n".join(path.read_text("utf-8") for path in sorted((ROOT / "ctpd_jax").rglob("*.py")))


def blocks(language: str) -> list[tuple[str, str]]:
    """(page, text) of every fenced block of a language."""
    found = []
    for page in PAGES:
        for own, text in re.findall(r"^```(\w*)\n(.*?)^```", page.read_text("utf-8"), re.M | re.S):
            if own == language:
                found.append((page.name, text))
    return found


def commands() -> list[tuple[str, list[str]]]:
    """Every `ctpd` command of a block or between backticks, as a shell cuts it; those with "..." are no commands."""
    texts = [(page, line) for page, text in blocks("") for line in text.replace("\\\n", " ").splitlines()]
    for page in PAGES:
        texts += [(page.name, inline) for inline in re.findall(r"`(ctpd [a-z_]+ [^`]+)`", page.read_text("utf-8"))]
    found = []
    for page, line in texts:
        if line.startswith("ctpd ") and "..." not in line:
            words = shlex.split(line, comments=True)[1:]
            # In a sentence the run is not named.
            bare = not any(word in words for word in ("--config", "--folder", "--data", "judge", "--workdir"))
            found.append((page, [*words, *(["--config", "configs/demo.py", "--workdir", "x"] if bare else [])]))
    return found


def test_settings_are_those_of_the_source():
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "make_settings.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_every_command_is_one():
    seen = set()
    for page, words in commands():
        try:
            known, overrides = parser().parse_known_args(words)
        except SystemExit:
            pytest.fail(f"{page}: ctpd {shlex.join(words)}")
        seen.add(known.command)
        if known.command == "judge":
            continue
        if getattr(known, "config", None) == "FILE.py":  # a name for any
            continue
        config = ROOT / known.config if getattr(known, "config", None) else None
        assert config is None or config.is_file(), (page, words)
        load_config(str(config) if config else None, overrides)  # a key that does not exist is refused
    assert {"run", "inspect", "generate", "plan", "judge", "evaluate"} <= seen


def test_every_setting_that_a_page_names_exists():
    defaults, wrong = load_config(None, []), []
    sections = "|".join(name for name, value in defaults.items() if hasattr(value, "keys"))
    for page in PAGES:
        for name in re.findall(rf"`(?:--config\.)?((?:{sections})\.[a-z_0-9.]+)", page.read_text("utf-8")):
            found = defaults
            for part in name.rstrip(".").split("."):
                found = found[part] if hasattr(found, "keys") and part in found else None
            if found is None and not name.endswith((".py", ".json")):
                wrong.append((page.name, name))
    assert not wrong


def test_every_message_of_the_errors_page_is_said():
    page = (ROOT / "docs" / "errors.md").read_text("utf-8")
    told = re.findall(r"^\| `([^`]+)`", page.partition("most often")[2], re.M)
    assert len(told) > 5
    joined = re.sub(r'"\s+f?"', "", SOURCE)  # sentences that the source cuts into lines
    for message in told:
        for part in re.split(r"\.\.\.|\b[NM]\b", message):
            assert part.strip() in joined or message.startswith("RESOURCE_EXHAUSTED"), message


@pytest.mark.parametrize("text", [text for page, text in blocks("python") if page == "functions.md"])
def test_the_examples_of_the_functions_run(text, capsys):
    exec(compile(text, "functions.md", "exec"), {})
    assert capsys.readouterr().out
