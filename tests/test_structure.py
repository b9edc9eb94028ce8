"""The rooms of the house: imports point one way, and the files are those that the packaging ships."""

import ast
from pathlib import Path

import ctpd_jax

ROOT = Path(ctpd_jax.__file__).parent
# From the bottom up. A room may import those before it, and itself.
ROOMS = (
    "errors", "processes", "artifacts", "schema", "settings", "text", "core", "sharding", "models", "data", "train",
    "annotate", "evaluate", "report", "job", "stages", "plan",
    "cli",
)  # fmt: skip


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """The rooms that a file imports, at the top or inside a function."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "ctpd_jax":
            parts = node.module.split(".")
            rooms |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            rooms |= {a.name.split(".")[1] for a in node.names if a.name.startswith("ctpd_jax.")}
    return rooms


def test_imports_point_one_way():
    for path in ROOT.rglob("*.py"):
        if path == ROOT / "__init__.py":
            continue
        own = ROOMS.index(room(path))
        for other in imported(path):
            assert ROOMS.index(other) <= own, f"{path.relative_to(ROOT)} imports {other}, which stands above it"


def test_core_and_text_stay_pure():
    for path in (ROOT / "text").glob("*.py"):
        assert "import jax" not in path.read_text(), f"{path} imports JAX"
    for path in (ROOT / "core").glob("*.py"):
        source = path.read_text()
        assert "flax" not in source and "ml_collections" not in source and "open(" not in source, path


def test_flax_stays_in_models():
    for path in ROOT.rglob("*.py"):
        if "models" not in path.parts:
            assert "from flax" not in path.read_text() and "import flax" not in path.read_text(), path
