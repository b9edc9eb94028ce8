"""One cell of benchmarks/quality.py: a toy world, a method with its settings, and what is measured of the student.

A world's teacher stages are made once and stay in its folder; every cell on that world trains in the same folder, one
after the other, measures, and makes room for the next. So a cell that was killed is begun anew, and a finished world is
never made twice.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import toy
from quality_measures import of_samples, of_test_pairs, of_weights

from ctpd_jax.annotate.coefficients import Example
from ctpd_jax.annotate.store import open_store
from ctpd_jax.errors import UserError
from ctpd_jax.job.check import check_config
from ctpd_jax.job.job import Job, open_job
from ctpd_jax.job.table import STAGES, left_out
from ctpd_jax.settings import default_config

FORMAT = 1  # raise it when a change here makes other numbers from the same settings
# One shape of rows, and few shapes over all worlds: to compile a cell's program takes as long as to train it. The many
# updates of SFT are worth a tighter fit.
ROWS = {"layout": "shared", "buckets": 1, "multiple": 32, "fewer": "no"}
ROWS_OF_SFT = {"layout": "shared", "buckets": 2, "multiple": 16, "fewer": "no"}
WORLD_STAGES = ("teacher_sft", "student_sft", "positive", "negative", "annotate")


@dataclass(frozen=True)
class Sizes:
    """What a cell costs; the same for every method."""

    pairs: int = 768  # of training
    test_pairs: int = 300
    batch: int = 16
    sft_updates: int = 192
    updates: int = 48  # of the contrastive pair, and of the student by every method
    samples: int = 512
    max_new_tokens: int = 80

    @staticmethod
    def of(text: str) -> Sizes:
        """Return the sizes with what "pairs=48,samples=8" changes. Raises UserError for what is no size."""
        return Sizes(**toy.settings_in(text, **asdict(Sizes())))


@dataclass(frozen=True)
class World:
    """What the teacher and the data are."""

    seed: int = 0  # of pairs, label noise, the models' first weights, and the order of training
    noise: float = 0.2  # share of swapped training labels
    mismatch: str = "word"  # of the two tokenizers; see toy.models
    teacher: float = 1.0  # the teacher's updates in SFT and DPO, relative to Sizes

    @property
    def name(self) -> str:
        return f"seed{self.seed}-noise{self.noise:g}-{self.mismatch}-teacher{self.teacher:g}"

    @staticmethod
    def named(name: str) -> World:
        """Return the world of that name. Raises UserError where it is none."""
        found = re.fullmatch(r"seed(\d+)-noise([\d.]+)-(\w+)-teacher([\d.]+)", name)
        if not found:
            raise UserError(f"{name!r} is no world; an example: {World().name}.")
        seed, noise, mismatch, teacher = found.groups()
        return World(int(seed), float(noise), mismatch, float(teacher))


@dataclass(frozen=True)
class Method:
    """A way to train the student: settings of the config, and the stage that leaves the model."""

    says: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    stage: str = "train"
    knob: str = "beta"  # the one number that is tuned, a setting of the stage, beside its learning rate
    knobs: tuple[float, ...] = (0.1, 0.3, 1.0)  # (): nothing is trained
    prepare: Mapping[str, Any] = field(default_factory=dict)  # settings of the contrastive pair of its own
    needs: tuple[str, ...] = ()  # stages of the student that it starts with, trained as it is itself
    like: str = ""  # the method whose knob and learning rate it takes, instead of a choice of its own


@dataclass(frozen=True)
class Cell:
    """What is trained and measured once."""

    world: World
    method: str
    knob: float
    lr: float
    seed: int  # of the order of training, random weights and samples

    @property
    def key(self) -> dict[str, Any]:
        return {"world": self.world.name, "method": self.method, "knob": self.knob, "lr": self.lr, "seed": self.seed}


# ------------------------------------------------------------------------------------------------ a world


def base_config(world: World, sizes: Sizes) -> ConfigDict:
    """The config of a world's teacher stages; configs/demo.py, smaller."""
    config = default_config()
    named = {} if world.mismatch == "word" else {"mismatch": world.mismatch}
    files = toy.world_on_disk(sizes.pairs, sizes.test_pairs, noise=world.noise, seed=world.seed, **named)
    config.seed = world.seed
    config.teacher.path, config.student.path = files.teacher, files.student
    config.data.update({"train": files.train, "test": files.test, "max_prompt_tokens": 64, "max_response_tokens": 96})
    config.rows.update(ROWS)
    config.annotate.micro_batch = 16
    for stage in ("teacher_sft", "student_sft", "positive", "negative", "train", "student_dpo"):
        train_so(config, stage, sizes)
    for stage in ("teacher_sft", "student_sft"):
        config[stage].update({"lr": 3e-3, "clip": 1.0, "steps": sizes.sft_updates})
    for stage in ("positive", "negative"):
        config[stage].update({"lr": 5e-4, "beta": 0.1})
    for stage in ("teacher_sft", "positive", "negative"):
        config[stage].steps = max(1, round(world.teacher * config[stage].steps))
    config.log_every, config.compile_cache = 10**6, False  # all worlds share one: see `alone`
    return config


def train_so(config: ConfigDict, stage: str, sizes: Sizes) -> None:
    """Gives a stage the updates and the batch that all have; no checkpoint before its end."""
    config[stage].update({"steps": sizes.updates, "batch_size": sizes.batch, "micro_batch": sizes.batch})
    config[stage].save_every = 10**6
    if "sft_weight" in config[stage]:  # keeps the fluency of models this small, as in the demo
        config[stage].sft_weight = 2.0


