"""`ctpd plan` without the compiler for TPUs: shapes, bytes, arithmetic, the search, and what it prints.

One process plans once: how many CPU devices stand in for a topology is set before JAX has any. So commands run in
processes of their own.
"""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from helpers import MICRO, ROOT
from helpers.compiled_text import vocabulary_arrays
from helpers.tiny import CONFIGS
from hypothesis import given, settings
from hypothesis import strategies as st

from ctpd_jax.cli import load_config
from ctpd_jax.data.loader import batch_indices, plan_shapes
from ctpd_jax.data.packing import PackingConfig
from ctpd_jax.data.rows import PairItem, ScoredResponse
from ctpd_jax.errors import UserError
from ctpd_jax.job.recipe import passes
from ctpd_jax.job.table import columns
from ctpd_jax.plan import command
from ctpd_jax.plan.chips import CHIPS, Topology, parse_topology
from ctpd_jax.plan.costs import Work, work
from ctpd_jax.plan.planner import (
    Candidate,
    bound,
    compile_program,
    meshes,
    micro_batches,
    over_links,
)
from ctpd_jax.plan.programs import Program, decoders, largest_shape, plan_stage, share, usual_padding
from ctpd_jax.settings import default_config
from ctpd_jax.sharding import make_mesh

PAPER, COLAB = ROOT / "configs" / "qwen2.5_14b_to_llama3.1_8b.py", ROOT / "configs" / "colab_v5e.py"
NO_COMPILER = """
import contextlib, importlib.util, io, json, sys
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "libtpu" else real(name, *rest)
from ctpd_jax.cli import main
found = []
for arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["plan", *arguments])
    found.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(found))
"""


