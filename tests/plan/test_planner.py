"""`ctpd plan` without the compiler for TPUs: shapes, bytes, arithmetic, the search, and what it prints.

One process plans once: how many CPU devices stand in for a topology is set before JAX has any. So commands run in
processes of their own.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctpd_jax.cli import load_config
from ctpd_jax.data.loader import batch_indices, plan_shapes
from ctpd_jax.data.packing import Rows
from ctpd_jax.data.rows import PairItem, ScoredResponse
from ctpd_jax.errors import UserError
from ctpd_jax.plan.chips import CHIPS, Topology, parse_topology
from ctpd_jax.plan.planner import bound, meshes, micro_batches, over_links, vocabulary_arrays
from ctpd_jax.plan.programs import decoder_of, largest_shape, plan_stage, share
from ctpd_jax.settings import default_config
from ctpd_jax.sharding import make_mesh

ROOT = Path(__file__).parents[2]
PAPER, COLAB = ROOT / "configs" / "qwen2.5_14b_to_llama3.1_8b.py", ROOT / "configs" / "colab_v5e.py"
NO_COMPILER = (
    "import importlib.util, sys; real = importlib.util.find_spec; "
    "importlib.util.find_spec = lambda name, *rest: None if name == 'libtpu' else real(name, *rest); "
    "from ctpd_jax.cli import main; sys.exit(main(sys.argv[1:]))"
)


def plan(*arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `ctpd plan` where there is no compiler."""
    command = [sys.executable, "-c", NO_COMPILER, "plan", *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    return done.returncode, done.stdout, done.stderr


# ------------------------------------------------------------------------------------------------ topologies


def test_topologies():
    assert parse_topology("v5e:4x4") == Topology("v5e:4x4", "v5e", (4, 4))
    assert [parse_topology(name).count for name in ("v5e:1x1", "v5e:2x4", "v5p:2x2x2")] == [1, 8, 8]
    assert [parse_topology(name).hosts for name in ("v5e:1x1", "v5e:2x2", "v5e:2x4", "v5e:16x16")] == [1, 1, 2, 64]
    assert parse_topology("v5p:4x4x4").host.name == "v5p:2x2x1" and parse_topology("v6e:4x4").host.name == "v6e:2x2"


@pytest.mark.parametrize("name", ["v5e", "v5e:4", "v99:2x2", "v5e:0x4", "v5e:4x4x4x4", "tpu v5e:4x4"])
def test_what_is_no_topology_is_told(name):
    with pytest.raises(UserError, match="--topology"):
        parse_topology(name)


# ------------------------------------------------------------------------------------------------ shapes


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    layout=st.sampled_from(["response", "pair", "shared"]),
    packed=st.sampled_from(["yes", "no"]),
    devices=st.sampled_from([1, 2, 4]),
    micro_batch=st.integers(1, 8),
    sft=st.booleans(),
)
def test_no_real_batch_is_larger_than_the_largest_shape(seed, layout, packed, devices, micro_batch, sft):
    config = default_config()
    config.data.update({"max_prompt_tokens": 24, "max_response_tokens": 40})
    config.rows.update({"layout": layout, "packed": packed, "multiple": 16})
    random = np.random.default_rng(seed)

    def response() -> ScoredResponse:
        length = random.choice([40, random.integers(1, 41)])
        return ScoredResponse(np.ones(length, np.int32), np.ones(length, np.float32))

    items = [
        PairItem(np.ones(random.integers(1, 25), np.int32), response(), None if sft else response()) for _ in range(24)
    ]
    rows = Rows(layout, packed == "yes", buckets=2, multiple=16, row_multiple=devices)
    updates = [batch_indices(seed, step, len(items), 8) for step in range(3)]
    largest = largest_shape(config, micro_batch, 1 if sft else 2, devices)
    for shape in plan_shapes(items, updates, micro_batch, rows):
        # Packed rows may be longer and fewer; what a device holds is at most one row more.
        slack = devices * shape.length if packed == "yes" else 0
        assert shape.rows * shape.length <= largest.rows * largest.length + slack
        assert packed == "yes" or (shape.length <= largest.length and shape.scored <= largest.scored)


def test_the_largest_pair_fits_its_row_or_is_refused():
    config = default_config()
    config.data.update({"max_prompt_tokens": 128, "max_response_tokens": 384})
    config.rows.update({"layout": "shared", "length": 1024, "multiple": 128})
    found = largest_shape(config, 16, 2, 16)
    assert (found.rows, found.length, found.scored) == (16, 1024, 768)
    config.rows.length = 2048  # two pairs in a row
    found = largest_shape(config, 16, 2, 1)
    assert (found.rows, found.length, found.scored) == (8, 2048, 1536)
    config.rows.length = 512
    with pytest.raises(UserError, match=r"rows.length is 512, .* up to 896 tokens"):
        largest_shape(config, 16, 2, 16)