@dataclass(frozen=True, eq=False)
class Made:
    """A world whose teacher stages are finished."""

    job: Job
    base: ConfigDict  # what job.config is between two cells
    examples: list[Example]  # the annotated training pairs


@contextmanager
def made(folder: Path, world: World, sizes: Sizes, prepare: Mapping[str, Any]) -> Iterator[Made]:
    """Makes the teacher stages of a world that are not there yet.

    With `prepare`, in a folder beside that has SFT in common with the world's own.
    """
    # 1. The config, and the world's own folder or one beside.
    config = base_config(world, sizes)
    workdir = folder / "worlds" / world.name
    if prepare:
        config.update_from_flattened_dict(prepare)
        with made(folder, world, sizes, {}):  # whose SFT is taken
            own = workdir
        workdir = own.with_name(f"{own.name}-" + "-".join(f"{key}={value}" for key, value in prepare.items()))
        workdir.mkdir(parents=True, exist_ok=True)
        for stage in ("teacher_sft", "student_sft"):
            if not (workdir / stage).exists():
                (workdir / stage).symlink_to(own / stage)
    check_config(config)

    # 2. Every stage knows whether it is finished.
    with open_job(config, workdir, say=lambda text: None) as job:
        for stage in WORLD_STAGES:
            if stage == "annotate" and (workdir / "annotations" / "manifest.json").exists():
                continue  # training holds it against what it should have been made from
            config.rows.update(ROWS_OF_SFT if stage.endswith("_sft") else ROWS)
            run_stage(job, stage)
        store = open_store(workdir / "annotations", verify=False)
        yield Made(job, config.copy_and_resolve_references(), list(store))


def run_stage(job: Job, stage: str) -> None:
    if not left_out(job.config, stage):
        import_module(f"ctpd_jax.stages.{STAGES[stage].kind}").run(job, stage)


# ------------------------------------------------------------------------------------------------ a cell


def run_cell(world: Made, cell: Cell, method: Method, sizes: Sizes) -> dict[str, Any]:
    """Trains the method's student, where it has one to train, and returns what is measured."""
    began = time.perf_counter()
    job, stage, config = world.job, method.stage, world.job.config
    # 1. The settings of the cell, and nothing of the cell before.
    config.update(world.base)
    config.seed = cell.seed
    config.update_from_flattened_dict(method.settings)
    if method.knobs:
        remove(job, method)
        for one in (*method.needs, stage):
            train_so(config, one, sizes)
            config.update_from_flattened_dict({f"{one}.{method.knob}": cell.knob, f"{one}.lr": cell.lr})
            config.update_from_flattened_dict({k: v for k, v in method.settings.items() if k.startswith(f"{one}.")})
        check_config(config)
        for one in (*method.needs, stage):
            run_stage(job, one)
    trained = time.perf_counter()

    # 2. What became of it.
    found = {"train_seconds": round(trained - began, 2)}
    found |= of_test_pairs(job, stage)
    found |= of_samples(job, stage, sizes.samples, sizes.max_new_tokens)
    if stage == "train":
        found |= of_weights(world.examples, config)
    found["seconds"] = round(time.perf_counter() - began, 2)
    if method.knobs:
        remove(job, method)
    config.update(world.base)
    return found


def remove(job: Job, method: Method) -> None:
    """Makes room for the next cell: what a method trains, and what its models have read."""
    for one in (*method.needs, method.stage):
        for folder in (job.workdir / one, job.workdir / "annotations" / "columns" / f"{one}_tokens"):
            shutil.rmtree(folder, ignore_errors=True)


# ------------------------------------------------------------------------------------------------ many cells


def alone(folder: Path) -> None:
    """Has this process compute on one thread, so that its numbers do not depend on the machine's cores.

    Before JAX starts. Compiled programs are shared by all processes on that folder.
    """
    os.environ["NPROC"] = "1"  # what XLA's CPU client takes for the number of cores
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_compilation_cache_dir", str(folder.absolute() / "compile_cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def made_from(method: Method, sizes: Sizes) -> dict[str, Any]:
    """What decides a cell's numbers beside its key; a line that was made from something else is made anew."""
    settings = {**method.prepare, **method.settings, "stage": method.stage}
    return {"format": FORMAT, "sizes": asdict(sizes), "settings": settings}  # as JSON holds it


def run_world(folder: Path, sizes: Sizes, methods: Mapping[str, Method], cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Measures cells of one world, and appends a line for each to cells.jsonl; returns what was found."""
    all_found = []
    # Methods with a contrastive pair of their own come after one another, to have it made once.
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(json.dumps(methods[cell.method].prepare), []).append(cell)
    for group in groups.values():
        with made(folder, group[0].world, sizes, methods[group[0].method].prepare) as world:
            for cell in group:
                method = methods[cell.method]
                try:
                    found = run_cell(world, cell, method, sizes)
                except UserError as error:
                    if "gradient norm" not in str(error):
                        raise
                    found = {"failed": str(error)}  # a training that diverged is a result too
                line = {"key": cell.key, "made_from": made_from(method, sizes), "found": found}
                append(folder / "cells.jsonl", line)
                all_found.append(found)
    return all_found


def append(path: Path, line: Mapping[str, Any]) -> None:
    """Appends one line by one write: lines of several processes do not mix."""
    with open(path, "ab", buffering=0) as file:
        torn = path.stat().st_size and path.read_bytes()[-1:] != b"\n"  # a killed process has left half a line
        file.write(b"\n" * bool(torn) + json.dumps(line, allow_nan=False).encode() + b"\n")


def lines_of(path: Path) -> list[dict[str, Any]]:
    """Return the lines of cells.jsonl; what a killed process left half written is none."""
    found = []
    for text in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(json.loads(text))
        except ValueError:
            continue
    return found
