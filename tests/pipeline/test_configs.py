"""The configs for TPUs: they are accepted as they are, and the memory and the rows that they speak of add up."""

import json
import re
import shlex
from pathlib import Path

import jax
import pytest

import ctpd_jax
from ctpd_jax.cli import load_config, parser
from ctpd_jax.job.check import check_config
from ctpd_jax.job.table import TRAINED
from ctpd_jax.models.config import DecoderConfig
from ctpd_jax.models.decoder import param_shapes
from ctpd_jax.models.hf.config import from_hf
from ctpd_jax.models.hf.load import held_as
from ctpd_jax.models.lora import adapter_shapes, with_lora
from ctpd_jax.sharding import param_spec

ROOT = Path(ctpd_jax.__file__).parents[1]
KNOWN = json.loads((ROOT / "ctpd_jax" / "plan" / "known_models.json").read_text())
FILES = sorted(path for path in (ROOT / "configs").glob("*.py") if "v5e" in path.read_text())
CHIP = 15.75 * 2**30
WIDTH = {"float32": 4, "bfloat16": 2}


def chips_of(path: Path) -> int:
    """From the docstring: "v5e:4x4", or one."""
    found = re.search(r"v5e:(\d+)x(\d+)", path.read_text())
    return int(found[1]) * int(found[2]) if found else 1


def count(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def case(request):
    config = load_config(str(request.param), [])
    models = {model: from_hf(KNOWN[config[model].path]) for model in ("teacher", "student")}
    return config, models, chips_of(request.param)


def test_all_six_are_here():
    assert len(FILES) == 6 and [chips_of(path) for path in FILES] == [1, 1, 8, 4, 16, 8]


def held(model: DecoderConfig, dtype: str) -> int:
    """Bytes of a model that lies still; what int8 does not round is bfloat16."""
    shapes = param_shapes(held_as(model, dtype), "bfloat16" if dtype == "int8" else dtype)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


def test_it_is_accepted_and_a_pair_fits_its_rows(case):
    config, models, _ = case
    check_config(config)
    assert config.rows.multiple == 128 and config.rows.length == 0
    longest = config.data.max_prompt_tokens + 2 * config.data.max_response_tokens
    assert longest <= 1024 <= min(model.longest for model in models.values())


def test_what_lies_on_a_chip_leaves_room(case):
    """Parameters, gradients and both moments of every stage; a micro-batch's gradient comes on top, and activations."""
    config, models, chips = case
    for stage in TRAINED:
        settings = config[stage]
        if settings.steps == -1:
            continue
        model = models["teacher" if stage in ("teacher_sft", "positive", "negative") else "student"]
        trained, frozen = count(param_shapes(model)), 0
        if settings.lora.rank:
            frozen = held(model, settings.lora.base)
            trained = count(adapter_shapes(with_lora(model, settings.lora.rank, settings.lora.alpha)))
        moments = 4 + WIDTH[settings.moments]
        assert (trained * (4 + 4 + 4 + moments) + frozen) / chips < 0.7 * CHIP, stage
        on_rows = settings.micro_batch if stage not in ("teacher_sft", "student_sft") else settings.micro_batch / 2
        assert on_rows >= chips and settings.batch_size % settings.micro_batch == 0, stage
    # Hosts annotate on their own chips, 4 of a larger slice.
    own = min(chips, 4)
    assert held(models["teacher"], config.annotate.teacher_weights) / own < 0.7 * CHIP
    assert 4 * count(param_shapes(models["student"])) / own < 0.7 * CHIP


def test_every_parameter_divides_over_the_mesh(case):
    config, models, chips = case
    sizes = {"data": config.mesh.data, "fsdp": config.mesh.fsdp, "tensor": config.mesh.tensor}
    sizes = {axis: chips if size == -1 else size for axis, size in sizes.items()}
    assert sizes["data"] * sizes["fsdp"] * sizes["tensor"] == chips
    for stage, model in (("positive", "teacher"), ("train", "student")):
        decoder, lora = models[model], config[stage].lora
        decoder = with_lora(decoder, lora.rank, lora.alpha) if lora.rank else decoder
        for path, leaf in jax.tree.leaves_with_path(param_shapes(decoder)):
            spec = param_spec([key.key for key in path], leaf.shape)
            for size, axis in zip(leaf.shape, spec):
                assert axis is None or size % sizes[axis] == 0, path


def options_of(cell: str, form: dict) -> list[str]:
    """The command line that the notebook's cell makes of what was filled in."""
    for name, value in form.items():
        cell, found = re.subn(rf"^{name} = .*# @param.*$", f"{name} = {value!r}", cell, flags=re.M)
        assert found == 1, name
    told = {"WORKDIR": "/content/run"}
    exec(cell, told)
    return shlex.split(told["OPTIONS"])


def test_the_notebook_asks_for_settings_that_its_config_has():
    cells = ["".join(cell["source"]) for cell in json.loads((ROOT / "launch" / "colab.ipynb").read_text())["cells"]]
    (cell,) = (cell for cell in cells if "chosen = {" in cell)
    given = {"TEACHER": "a", "STUDENT": "b", "TRAIN": "hf:a/b", "TEST": "hf:a/b", "PAIRS": 7}
    for form in ({name: type(value)() for name, value in given.items()}, given):
        known, overrides = parser().parse_known_args(["run", *options_of(cell, form)])
        config = load_config(str(ROOT / known.config), overrides)
        check_config(config)
        assert known.config == "configs/colab_v5e.py" and config.train.steps == 0  # the number of pairs decides
        assert bool(overrides) == (form is given)
    assert (config.data.limit, config.teacher.path, config.student.path) == (7, "a", "b")
    assert (config.data.train, config.data.train_split, config.data.test_split) == ("hf:a/b", "train", "test")
