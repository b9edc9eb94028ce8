"""A training stage whose batches have more shapes than were planned stops, and says so; what an update took."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.recipes import recipe_of, updates_of

from ctpd_jax.schema import Batch, RowLayout
from ctpd_jax.settings import training
from ctpd_jax.train import loop
from ctpd_jax.train.loop import Recipe, train
from ctpd_jax.train.metrics import MetricLog, read_metrics

LENGTHS = (4, 8, 4, 12)  # of the rows, update for update


def batches(step: int) -> list[Batch]:
    row, slot = np.zeros((1, LENGTHS[step]), np.int32), np.zeros((1, 2), np.int32)
    pair, weight = np.zeros((1, 2), np.float32), np.zeros((1, 2), np.float32)
    return [
        Batch(row, RowLayout(row, row, row), slot, slot, slot, slot, weight, pair, pair, pair, np.ones(1, np.float32))
    ]


def sums_of(params, batch):
    loss, one = jnp.sum(params["model"]["norm"]["weight"] ** 2), jnp.ones(())
    return loss, {"loss": jnp.stack([loss, one]), "num_tokens": jnp.stack([batch.tokens.size * one, 0 * one])}


@pytest.mark.parametrize("planned", [2, 3])
def test_a_shape_too_many_stops_the_training(tmp_path, planned):
    shapes = {"model": {"norm": {"weight": jax.ShapeDtypeStruct((4,), jnp.float32)}}}

    def run(log: MetricLog) -> None:
        recipe = recipe_of(sums_of, shapes, training(lr=0.1), len(LENGTHS))
        initial = {"model": {"norm": {"weight": jnp.arange(4.0)}}}
        train(recipe, tmp_path / "checkpoints", lambda: initial, {}, updates_of(batches, planned), log)

    with MetricLog(tmp_path, tensorboard=False) as log:
        if planned == 3:
            run(log)
        else:
            with pytest.raises(RuntimeError, match="stage: 3 programs were compiled for batches of 2 planned shapes"):
                run(log)
    counts = [line["compiled_programs"] for line in read_metrics(tmp_path)]
    assert counts == [1, 2, 2, 3][: 4 if planned == 3 else 3]


def test_each_update_has_its_own_time_where_programs_run_at_once(tmp_path, monkeypatch):
    """A clock that only updates move: a second each, told of later, or at once where a checkpoint is saved."""
    seconds = [0.0]
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: seconds[0]))

    class Timed(Recipe):
        def programs(self):
            accumulate, update = super().programs()

            def a_second(*given):
                out = jax.block_until_ready(update(*given))
                seconds[0] += 1
                return out

            return accumulate, a_second

    shapes = {"model": {"norm": {"weight": jax.ShapeDtypeStruct((4,), jnp.float32)}}}
    recipe = recipe_of(sums_of, shapes, training(lr=0.1, save_every=3), 10)
    timed = Timed(**{name: getattr(recipe, name) for name in Recipe.__dataclass_fields__})
    initial = {"model": {"norm": {"weight": jnp.arange(4.0)}}}
    with MetricLog(tmp_path, tensorboard=False) as log:
        train(timed, tmp_path / "checkpoints", lambda: initial, {}, updates_of(lambda step: batches(0), 1), log)
    assert [line["seconds"] for line in read_metrics(tmp_path)] == [1.0] * 10