def plans(*commands: tuple[object, ...]) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each `ctpd plan` without the compiler; all on as many devices."""
    asked = json.dumps([[str(argument) for argument in command] for command in commands])
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}  # no waiting for it
    command = [sys.executable, "-c", NO_COMPILER, asked]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return [tuple(found) for found in json.loads(done.stdout.splitlines()[-1])]


def plan(*arguments: object) -> tuple[int, str, str]:
    return plans(arguments)[0]


# ------------------------------------------------------------------------------------------------ topologies


def test_topologies():
    assert parse_topology("v5e:4x4") == Topology("v5e:4x4", "v5e", (4, 4))
    two = parse_topology("2xv5e:16x16")
    assert (two.slices, two.count, two.hosts, two.host.name, two.host.slices) == (2, 512, 128, "v5e:2x2", 1)
    assert [parse_topology(name).count for name in ("v5e:1x1", "v5e:2x4", "v5p:2x2x2")] == [1, 8, 8]
    assert [parse_topology(name).hosts for name in ("v5e:1x1", "v5e:2x2", "v5e:2x4", "v5e:16x16")] == [1, 1, 2, 64]
    assert parse_topology("v5p:4x4x4").host.name == "v5p:2x2x1" and parse_topology("v6e:4x4").host.name == "v6e:2x2"


def test_slices_need_a_replica_each():
    devices = [SimpleNamespace(platform="tpu", slice_index=number // 4, id=number) for number in range(8)]
    for data, fsdp in ((1, 8), (3, 1)):
        with pytest.raises(UserError, match=r"config\.mesh"):
            make_mesh({"data": data, "fsdp": fsdp, "tensor": 1}, devices)


@pytest.mark.parametrize(
    "name",
    [
        "v5e",
        "v5e:4",
        "0xv5e:4x4",
        "2v5e:4x4",
        "2x:4x4",
        "v99:2x2",
        "v5e:0x4",
        "v5e:4x4x4x4",
        "tpu v5e:4x4",
        "v5e:3x3",
        "v5e:4x4x4",
        "v5p:2x2",
    ],
)
def test_what_is_no_topology_is_told(name):
    with pytest.raises(UserError, match="--topology"):
        parse_topology(name)


# ------------------------------------------------------------------------------------------------ shapes


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    layout=st.sampled_from(["response", "shared"]),
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
    rows = PackingConfig(layout, packed == "yes", buckets=2, multiple=16, row_multiple=devices)
    updates = [batch_indices(seed, step, len(items), 8) for step in range(3)]
    largest = largest_shape(config, micro_batch, 1 if sft else 2, rows)
    for shape in plan_shapes(items, updates, micro_batch, rows):
        # Packed rows may be longer and fewer; what a device holds is at most one row more.
        slack = devices * shape.length if packed == "yes" else 0
        assert shape.rows * shape.length <= largest.rows * largest.length + slack
        assert shape.rows * shape.scored <= largest.rows * largest.scored + slack
        assert packed == "yes" or (shape.length <= largest.length and shape.scored <= largest.scored)


def test_the_largest_pair_fits_its_row_or_is_refused():
    config = default_config()
    config.data.update({"max_prompt_tokens": 128, "max_response_tokens": 384})
    rows = PackingConfig("shared", True, multiple=128, length=1024)
    found = largest_shape(config, 16, 2, replace(rows, row_multiple=16))
    assert (found.rows, found.length, found.scored) == (16, 1024, 1024)
    found = largest_shape(config, 16, 2, replace(rows, length=2048))  # two pairs in a row
    assert (found.rows, found.length, found.scored) == (8, 2048, 2048)
    with pytest.raises(UserError, match=r"rows.length is 512, .* up to 896 tokens"):
        largest_shape(config, 16, 2, replace(rows, length=512))


# ------------------------------------------------------------------------------------------------ arithmetic


@pytest.fixture(scope="module")
def device():
    return jax.devices()[:1]


def one_device(device) -> jax.sharding.Mesh:
    return make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, device)


def stage_on(device, config, name: str, **tensor: int):
    bases = {model: share(base, tensor.get("tensor", 1)) for model, base in decoders(config, name).items()}
    return plan_stage(config, name, bases, one_device(device))


def test_operations_are_those_of_the_textbook(device):
    """2 operations a parameter and token forward, 4 backward, 2 more for what is computed again; and attention."""
    stage = stage_on(device, load_config(str(PAPER), []), "train")
    program = stage.programs[0]
    decoder, found = program.decoder, work(program.traced.jaxpr).flops
    tokens, scored = stage.shape.rows * stage.shape.length, stage.shape.rows * stage.shape.scored
    head = decoder.vocab_size * decoder.hidden_size
    layers = program.trained - 2 * head
    attention = 8 * 2 * tokens * stage.shape.length * decoder.num_heads * decoder.head_dim * decoder.num_layers
    # What a layer's last matrix gives is not needed again for its gradient.
    last = decoder.intermediate_size * decoder.hidden_size * decoder.num_layers
    expected = (8 * layers - 2 * last) * tokens + 8 * head * scored + attention
    assert found == pytest.approx(expected, rel=0.02)
    # Adapters: no gradient of the frozen matrices, a quarter of the work.
    stage = stage_on(device, load_config(str(COLAB), []), "positive")
    program = stage.programs[0]
    found = work(program.traced.jaxpr).flops
    assert 6 < found / (program.parameters * stage.shape.rows * stage.shape.length) < 7.2


def test_experts_count_as_many_as_a_token_has(device):
    config = load_config(str(PAPER), [])
    dense = decoders(config, "train")["student"]
    mixture = replace(dense, family="qwen3_moe", experts=8, experts_per_token=2)
    bases = decoders(config, "annotate") | {"teacher": mixture}
    config.teacher_sft.steps = config.student_sft.steps = -1
    config.weights.source = "uniform"
    stage = plan_stage(config, "annotate", bases, one_device(device))
    found = {program.name: work(program.traced.jaxpr).flops for program in stage.programs}
    width = 3 * dense.hidden_size * dense.intermediate_size * dense.num_layers  # of one expert
    expected = 2 * width * stage.shape.rows * stage.shape.length  # two experts instead of one
    assert found["reference"] - found["start"] == pytest.approx(expected, rel=0.02)


def test_memory_of_parameters_gradient_and_moments(device):
    config = load_config(str(COLAB), ["--config.train.lora.rank=0", "--config.train.lora.base=float32"])
    accumulate, update = stage_on(device, config, "train").programs
    count = 1_235_814_400
    assert (accumulate.trained, accumulate.parameters, accumulate.times) == (count, count, 4)
    assert accumulate.memory["parameters"] == accumulate.memory["gradient"] == 4 * count
    assert accumulate.memory["optimizer"] == accumulate.beside == pytest.approx(8 * count)
    assert update.beside == 0
    config.train.moments = "bfloat16"
    assert stage_on(device, config, "train").programs[0].memory["optimizer"] == pytest.approx(6 * count)
    adapted = stage_on(device, load_config(str(COLAB), []), "train").programs
    assert adapted[0].parameters == count and adapted[1].beside == 2 * count
    assert adapted[0].memory["parameters"] == 2 * count + 4 * adapted[0].trained


def test_annotation_reads_with_the_weights_that_the_config_names(device):
    config, sizes = load_config(str(COLAB), []), {}
    for dtype in ("float32", "bfloat16"):
        config.annotate.teacher_weights = dtype
        programs = {program.name: program for program in stage_on(device, config, "annotate").programs}
        assert set(programs) == {"reference", "start", "positive+negative"}
        assert programs["start"].memory["parameters"] == 2 * 1_235_814_400  # the base of train, which starts there
        sizes[dtype] = programs["reference"].memory["parameters"]
        adapters = programs["positive+negative"].memory["parameters"] - sizes[dtype]
        assert adapters == 2 * 4 * stage_on(device, config, "positive").programs[0].trained
    assert sizes["float32"] == 2 * sizes["bfloat16"] == 4 * 3_085_938_688


def test_what_is_read_in_one_pass():
    config = default_config()
    models = {"teacher": CONFIGS["gemma3"], "student": CONFIGS["llama"]}
    config.weights.source = "prompts"
    assert passes(config, models) == [("reference",), ("start",), ("positive",), ("negative",)]
    config.weights.source = "dpo"
    assert passes(config, models) == [("reference",), ("start",), ("positive",), ("negative",)]
    config.positive.lora.rank = config.negative.lora.rank = 4
    config.positive.lora.base = "bfloat16"  # while they train; they are read with annotate.teacher_weights
    assert passes(config, models) == [("reference",), ("start",), ("positive", "negative")]
    config.weights.negative_scorer = "student"
    assert passes(config, models)[2:] == [("positive",), ("negative",)]
    assert [columns(config)[name].model for name in ("positive", "negative")] == ["teacher", "student"]
    config.weights.source = "uniform"
    assert passes(config, models) == [("reference",), ("start",)]


def test_the_share_of_a_tensor_device_is_its_heads_width_and_vocabulary(device):
    config = load_config(str(PAPER), [])
    whole, half = (stage_on(device, config, "train", tensor=size).programs[0].trained for size in (1, 2))
    assert half == pytest.approx(whole / 2, rel=1e-3)


class Sizes:
    """A mesh's sizes, of more devices than there are here."""

    def __init__(self, data: int, fsdp: int, tensor: int) -> None:
        self.shape = {"data": data, "fsdp": fsdp, "tensor": tensor}


