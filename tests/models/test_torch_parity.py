"""Every family against transformers and torch: tiny random models that use every field of their configs.

torch runs in an environment of its own, in three processes for all families: one makes the models and says what it
computes with them, two open what we exported, with transformers 5 and with 4.
"""

from __future__ import annotations

import ast
import json
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import HELPERS, real_assets
from helpers.tiny import FAMILIES, TEACHERS, random_model

from ctpd_jax.data.rows import LAYOUTS, BatchShape, PairItem, ScoredResponse, build_batch
from ctpd_jax.models.compute import Compute
from ctpd_jax.models.decoder import apply
from ctpd_jax.models.hf import load_hf, save_hf
from ctpd_jax.models.hf.config import from_hf
from ctpd_jax.models.hf.load import tensor_table
from ctpd_jax.schema import RowLayout
from ctpd_jax.train.sums import Objective, preference_sums

pytestmark = pytest.mark.parity
SCRIPT = HELPERS / "torch_reference.py"
TRAINABLE = sorted(set(FAMILIES) - set(TEACHERS))
# transformers 4 allows no such field for this family, or does not know it.
ONLY_IN_5 = {"phi3_attention_factor", "ministral3"}
LENGTHS = (23, 31)  # longer than the tiny windows
ROW = 56
BETA = 0.1
LOGITS = 1e-4  # on logits of a size of about 5
GRADIENT = 1e-4  # relative to the largest entry of the same tensor
ZERO = 1e-12  # what is smaller in float64 is zero


# ------------------------------------------------------------------------------------------------ both sides


def _sequences(vocab):
    random = np.random.default_rng(1)
    return [random.integers(0, vocab, length).tolist() for length in LENGTHS]


def _pairs(vocab):
    """Two preferences. No token is the padding token: torch.nn.Embedding gives that one no gradient."""
    random = np.random.default_rng(2)

    def tokens(count):
        return random.integers(3, vocab, count).tolist()

    return [
        {"prompt": tokens(7), "chosen": tokens(11), "rejected": tokens(9), "reference": [-60.5, -50.25]},
        {"prompt": tokens(4), "chosen": tokens(6), "rejected": tokens(12), "reference": [-31.0, -70.75]},
    ]


def _run(root, jobs, transformers4=False):
    file = root / "jobs.json"
    file.write_text(json.dumps(jobs))
    real_assets.run_in_assets_venv(SCRIPT, file, transformers4=transformers4)


def _logits_job(root, label, name, version=5):
    tokens, out = _sequences(FAMILIES[name]["vocab_size"]), f"{label}-{name}.{version}.npz"
    return {"logits": str(root / f"{label}-{name}"), "tokens": tokens, "out": str(root / out)}


