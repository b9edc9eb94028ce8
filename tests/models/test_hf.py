"""Model folders: round trips to the bit, shards, dtypes, and refusals that say which tensor or file."""

from __future__ import annotations

import json
import os
from fnmatch import fnmatch
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers.tiny import HF_CONFIGS, random_model
from safetensors.numpy import load_file, save_file

from ctpd_jax.errors import UserError
from ctpd_jax.models.decoder import apply
from ctpd_jax.models.hf import load_hf, model_directory, safetensors, save_hf


def _same(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second)):
        assert a.dtype == b.dtype and np.array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


def _write(file, tensors):
    entries = [(name, array.shape, array.dtype, lambda array=array: array) for name, array in tensors.items()]
    safetensors.write(file, entries)


def _tensors(folder):
    header = safetensors.read_header(folder / "model.safetensors")
    out = {}
    for name, tensor in header.items():
        out[name] = np.empty(tensor.shape, safetensors.DTYPES[tensor.code])
        safetensors.read_into(tensor, name, out[name])
    return out


@pytest.mark.parametrize("name", sorted(HF_CONFIGS))
def test_round_trip_is_bit_identical(name, tmp_path):
    config, params = random_model(name)
    save_hf(tmp_path / "model", config, params)
    loaded_config, loaded = load_hf(tmp_path / "model")
    assert loaded_config == config
    _same(params, loaded)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]  # nothing is left beside it


