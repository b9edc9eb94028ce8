"""STAGE.moments: Adam's first moment in bfloat16, and nothing else."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import MICRO
from toy.models import student_config

from ctpd_jax.cli import load_config, main
from ctpd_jax.errors import UserError
from ctpd_jax.job.check import check_config
from ctpd_jax.models.decoder import init_params, param_shapes
from ctpd_jax.models.hf.config import from_hf
from ctpd_jax.settings import training
from ctpd_jax.sharding import make_mesh, shard_shapes
from ctpd_jax.train.checkpoint import Checkpoints
from ctpd_jax.train.loop import init_state, state_shapes
from ctpd_jax.train.metrics import read_metrics
from ctpd_jax.train.optimizer import adam, decay_mask, learning_rate, make_optimizer

MODEL = from_hf(student_config() | {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})
STEPS = 40


def settings(moments: str):
    return training(lr=3e-3, moments=moments)


@cache
def noisy_update(moments: str):
    """An update towards other parameters, with noise: state -> (state, the distance before it)."""
    optimizer, goal = make_optimizer(settings(moments), STEPS), init_params(MODEL, jax.random.key(1))

    @jax.jit
    def update(state):
        def loss(params):
            return sum(jnp.sum((a - b) ** 2) for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(goal)))

        value, gradient = jax.value_and_grad(loss)(state.params)
        keys = jax.random.split(jax.random.fold_in(jax.random.key(2), state.step), len(jax.tree.leaves(gradient)))
        keys = jax.tree.unflatten(jax.tree.structure(gradient), list(keys))
        gradient = jax.tree.map(lambda g, key: g + 0.01 * jax.random.normal(key, g.shape), gradient, keys)
        changes, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        return state._replace(
            step=state.step + 1, params=optax.apply_updates(state.params, changes), opt_state=opt_state
        ), value

    return update


def trained(moments: str, steps: int = STEPS):
    """The state after `steps` updates, the distance at each, and the update."""
    state = init_state(init_params(MODEL, jax.random.key(0)), make_optimizer(settings(moments), STEPS))
    update, values = noisy_update(moments), []
    for _ in range(steps):
        state, value = update(state)
        values.append(float(value))
    return state, np.array(values), update


def moments_of(opt_state) -> optax.ScaleByAdamState:
    return opt_state[1][0]


def dtypes(tree) -> set[str]:
    return {str(leaf.dtype) for leaf in jax.tree.leaves(tree)}


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_only_the_first_moment_changes_its_dtype_and_all_lie_as_the_parameters_do(moments):
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    params, optimizer = shard_shapes(mesh, param_shapes(MODEL)), make_optimizer(settings(moments), STEPS)
    placed = state_shapes(mesh, optimizer, params)
    found = moments_of(placed.opt_state)
    assert dtypes(found.mu) == {moments} and dtypes(found.nu) == dtypes(placed.params) == {"float32"}
    for tree in (found.mu, found.nu):
        jax.tree.map(lambda a, b: (a.sharding == b.sharding) or pytest.fail(str(a)), tree, params)
    state, _, _ = trained(moments, 2)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), placed
    )


def test_in_float32_it_is_adamw():
    chosen = settings("float32")
    theirs = optax.chain(
        optax.clip_by_global_norm(chosen.clip),
        optax.adamw(learning_rate(chosen, STEPS), weight_decay=chosen.weight_decay, mask=decay_mask),
    )
    ours = make_optimizer(chosen, STEPS)
    params = init_params(MODEL, jax.random.key(0))
    a, b = ours.init(params), theirs.init(params)
    for step in range(3):
        gradient = init_params(MODEL, jax.random.key(step + 5))
        (one, a), (other, b) = ours.update(gradient, a, params), theirs.update(gradient, b, params)
        jax.tree.map(np.testing.assert_array_equal, (one, a), (other, b))


def test_training_stays_close_to_float32():
    (exact, falls, _), (rounded, others, _) = trained("float32"), trained("bfloat16")
    assert falls[-1] < 0.25 * falls[0]  # something was learned
    gap = np.abs(others / falls - 1).max()
    assert 0 < gap < 2e-4
    moved = [
        np.concatenate([np.ravel(a - b) for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(start))])
        for start in [init_params(MODEL, jax.random.key(0))]
        for one in (exact, rounded)
    ]
    error = np.linalg.norm(moved[1] - moved[0]) / np.linalg.norm(moved[0])
    print(f"bfloat16 moments: relative gap of the loss {gap:.1e} at most, of the way gone {error:.1e}")
    assert error < 3e-3


def test_updates_do_not_fall_short():
    """With optax's own mu_dtype they do, by 1.5 %: b1 itself is rounded there."""
    gradients = 1 + 0.5 * np.random.default_rng(0).normal(size=(100, 2000)).astype(np.float32)
    gone = []
    for moments in ("float32", "bfloat16"):
        optimizer = adam(settings(moments))
        state, total, update = optimizer.init(jnp.zeros(2000)), np.zeros(2000), jax.jit(optimizer.update)
        for gradient in gradients:
            changes, state = update(gradient, state)
            total += changes
        gone.append(float(total.mean()))
    assert abs(gone[1] / gone[0] - 1) < 1e-3


def test_a_checkpoint_comes_back_bit_for_bit_and_goes_on(tmp_path):
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    params = shard_shapes(mesh, param_shapes(MODEL))
    state, _, update = trained("bfloat16", 5)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, state)
        restored = checkpoints.restore_latest(state_shapes(mesh, make_optimizer(settings("bfloat16"), STEPS), params))
        for _ in range(2):  # as it was saved, and after one more update
            for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
                assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()
            restored, state = update(restored)[0], update(state)[0]
        with pytest.raises(UserError, match=r"mu/.* is bfloat16"):
            checkpoints.restore_latest(state_shapes(mesh, make_optimizer(settings("float32"), STEPS), params))


@pytest.mark.slow
def test_a_stage_trains_alike_and_is_not_taken_up_with_other_moments(new_workdir, capsys):
    command, losses = ["sft", "--model", "student", "--config", MICRO, "--config.student_sft.steps=20"], []
    for moments in ("float32", "bfloat16"):
        workdir = new_workdir(f"{moments}_moments")
        assert main([*command, "--workdir", str(workdir), f"--config.student_sft.moments={moments}"]) == 0
        losses.append(np.array([line["loss"] for line in read_metrics(workdir, "student_sft")]))
    gap = np.abs(losses[1] / losses[0] - 1).max()
    assert losses[0][-1] < 0.9 * losses[0][0]
    assert 0 < gap < 2e-3, gap
    assert main([*command, "--workdir", str(workdir)]) == 2
    assert "settings.moments is 'bfloat16' there and 'float32' here" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes, message",
    [({"moments": "float16"}, "negative.moments is 'float16'"), ({"moments": "bfloat16", "adam_b1": 0.999}, "adam_b1")],
)
def test_what_cannot_be_is_refused(changes, message):
    config = load_config(MICRO, [])
    config.negative.update(changes)
    with pytest.raises(UserError, match=message):
        check_config(config)