# Of models with eyes: the smallest of their vision towers, and what lies between.
TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TOWER |= {"image_size": 28, "patch_size": 14}
EYES = {
    "gemma3": {
        "model_type": "gemma3", "text_config": FAMILIES["gemma3"], "mm_tokens_per_image": 4,
        "vision_config": {**TOWER, "model_type": "siglip_vision_model"},
    },
    **{
        name: {
            "model_type": "mistral3", "text_config": FAMILIES[text],
            "vision_config": {**TOWER, "model_type": "pixtral", "head_dim": 8},
        }
        for name, text in (("mistral3", "mistral"), ("mistral3_of_ministral3", "ministral3"))
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """For each family a model made by transformers, its logits and its gradients."""
    root, jobs = tmp_path_factory.mktemp("theirs"), []
    for name, raw in FAMILIES.items():
        folder = str(root / f"theirs-{name}")
        jobs += [{"create": folder, "config": raw}, _logits_job(root, "theirs", name)]
        if name in TRAINABLE:
            pairs, out = _pairs(raw["vocab_size"]), str(root / f"dpo-{name}.npz")
            jobs.append({"dpo": folder, "pairs": pairs, "beta": BETA, "out": out})
    for name, raw in EYES.items():
        tokens, out = _sequences(raw["text_config"]["vocab_size"]), str(root / f"eyes-{name}.npz")
        folder = str(root / f"eyes-{name}")
        jobs += [{"create": folder, "config": raw}, {"logits": folder, "tokens": tokens, "out": out}]
    _run(root, jobs)
    return root


@pytest.fixture(scope="module")
def exported(theirs, tmp_path_factory):
    """What transformers 5 computes with our exports of its own models, `back`, and of `ours`; of the latter also 4."""
    root, jobs = tmp_path_factory.mktemp("exported"), []
    for name in TRAINABLE:
        save_hf(root / f"back-{name}", *load_hf(theirs / f"theirs-{name}"))
        save_hf(root / f"ours-{name}", *random_model(name))
        jobs += [_logits_job(root, "back", name), _logits_job(root, "ours", name)]
    _run(root, jobs)
    _run(root, [_logits_job(root, "ours", name, 4) for name in TRAINABLE if name not in ONLY_IN_5], transformers4=True)
    return root


@pytest.fixture(scope="module")
def figures():
    """Largest differences, {family: {what: number}}; printed as a table when all is done (pytest -s)."""
    table: dict[str, dict[str, float]] = {}
    yield table
    print()
    for name, row in table.items():
        print(f"{name:24}", "  ".join(f"{what} {value:.1e}" for what, value in row.items()))


# ------------------------------------------------------------------------------------------------ logits


@partial(jax.jit, static_argnums=0)
def _apply(config, params, tokens, row):
    return apply(config, params, tokens, row)


def _logits(config, params):
    """Of the two sequences, each in a row of its own, and then once more side by side in one row."""
    first, second = _sequences(config.vocab_size)
    a, b = LENGTHS
    tokens, positions, segment = np.zeros((3, 3, ROW), np.int32)
    for row, start, number, sequence in ((0, 0, 1, first), (1, 0, 1, second), (2, 0, 1, second), (2, b, 2, first)):
        place = (row, slice(start, start + len(sequence)))
        tokens[place], positions[place], segment[place] = sequence, np.arange(len(sequence)), number
    out = np.asarray(_apply(config, params, tokens, RowLayout(positions, segment, segment)))
    return {"alone": (out[0, :a], out[1, :b]), "in one row": (out[2, b : a + b], out[2, :b])}


def _compare(figures, name, label, ours, file):
    expected = np.load(file)
    for how, (first, second) in ours.items():
        assert np.abs(expected["0"]).max() > 1  # the models are no constants
        largest = max(np.abs(first - expected["0"]).max(), np.abs(second - expected["1"]).max())
        figures.setdefault(name, {})[f"{label} {how}"] = largest
        assert largest < LOGITS, how


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_model_of_transformers_computes_the_same_here(theirs, figures, name):
    config, params = load_hf(theirs / f"theirs-{name}")
    assert config == from_hf(FAMILIES[name])  # what transformers writes, and the spelling of older versions
    _compare(figures, name, "theirs", _logits(config, params), theirs / f"theirs-{name}.5.npz")


@pytest.mark.parametrize("name", EYES)
def test_of_a_vision_language_model_the_text_model_computes_the_same(theirs, figures, name, tmp_path):
    config, params = load_hf(theirs / f"eyes-{name}")
    assert config == from_hf(EYES[name]["text_config"] | {"tie_word_embeddings": True})  # what both kinds default to
    _compare(figures, name, "theirs", _logits(config, params), theirs / f"eyes-{name}.npz")
    save_hf(tmp_path / "text", config, params)  # a text model by itself
    again, same = load_hf(tmp_path / "text")
    assert again == config
    jax.tree.map(np.testing.assert_array_equal, same, params)


@pytest.mark.parametrize("name", TRAINABLE)
def test_transformers_opens_what_we_export(theirs, exported, figures, name):
    for version in (5,) if name in ONLY_IN_5 else (5, 4):
        _compare(
            figures, name, f"ours in {version}", _logits(*random_model(name)), exported / f"ours-{name}.{version}.npz"
        )
    back = np.load(exported / f"back-{name}.5.npz")
    _compare(figures, name, "back", {"": (back["0"], back["1"])}, theirs / f"theirs-{name}.5.npz")


# ------------------------------------------------------------------------------------------------ gradients


def _batches(vocab):
    """The two pairs in every layout of rows: each response alone, both in one row, both after one prompt.

    All of one shape, the rows that a layout does not need being padding, so that there is one program to compile.
    """
    items = [
        PairItem(
            np.array(pair["prompt"]),
            *(
                ScoredResponse(np.array(pair[side]), np.ones(len(pair[side])), constant)
                for side, constant in zip(("chosen", "rejected"), pair["reference"])
            ),
        )
        for pair in _pairs(vocab)
    ]
    shape = BatchShape(2 * len(items), 36, 20)
    return {layout: build_batch(items, layout, shape, len(items)) for layout in LAYOUTS}


@partial(jax.jit, static_argnums=0)
def _dpo(config, params, batch):
    return jax.value_and_grad(lambda p: preference_sums(config, Objective(BETA), Compute(), p, batch)[0])(params)


def _by_name(config, tree):
    """The gradient under the checkpoint's names, one entry a layer."""
    out = {}
    for path, entry in tensor_table(config).items():
        leaf = tree
        for key in path:
            leaf = leaf[key]
        layers = np.asarray(leaf) if "{}" in entry else np.asarray(leaf)[None]
        out |= {entry.format(number): layer for number, layer in enumerate(layers)}
    return out


@pytest.mark.parametrize("name", TRAINABLE)
def test_the_gradient_of_a_dpo_step_is_that_of_torch(theirs, figures, name):
    """Every entry of every parameter, against float64.

    A bias of the keys in a layer without positions shifts all scores of a query alike: its gradient is zero, which
    leaves nothing to be relative to but the gradient of the matrix that it belongs to.
    """
    config, params = load_hf(theirs / f"theirs-{name}")
    expected = np.load(theirs / f"dpo-{name}.npz")
    names = {key for key in expected.files if key != "loss" and not key.startswith("float32:")}
    size = {key: np.abs(expected[key]).max() for key in names}
    unmoved = [key for key in names if size[key] < ZERO]
    without_positions = [i for i, kind in enumerate(config.layer_kinds) if config.kinds[kind].rope is None]
    biases = [f"model.layers.{layer}.self_attn.k_proj.bias" for layer in without_positions if config.qkv_bias]
    assert sorted(unmoved) == biases
    for key in unmoved:
        size[key] = size[key.replace("bias", "weight")]
    for layout, batch in _batches(config.vocab_size).items():
        loss, gradient = _dpo(config, params, batch)
        assert loss == pytest.approx(expected["loss"], rel=1e-5)
        ours = _by_name(config, gradient)
        assert ours.keys() == names
        errors = {key: np.abs(ours[key] - expected[key]).max() / size[key] for key in names}
        worst = max(errors, key=errors.__getitem__)
        figures.setdefault(name, {})[f"gradient {layout}"] = errors[worst]
        assert errors[worst] < GRADIENT, (layout, worst)
    figures[name]["torch float32"] = max(expected[f"float32:{key}"] / size[key] for key in names)


# ------------------------------------------------------------------------------------------------ packaging


def test_what_runs_torch_here_is_the_extra_called_parity():
    setup = ast.parse((Path(__file__).parents[2] / "setup.py").read_text())
    keywords = {node.arg: node.value for node in ast.walk(setup) if isinstance(node, ast.keyword)}
    assert set(ast.literal_eval(keywords["extras_require"])["parity"]) <= set(real_assets.LIBRARIES)