def test_the_official_reader_sees_the_names_and_values(tmp_path):
    config, params = random_model("llama")
    save_hf(tmp_path / "m", config, params)
    official = load_file(tmp_path / "m" / "model.safetensors")
    layers = params["model"]["layers"]
    assert len(official) == 3 * 9 + 3
    np.testing.assert_array_equal(
        official["model.layers.2.mlp.down_proj.weight"], layers["mlp"]["down_proj"]["weight"][2]
    )
    np.testing.assert_array_equal(official["lm_head.weight"], params["lm_head"]["weight"])
    with open(tmp_path / "m" / "model.safetensors", "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        assert json.loads(stream.read(length))["__metadata__"] == {"format": "pt"} and length % 8 == 0


def test_bfloat16_is_read_and_written_exactly(tmp_path):
    config, params = random_model("gemma3")
    save_hf(tmp_path / "m", config, params, dtype="bfloat16")
    assert json.loads((tmp_path / "m" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    _same(load_hf(tmp_path / "m", dtype="bfloat16")[1], rounded)
    wide = load_hf(tmp_path / "m")[1]
    _same(wide, jax.tree.map(lambda x: x.astype(jnp.float32), rounded))
    save_hf(tmp_path / "again", config, wide, dtype="bfloat16")
    first, second = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("m", "again"))
    assert first == second


@pytest.mark.parametrize("code", ["F64", "F16"])
def test_other_float_dtypes_convert(code, tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors, "_PIECE", 24)  # so that a tensor takes several pieces
    values = np.random.default_rng(0).normal(size=(5, 7)).astype(safetensors.DTYPES[code])
    _write(tmp_path / "x.safetensors", {"x": values})
    out = np.empty((5, 7), np.float32)
    safetensors.read_into(safetensors.read_header(tmp_path / "x.safetensors")["x"], "x", out)
    np.testing.assert_array_equal(out, values.astype(np.float32))


@pytest.mark.parametrize("prefixes", [("language_model.", ""), ("", "model.language_model.")])
def test_the_text_model_of_a_vision_language_model(tmp_path, prefixes):
    """Beside the tower, or within "model"; of the tower nothing is read, whatever it holds."""
    config, params = random_model("gemma3")
    save_hf(tmp_path / "text", config, params)
    outer, inner = prefixes
    named = {}
    for name, array in load_file(tmp_path / "text" / "model.safetensors").items():
        named[f"{outer}{inner + name.removeprefix('model.') if inner else name}"] = array
    named["vision_tower.embeddings.weight"] = np.ones((3, 2), np.float32)
    named["multi_modal_projector.mm_input_projection_weight"] = np.ones(2, np.float32)
    folder = tmp_path / "eyes"
    folder.mkdir()
    save_file(named, folder / "model.safetensors")
    raw = json.loads((tmp_path / "text" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": raw, "vision_config": {}}))
    read, same = load_hf(folder)
    assert read == config
    _same(same, params)
    # Under both versions' names at once nobody knows which of them counts, and a head that stands twice is no better.
    norm = next(array for name, array in named.items() if name.endswith("l.norm.weight"))
    twice = {"language_model.model.norm.weight": norm, "model.language_model.norm.weight": norm}
    head = dict.fromkeys(("lm_head.weight", "language_model.lm_head.weight"), np.ones((3, 2), np.float32))
    for more in (twice, head):
        save_file(named | more, folder / "model.safetensors")
        with pytest.raises(UserError, match="of the text model under another name too"):
            load_hf(folder)
    del named[next(name for name in named if "layers" in name)]
    save_file(named, folder / "model.safetensors")
    with pytest.raises(UserError, match="lacks tensors"):
        load_hf(folder)


def test_shards_are_read_through_their_index(tmp_path):
    config, params = random_model("gemma3")
    folder = tmp_path / "m"
    save_hf(folder, config, params)
    tensors = _tensors(folder)
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {name: f"model-{i % 3 + 1:05d}-of-00003.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        _write(folder / file, {name: tensors[name] for name in names if files[name] == file})
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": files}))
    _same(load_hf(folder)[1], params)

    (folder / "model-00002-of-00003.safetensors").rename(folder / "elsewhere")
    with pytest.raises(UserError, match="model-00002-of-00003"):
        load_hf(folder)
    index.write_text(json.dumps({"weight_map": {"x": "../outside.safetensors"}}))
    with pytest.raises(UserError, match="outside"):
        load_hf(folder)


def test_missing_unexpected_and_misshapen_tensors_are_named(tmp_path):
    config, params = random_model("llama")
    folder = tmp_path / "m"
    save_hf(folder, config, params)
    file, good = folder / "model.safetensors", _tensors(folder)

    _write(file, {k: v for k, v in good.items() if k != "model.layers.1.mlp.up_proj.weight"})
    with pytest.raises(UserError, match=r"lacks.*model\.layers\.1\.mlp\.up_proj\.weight"):
        load_hf(folder)
    _write(file, {**good, "model.layers.0.mlp.experts.0.weight": np.zeros(3, np.float32)})
    with pytest.raises(UserError, match=r"not imply.*experts\.0\.weight"):
        load_hf(folder)
    _write(file, {**good, "model.norm.weight": np.zeros(31, np.float32)})
    with pytest.raises(UserError, match=r"model\.norm\.weight has shape \(31,\).*\(32,\)"):
        load_hf(folder)
    _write(file, {**good, "model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(4, np.float32)})
    _same(load_hf(folder)[1], params)  # old checkpoints store what the config determines


def test_a_tied_model_may_store_its_head_only_if_it_is_the_embedding(tmp_path):
    config, params = random_model("llama_llama3_tied")
    folder = tmp_path / "m"
    save_hf(folder, config, params)
    good = _tensors(folder)
    assert "lm_head.weight" not in good
    _write(folder / "model.safetensors", {**good, "lm_head.weight": good["model.embed_tokens.weight"]})
    _same(load_hf(folder)[1], params)
    _write(folder / "model.safetensors", {**good, "lm_head.weight": good["model.embed_tokens.weight"] + 1})
    with pytest.raises(UserError, match="tie_word_embeddings"):
        load_hf(folder)


def test_broken_files_are_refused(tmp_path):
    config, params = random_model("llama")
    folder = tmp_path / "m"
    save_hf(folder, config, params)
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    with pytest.raises(UserError, match="cut short"):
        load_hf(folder)
    file.write_bytes(b"not found")
    with pytest.raises(UserError, match=r"(no|not a) safetensors file"):
        load_hf(folder)
    header = json.dumps({"x": {"dtype": "I8", "shape": [2], "data_offsets": [0, 2]}}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + b"ab")
    tensor = safetensors.read_header(file)["x"]
    with pytest.raises(UserError, match="x has dtype I8"):
        safetensors.read_into(tensor, "x", np.empty(2, np.float32))


def test_folders_without_a_model_are_refused(tmp_path):
    with pytest.raises(UserError, match="not a folder"):
        load_hf(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no config\.json"):
        load_hf(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(HF_CONFIGS["llama"]))
    with pytest.raises(UserError, match=r"neither model\.safetensors nor"):
        load_hf(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(UserError, match="only safetensors are read"):
        load_hf(tmp_path)
    with pytest.raises(UserError, match="int4"):
        load_hf(tmp_path, dtype="int4")


def test_an_unreachable_hub_is_one_sentence(monkeypatch):
    import huggingface_hub

    def unreachable(*args, **kwargs):
        raise ConnectionError("Name or service not known\nlong trace")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(UserError, match=r"owner/name.*hub \(ConnectionError: Name or service not known\)"):
        load_hf("owner/name")


def test_a_hub_name_loads_the_downloaded_snapshot(monkeypatch, tmp_path):
    import huggingface_hub

    config, params = random_model("llama")
    save_hf(tmp_path / "snapshot", config, params)
    asked = {}

    def download(name, allow_patterns):
        asked.update(name=name, patterns=allow_patterns)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    _same(load_hf("owner/some-model")[1], params)
    assert asked["name"] == "owner/some-model"

    def fetched(file):
        return any(fnmatch(file, pattern) for pattern in asked["patterns"])

    wanted = (
        *("config.json", "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json"),
        *("tokenizer.json", "tokenizer.model", "merges.txt", "chat_template.jinja", "generation_config.json"),
    )
    unwanted = ("pytorch_model.bin", "modeling_own.py", "consolidated.safetensors", "original/consolidated.00.pth")
    assert all(map(fetched, wanted)) and not any(map(fetched, unwanted))
    model_directory("owner/some-model", weights=False)  # of a teacher that is elsewhere
    assert fetched("tokenizer.json") and fetched("config.json") and not fetched("model-00001-of-00002.safetensors")


def test_saving_replaces_a_model_and_nothing_else(tmp_path):
    config, params = random_model("llama")
    target = tmp_path / "deep" / "m"
    save_hf(target, config, params, max_shard_bytes=20_000)
    kept = ("notes.txt", "README.md", "tokenizer.json", "chat_template.jinja", "runs/1/log.txt", "empty/.keep")
    for name in kept:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_text(name)
    (target / "link").symlink_to("notes.txt")
    (target / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "eos_token_id": 2}))
    other, other_params = random_model("gemma3")
    save_hf(target, other, other_params)
    assert load_hf(target)[0] == other
    assert (
        all((target / name).read_text() == name for name in kept) and (target / "link").readlink().name == "notes.txt"
    )
    assert [path.name for path in target.glob("model*")] == ["model.safetensors"]  # no shards of the earlier model
    assert json.loads((target / "generation_config.json").read_text())["temperature"] == 0.6
    assert [path.name for path in target.parent.iterdir()] == ["m"]

    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="not a model folder"):
        save_hf(tmp_path / "notes", config, params)
    assert (tmp_path / "notes" / "mine.txt").read_text() == "keep"


def test_another_tokenizer_replaces_all_of_the_earlier_one(tmp_path):
    config, params = random_model("llama")
    save_hf(tmp_path / "m", config, params)
    (tmp_path / "m" / "tokenizer.model").write_text("of the earlier one")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "tokenizer.json").write_text("{}")
    save_hf(tmp_path / "m", config, params, tokenizer=tmp_path / "new")
    assert (tmp_path / "m" / "tokenizer.json").exists() and not (tmp_path / "m" / "tokenizer.model").exists()


def test_a_save_that_is_killed_loses_no_strangers(tmp_path, monkeypatch):
    """Between the two renames, and where the file system has no hard links."""
    config, params = random_model("llama")
    save_hf(tmp_path / "m", config, params)
    (tmp_path / "m" / "notes.txt").write_text("keep")
    monkeypatch.setattr(os, "link", lambda *a, **k: (_ for _ in ()).throw(OSError("no links here")))
    real, calls = Path.rename, []

    def killed(self, target):
        calls.append(self)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        save_hf(tmp_path / "m", config, params)
    monkeypatch.setattr(Path, "rename", real)
    save_hf(tmp_path / "m", config, params)
    assert (tmp_path / "m" / "notes.txt").read_text() == "keep"
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_folder_that_is_made_anew_after_a_kill_gets_its_strangers_back(tmp_path):
    """As a launcher does that makes the folder before it starts the process again."""
    config, params = random_model("llama")
    save_hf(tmp_path / "m", config, params)
    (tmp_path / "m" / "notes.txt").write_text("keep")
    (tmp_path / "m").rename(tmp_path / ".m.old.partial")  # killed between the two renames
    (tmp_path / "m").mkdir()
    save_hf(tmp_path / "m", config, params)
    assert (tmp_path / "m" / "notes.txt").read_text() == "keep"


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    config, params = random_model("llama")
    save_hf(tmp_path / "real" / "m", config, params)
    (tmp_path / "m").symlink_to(tmp_path / "real" / "m")
    save_hf(tmp_path / "m", config, params)
    assert (tmp_path / "m").is_symlink() and load_hf(tmp_path / "real" / "m")[0] == config
    assert sorted(path.name for path in tmp_path.rglob("*m*") if path.is_dir()) == ["m", "m"]


def test_a_failed_save_leaves_the_earlier_model(tmp_path):
    config, params = random_model("llama")
    save_hf(tmp_path / "m", config, params)
    broken = {**params, "lm_head": {"weight": np.zeros((97, 32), ml_dtypes.float8_e4m3fn)}}
    with pytest.raises(UserError, match=r"lm_head\.weight has dtype float8_e4m3fn"):
        save_hf(tmp_path / "m", config, broken)
    _same(load_hf(tmp_path / "m")[1], params)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


def test_what_killed_saves_left_is_cleared_or_put_back(tmp_path):
    """kill -9 while writing leaves one folder beside; between the two renames, the new one and the earlier one."""
    config, params = random_model("llama")
    save_hf(tmp_path / "m", config, params)
    (tmp_path / ".m.partial").mkdir()
    (tmp_path / ".m.partial" / "model.safetensors").write_bytes(b"half")
    save_hf(tmp_path / "m", config, params)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]

    (tmp_path / "m").rename(tmp_path / ".m.old.partial")
    (tmp_path / ".m.partial").mkdir()
    with pytest.raises(UserError, match=r"lack lm_head\.weight"):
        save_hf(tmp_path / "m", config, {"model": {}})
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    _same(load_hf(tmp_path / "m")[1], params)


def test_a_rename_that_fails_leaves_the_earlier_model(tmp_path, monkeypatch):
    config, params = random_model("llama")
    save_hf(tmp_path / "m", config, params)
    real = Path.rename

    def failing(self, target):
        if self.name == ".m.partial":
            raise OSError("disk trouble")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="disk trouble"):
        save_hf(tmp_path / "m", *random_model("gemma3"))
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    _same(load_hf(tmp_path / "m")[1], params)


def test_an_address_is_no_place_for_an_export():
    with pytest.raises(UserError, match="not a folder of this machine"):
        save_hf("gs://bucket/m", *random_model("llama"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"index\.json is damaged .*fetch the model again"),
        ("[]", "must hold a JSON object with a weight_map"),
        ('{"weight_map": {"x": 1}}', "must hold a JSON object with a weight_map"),
    ],
)
def test_a_broken_index_is_named(tmp_path, content, message):
    config, params = random_model("llama")
    save_hf(tmp_path / "m", config, params)
    (tmp_path / "m" / "model.safetensors").unlink()
    (tmp_path / "m" / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UserError, match=message):
        load_hf(tmp_path / "m")


def test_a_loaded_model_computes_the_same(tmp_path):
    config, params = random_model("gemma3")
    save_hf(tmp_path / "m", config, params)
    tokens = np.arange(12)[None]
    np.testing.assert_array_equal(apply(*load_hf(tmp_path / "m"), tokens), apply(config, params, tokens))


def test_remote_code_is_neither_read_nor_exported(tmp_path):
    """`auto_map` names Python files of the repository: the field means nothing here."""
    config, params = random_model("llama")
    save_hf(tmp_path / "m", config, params)
    file = tmp_path / "m" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "auto_map": {"AutoModel": "modeling_own.Model"}}))
    (tmp_path / "m" / "modeling_own.py").write_text("raise SystemExit('this code ran')")
    loaded_config, loaded = load_hf(tmp_path / "m")
    _same(loaded, params)
    save_hf(tmp_path / "again", loaded_config, loaded)
    assert "auto_map" not in json.loads((tmp_path / "again" / "config.json").read_text())
    assert not (tmp_path / "again" / "modeling_own.py").exists()


