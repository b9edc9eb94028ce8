"""Tiers, and fixtures that every room's tests may use: tests/README.md lists them."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
from helpers import MICRO, real_assets
from toy import world_on_disk

# The medium tier is decided here alone: files that train, compile much or start many processes. What is neither here
# nor marked slow or parity is fast (`make fast`). The longest stand first, for in this order the workers get them; but
# the two whole runs that several files share are not asked for by both workers at once.
MEDIUM = (
    "plan/test_planner.py",
    "pipeline/test_bfloat16_teacher.py",
    "train/test_step.py",
    "pipeline/test_micro.py",
    "models/test_attention.py",
    "models/test_decoder.py",
    "train/test_moments.py",
    "models/test_sampling.py",
    "core/test_golden.py",
    "multi_device/test_core.py",
    "train/test_checkpoint.py",
    "models/test_packed_rows.py",
    "pipeline/test_generate_command.py",
    "core/test_logprobs.py",
    "toy/test_models.py",
    "models/test_lora.py",
    "multi_device/test_import.py",
    "pipeline/test_adapters.py",
    "evaluate/test_harness.py",
    "pipeline/test_export.py",
    "pipeline/test_starts.py",
    "pipeline/test_propose.py",
    "pipeline/test_elsewhere.py",
    "pipeline/test_bad_numbers.py",
    "text/test_fuzz.py",
    "buckets/test_twin.py",
    "buckets/test_objects.py",
    "train/test_programs.py",
    "examples/test_one_page.py",
    "pipeline/test_sigterm.py",
    "pipeline/test_secrets.py",
    "annotate/test_coefficients.py",
    "core/test_baselines.py",
    "pipeline/test_baselines.py",
    "examples/test_quality.py",
    "core/test_theory.py",
    "launch/test_local.py",
)

# Most tests are small programs that run once or twice: what XLA does to make them faster is most of their time.
# Without fused multiply-add (that is AVX) the same arithmetic gives the same bits whatever the shape around it.
QUICK_COMPILER = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1 --xla_cpu_max_isa=AVX"
if version("jax").startswith("0.10."):  # a flag that XLA does not know ends the process
    QUICK_COMPILER += " --xla_cpu_use_fusion_emitters=false"
TESTS = Path(__file__).parent


def pytest_configure(config: pytest.Config) -> None:
    """The fast and medium tests compile quickly, the slow and parity tests as users do. Before JAX is there."""
    if hasattr(config, "workerinput"):  # a worker of pytest-xdist inherits the environment
        return
    if "not slow" in config.option.markexpr:
        os.environ["XLA_FLAGS"] = f"{QUICK_COMPILER} {os.environ.get('XLA_FLAGS', '')}"
    # Many tests run the same stages: a program that took long is compiled once for all workers and their processes.
    programs = tempfile.mkdtemp(prefix="ctpd-programs-")
    config.add_cleanup(lambda: shutil.rmtree(programs, ignore_errors=True))
    os.environ["JAX_COMPILATION_CACHE_DIR"] = programs
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"


@pytest.hookimpl(tryfirst=True)  # before pytest chooses by -m
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the medium tier, and let its longest files start first."""
    places = {TESTS / file: place for place, file in enumerate(MEDIUM)}
    if missing := [str(path) for path in places if not path.exists()]:
        raise pytest.UsageError(f"tests/conftest.py: MEDIUM names what is not there: {', '.join(missing)}")
    for item in items:
        if item.path in places:
            item.add_marker(pytest.mark.medium)
    items.sort(key=lambda item: places.get(item.path, len(MEDIUM)))


@pytest.fixture(scope="session")
def made_once(tmp_path_factory) -> Callable[[str, Callable[[Path], object]], Path]:
    """made_once(name, make): a folder that one worker makes, by make(folder), for all of them. Only to be read."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent

    def folder_of(name: str, make: Callable[[Path], object]) -> Path:
        folder, whole = root / name, root / f"{name}.whole"
        with open(root / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not whole.exists():
                make(folder)
                whole.touch()
        return folder

    return folder_of


@pytest.fixture(scope="session")
def toy_models() -> tuple[Path, Path]:
    """The folders of the toy teacher and the toy student, as configs/micro.py names them."""
    world = world_on_disk()
    return Path(world.teacher), Path(world.student)


@pytest.fixture(scope="session")
def new_workdir(tmp_path_factory) -> Callable[[str], Path]:
    """new_workdir(name): a workdir that is not there yet."""
    return lambda name: tmp_path_factory.mktemp(name) / "run"


@pytest.fixture(scope="session")
def finished_micro(made_once) -> Path:
    """The workdir of a whole `ctpd run --config configs/micro.py`. Who changes it takes a copy (shutil.copytree)."""
    from ctpd_jax.cli import main

    def make(folder: Path) -> None:
        assert main(["run", "--config", MICRO, "--workdir", str(folder)]) == 0

    return made_once("finished_micro", make)


@pytest.fixture(scope="session")
def real_tokenizers() -> dict[str, Path]:
    """Name -> folder: llama3, qwen2.5, mistral-v0.1, deepseek, smollm2, gemma3. For slow tests alone."""
    return real_assets.real_tokenizers()


@pytest.fixture(scope="session")
def real_models() -> dict[str, Path]:
    """Name -> folder: smollm2-135m-instruct, gemma3-270m. For slow tests alone."""
    return real_assets.real_models()