def test_bytes_over_links(device):
    config = load_config(str(PAPER), [])
    stage = stage_on(device, config, "train")
    training, reading = stage.programs[0], replace(stage.programs[0], trained=0)

    def links(program, *sizes: int) -> float:
        return over_links(replace(stage, mesh=Sizes(*sizes)), program)

    trained = 2.0 * training.trained
    gathered = trained - 2 * 128256 * 4096  # the embedding is not
    assert links(training, 1, 1, 1) == 0
    # Forward, again, backward; and the gradient of everything.
    assert links(training, 1, 16, 1) == (3 * gathered + trained) * 15 / 16
    assert links(reading, 1, 16, 1) == gathered * 15 / 16
    assert links(training, 16, 1, 1) == 2 * trained * 15 / 16  # the gradient alone, summed and handed out
    tokens = stage.shape.rows * stage.shape.length
    assert links(training, 1, 1, 2) == 2 * 3 * 32 * tokens * 4096 * 2 * 2 / 2  # two sums a layer and pass


@pytest.mark.parametrize(
    ("message", "gib"),
    [
        (
            "Ran out of memory on HBM, the total memory required for HLO temporaries (400.00G) exceeds (15.75G).",
            400,
        ),
        ("XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.12G of 15.75G hbm.", 20.12),
        ("Ran out of memory in memory space vmem. Used 59.79M of 16.00M vmem.", None),
        ("Ran out of memory in memory space smem. Used 1.79M of 1.00M smem.", None),
    ],
)
def test_only_the_main_memory_decides_what_fits(message, gib):
    class Refusing:
        def lower(self, **_):
            raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {message}")

    program = Program("accumulate", Refusing(), 1, {"parameters": 1.0}, 2.0, None, None, 1, 1)
    if gib is None:
        with pytest.raises(UserError, match=r"cannot compile accumulate: .* --estimate"):
            compile_program(program)
    else:
        memory, text = compile_program(program)
        assert (memory.total, memory.source, text) == (gib * 2**30 + 2.0, "refused", "")