def test_a_vocabulary_may_be_larger_than_its_tokenizer(tmp_path):
    """Padded vocabularies are the rule: every row of the embedding comes and goes, whatever the tokenizer knows."""
    config, params = random_model("llama")
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 1}}}))
    save_hf(tmp_path / "m", config, params, tokenizer=tmp_path / "tokenizer")
    loaded_config, loaded = load_hf(tmp_path / "m")
    assert loaded_config.vocab_size == 97
    _same(loaded, params)


@pytest.mark.parametrize(
    "index",
    [
        (slice(2, 9),),
        (slice(None), slice(3, 7)),
        (slice(5, 11), slice(0, 7)),
        (slice(10, 11), slice(6, 7)),
        (slice(4, 4),),
    ],
)
@pytest.mark.parametrize("out_dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("piece", [1, 64, 1 << 24])
def test_a_part_of_a_tensor_is_read(tmp_path, monkeypatch, index, out_dtype, piece):
    monkeypatch.setattr(safetensors, "_PIECE", piece)
    values = np.random.default_rng(0).normal(size=(11, 7)).astype(ml_dtypes.bfloat16)
    _write(tmp_path / "x.safetensors", {"before": np.ones(3, np.float32), "x": values})
    tensor = safetensors.read_header(tmp_path / "x.safetensors")["x"]
    expected = values[index].astype(out_dtype)
    out = np.full(expected.shape, -1, out_dtype)
    safetensors.read_into(tensor, "x", out, index)
    np.testing.assert_array_equal(out, expected)
    with pytest.raises(ValueError, match="does not fit"):
        safetensors.read_into(tensor, "x", np.empty((12, 7), out_dtype), index)


def test_only_the_rows_asked_for_are_read(tmp_path, monkeypatch):
    values = np.arange(60, dtype=np.float32).reshape(12, 5)
    _write(tmp_path / "x.safetensors", {"x": values})
    tensor = safetensors.read_header(tmp_path / "x.safetensors")["x"]
    read, real = [], safetensors.os.preadv

    def counting(fd, buffers, offset):
        read.append((offset - tensor.offset, sum(map(len, buffers))))
        return real(fd, buffers, offset)

    monkeypatch.setattr(safetensors.os, "preadv", counting)
    safetensors.read_into(tensor, "x", np.empty((3, 5), np.float32), (slice(4, 7),))
    assert read == [(4 * 20, 3 * 20)]
