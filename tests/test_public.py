"""The public interface: what the stub declares is there, and importing the package imports nothing heavy."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import ctpd_jax

STUB = Path(ctpd_jax.__file__).with_suffix(".pyi")


def declared() -> list[str]:
    """__all__ of the stub: what type checkers let through."""
    for node in ast.parse(STUB.read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"]:
            return ast.literal_eval(node.value)
    raise AssertionError(f"{STUB} declares no __all__")


def test_the_stub_declares_what_the_package_has():
    assert sorted(declared()) == sorted([*ctpd_jax.__all__, "__version__"])
    assert isinstance(ctpd_jax.__version__, str)


def homes() -> dict[str, str]:
    """Public name -> the module that the stub imports it from."""
    imports = [node for node in ast.parse(STUB.read_text("utf-8")).body if isinstance(node, ast.ImportFrom)]
    return {alias.name: f"ctpd_jax.{node.module}" for node in imports for alias in node.names}


@pytest.mark.parametrize(("name", "module"), sorted(homes().items()))
def test_every_name_is_that_of_its_module(name, module):
    assert getattr(ctpd_jax, name) is getattr(import_module(module), name)


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such"):
        _ = ctpd_jax.no_such


def test_importing_the_package_imports_nothing_heavy():
    code = (
        "import sys, ctpd_jax; ctpd_jax.PreferencePair; ctpd_jax.align;"
        "print([name for name in ('jax', 'flax', 'tensorflow', 'torch') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"
