"""Exports: shards and their index, what stands beside the weights, and the self-check before anything is replaced."""

from __future__ import annotations

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from helpers.tiny import random_model
from safetensors.numpy import load_file

from ctpd_jax.errors import UserError
from ctpd_jax.models.hf import load, load_hf, safetensors, save_hf
from ctpd_jax.models.hf.config import read_config

LIMIT = 20_000  # bytes of a shard: the tiny Llama has 97 x 32 embeddings, 12,416 bytes, and smaller tensors


def _same(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    jax.tree.map(np.testing.assert_array_equal, first, second)


def _index(folder):
    return json.loads((folder / "model.safetensors.index.json").read_text())


# ------------------------------------------------------------------------------------------------ shards


def test_a_sharded_export_is_read_back_bit_for_bit(tmp_path):
    config, params = random_model("llama")
    save_hf(tmp_path / "one", config, params)
    save_hf(tmp_path / "many", config, params, max_shard_bytes=LIMIT)
    loaded_config, loaded = load_hf(tmp_path / "many")
    assert loaded_config == config
    _same(loaded, params)

    index, files = _index(tmp_path / "many"), sorted((tmp_path / "many").glob("*.safetensors"))
    count = len(files)
    assert count > 3 and [file.name for file in files] == [
        f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)
    ]
    whole = load_file(tmp_path / "one" / "model.safetensors")
    parts = {file.name: load_file(file) for file in files}
    assert {name: file for file, tensors in parts.items() for name in tensors} == index["weight_map"]
    assert index["weight_map"].keys() == whole.keys()
    sizes = [sum(tensor.nbytes for tensor in tensors.values()) for tensors in parts.values()]
    assert index["metadata"]["total_size"] == sum(sizes) == sum(tensor.nbytes for tensor in whole.values())
    assert max(sizes) <= LIMIT
    for file, name in ((file, name) for name, file in index["weight_map"].items()):
        assert parts[file][name].tobytes() == whole[name].tobytes()
    for file in files:
        length = int.from_bytes(file.read_bytes()[:8], "little")
        assert json.loads(file.read_bytes()[8 : 8 + length])["__metadata__"] == {"format": "pt"}


def test_a_tensor_larger_than_a_shard_has_one_of_its_own(tmp_path):
    config, params = random_model("llama")
    save_hf(tmp_path / "m", config, params, max_shard_bytes=1)
    weight_map = _index(tmp_path / "m")["weight_map"]
    assert len(set(weight_map.values())) == len(weight_map)
    _same(load_hf(tmp_path / "m")[1], params)


