"""Folders as people bring them: fields of the wrong kind, two spellings that differ, files that are something else."""

from __future__ import annotations

import json
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from helpers.tiny import FAMILIES, HF_CONFIGS, random_model

from ctpd_jax.errors import UserError
from ctpd_jax.models.hf import load_hf, safetensors, save_hf
from ctpd_jax.models.hf.config import from_hf, read_config, to_hf

LLAMA, GEMMA3, QWEN2 = HF_CONFIGS["llama"], HF_CONFIGS["gemma3"], FAMILIES["qwen2"]
NEOX, PHI3, LONG = FAMILIES["gpt_neox"], FAMILIES["phi3"], FAMILIES["phi3_longrope"]
PLAIN = {name: value for name, value in LLAMA.items() if not name.startswith("rope")}
LINEAR = {"rope_type": "linear", "factor": 2.0}


# ------------------------------------------------------------------------------------------------ config.json: kinds


@pytest.mark.parametrize(
    ("raw", "field", "value"),
    [
        (LLAMA, "num_hidden_layers", "30"),
        (LLAMA, "num_hidden_layers", 3.0),
        (LLAMA, "num_hidden_layers", True),
        (LLAMA, "num_hidden_layers", [3]),
        (LLAMA, "num_attention_heads", 0),
        (LLAMA, "hidden_size", -32),
        (LLAMA, "vocab_size", "97"),
        (LLAMA, "num_key_value_heads", "2"),
        (LLAMA, "tie_word_embeddings", "false"),
        (LLAMA, "tie_word_embeddings", 1),
        (LLAMA, "attention_bias", "no"),
        (LLAMA, "rms_norm_eps", "1e-5"),
        (LLAMA, "rms_norm_eps", float("nan")),
        (LLAMA, "initializer_range", float("inf")),
        (LLAMA, "hidden_act", ["silu"]),
        (LLAMA, "model_type", ["llama"]),
        (LLAMA, "rope_theta", "10000"),
        (LLAMA, "rope_theta", 0),
        (LLAMA, "rope_theta", -1.0),
        (LLAMA, "rope_scaling", "linear"),
        (LLAMA, "rope_parameters", [1]),
        (LLAMA, "eos_token_id", ["2"]),
        (LLAMA, "eos_token_id", "2"),
        (LLAMA, "eos_token_id", [2, 97]),  # the vocabulary has 97
        (LLAMA, "pad_token_id", 97),
        (LLAMA, "bos_token_id", 1.0),
        (LLAMA, "pad_token_id", -2),
        (FAMILIES["qwen2_windows"], "sliding_window", -1),
        (FAMILIES["mistral"], "sliding_window", 0),
        (QWEN2, "max_window_layers", -1),
        (QWEN2, "use_sliding_window", "true"),
        (QWEN2, "layer_types", "full_attention"),
        (QWEN2, "layer_types", ["full_attention"] * 3),
        (GEMMA3, "final_logit_softcapping", 0),
        (GEMMA3, "query_pre_attn_scalar", None),
        (GEMMA3, "sliding_window", None),
        (FAMILIES["smollm3"], "no_rope_layers", [2, 1, 1, 0]),
        (NEOX, "rotary_pct", 1.5),
        (PHI3, "head_dim", 10),
        (FAMILIES["mixtral"], "num_experts_per_tok", 6),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_by_file_field_and_value(raw, field, value):
    if value is None and field == "query_pre_attn_scalar":
        from_hf({**raw, field: None})  # null where there is a default is that default
        return
    with pytest.raises(UserError, match=r"^some/config\.json\b") as error:
        from_hf({**raw, field: value}, where="some/config.json")
    assert field in str(error.value)


@pytest.mark.parametrize(
    ("scaling", "words"),
    [
        ({"rope_type": "linear", "factor": "2"}, "factor"),
        ({"rope_type": "linear", "factor": 0}, "factor"),
        ({"rope_type": ["linear"], "factor": 2.0}, "rope_type"),
        ({"rope_type": "linear", "type": "llama3", "factor": 2.0}, "rope_type and type differ"),
        ({**FAMILIES["llama_llama3_tied"]["rope_scaling"], "low_freq_factor": 4.0}, "low_freq_factor"),
        ({**FAMILIES["llama_llama3_tied"]["rope_scaling"], "original_max_position_embeddings": 64.5}, "original_max"),
        ({**LONG["rope_scaling"], "short_factor": [1.0, "2"]}, "short_factor"),
        ({**LINEAR, "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_rotary_parameters_of_the_wrong_kind_are_refused(scaling, words):
    for spelling in ("rope_scaling", "rope_parameters"):
        with pytest.raises(UserError, match=words):
            from_hf({**PLAIN, spelling: scaling})


def test_what_real_configs_carry_is_accepted():
    assert from_hf({**LLAMA, "pad_token_id": -1, "eos_token_id": [2, -1]}).pad_id is None
    assert from_hf({**LLAMA, "pad_token_id": -1, "eos_token_id": [2, -1]}).eos_ids == (2,)
    assert from_hf({**LLAMA, "rope_theta": 20_000}) == from_hf({**LLAMA, "rope_theta": 20_000.0})
    assert from_hf({**LLAMA, "num_key_value_heads": None}).num_kv_heads == LLAMA["num_attention_heads"]
    scaling = {"type": "su", "rope_type": "longrope", **{k: v for k, v in LONG["rope_scaling"].items() if "f" in k}}
    assert from_hf({**LONG, "rope_scaling": scaling}) == from_hf(LONG)


def test_the_ends_of_generation_config_are_held_to_the_same(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    for value in (["2"], "2", [2.0], [97]):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
        with pytest.raises(UserError, match=r"generation_config\.json: eos_token_id is"):
            read_config(tmp_path)


# ------------------------------------------------------------------------------------------------ two spellings


@pytest.mark.parametrize(
    "raw",
    [
        {**PLAIN, "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}, "rope_scaling": LINEAR},
        {**PLAIN, "rope_parameters": {"rope_theta": 1e4, **LINEAR}, "rope_scaling": {**LINEAR, "factor": 4.0}},
        {**PLAIN, "rope_parameters": {"rope_theta": 1e4, **LINEAR}, "rope_scaling": None},
        {**PLAIN, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}, "rope_theta": 1e4},
        {**PLAIN, "rope_theta": 1e4, "rope_scaling": {"rope_theta": 5e5, **LINEAR}},
        {**GEMMA3, "rope_parameters": {"full_attention": {"rope_theta": 1e6}}},  # its rope_scaling is linear
        {**GEMMA3, "rope_parameters": {"sliding_attention": {"rope_theta": 1e4}}},
        {
            **GEMMA3,
            "rope_scaling": None,
            "rope_parameters": {"sliding_attention": {"rope_theta": 5e3, "rope_type": "default"}},
        },
        {**LONG, "rope_parameters": {"partial_rotary_factor": 0.5}},
        {**LONG, "rope_scaling": {**LONG["rope_scaling"], "original_max_position_embeddings": 128}},
        {**LONG, "rope_scaling": {**LONG["rope_scaling"], "factor": 3.0}},
        {**NEOX, "rope_parameters": {"partial_rotary_factor": 0.5}, "rotary_pct": 0.25},
        {**NEOX, "rotary_pct": 0.25, "partial_rotary_factor": 0.5},
        {**NEOX, "rope_theta": 1e4},  # not read for this family, whose base is 700 here
        {**FAMILIES["qwen3_moe"], "num_local_experts": 8},
    ],
)
def test_two_spellings_that_differ_are_refused(raw):
    with pytest.raises(UserError, match=r"differ|disagree|remove"):
        from_hf(raw)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_our_configs_are_read_by_transformers_as_by_us(name):
    """Both spellings stand in them, of which version 5 takes now one, now the other."""
    from transformers import AutoConfig

    config = from_hf(FAMILIES[name])
    for raw in (FAMILIES[name], to_hf(config)):
        raw = json.loads(json.dumps(raw))
        theirs = AutoConfig.for_model(raw.pop("model_type"), **raw)
        assert (theirs.num_key_value_heads if name[:3] != "gpt" else config.num_kv_heads) == config.num_kv_heads
        for kind in config.kinds:
            if kind.rope is not None:
                layer = "full_attention" if kind.window is None else "sliding_attention"
                found = theirs.rope_parameters.get(layer, theirs.rope_parameters)
                assert (found["rope_theta"], found["rope_type"]) == (kind.rope.theta, kind.rope.scaling)
                assert kind.rope.scaling not in ("linear", "llama3") or found["factor"] == kind.rope.factor
                assert int(config.head_dim * (found.get("partial_rotary_factor") or 1)) == config.turned


# ------------------------------------------------------------------------------------------------ weights


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A model folder in two shards, as bytes by name."""
    config, params = random_model("llama")
    folder = tmp_path_factory.mktemp("whole") / "m"
    save_hf(folder, config, params, max_shard_bytes=80_000)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert sum(name.startswith("model-") for name in files) == 2
    return files


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 269060552\n"
SHARD = "model-00002-of-00002.safetensors"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (SHARD, POINTER, r"00002\.safetensors is a git-lfs pointer, .*git lfs pull"),
        ("config.json", POINTER, r"config\.json is a git-lfs pointer"),
        ("model.safetensors.index.json", POINTER, r"index\.json is a git-lfs pointer"),
        ("generation_config.json", POINTER, r"generation_config\.json is a git-lfs pointer"),
        (SHARD, b"\n<!DOCTYPE html><html><body>Access to this model is gated", "is an HTML page"),
        ("config.json", b"<html>404</html>", "is an HTML page"),
        (SHARD, b"PK\x03\x04" + bytes(100), "is a PyTorch pickle"),
        (SHARD, b"GGUF" + bytes(100), "is a GGUF file"),
        (SHARD, b"", "not a safetensors file"),
        (SHARD, b"\x10", "not a safetensors file"),
        (SHARD, lambda data: data[:100], "cut short"),
        (SHARD, lambda data: data[:-1], "cut short: tensor"),
        (SHARD, lambda data: data + b"x", "goes on after its last tensor"),
        (SHARD, lambda data: data.replace(b'"data_offsets":[0,', b'"data_offsets":[4,', 1), "overlap another's|size"),
        (SHARD, lambda data: data.replace(b'"shape":[', b'"shape":["', 1), "header cannot be read"),
        ("adapter_config.json", b"{}", r"holds adapters .*beside a model.*merge_and_unload"),
        ("adapter_model.safetensors", b"x", r"holds adapters .*merge_and_unload"),
    ],
)
def test_a_file_that_is_something_else_is_named_for_what_it_is(tmp_path, whole, name, content, message):
    for file, data in whole.items():
        (tmp_path / file).write_bytes(data)
    load_hf(tmp_path)
    (tmp_path / name).write_bytes(content(whole[name]) if callable(content) else content)
    with pytest.raises(UserError, match=message) as error:
        load_hf(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_adapters_alone_are_named(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(UserError, match=r"adapters .*alone, without the model.*merge_and_unload"):
        load_hf(tmp_path)
    config, params = random_model("llama")
    (tmp_path / "config.json").write_text(json.dumps(to_hf(config)))
    with pytest.raises(UserError, match=r"holds adapters \(adapter_config\.json\)"):
        save_hf(tmp_path, config, params)  # transformers would put them onto the merged weights


def test_a_tensor_in_two_shards_is_refused(tmp_path, whole):
    for file, data in whole.items():
        (tmp_path / file).write_bytes(data)
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(whole[SHARD])
    with pytest.raises(UserError, match=r"00002\.safetensors .*holds tensors that another shard holds too: "):
        load_hf(tmp_path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_a_number_that_is_not_finite_is_refused_by_tensor(tmp_path, monkeypatch, dtype, value):
    monkeypatch.setattr(safetensors, "_PIECE", 64)
    largest = ml_dtypes.finfo(dtype).max
    values = np.linspace(-1, 1, 96).reshape(12, 8).astype(dtype)
    values[3, 3], values[4, 4] = largest, -largest  # the nearest of what is finite

    def write():
        entry = [("x", values.shape, np.dtype(dtype), lambda: values)]
        safetensors.write(tmp_path / "x.safetensors", entry)
        return safetensors.read_header(tmp_path / "x.safetensors")["x"]

    tensor, out = write(), np.empty((12, 8), dtype)
    safetensors.read_into(tensor, "x", out)
    np.testing.assert_array_equal(out, values)
    values[10, 5] = value
    tensor = write()
    for out in (np.empty((12, 8), dtype), np.empty((12, 8), np.float64)):
        with pytest.raises(UserError, match=rf"x\.safetensors: tensor x holds {value} at \["):
            safetensors.read_into(tensor, "x", out)


def test_import_refuses_what_its_dtype_cannot_hold(tmp_path):
    config, params = random_model("llama")
    params["model"]["norm"]["weight"] = params["model"]["norm"]["weight"].at[3].set(70_000.0)
    save_hf(tmp_path / "m", config, params)
    load_hf(tmp_path / "m", dtype="bfloat16")
    with pytest.raises(
        UserError, match=r"tensor model\.norm\.weight holds 70000 at \[3\], beyond the range of float16"
    ):
        load_hf(tmp_path / "m", dtype="float16")


@pytest.mark.parametrize(
    ("dtype", "value", "words"),
    [
        ("float16", 70_000.0, "70000 at .*beyond the range of float16"),
        ("float16", -1e30, "-1e.30 at .*beyond the range of float16"),
        ("bfloat16", 3.4e38, "3.4e.38 at .*beyond the range of bfloat16"),
        ("bfloat16", np.nan, "nan at"),
        (None, np.inf, "inf at"),
        (None, np.nan, "nan at"),
    ],
)
def test_no_infinity_and_no_nan_is_exported(tmp_path, dtype, value, words):
    config, params = random_model("llama")
    weight = params["model"]["layers"]["mlp"]["up_proj"]["weight"]
    params["model"]["layers"]["mlp"]["up_proj"]["weight"] = weight.at[1, 2, 3].set(value)
    with pytest.raises(UserError, match=rf"tensor model\.layers\.1\.mlp\.up_proj\.weight holds {words}"):
        save_hf(tmp_path / "m", config, params, dtype=dtype)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------ from strangers


def header_of(data: bytes) -> tuple[dict, bytes]:
    """The header of a safetensors file, and what follows it."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(header: bytes, rest: bytes, length: int | None = None) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header + rest


def changed(**fields):
    """A file whose first tensor has other fields in the header."""

    def change(data: bytes) -> bytes:
        header, rest = header_of(data)
        name = next(one for one in header if one != "__metadata__")
        header[name] |= fields
        return with_header(json.dumps(header).encode(), rest)

    return change


def twice(data: bytes) -> bytes:
    """A name that stands there twice, with the same span: JSON alone would take the last."""
    header, rest = header_of(data)
    name = next(one for one in header if one != "__metadata__")
    text = json.dumps(header)
    return with_header((text[:-1] + f", {json.dumps(name)}: {json.dumps(header[name])}}}").encode(), rest)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda data: with_header(b"", b"", 2**63), "not a safetensors file"),
        (lambda data: with_header(b"{}", b"", 99_999_999), "cut short within its header"),
        (lambda data: with_header(b"[" * 100_000, b""), "header cannot be read"),
        (lambda data: with_header(b"[]", b""), "header cannot be read"),
        (lambda data: with_header(b'{"x": 1}', b""), "header cannot be read"),
        (changed(dtype="F33"), "dtype F33"),
        (changed(dtype=["F32"]), r"dtype \['F32'\]"),
        (changed(dtype="I8"), "dtype I8"),
        (changed(shape=[-1, -3104]), "no sizes"),
        (changed(shape=[97.0, 32]), "no sizes"),
        (changed(shape=[True, 3104]), "no sizes"),
        (changed(shape=[10**30]), "no sizes"),
        (changed(shape=[2**62, 2**62]), "size of its shape"),
        (changed(shape=3104), "list of sizes is none"),
        (changed(data_offsets=[0, 10**12]), "overlap|cut short|size of its shape"),
        (changed(data_offsets=[-4, 12412]), "no sizes"),
        (changed(data_offsets=[0, float("inf")]), "no sizes"),
        (changed(data_offsets=[0, 1, 2]), "list of sizes is none"),
        (twice, "stands there twice"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path, whole, content, message):
    for file, data in whole.items():
        (tmp_path / file).write_bytes(data)
    (tmp_path / SHARD).write_bytes(content(whole[SHARD]))
    with pytest.raises(UserError, match=message) as error:
        load_hf(tmp_path)
    assert SHARD in str(error.value) and len(str(error.value)) < 600


@pytest.mark.parametrize(
    "shard", ["../outside.safetensors", "/{}/outside.safetensors", "..", ".", "", "a/b", "a\0b", "\ud800", "x" * 5000]
)
def test_an_index_does_not_lead_out_of_its_folder(tmp_path, whole, shard):
    (tmp_path / "m").mkdir()
    for file, data in whole.items():
        (tmp_path / "m" / file).write_bytes(data)
    (tmp_path / "outside.safetensors").write_bytes(whole[SHARD])
    index = tmp_path / "m" / "model.safetensors.index.json"
    found = json.loads(index.read_text())
    name = next(one for one, file in found["weight_map"].items() if file == SHARD)
    found["weight_map"][name] = shard.replace("{}", str(tmp_path))
    index.write_text(json.dumps(found))
    with pytest.raises(UserError, match=r"index\.json lists .* no such file"):
        load_hf(tmp_path / "m")


@pytest.mark.parametrize("value", [[], {}, "x", 3, {"weight_map": []}, {"weight_map": {"x": 3}}])
def test_an_index_of_another_kind_is_refused(tmp_path, whole, value):
    for file, data in whole.items():
        (tmp_path / file).write_bytes(data)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(value))
    with pytest.raises(UserError, match=r"index\.json is not a safetensors index"):
        load_hf(tmp_path)


def test_links_out_of_the_folder_are_followed(tmp_path, whole):
    """The cache of the hub is made of them."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    for number, (file, data) in enumerate(whole.items()):
        (tmp_path / "blobs" / str(number)).write_bytes(data)
        (tmp_path / "snapshot" / file).symlink_to(f"../blobs/{number}")
    load_hf(tmp_path / "snapshot")
    (tmp_path / "snapshot" / SHARD).unlink()
    (tmp_path / "snapshot" / SHARD).symlink_to(SHARD)  # in a circle
    with pytest.raises(UserError, match="no such file"):
        load_hf(tmp_path / "snapshot")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", SHARD, "generation_config.json"])
def test_a_folder_in_the_place_of_a_file_is_refused(tmp_path, whole, name):
    for file, data in whole.items():
        (tmp_path / file).write_bytes(data)
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=name):
        load_hf(tmp_path)


@pytest.mark.parametrize(
    "fields",
    [
        {"num_hidden_layers": 10**12},
        {"num_hidden_layers": 10_000},
        {"hidden_size": 10**12, "head_dim": 8},
        {"vocab_size": 10**12},
        {"vocab_size": 2**31 - 1},
        {"intermediate_size": 10**30},
        {"num_attention_heads": 10**12},
        {"max_position_embeddings": 10**30},
        {"rope_theta": 10**400},
        {"rms_norm_eps": 10**400},
        {"eos_token_id": 10**30},
    ],
)
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_absurd_sizes_are_refused_before_anything_of_that_size_is_made(tmp_path, family, fields):
    config, params = random_model(family)
    save_hf(tmp_path / "m", config, params)
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    tracemalloc.start()
    try:
        with pytest.raises(UserError) as error:
            load_hf(tmp_path / "m")
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()
    assert str(tmp_path / "m") in str(error.value)


def test_experts_without_number_are_refused(tmp_path):
    config, params = random_model("mixtral")
    save_hf(tmp_path / "m", config, params)
    path = tmp_path / "m" / "config.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "num_hidden_layers": 10_000, "num_local_experts": 10_000})
    )
    with pytest.raises(UserError, match="implies 100000000 at least"):
        load_hf(tmp_path / "m")
