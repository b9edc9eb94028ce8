"""config.attention, as a run reads it for each of its models."""

from dataclasses import replace

import jax
import pytest

from ctpd_jax.errors import UserError
from ctpd_jax.job.check import check_config
from ctpd_jax.job.models import compute_on
from ctpd_jax.models.compute import Compute
from ctpd_jax.models.config import DecoderConfig, LayerKind
from ctpd_jax.settings import default_config
from ctpd_jax.sharding import make_mesh

STUDENT = DecoderConfig(
    family="llama", vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=1, num_heads=2, num_kv_heads=1,
    head_dim=64, kinds=(LayerKind(),), layer_kinds=(0,), attention_scale=0.125,
)  # fmt: skip
MODELS = {"student": STUDENT, "teacher": replace(STUDENT, attention_softcap=50.0)}


def compute(
    model: str, attention: str, layout: str = "response", dtype: str = "auto", platform: str = "cpu"
) -> Compute:
    config = default_config()
    config.attention, config.rows.layout, config.compute_dtype, config.data.train = attention, layout, dtype, "x"
    check_config(config)
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    return compute_on(mesh, config, model, MODELS[model], platform)


def test_on_a_cpu():
    found = compute("teacher", "auto")
    assert found == Compute("float32", "dots", "plain", found.mesh)
    assert compute("student", "auto", platform="tpu").remat == "full"
    assert compute("student", "xla").attention == "xla"
    with pytest.raises(UserError, match=r"^The teacher: .*'xla' cannot be used with soft cap"):
        compute("teacher", "xla")
    for missing in ("cudnn", "splash"):
        with pytest.raises(UserError, match=f"'{missing}' cannot be used with "):
            compute("student", missing)


def test_the_layout_of_the_rows_decides_between_the_two_of_splash():
    for layout, backend in (("response", "splash_segments"), ("auto", "splash_segments"), ("shared", "splash")):
        for attention in ("auto", "splash"):
            assert compute("teacher", attention, layout, "bfloat16", "tpu").attention == backend
    assert compute("teacher", "auto", "shared", "float32", "tpu").attention == "plain"


def test_a_back_end_that_there_is_not():
    with pytest.raises(UserError, match=r"config\.attention is 'flash'; choose one of auto, plain, xla, cudnn, splash"):
        compute("student", "flash")