def test_what_fits_into_one_file_has_no_index(tmp_path):
    config, params = random_model("llama")
    size = 4 * sum(leaf.size for leaf in jax.tree.leaves(params))
    save_hf(tmp_path / "m", config, params, max_shard_bytes=size)
    assert sorted(file.name for file in (tmp_path / "m").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    save_hf(tmp_path / "m", config, params, max_shard_bytes=size - 1)  # and the single file does not stay
    assert len(list((tmp_path / "m").glob("*.safetensors"))) == 2 and (tmp_path / "m" / load.INDEX).exists()


# ------------------------------------------------------------------------------------------------ self-check


@pytest.mark.parametrize("sharded", [False, True])
def test_one_wrong_byte_on_the_disk_is_noticed(tmp_path, monkeypatch, sharded):
    """The writer puts a single flipped bit into the middle of the last file."""
    config, params = random_model("llama")
    save_hf(tmp_path / "m", config, params)
    earlier = (tmp_path / "m" / "model.safetensors").read_bytes()
    real, written = safetensors.write, []

    def faulty(file, tensors):
        real(file, tensors)
        written.append(file)
        if not sharded or len(written) == 4:
            data = bytearray(file.read_bytes())
            data[-1000] ^= 1
            file.write_bytes(data)

    monkeypatch.setattr(safetensors, "write", faulty)
    with pytest.raises(UserError, match=r"not read back .*tensor .*is not what was meant"):
        save_hf(tmp_path / "m", config, params, max_shard_bytes=LIMIT if sharded else 10**9)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == earlier


def test_tensors_that_changed_places_are_noticed(tmp_path, monkeypatch):
    config, params = random_model("llama")
    real = safetensors.write

    def faulty(file, tensors):
        keys, values = "model.layers.0.self_attn.k_proj.weight", "model.layers.1.self_attn.v_proj.weight"
        fetch, swap = {name: fetch for name, *_, fetch in tensors}, {keys: values, values: keys}
        real(file, [(name, *what, fetch[swap.get(name, name)]) for name, *what, _ in tensors])

    monkeypatch.setattr(safetensors, "write", faulty)
    with pytest.raises(UserError, match=r"tensor model\.layers\.\d\.self_attn\.\w_proj\.weight is not what was meant"):
        save_hf(tmp_path / "m", config, params)
    assert not list(tmp_path.iterdir())


def test_a_shard_that_is_gone_is_noticed(tmp_path, monkeypatch):
    config, params = random_model("llama")
    real = safetensors.write

    def forgetful(file, tensors):
        if "00002" not in file.name:
            real(file, tensors)

    monkeypatch.setattr(safetensors, "write", forgetful)
    with pytest.raises(UserError, match=r"not read back .*model-00002-of"):
        save_hf(tmp_path / "m", config, params, max_shard_bytes=LIMIT)
    assert not list(tmp_path.iterdir())


def test_a_config_that_cannot_be_written_is_noticed(tmp_path):
    """Llama's config.json has no place for a factor of the embeddings."""
    config, params = random_model("llama")
    with pytest.raises(UserError, match=r"embed_scale is 1\.0 in config\.json and was meant to be 2\.0"):
        save_hf(tmp_path / "m", replace(config, embed_scale=2.0), params)
    assert not list(tmp_path.iterdir())


def test_parameters_that_the_config_does_not_imply_are_refused(tmp_path):
    config, params = random_model("llama")
    attention = params["model"]["layers"]["self_attn"]
    adapted = {**attention["q_proj"], "lora_a": np.zeros((3, 4, 32), np.float32)}
    layers = {**params["model"]["layers"], "self_attn": {**attention, "q_proj": adapted}}
    with pytest.raises(UserError, match=r"hold model\.layers\.self_attn\.q_proj\.lora_a"):
        save_hf(tmp_path / "m", config, {**params, "model": {**params["model"], "layers": layers}})
    with pytest.raises(UserError, match=r"lm_head\.weight has shape \(96, 32\)"):
        save_hf(tmp_path / "m", config, {**params, "lm_head": {"weight": np.zeros((96, 32), np.float32)}})
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------ beside the weights


@pytest.fixture
def source(tmp_path):
    """A folder with a tokenizer and settings of generation."""
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes(b'{"odd":   "spacing"}\r\n')
    (folder / "tokenizer.model").write_bytes(bytes(range(256)))
    (folder / "chat_template.jinja").write_bytes(b"{{ x }}\r\n")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (folder / "unrelated.bin").write_text("no")
    (folder / "generation_config.json").write_text(
        json.dumps({"_from_model_config": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": 2, "pad_token_id": 3})
    )
    return folder


def test_tokenizer_files_are_copied_byte_for_byte(tmp_path, source):
    config, params = random_model("llama")
    save_hf(tmp_path / "m", config, params, tokenizer=source)
    copied = ("tokenizer.json", "tokenizer.model", "chat_template.jinja", "additional_chat_templates/tools.jinja")
    for name in copied:
        assert (tmp_path / "m" / name).read_bytes() == (source / name).read_bytes()
    assert not (tmp_path / "m" / "unrelated.bin").exists()

    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no tokenizer files"):
        save_hf(tmp_path / "other", config, params, tokenizer=tmp_path / "empty")

    class Tokenizer:
        def save_pretrained(self, folder):
            (folder / "tokenizer.json").write_text("{}")

    save_hf(tmp_path / "m", config, params, tokenizer=Tokenizer())
    assert (tmp_path / "m" / "tokenizer.json").read_text() == "{}"


def test_other_settings_of_generation_are_kept_and_every_end_is_told(tmp_path, source):
    config, params = random_model("llama")
    config = replace(config, eos_ids=(2, 5, 7))
    save_hf(tmp_path / "m", config, params, tokenizer=source)
    for file in ("generation_config.json", "config.json"):
        assert json.loads((tmp_path / "m" / file).read_text())["eos_token_id"] == [2, 5, 7]
    assert json.loads((tmp_path / "m" / "generation_config.json").read_text()) == {
        "temperature": 0.6,
        "top_p": 0.9,
        "bos_token_id": 1,
        "eos_token_id": [2, 5, 7],
    }  # this model has no padding id, whatever the source had
    assert read_config(tmp_path / "m") == config

    (source / "generation_config.json").write_text("[]")
    with pytest.raises(UserError, match=r"generation_config\.json must hold a JSON object"):
        save_hf(tmp_path / "m", config, params, tokenizer=source)


def test_another_chat_template_takes_the_place_of_the_tokenizers(tmp_path, source):
    config, params = random_model("llama")
    target = tmp_path / "m" / "chat_template.jinja"
    save_hf(tmp_path / "m", config, params, tokenizer=source, chat_template="{{ other }}")
    assert target.read_bytes() == b"{{ other }}"
    save_hf(tmp_path / "m", config, params, tokenizer=source, chat_template="{{ x }}\r\n")
    assert target.read_bytes() == b"{{ x }}\r\n"


@pytest.mark.parametrize("stored", ["{{ y }}", [{"name": "default", "template": "{{ y }}"}]])
def test_a_template_in_the_tokenizers_settings_is_not_written_twice(tmp_path, source, stored):
    config, params = random_model("llama")
    (source / "chat_template.jinja").unlink()
    (source / "tokenizer_config.json").write_text(json.dumps({"chat_template": stored}))
    save_hf(tmp_path / "m", config, params, tokenizer=source, chat_template="{{ y }}")
    assert not (tmp_path / "m" / "chat_template.jinja").exists()
    save_hf(tmp_path / "m", config, params, tokenizer=source, chat_template="{{ z }}")
    assert (tmp_path / "m" / "chat_template.jinja").read_bytes() == b"{{ z }}"


def test_a_template_that_only_processors_read_is_written_for_the_tokenizer(tmp_path, source):
    config, params = random_model("llama")
    (source / "chat_template.jinja").unlink()
    (source / "tokenizer_config.json").write_text("{}")
    (source / "chat_template.json").write_text(json.dumps({"chat_template": "{{ y }}"}))
    save_hf(tmp_path / "m", config, params, tokenizer=source, chat_template="{{ y }}")
    assert (tmp_path / "m" / "chat_template.jinja").read_bytes() == b"{{ y }}"


def test_a_card_becomes_the_readme(tmp_path):
    config, params = random_model("llama")
    save_hf(tmp_path / "m", config, params, card="# Größe\n")
    assert (tmp_path / "m" / "README.md").read_bytes() == "# Größe\n".encode()
    save_hf(tmp_path / "m", config, params)
    assert (tmp_path / "m" / "README.md").exists()  # notes of its owner's, as far as anybody can tell
