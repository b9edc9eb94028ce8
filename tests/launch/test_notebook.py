"""launch/colab.ipynb played from top to bottom on the CPU, in small, with stand-ins for Colab and for pip."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from helpers import MICRO, ROOT

pytestmark = pytest.mark.slow  # two runs

FORMS = {"SOURCE": str(ROOT), "DEMO": MICRO}


class Notebook:
    """Runs code cells: Python here, lines with "!" in a shell, as IPython does."""

    def __init__(self, folder: Path, replaced: dict[str, str]) -> None:
        self.folder, self.replaced, self.shown = folder, replaced, []
        self.names = {"__name__": "__main__", "_shell": self.shell, "_change": self.change}

    def shell(self, line: str) -> None:
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, cwd=self.folder, timeout=900)
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"

    def change(self, folder: str) -> None:
        self.folder = self.folder / folder

    def play(self, source: str) -> None:
        for name, value in FORMS.items():
            source = re.sub(rf"^{name} = .*# @param", f"{name} = {value!r}  # @param", source, flags=re.M)
        for before, after in self.replaced.items():
            source = source.replace(before, after)
        lines = []
        for line in source.splitlines():
            if line.startswith("%cd"):
                line = f"_change({line.split()[-1]!r})"
            elif line.startswith("!"):
                line = f"_shell(f{line[1:]!r})"
            lines.append(line)
        # A last expression is shown.
        tree = ast.parse("\n".join(lines))
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, "cell", "exec"), self.names)
        if last is not None:
            self.shown.append(eval(compile(ast.Expression(last.value), "cell", "eval"), self.names))


def stand_ins(monkeypatch, content: Path) -> list[str]:
    """google.colab and IPython.display; returns what is downloaded."""
    colab, userdata, files = (ModuleType(name) for name in ("google.colab", "userdata", "files"))
    userdata.SecretNotFoundError = userdata.NotebookAccessError = KeyError
    userdata.get = {}.__getitem__
    downloaded: list[str] = []
    files.download = downloaded.append
    colab.userdata, colab.files = userdata, files
    display = ModuleType("IPython.display")
    display.HTML = lambda text: text
    display.display = lambda value: downloaded.append(value._repr_html_())
    for name, module in {"google.colab": colab, "IPython": ModuleType("IPython"), "IPython.display": display}.items():
        monkeypatch.setitem(sys.modules, name, module)
    return downloaded


def test_the_notebook_plays_from_top_to_bottom(tmp_path, monkeypatch):
    content, tools = tmp_path / "content", tmp_path / "bin"
    content.mkdir()
    tools.mkdir()
    # What is installed is installed already; everything else runs as it stands.
    (tools / "pip").write_text("#!/bin/sh\n")
    (tools / "ctpd").write_text(f'#!/bin/sh\nexec {sys.executable} -m ctpd_jax.cli "$@"\n')
    (tools / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    for tool in ("pip", "ctpd", "python"):
        (tools / tool).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "programs"))  # both runs compile the same ones
    downloaded = stand_ins(monkeypatch, content)
    cells = json.loads((ROOT / "launch" / "colab.ipynb").read_text())["cells"]
    notebook = Notebook(tmp_path, {"/content": str(content), "configs/colab_v5e.py": MICRO})
    for cell in cells:
        if cell["cell_type"] == "code":
            notebook.play("".join(cell["source"]))
    assert [page[:15] for page in notebook.shown if page] == ["<!DOCTYPE html>"] * 3
    spans, archive = downloaded
    assert spans.count("<code") > 10 and Path(archive).stat().st_size > 10_000
