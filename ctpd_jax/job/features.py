"""What distillation needs of the teacher: it reads the chosen responses once, token by token, into shards on disk.

Its k largest probabilities are small; its last hidden states are D numbers a token, and are left on disk until a batch
asks for them. With those goes the teacher's unembedding, the one part of it that the training job holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ctpd_jax.annotate.scorer import response_items
from ctpd_jax.annotate.store import Column, shard_ranges
from ctpd_jax.data.loader import micro_batches, plan_shapes
from ctpd_jax.data.packing import PackingConfig
from ctpd_jax.errors import UserError
from ctpd_jax.job import lineage
from ctpd_jax.job.job import Job
from ctpd_jax.job.models import decoder_of, dtype_of
from ctpd_jax.job.pairs import Pairs
from ctpd_jax.job.recipe import packing, reading
from ctpd_jax.job.score import shard_size
from ctpd_jax.job.table import reading_dtype
from ctpd_jax.models.compute import scored_states
from ctpd_jax.models.decoder import Params, unembedding
from ctpd_jax.models.lora import join
from ctpd_jax.processes import preempt
from ctpd_jax.schema import CHOSEN, AlignedPair, Array, Batch, TeacherTokens
from ctpd_jax.sharding import compiler_options, first_process, place_batch, told_by_first
from ctpd_jax.train.distill import top_probabilities
from ctpd_jax.train.metrics import Progress


class Features(NamedTuple):
    """The teacher's figures of the chosen responses, in the order of the pairs."""

    of_pairs: list[np.ndarray]  # float32 [U, F] each
    head: np.ndarray | None  # float32 [V, D], with hidden states

    def beside(self, batch: Batch, pairs: Sequence[AlignedPair], places: Sequence[int], size: int) -> Batch:
        """The batch, whose row r is the chosen response of pair `places[r]`, with `size` teacher tokens a row."""
        rows = len(batch.tokens)
        features = np.zeros((rows, size, self.of_pairs[0].shape[1]), np.float32)
        inputs, targets = np.zeros((2, rows, size), np.int32)
        found = TeacherTokens(features, inputs, targets, np.zeros((rows, size), bool))
        for row, place in enumerate(places):
            own, tokens = self.of_pairs[place], pairs[place].tokens("teacher", CHOSEN).ids
            found.features[row, : len(own)] = own
            found.targets[row, : len(own)] = tokens
            found.inputs[row, : len(own)] = np.concatenate([pairs[place].teacher_prompt[-1:], tokens[:-1]])
            found.real[row, : len(own)] = True
        return batch._replace(teacher=found)


def one_response_a_row(rows: PackingConfig) -> PackingConfig:
    """How responses are laid out where what belongs to one has a row of its own."""
    return replace(rows, layout="response", packed=False)


def teacher_features(job: Job, pairs: Pairs, teacher: str, k: int) -> Features:
    """Has the model that a stage left read the chosen responses; what is on disk already is not read again.

    Args:
        teacher: the stage.
        k: so many probabilities, the largest ones; 0: the last hidden states, and the unembedding.
    """
    # 1. What is missing, as one process sees it. With hidden states the last shard is the unembedding.
    name, what = f"{teacher}_{f'top{k}' if k else 'hidden'}", f"{k} largest probabilities" if k else "hidden states"
    identity = {
        "params": lineage.identity(job, teacher),
        "weights": reading_dtype(job.config, "teacher"),
        "data": pairs.identity,
        "compute": dtype_of(job.config, job.mesh),
        "of": what,
    }
    column = Column(job.workdir / "annotations", name, identity, judge=first_process())
    ranges = shard_ranges(len(pairs.aligned), told_by_first(lambda: shard_size(job, "train")))
    shards = len(ranges) + (0 if k else 1)

    # 2. Each process reads its share.
    missing = told_by_first(lambda: column.missing_shards(shards))[jax.process_index() :: jax.process_count()]
    with preempt.apart(f"{name} is measured"):
        if missing:
            _measure(job, pairs, teacher, k, column, ranges, missing)

    # 3. Everything, left on disk until it is asked for.
    width = k or decoder_of(job, "teacher").hidden_size
    found = [array.reshape(-1, width) for shard in range(len(ranges)) for array in column.mapped(shard)]
    return Features(found, None if k else column.mapped(len(ranges))[0].reshape(-1, width))


def _measure(
    job: Job, pairs: Pairs, teacher: str, k: int, column: Column, ranges: Sequence[range], missing: Sequence[int]
) -> None:
    """Reads the missing shards, on the devices of this process."""
    # 1. The teacher, and its program.
    dtype, decoder = reading_dtype(job.config, "teacher"), decoder_of(job, "teacher")
    what = reading(job.config, (teacher,), dtype, decoder, job.own)
    origin, stacked = lineage.finished(lineage.Files(job, job.own), job.config, (teacher,), dtype)
    params = join(origin.params, jax.tree.map(lambda leaf: leaf[0], stacked))

    @partial(jax.jit, compiler_options=compiler_options(what.compute.mesh))
    def read(params: Params, batch: Batch) -> Array:
        states = scored_states(what.decoder, params, batch, what.compute)
        return top_probabilities(what.decoder, params, states, k, what.compute) if k else states.astype(jnp.float32)

    # 2. The chosen responses, one a row.
    items, micro_batch = response_items(pairs.aligned, "teacher", CHOSEN), job.config.annotate.micro_batch
    rows = one_response_a_row(packing(job.config, job.own, decoder, reads=True))
    shapes = plan_shapes(items, ranges, micro_batch, rows)

    # 3. Shard by shard.
    done = len(items) - sum(len(ranges[shard]) for shard in missing if shard < len(ranges))
    with Progress(len(items), f"train/{column.directory.name}", done, unit="response") as progress:
        for shard in missing:
            if shard == len(ranges):
                head = jnp.asarray(unembedding(what.decoder, params), jnp.float32)
                column.write(shard, [np.asarray(head).reshape(-1)])
                continue
            of_shard: list[np.ndarray] = [np.zeros(0, np.float32)] * len(ranges[shard])
            own = [items[place] for place in ranges[shard]]
            for batch, places in micro_batches(own, micro_batch, rows, shapes):
                preempt.check("the shards that are written are kept")
                found = np.asarray(read(params, place_batch(job.own, batch)))
                for row, place in enumerate(places):
                    of_shard[place] = found[row, : len(own[place].chosen.tokens)].reshape(-1)
                    if not np.isfinite(of_shard[place]).all():
                        where = pairs.aligned[ranges[shard][place]].id
                        raise UserError(f"What {teacher} makes of pair {where} is not finite: look at that model.")
                progress.update(len(places))
            column.write(shard, of_shard)
