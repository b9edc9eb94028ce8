"""A training stage whose batches have more shapes than were planned stops, and says so; what an update took."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.recipes import recipe_of, updates_of

from ctpd_jax.data.loader import Updates
from ctpd_jax.errors import UserError
from ctpd_jax.schema import Batch, RowLayout
from ctpd_jax.settings import training
from ctpd_jax.train import loop
from ctpd_jax.train.checkpoint import Checkpoints
from ctpd_jax.train.loop import Recipe, save_after, train
from ctpd_jax.train.metrics import MetricLog, read_metrics
from ctpd_jax.train.optimizer import make_optimizer

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


@pytest.mark.parametrize(
    ("step", "seconds", "minutes", "expected"),
    [
        (0, 1.0, 0.0, 100),  # by count alone
        (5, 1.0, 30.0, 100),  # quick: the count comes first
        (5, 60.0, 30.0, 35),
        (95, 60.0, 30.0, 100),
        (100, 60.0, 30.0, 130),
        (7, 7200.0, 30.0, 8),  # one update takes longer than that
        (7, 0.0, 30.0, 100),
    ],
)
def test_when_to_save_next(step, seconds, minutes, expected):
    settings = training(lr=0.1, save_every=100, save_minutes=minutes)
    assert save_after(step, seconds, settings) == expected


def test_slow_updates_are_saved_by_time_and_change_no_number(tmp_path, monkeypatch):
    """Here every update is slow: from the fifth on each is saved, and so is one that is asked to stop."""
    shapes = {"model": {"norm": {"weight": jax.ShapeDtypeStruct((4,), jnp.float32)}}}
    initial = {"model": {"norm": {"weight": jnp.arange(4.0)}}}
    steps: dict[float, list[int]] = {}
    found, save = {}, Checkpoints.save
    for minutes in (0.0, 1e-9):
        told = steps.setdefault(minutes, [])
        with monkeypatch.context() as patch, MetricLog(tmp_path / f"{minutes}", tensorboard=False) as log:
            patch.setattr(Checkpoints, "save", lambda self, *given, t=told: t.append(given[0]) or save(self, *given))
            recipe = recipe_of(sums_of, shapes, training(lr=0.1, save_every=8, save_minutes=minutes), 10)
            updates = updates_of(lambda step: batches(0), 1)
            found[minutes] = train(recipe, tmp_path / f"{minutes}" / "checkpoints", lambda: initial, {}, updates, log)
    assert steps == {0.0: [8], 1e-9: [6, 7, 8, 9]}
    weight = [found[minutes]["model"]["norm"]["weight"] for minutes in found]
    np.testing.assert_array_equal(*weight)


# ------------------------------------------------------------------------------------------------ not finite

STEPS = 8


def one_pair(value: float) -> Batch:
    row, slot = np.zeros((1, 4), np.int32), np.zeros((1, 2), np.int32)
    pair, weight = np.full((1, 2), value, np.float32), np.zeros((1, 2), np.float32)
    return Batch(
        row, RowLayout(row, row, row), slot, slot, slot, slot, weight, pair, pair, pair, np.ones(1, np.float32)
    )


def towards(params, batch):
    loss, one = jnp.sum((params["model"]["norm"]["weight"] - batch.constant[0, 0]) ** 2), jnp.ones(())
    return loss, {"loss": jnp.stack([loss, one]), "num_tokens": jnp.stack([one, 0 * one])}


def trained(folder, values, nonfinite: str) -> np.ndarray:
    """Two pairs an update: a good one, and one with the value of that update."""
    shapes = {"model": {"norm": {"weight": jax.ShapeDtypeStruct((4,), jnp.float32)}}}
    recipe = recipe_of(towards, shapes, training(lr=0.1, nonfinite=nonfinite, save_every=2), len(values))
    updates = Updates(
        lambda step: [one_pair(1.0), one_pair(values[step])],
        lambda step: [("good", one_pair(1.0)), (f"pair {step}", one_pair(values[step]))],
        1, (None,), 0.0,  # type: ignore[arg-type]
    )  # fmt: skip
    initial = {"model": {"norm": {"weight": jnp.arange(4.0)}}}
    with MetricLog(folder, tensorboard=False) as log:
        params = train(recipe, folder / "checkpoints", lambda: initial, {}, updates, log, log_every=3)
    return np.asarray(params["model"]["norm"]["weight"])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30], ids=str)
def test_an_update_that_is_not_finite_ends_the_stage_and_names_the_pair(tmp_path, value):
    """Told a turn later, when the next update has run: none of it is saved, and the stage goes on once it is mended."""
    values = [2.0, 3.0, 4.0, value, 5.0, 6.0, 7.0, 8.0]
    with pytest.raises(UserError, match=r"update 3; by themselves are not finite: pair 3\. Lower"):
        trained(tmp_path, values, "stop")
    saved = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert saved == ["00000002"]
    found = trained(tmp_path, values, "skip")
    np.testing.assert_array_equal(found, trained(tmp_path / "other", values, "skip"))


def test_an_update_that_is_left_out_changes_nothing_and_is_counted(tmp_path, capsys):
    values = [2.0, 3.0, np.nan, 4.0, 5.0, np.inf, 6.0, 7.0]
    found = trained(tmp_path, values, "skip")
    assert np.isfinite(found).all()
    told = capsys.readouterr().err
    assert "stage: left out, loss nan" in told and "at update 5; by themselves are not finite: pair 5." in told
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines if "skipped" in line] == [2, 5]  # logged though log_every is 3
    # Against AdamW step by step: state and parameters stay, the learning rate goes on.
    params, optimizer = {"norm": jnp.arange(4.0)}, make_optimizer(training(lr=0.1), STEPS)
    state = optimizer.init(params)
    for value in values:
        if np.isfinite(value):
            gradient = {"norm": 2 * params["norm"] - 1.0 - value}
            changes, state = optimizer.update(gradient, state, params)
            params = optax.apply_updates(params, changes)
        else:
            state = jax.tree.map(lambda x: x + (x.dtype == jnp.int32), state)
    np.testing.assert_allclose(found, params["norm"], rtol=1e-5)


def test_it_has_diverged_where_too_many_in_a_row_are_left_out(tmp_path):
    with pytest.raises(UserError, match=r"loss nan .* at update 5;"):
        trained(tmp_path, [1.0, *[np.nan] * 7], "skip")
    assert np.isfinite(trained(tmp_path / "few", [1.0, *[np.nan] * 4, 1.0, *[np.nan] * 2], "skip")).all()


def test_a_clock_that_jumps_changes_no_number(tmp_path, monkeypatch):
    """Back by a day with every look: only what is told as the time of a line."""
    values = [float(value) for value in range(STEPS)]
    steady = trained(tmp_path / "steady", values, "stop")
    now = [2e9]

    def back() -> float:
        now[0] -= 86400
        return now[0]

    monkeypatch.setattr("time.time", back)
    np.testing.assert_array_equal(trained(tmp_path / "jumping", values, "stop"), steady)
    lines = read_metrics(tmp_path / "jumping")
    assert len(lines) == len(read_metrics(tmp_path / "steady")) and all(line["seconds"] >= 0 for line in lines)
