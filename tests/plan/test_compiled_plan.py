"""`ctpd plan` with the compiler for TPUs, on models of full size: no weights, no data, no TPU."""

import re

import pytest
from helpers import HELPERS, ROOT
from helpers.real_assets import run_with_libtpu

SCRIPT = HELPERS / "run_plan.py"
PAPER, COLAB = ROOT / "configs" / "qwen2.5_14b_to_llama3.1_8b.py", ROOT / "configs" / "colab_v5e.py"
pytestmark = pytest.mark.slow


def plan(*arguments: object) -> tuple[int, str]:
    """The exit code of `ctpd plan` and what it printed."""
    *out, code = run_with_libtpu(SCRIPT, "plan", *map(str, arguments)).splitlines()
    print("\n".join(out))
    return int(code), "\n".join(out)


def total(out: str, program: str) -> float:
    """GiB on a chip that a program needs."""
    return float(re.search(rf"^  {re.escape(program)} .* ([\d.]+)$", out, re.M)[1])


@pytest.mark.parametrize(
    ("config", "topology", "stage", "program"),
    [
        (PAPER, "v5e:4x4", "train", "accumulate"),  # all of Llama 3.1 8B, float32 Adam, 16 pairs in rows of 1,024
        (COLAB, "v5e:1x1", "train", "accumulate"),  # adapters on Llama 3.2 1B
        (PAPER, "v5e:2x2", "annotate", "positive+negative"),  # Qwen 2.5 14B reads
    ],
)
def test_what_the_configs_promise_fits(config, topology, stage, program):
    arguments = ("--config", config, "--topology", topology, "--stage", stage)
    code, out = plan(*arguments)
    assert code == 0 and re.search(rf"^  {stage} fits, [\d.]+ GiB left\.$", out, re.M)
    contents = re.findall(r"^  in (\S+): (\d+) splash kernels; (.*)$", out, re.M)
    assert contents and all(int(count) >= (3 if stage == "train" else 1) for _, count, _ in contents)
    assert all(told.endswith("nothing else") for _, _, told in contents)
    # What the estimate says where there is no compiler.
    _, estimated = plan(*arguments, "--estimate")
    assert total(estimated, program) == pytest.approx(total(out, program), rel=0.15)


def test_two_slices_send_each_other_the_gradient_alone():
    mesh = ("--config.mesh.data=2", "--config.mesh.fsdp=4", "--config.train.micro_batch=8")
    code, out = plan("--config", COLAB, "--topology", "2xv5e:2x2", "--stage", "train", *mesh)
    assert code == 0 and "mesh data 2, fsdp 4, tensor 1 on 2xv5e:2x2: 8 x 15.75 GiB" in out
    # Adapters of 0.03 GiB a chip, in each of two micro-batches; half of the replicas are on the other side, twice.
    assert re.search(r"GB over links, 0\.1 GB between slices$", out, re.M)
    code, out = plan("--config", COLAB, "--topology", "2xv5e:2x2", "--stage", "train", "--config.mesh.fsdp=8")
    assert code == 2


def test_what_does_not_fit_is_found_out():
    changed = ("--config.train.lora.rank=0", "--config.train.lora.base=float32", "--config.export.adapters=False")
    code, out = plan("--config", COLAB, "--topology", "v5e:1x1", "--stage", "train", *changed)
    assert code == 3 and re.search(r"train DOES NOT FIT, [\d.]+ GiB too much\.", out)


def test_logits_of_all_positions_would_be_found():
    found = run_with_libtpu(SCRIPT, "logits").splitlines()[-1]
    assert "'other': []" not in found and re.search(r"'other': \[.*(50000|1024)", found)
