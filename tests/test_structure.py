"""The rules of the house: imports point one way and never in a circle; small, commented, few files at the door."""

import ast
import warnings
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import ctpd_jax

ROOT = Path(ctpd_jax.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
# From the bottom up. A room may import those before it, and itself.
ROOMS = (
    "errors", "processes", "artifacts", "buckets", "schema", "settings", "text", "core", "sharding", "models", "data",
    "train", "annotate", "evaluate", "report", "job", "stages", "plan",
    "cli",
)  # fmt: skip


def module_of(path: Path) -> str:
    """ctpd_jax/text/spans.py -> ctpd_jax.text.spans; a package by its own name."""
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def imported(path: Path) -> set[str]:
    """The modules of ctpd_jax that a file imports, at the top or inside a function."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                names.add(name if name in MODULES else str(node.module))
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names & MODULES.keys()


def room(module: str) -> str:
    return module.split(".")[1]


def test_imports_point_one_way():
    for module in MODULES.keys() - {"ctpd_jax"}:
        for other in imported(MODULES[module]) - {"ctpd_jax"}:
            assert ROOMS.index(room(other)) <= ROOMS.index(room(module)), f"{module} imports {other}, from above it"


def test_no_module_imports_itself_by_way_of_others():
    graph = {module: imported(path) - {module} for module, path in MODULES.items() if module != "ctpd_jax"}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_core_and_text_stay_pure():
    for path in (ROOT / "text").glob("*.py"):
        assert "import jax" not in path.read_text(), f"{path} imports JAX"
    for path in (ROOT / "core").glob("*.py"):
        source = path.read_text()
        assert "flax" not in source and "ml_collections" not in source and "open(" not in source, path


def test_flax_stays_in_models():
    for path in FILES:
        if "models" not in path.parts:
            assert "from flax" not in path.read_text() and "import flax" not in path.read_text(), path


def test_files_fit_a_head_and_few_stand_at_the_door():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in FILES}
    assert not {name: length for name, length in lengths.items() if length > 400}
    assert len([path for path in ROOT.iterdir() if path.suffix in (".py", ".pyi")]) <= 8


def test_steps_and_reasons_are_told_in_comments():
    """Lines that are a comment and nothing else are at least one in twenty-five; rulers do not count."""
    lines = [line.strip() for path in FILES for line in path.read_text().splitlines()]
    comments = [line for line in lines if line.startswith("#") and not line.startswith("# ---")]
    assert len(comments) >= 0.04 * len(lines), f"{len(comments)} of {len(lines)} lines"


# What runs or rebuilds whatever a file says. Names of calls, as they are written; a keyword with the value that asks.
FORBIDDEN_CALLS = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "os.execvp", "yaml.load", "yaml.unsafe_load"),
    *("torch.load", "pd.read_pickle", "pandas.read_pickle", "jinja2.Template", "code.interact", "runpy.run_path"),
}
FORBIDDEN_IMPORTS = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "runpy", "code", "pty", "yaml"}
FORBIDDEN_ARGUMENTS = {"trust_remote_code": True, "allow_pickle": True, "shell": True, "weights_only": False}


def test_what_a_file_says_is_never_run():
    for path in (*FILES, *ROOT.parent.glob("examples/**/*.py"), *ROOT.parent.glob("benchmarks/*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            where = f"{path}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import):
                assert not {alias.name.split(".")[0] for alias in node.names} & FORBIDDEN_IMPORTS, where
                assert not any(alias.asname for alias in node.names if alias.name in ("os", "builtins", "torch")), where
            elif isinstance(node, ast.ImportFrom):
                assert str(node.module).split(".")[0] not in FORBIDDEN_IMPORTS, where
                assert not {f"{node.module}.{alias.name}" for alias in node.names} & FORBIDDEN_CALLS, where
            elif isinstance(node, ast.Name | ast.Attribute):  # called or handed on
                assert ast.unparse(node) not in FORBIDDEN_CALLS - {"compile", "jinja2.Template"}, where
            elif isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in FORBIDDEN_CALLS, where
                # Anything but the harmless constant: a variable could hold the other one.
                for one in node.keywords:
                    harmless = isinstance(one.value, ast.Constant) and one.value.value != FORBIDDEN_ARGUMENTS.get(
                        one.arg
                    )
                    assert one.arg not in FORBIDDEN_ARGUMENTS or harmless, where
            elif isinstance(node, ast.Dict):  # arguments that are handed on by **
                for key, value in zip(node.keys, node.values):
                    name = getattr(key, "value", None)
                    asks = isinstance(name, str) and getattr(value, "value", None) == FORBIDDEN_ARGUMENTS.get(name, ...)
                    assert not asks, where


def test_templates_of_strangers_are_rendered_in_a_sandbox():
    """The one other environment of Jinja reads the templates of report/ alone."""
    made = {
        (path.name, ast.unparse(node.func))
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Environment")
    }
    # The sandbox is made where it is defined, and where a template is only parsed to see what it asks for.
    sandboxed = {("sandbox.py", "ChatEnvironment"), ("templates.py", "sandbox.ChatEnvironment")}
    assert made == {("format.py", "jinja2.Environment")} | sandboxed


@pytest.mark.parametrize("kind", [DeprecationWarning, PendingDeprecationWarning, FutureWarning])
def test_what_our_own_lines_are_warned_of_ends_a_test(kind):
    """The filters of pyproject.toml: what a library warns another one of is theirs."""
    for module in ("ctpd_jax.cli", "tests.test_status", "test_status", "helpers.tiny", "toy"):
        with pytest.raises(kind):
            warnings.warn_explicit("it goes", kind, "file.py", 1, module)
    if kind is DeprecationWarning:
        warnings.warn_explicit("it goes", kind, "file.py", 1, "orbax.checkpoint")
