"""The method on one page runs on two small models of different tokenizers, by public names alone."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

from toy.models import make_toy_models

import ctpd_jax

PAGE = Path(__file__).parents[2] / "examples" / "ctpd_one_page.py"


def test_the_loss_falls(tmp_path, capsys):
    specification = importlib.util.spec_from_file_location("ctpd_one_page", PAGE)
    page = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(page)
    # Fresh models are far from any text: they need larger steps than the page's own.
    losses = page.main(*make_toy_models(tmp_path), steps=10, learning_rate=3e-4)
    assert len(losses) == 10 and losses[-1] < 0.9 * losses[0]
    assert capsys.readouterr().out.count("loss") == 10


def test_the_page_needs_public_names_alone():
    tree = ast.parse(PAGE.read_text("utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert imported == {"sys", "jax", "jax.numpy", "optax", "ctpd_jax"}
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    used = [
        node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "ctpd"
    ]
    assert set(used) <= set(ctpd_jax.__all__)