# ------------------------------------------------------------------------------------------------ arithmetic


@pytest.fixture(scope="module")
def device():
    return jax.devices()[:1]


def one_device(device) -> jax.sharding.Mesh:
    return make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, device)


def test_operations_are_those_of_the_textbook(device):
    """2 operations a parameter and token forward, 4 backward, 2 more for what is computed again; and attention."""
    config = load_config(str(PAPER), [])
    decoder = decoder_of(config, "student")
    stage = plan_stage(config, "train", decoder, one_device(device))
    from ctpd_jax.plan.costs import work

    found = work(stage.programs[0].traced.jaxpr).flops
    tokens, scored = stage.shape.rows * stage.shape.length, stage.shape.rows * stage.shape.scored
    head = decoder.vocab_size * decoder.hidden_size
    layers = stage.trained - 2 * head
    attention = 8 * 2 * tokens * stage.shape.length * decoder.num_heads * decoder.head_dim * decoder.num_layers
    expected = 8 * layers * tokens + 8 * head * scored + attention
    assert found == pytest.approx(expected, rel=0.05)
    # Adapters: no gradient of the frozen matrices, a third of the backward pass.
    colab = load_config(str(COLAB), [])
    stage = plan_stage(colab, "positive", decoder_of(colab, "teacher"), one_device(device))
    found = work(stage.programs[0].traced.jaxpr).flops
    assert found < 0.85 * 8 * stage.frozen * stage.shape.rows * stage.shape.length


def test_memory_of_parameters_gradient_and_moments(device):
    config = load_config(str(COLAB), ["--config.train.lora.rank=0", "--config.train.lora.base=float32"])
    decoder = decoder_of(config, "student")
    stage = plan_stage(config, "train", decoder, one_device(device))
    accumulate, update = stage.programs
    count = 1_235_814_400
    assert (stage.trained, stage.frozen) == (count, 0) and accumulate.times == 4
    assert accumulate.memory["parameters"] == accumulate.memory["gradient"] == 4 * count
    assert accumulate.memory["optimizer"] == accumulate.beside == pytest.approx(8 * count)
    assert update.beside == 0
    config.train.moments = "bfloat16"
    halved = plan_stage(config, "train", decoder, one_device(device)).programs[0]
    assert halved.memory["optimizer"] == pytest.approx(6 * count)
    adapters = plan_stage(load_config(str(COLAB), []), "train", decoder, one_device(device))
    assert adapters.frozen == count and adapters.programs[1].beside == 2 * count
    assert adapters.programs[0].memory["parameters"] == 2 * count + 4 * adapters.trained


def test_annotation_reads_with_the_weights_that_the_config_names(device):
    config = load_config(str(COLAB), [])
    decoder, sizes = decoder_of(config, "teacher"), {}
    for dtype in ("float32", "bfloat16", "int8"):
        config.annotate.teacher_weights = dtype
        sizes[dtype] = plan_stage(config, "annotate", decoder, one_device(device)).programs[0].memory["parameters"]
    adapters = 2 * 4 * plan_stage(config, "positive", decoder, one_device(device)).trained  # of both models
    assert sizes["float32"] - adapters == 2 * (sizes["bfloat16"] - adapters) == 4 * 3_085_938_688
    assert sizes["int8"] < 0.75 * sizes["bfloat16"]


def test_the_share_of_a_tensor_device_is_its_heads_width_and_vocabulary(device):
    config = load_config(str(PAPER), [])
    decoder = decoder_of(config, "student")
    whole = plan_stage(config, "train", decoder, one_device(device))
    half = plan_stage(config, "train", share(decoder, 2), one_device(device))
    assert half.trained == pytest.approx(whole.trained / 2, rel=1e-3)


class Sizes:
    """A mesh's sizes, of more devices than there are here."""

    def __init__(self, data: int, fsdp: int, tensor: int) -> None:
        self.shape = {"data": data, "fsdp": fsdp, "tensor": tensor}


def test_bytes_over_links(device):
    from dataclasses import replace

    config = load_config(str(PAPER), [])
    stage = plan_stage(config, "train", decoder_of(config, "student"), one_device(device))

    def links(*sizes: int, training: bool = True) -> float:
        return over_links(replace(stage, mesh=Sizes(*sizes)), training)

    weights = 2.0 * stage.trained
    assert links(1, 1, 1) == 0
    assert links(1, 16, 1) == 4 * weights * 15 / 16  # forward, again, backward; and the gradient
    assert links(1, 16, 1, training=False) == weights * 15 / 16
    assert links(16, 1, 1) == 2 * weights * 15 / 16  # the gradient alone, summed and handed out
    tokens = stage.shape.rows * stage.shape.length
    assert links(1, 1, 2) == 2 * 3 * 32 * tokens * 4096 * 2 * 2 / 2  # two sums a layer and pass


