"""ctpd_jax: Cross-Tokenizer Preference Distillation in JAX (arXiv 2601.11865).

    import ctpd_jax as ctpd

The public names, and the module of each, stand in __init__.pyi, for type checkers, editors and this file alike. Each is
imported when it is first used, so that `ctpd --help` and the text half need neither JAX nor the models.
"""

import ast
from importlib import import_module
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

_STUB = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
_HOME = {
    alias.name: str(node.module) for node in _STUB.body if isinstance(node, ast.ImportFrom) for alias in node.names
}
__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