def test_the_slowest_of_three_bounds_the_time():
    topology, chip = parse_topology("v5e:1x1"), CHIPS["v5e"]
    assert bound(Work(chip.flops, 0, 0), topology) == 1
    assert bound(Work(chip.flops, 0, 0), topology, utilisation=0.5) == 2
    assert bound(Work(chip.flops, 3 * chip.bandwidth, 2 * chip.links), topology, utilisation=0.5) == 3


def test_arrays_with_a_vocabulary_axis():
    decoder = decoders(load_config(str(PAPER), []), "train")["student"]
    text = """
      %a = f32[128256,256]{1,0} parameter(0)
      %b = bf16[8016,1,4096]{2,1,0} fusion(%a)
      %c = f32[64,128256]{1,0} dot(%a, %b)
      %d = s32[128256]{0} iota()
    """
    mesh = Sizes(1, 16, 1)
    mesh.devices = np.empty(16)
    found = vocabulary_arrays(text, decoder, mesh)
    assert found == {"unembedding": [(128256, 256), (8016, 4096)], "block": [(64, 128256)], "other": []}
    logits = vocabulary_arrays("%e = bf16[16,768,128256]{2,1,0} dot(%a)", decoder, mesh)
    assert logits["other"] == [(16, 768, 128256)]


def test_a_search_takes_fewer_pairs_where_the_compiler_refuses(monkeypatch, capsys):
    mib, tried = 2**20, []
    found = [
        Candidate((1, 4, 1), 16, mib, 0.1, 0.0, {"train.micro_batch": 16, "mesh.fsdp": 4}),
        Candidate((1, 2, 2), 16, mib, 0.2, 0.0, {"train.micro_batch": 16, "mesh.fsdp": 2}),
    ]

    def make_plan(config, *_):
        tried.append((config.mesh.fsdp, config.train.micro_batch))
        return SimpleNamespace(fits=tried[-1] == (4, 4), largest=mib)

    monkeypatch.setattr(command, "candidates", lambda *_: list(found))
    monkeypatch.setattr(command, "make_plan", make_plan)
    plan = command.search(load_config(str(PAPER), []), "train", {}, parse_topology("v5e:2x2"), [], True)
    assert plan.fits and tried == [(4, 16), (4, 8), (4, 4)]
    assert "--config.train.micro_batch=4 --config.mesh.fsdp=4" in capsys.readouterr().out


def test_what_a_search_goes_through():
    assert list(meshes(4)) == [(4, 1, 1), (2, 1, 2), (1, 1, 4), (2, 2, 1), (1, 2, 2), (1, 4, 1)]
    assert micro_batches(16) == [16, 8, 4, 2, 1] and micro_batches(256)[0] == 64


# ------------------------------------------------------------------------------------------------ the command