def test_the_slowest_of_three_bounds_the_time():
    from ctpd_jax.plan.costs import Work

    topology, chip = parse_topology("v5e:1x1"), CHIPS["v5e"]
    assert bound(Work(chip.flops, 0, 0), topology) == 1
    assert bound(Work(chip.flops, 0, 0), topology, utilisation=0.5) == 2
    assert bound(Work(chip.flops, 3 * chip.bandwidth, 2 * chip.links), topology, utilisation=0.5) == 3


def test_arrays_with_a_vocabulary_axis():
    decoder = share(decoder_of(load_config(str(PAPER), []), "student"), 1)
    text = """
      %a = f32[128256,256]{1,0} parameter(0)
      %b = bf16[8,16032,4096]{2,1,0} fusion(%a)
      %c = f32[64,128256]{1,0} dot(%a, %b)
      %d = s32[128256]{0} iota()
    """
    mesh = Sizes(1, 16, 1)
    mesh.devices = np.empty(16)
    found = vocabulary_arrays(text, decoder, mesh)
    assert found == {"unembedding": [(128256, 256)], "block": [(64, 128256)], "other": []}
    logits = vocabulary_arrays("%e = bf16[16,768,128256]{2,1,0} dot(%a)", decoder, mesh)
    assert logits["other"] == [(16, 768, 128256)]


def test_what_a_search_goes_through():
    assert list(meshes(4)) == [(4, 1, 1), (2, 1, 2), (1, 1, 4), (2, 2, 1), (1, 2, 2), (1, 4, 1)]
    assert micro_batches(16) == [16, 8, 4, 2, 1] and micro_batches(256)[0] == 64


# ------------------------------------------------------------------------------------------------ the command


def test_without_the_compiler_it_says_what_to_install_and_estimates():
    code, out, _ = plan("--config", COLAB, "--topology", "v5e:1x1", "--stage", "train", "--stage", "annotate")
    assert code == 0
    assert "pip install 'ctpd-jax[tpu]'" in out
    assert re.search(r"train fits, \d+\.\d GiB left, by estimate\.", out)
    assert "annotate fits" in out and "positive" not in out
    assert "11.27 million parameters trained on 1.24 billion frozen ones; bfloat16, attention splash" in out


def test_what_does_not_fit_is_told_and_answered_with_1():
    code, out, _ = plan("--config", PAPER, "--topology", "v5e:2x2", "--stage", "train")
    assert code == 1
    assert re.search(r"train DOES NOT FIT, \d+\.\d GiB too much, by estimate\.", out)


def test_a_search_proposes_settings_that_fit():
    code, out, _ = plan("--config", PAPER, "--topology", "v5e:4x4", "--stage", "train", "--search")
    assert code == 0
    flags = re.search(r"^  (--config\.train\.micro_batch=.* --config\.mesh\.data=.*)$", out, re.M)
    assert flags
    again, told, _ = plan("--config", PAPER, "--topology", "v5e:4x4", "--stage", "train", *flags[1].split())
    assert again == 0 and "train fits" in told
    listed = re.findall(r"data (\d+), fsdp (\d+), tensor (\d+), micro_batch", out)
    assert len(listed) > 5 and all(int(a) * int(b) * int(c) == 16 for a, b, c in listed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--topology", "v5e"), "--topology 'v5e': write the kind of chip"),
        (("--topology", "v5e:4x4", "--stage", "teacher_sft"), "--stage teacher_sft: the config leaves it out"),
        (("--topology", "v5e:4x4", "--utilisation", "40"), "--utilisation 40.0: a share"),
        (("--topology", "v5e:2x2", "--stage", "train", "--config.mesh.fsdp=3"), "does not fit 4 devices"),
        (
            ("--topology", "v5e:2x2", "--stage", "train", "--config.student.path=no/such"),
            "config.student.path is no/such",
        ),
    ],
)
def test_mistakes_are_told_in_a_sentence(arguments, message):
    code, _, err = plan("--config", COLAB, *arguments)
    assert code == 2 and message in err and "Traceback" not in err


def test_the_micro_configuration_needs_no_model_folder():
    code, out, _ = plan("--config", ROOT / "configs" / "micro.py", "--topology", "v5e:1x1", "--stage", "train")
    assert code == 0 and "the student, 0.34 million parameters trained" in out
