"""config.attention, as the run reads it for each of its models."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ctpd_jax.run import Run

from ctpd_jax.errors import UserError
from ctpd_jax.models.config import DecoderConfig, LayerKind
from ctpd_jax.settings import check_config, default_config
from ctpd_jax.train.step import Compute

STUDENT = DecoderConfig(
    family="llama", vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=1, num_heads=2, num_kv_heads=1,
    head_dim=64, kinds=(LayerKind(),), layer_kinds=(0,), attention_scale=0.125,
)  # fmt: skip
MODELS = {"student": STUDENT, "teacher": replace(STUDENT, attention_softcap=50.0)}


@pytest.fixture
def make_run(monkeypatch, tmp_path):
    monkeypatch.setattr(Run, "decoder", lambda self, model: MODELS[model])

    def make(attention: str, layout: str = "response", dtype: str = "auto") -> Run:
        config = default_config()
        config.attention, config.rows.layout, config.compute_dtype, config.data.train = attention, layout, dtype, "x"
        check_config(config)
        log: Any = None
        return Run(config, Path(tmp_path), log)

    return make


def test_on_a_cpu(make_run):
    run = make_run("auto")
    assert run.compute("teacher") == Compute("float32", "full", "plain", run.mesh)
    assert make_run("xla").compute("student").attention == "xla"
    with pytest.raises(UserError, match=r"^The teacher: .*'xla' cannot be used with soft cap"):
        make_run("xla").compute("teacher")
    for missing in ("cudnn", "splash"):
        with pytest.raises(UserError, match=f"'{missing}' cannot be used with "):
            make_run(missing).compute("student")


def test_the_layout_of_the_rows_decides_between_the_two_of_splash(make_run, monkeypatch):
    chip = SimpleNamespace(devices=np.array([SimpleNamespace(platform="tpu")]), shape={"tensor": 1})
    monkeypatch.setattr(Run, "mesh", chip)
    for layout, backend in (("response", "splash_segments"), ("pair", "splash_segments"), ("shared", "splash")):
        for attention in ("auto", "splash"):
            assert make_run(attention, layout, "bfloat16").compute("teacher").attention == backend
    assert make_run("auto", "shared", "float32").compute("teacher").attention == "plain"


def test_a_back_end_that_there_is_not(make_run):
    with pytest.raises(UserError, match=r"config\.attention is 'flash'; choose one of auto, plain, xla, cudnn, splash"):
        make_run("flash")
