"""Writes docs/settings.md from ctpd_jax/settings.py: every key of the config with its default and its comment.

python docs/make_settings.py           # writes it
python docs/make_settings.py --check   # exit code 1 if it is not what it would write
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from pathlib import Path

from ml_collections import ConfigDict

from ctpd_jax import settings

SOURCE, PAGE = Path(settings.__file__), Path(__file__).with_name("settings.md")
HEAD = """\
# Settings

Every key of the config, its default and its meaning. This page is made from
`ctpd_jax/settings.py` by `docs/make_settings.py`. A key is given as `--config.train.beta=0.2`, or in a file with
`get_config()` that begins with `default_config()`; one that does not exist is an error. Such a file is Python and is
run: give `--config` only what you would run yourself. Models, tokenizers and data are only ever read.
"""
# The functions of settings.py that sections are made of, and what is said of each.
SHARED = {
    "training": "Every stage that trains",
    "preference": "Stages that train on pairs",
    "distilling": "Logit distillation",
    "model": "A model: `teacher`, `student`",
}


def comments() -> dict[int, tuple[str, bool]]:
    """Return line -> (comment, whether it has the line for itself)."""
    found = {}
    for token in tokenize.generate_tokens(io.StringIO(SOURCE.read_text("utf-8")).readline):
        if token.type == tokenize.COMMENT:
            found[token.start[0]] = token.string.lstrip("# "), not token.line[: token.start[1]].strip()
    return found


def meaning(line: int, told: dict[int, tuple[str, bool]]) -> str:
    """Return what stands beside a key, else above it."""
    if line in told:
        return told[line][0]
    above = []
    while (line := line - 1) in told and told[line][1]:
        above.append(told[line][0])
    return " ".join(reversed(above))


def rows(node: ast.Dict, prefix: str, values: ConfigDict | dict, told: dict[int, tuple[str, bool]]) -> list[str]:
    """Return a table's rows for the keys of a dict in the source; nested ones under their path."""
    lines = []
    for key, value in zip(node.keys, node.values, strict=True):
        if not isinstance(key, ast.Constant):
            continue
        name = f"{prefix}{key.value}"
        if isinstance(value, ast.Dict):
            lines += rows(value, f"{name}.", values[key.value], told)
        elif not (isinstance(value, ast.Call) and getattr(value.func, "id", "") in SHARED):
            shown = repr(values[key.value]) if key.value in values else ast.unparse(value)
            if not (says := meaning(key.lineno, told)):
                raise SystemExit(f"{SOURCE.name} does not say what {name} means: add a comment beside it.")
            lines.append(f"| `{name}` | `{shown}` | {says.replace('|', chr(92) + '|')} |")
    return lines


def sections(node: ast.Dict) -> list[str]:
    """Return a row for each section that one of the shared functions makes: what it is made of, and what differs."""
    lines = []
    for key, value in zip(node.keys, node.values, strict=True):
        if isinstance(value, ast.Call) and getattr(value.func, "id", "") in SHARED and isinstance(key, ast.Constant):
            other = ", ".join(f"`{one.arg}={ast.unparse(one.value)}`" for one in value.keywords)
            lines.append(f"| `{key.value}` | {SHARED[value.func.id].split(':')[0].lower()} | {other} |")
    return lines


def said_of(function: ast.FunctionDef) -> str:
    """Return what a function's docstring says, and which settings of `training` it takes other defaults for."""
    says = " ".join((ast.get_docstring(function) or "").split())
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "training":
            own = [("lr", one) for one in node.args] + [(one.arg, one.value) for one in node.keywords]
            other = [f"`{name}={ast.unparse(one)}`" for name, one in own if name and not isinstance(one, ast.Name)]
            says += "\nIt has all keys of a stage that trains" + (f", with {', '.join(other)}." if other else ".")
    return says


def page() -> str:
    """Return the whole page."""
    tree, told, config = ast.parse(SOURCE.read_text("utf-8")), comments(), settings.default_config()
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    dicts = {
        name: max((d for d in ast.walk(node) if isinstance(d, ast.Dict)), key=lambda d: len(ast.dump(d)))
        for name, node in functions.items()
    }
    examples = {"training": "train", "preference": "train", "distilling": "student_dskd", "model": "teacher"}
    table = ["| key | default | meaning |", "|---|---|---|"]
    parts = [HEAD, "## The run, and its sections", "", *table, *rows(dicts["default_config"], "", config, told)]
    for name, title in SHARED.items():
        own = rows(dicts[name], "STAGE." if name != "model" else "MODEL.", config[examples[name]], told)
        parts += ["", f"## {title}", "", said_of(functions[name]), "", *table, *own]
    # What differs between stages: the arguments of the calls.
    parts += ["", "## Stages", "", "| section | keys of | here |", "|---|---|---|", *sections(dicts["default_config"])]
    parts.append("| `student_proposed` | as `train` | `steps=-1` |")
    own = next(
        value
        for key, value in zip(dicts["default_config"].keys, dicts["default_config"].values)
        if isinstance(key, ast.Constant) and key.value == "train"
    )
    parts += ["", "## `train`, and `student_proposed`, besides", "", *table]
    for one in own.keywords:
        if one.arg not in ("lr", "beta"):  # which stand above
            default = config.train[one.arg]
            parts.append(f"| `train.{one.arg}` | `{default!r}` | {meaning(one.value.lineno, told)} |")
    return "\n".join(parts) + "\n"


def main() -> int:
    if "--check" in sys.argv:
        if PAGE.exists() and PAGE.read_text("utf-8") == page():
            return 0
        print(f"{PAGE} is not what settings.py says: run `python docs/make_settings.py`.", file=sys.stderr)
        return 1
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