def test_without_the_compiler_it_says_what_to_install_and_estimates():
    code, out, _ = plan("--config", COLAB, "--topology", "v5e:1x1", "--stage", "train", "--stage", "annotate")
    assert code == 0
    assert "pip install 'ctpd-jax[tpu]'" in out
    assert re.search(r"train fits, \d+\.\d GiB left, by estimate\.", out)
    assert "annotate fits" in out and "positive fits" not in out
    assert "11.27 million parameters trained beside 1.24 billion frozen ones; bfloat16, attention splash" in out


def test_what_does_not_fit_is_told_and_answered_with_3():
    code, out, _ = plan("--config", PAPER, "--topology", "v5e:2x2", "--stage", "train")
    assert code == 3
    assert re.search(r"train DOES NOT FIT, \d+\.\d GiB too much, by estimate\.", out) and "--search" in out


@pytest.mark.slow
def test_a_search_proposes_settings_that_fit():
    code, out, _ = plan("--config", PAPER, "--topology", "v5p:2x2x2", "--stage", "train", "--search")
    assert code == 0
    flags = re.search(r"^  (--config\.train\.micro_batch=.* --config\.mesh\.data=.*)$", out, re.M)
    assert flags
    again, told, _ = plan("--config", PAPER, "--topology", "v5p:2x2x2", "--stage", "train", *flags[1].split())
    assert again == 0 and "train fits" in told
    listed = re.findall(r"data (\d+), fsdp (\d+), tensor (\d+), micro_batch", out)
    assert len(listed) > 5 and all(int(a) * int(b) * int(c) == 8 for a, b, c in listed)


def test_mistakes_are_told_in_a_sentence():
    """All in one process: those that ask for devices ask for as many."""
    mistakes = [
        (("--topology", "v5e"), "--topology 'v5e': write the kind of chip"),
        (("--topology", "v5e:4x4", "--stage", "teacher_sft"), "--stage teacher_sft: the config leaves it out"),
        (("--topology", "v5e:4x4", "--utilisation", "40"), "--utilisation 40.0: a share"),
        (("--topology", "v5e:2x2", "--stage", "train", "--config.mesh.fsdp=3"), "does not fit 4 devices"),
        (("--topology", "v5e:2x2", "--stage", "train", "--search", "--config.rows.length=512"), "up to 896 tokens"),
        (
            ("--topology", "v5e:2x2", "--stage", "train", "--config.student.path=no/such"),
            "config.student.path is no/such",
        ),
    ]
    found = plans(*(("--config", COLAB, *arguments) for arguments, _ in mistakes))
    for (arguments, message), (code, _, err) in zip(mistakes, found, strict=True):
        assert code == 2 and message in err and "Traceback" not in err, arguments


def test_the_examples_of_the_help_need_no_data():
    pair = ROOT / "configs" / "pair.py"
    student = "--config.student.path=meta-llama/Llama-3.2-1B"
    code, out, err = plan("--config", pair, student, "--topology", "v5p:2x2x1", "--stage", "train", "--estimate")
    assert code == 0 and "train fits" in out, err


def test_the_micro_configuration_needs_no_model_folder():
    code, out, _ = plan("--config", MICRO, "--topology", "v5e:1x1", "--stage", "train")
    assert code == 0 and "the student, 0.34 million parameters trained" in out


def test_the_configs_leave_little_padding_and_a_plan_says_where_there_is_much():
    """16 chips, 16 pairs: rows of a fixed length for whole pairs would stay empty by half."""
    chips = {"qwen2.5_14b_to_llama3.1_8b": 16, "qwen2.5_7b_to_llama3.2_1b": 8, "mistral_7b_to_llama3.2_1b": 4}
    for name, count in chips.items():
        config = load_config(str(ROOT / "configs" / f"{name}.py"), [])
        mesh, host = (SimpleNamespace(shape={"data": 1, "fsdp": n, "tensor": 1}) for n in (count, min(count, 4)))
        for stage in ("teacher_sft", "positive", "train", "annotate"):
            assert usual_padding(config, stage, host if stage == "annotate" else mesh) < 0.2, (name, stage)
        config.rows.update({"layout": "shared", "length": 1024})
        assert usual_padding(config, "train", mesh) > 0.4
