"""Writing Hugging Face model folders that transformers 4 and 5 open, each read back before it takes its place."""

from __future__ import annotations

import dataclasses
import math
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from ctpd_jax.artifacts import local_path, read_json, read_object, refuse_impostor, replacing_folder, write_json
from ctpd_jax.errors import UserError
from ctpd_jax.models.config import DecoderConfig
from ctpd_jax.models.decoder import Params, leaves
from ctpd_jax.models.hf import load, safetensors
from ctpd_jax.models.hf.config import ADAPTERS, read_config, to_hf, written_token_ids
from ctpd_jax.models.hf.safetensors import TensorToWrite

MAX_SHARD_BYTES = 5_000_000_000
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_TEMPLATE, _MORE_TEMPLATES = "chat_template.jinja", "additional_chat_templates"
_GENERATION, _TOKENIZER_CONFIG = "generation_config.json", "tokenizer_config.json"
# What a model folder consists of, older shards included, and what is replaced; a tokenizer only by another one.
_MODEL_FILES = re.compile(r"config\.json|generation_config\.json|model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")


def save_hf(
    directory: str | Path,
    config: DecoderConfig,
    params: Params,
    tokenizer: Any = None,
    dtype: str | None = None,
    *,
    chat_template: str | None = None,
    card: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a model folder that `transformers` opens; `load_hf` of it gives the same parameters, bit for bit.

    The folder is written beside its place, read back and compared with what was meant, and then renamed. The model of
    an earlier folder is replaced, whatever else lies there stays; a folder without a model that holds anything else is
    refused. What a killed save left is removed, or put back, by the next.

    Args:
        directory: where to.
        config: what the parameters belong to; no adapters.
        params: as from `load_hf`, on any number of devices of this process.
        tokenizer: a folder (or hub id) whose tokenizer files are copied byte for byte and whose other settings of
            generation are kept, or an object with `save_pretrained`; None leaves what lies in `directory`. Of
            tokenizer_config.json, what one of the two versions of transformers does not understand is written anew.
        dtype: "float32", "bfloat16" or "float16" of the weights; None keeps each parameter's own.
        chat_template: a template in Jinja; written where the tokenizer's own is another one. None keeps that.
        card: the text of README.md; None leaves the one that is there.
        max_shard_bytes: of the tensors in one file; a larger model becomes several files and an index.

    Raises:
        UserError: the folder is in use by something else, an unknown dtype, parameters that the config does not imply
            or that are not finite in `dtype`, a tokenizer folder without tokenizer files, or a folder that reads back
            otherwise than it was meant.
    """
    # 1. What is asked for can be done, and may be done there.
    if dtype is not None and dtype not in load.SAVE_DTYPES:
        raise UserError(f"dtype = {dtype!r} is not supported; use one of {', '.join(load.SAVE_DTYPES)}.")
    place = local_path(directory)
    if found := [name for name in ADAPTERS if (place / name).exists()]:
        raise UserError(f"{place} holds adapters ({found[0]}), which are put on the model beside them; choose another.")
    tokenizer_files = () if tokenizer is None else (*_TOKENIZER_FILES, _MORE_TEMPLATES)

    def ours(name: str) -> bool:
        return bool(_MODEL_FILES.fullmatch(name)) or name in tokenizer_files

    with replacing_folder(place, "config.json", "a model folder", ours) as beside:
        # 2. The small files.
        _check_params(config, params)
        tensors = _tensors(config, params, dtype)
        source = load.model_directory(tokenizer) if isinstance(tokenizer, str | Path) else None
        main_dtype = jnp.dtype(dtype or params["model"]["embed_tokens"]["weight"].dtype)
        _write_configs(beside, config, str(main_dtype), source or place)
        if source is not None:
            _copy_tokenizer(beside, source)
        elif tokenizer is not None:
            tokenizer.save_pretrained(beside)
        if tokenizer is not None:
            _suit_both_versions(beside)
        if chat_template is not None and chat_template != stored_template(beside):
            (beside / _TEMPLATE).write_bytes(chat_template.encode("utf-8"))
        if card is not None:
            (beside / "README.md").write_bytes(card.encode("utf-8", errors="replace"))
        # 3. The weights, and then all of it read back, before the folder takes its place.
        write_weights(beside, tensors, max_shard_bytes)
        _read_back(beside, config, tensors)


# ------------------------------------------------------------------------------------------------ weights


def _check_params(config: DecoderConfig, params: Params) -> None:
    """Raise UserError where the parameters are not those of a checkpoint of the config."""
    if config.lora is not None:
        raise UserError(
            "A model with adapters has no checkpoint of its own: merge them into the weights before the export."
        )
    if config.int8:
        raise UserError("A model that was rounded to int8 has no checkpoint of its own: load it as float32.")
    expected, found = load.checkpoint_shapes(config), dict(leaves(params))
    for path in sorted(expected.keys() ^ found.keys()):
        raise UserError(
            f"The parameters {'lack' if path in expected else 'hold'} {'.'.join(path)}, which the config "
            f"{'implies' if path in expected else 'does not imply'}."
        )
    for path, leaf in found.items():
        if leaf.shape != expected[path]:
            raise UserError(f"{'.'.join(path)} has shape {leaf.shape}, but the config implies {expected[path]}.")


def _tensors(config: DecoderConfig, params: Params, dtype: str | None) -> list[TensorToWrite]:
    """Return the checkpoint's tensors in the order of the table."""
    found = dict(leaves(params))
    # A stacked parameter is as many tensors as it has layers; none is fetched before it is written.
    tensors: list[TensorToWrite] = []
    for path, entry in load.tensor_table(config).items():
        kind = jnp.dtype(dtype or found[path].dtype)
        if kind not in safetensors.DTYPES.values():
            raise UserError(f"{'.'.join(path)} has dtype {kind}; give dtype, one of {', '.join(load.SAVE_DTYPES)}.")
        for name, place in load.tensor_names(config, entry).items():
            fetch = partial(_fetch, found[path], place, name, kind)
            tensors.append((name, found[path].shape[len(place) :], kind, fetch))
    return tensors


def _fetch(array: Any, place: tuple[int, ...], name: str, kind: np.dtype) -> np.ndarray:
    """Bring one tensor from its device, out of the stack that it lies in."""
    host = np.asarray(array[place] if place else array)
    return safetensors.converted(host, kind, f"Nothing was exported: tensor {name}")


def write_weights(directory: Path, tensors: list[TensorToWrite], max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write model.safetensors, or, where that would be larger than `max_shard_bytes`, shards and their index.

    A shard has at most that size, but at least one tensor.
    """
    # 1. Which tensors go into which file.
    shards: list[list[TensorToWrite]] = [[]]
    total = filled = 0
    for tensor in tensors:
        size = math.prod(tensor[1]) * tensor[2].itemsize
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled, total = filled + size, total + size
    if len(shards) == 1:
        safetensors.write(directory / load.WEIGHTS, shards[0])
        return
    # 2. Each file, and the index last: without it nobody looks for shards.
    stem, suffix = load.WEIGHTS.split(".")
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"{stem}-{number:05d}-of-{len(shards):05d}.{suffix}"
        safetensors.write(directory / file, shard)
        weight_map |= {name: file for name, *_ in shard}
    write_json(directory / load.INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _read_back(directory: Path, config: DecoderConfig, tensors: list[TensorToWrite]) -> None:
    """Hold the written folder against what was meant: the config, and every byte of every tensor."""
    try:
        # The config, field by field, then as many tensors as were meant, then every byte of them.
        found = read_config(directory)
        for field in dataclasses.fields(config):
            meant, there = getattr(config, field.name), getattr(found, field.name)
            if meant != there:
                raise UserError(f"{field.name} is {there!r} in config.json and was meant to be {meant!r}")
        stored = load.check_weights(directory, config)
        if len(stored) != len(tensors):
            raise UserError("tensors were written that were not meant")
        for name, _, kind, fetch in tensors:
            if not safetensors.holds(stored[name], name, np.asarray(fetch(), kind)):
                raise UserError(f"tensor {name} is not what was meant")
    except UserError as error:
        raise UserError(f"The export does not read back as it was written ({error}); nothing was exported.") from error


# ------------------------------------------------------------------------------------------------ what stands beside


def _write_configs(directory: Path, config: DecoderConfig, dtype: str, source: Path) -> None:
    """Write config.json, and generation_config.json: the source's, with the token ids of this model."""
    write_json(directory / "config.json", to_hf(config, dtype))
    kept = read_object(source / _GENERATION) or {}
    # Keys with an underscore are notes of transformers to itself: the file was derived from the source's config.json.
    generation = {key: value for key, value in kept.items() if not key.startswith("_")} | written_token_ids(config)
    write_json(directory / _GENERATION, {key: value for key, value in generation.items() if value is not None})


def _copy_tokenizer(directory: Path, source: Path) -> None:
    found = [source / name for name in _TOKENIZER_FILES if (source / name).exists()]
    if not found:
        raise UserError(f"There are no tokenizer files in {source}.")
    for file in found:
        with open(file, "rb") as stream:
            refuse_impostor(file, stream.read(64))
        shutil.copyfile(file, directory / file.name)
    for file in sorted((source / _MORE_TEMPLATES).glob("*.jinja")):
        (directory / _MORE_TEMPLATES).mkdir(exist_ok=True)
        shutil.copyfile(file, directory / _MORE_TEMPLATES / file.name)


def _suit_both_versions(directory: Path) -> None:
    """Mend tokenizer_config.json so that AutoTokenizer of transformers 4 and 5 takes tokenizer.json as it is."""
    path = directory / _TOKENIZER_CONFIG
    stored, core = read_object(path), read_object(directory / "tokenizer.json")
    # Code is not exported, so that nothing may ask for it.
    settings = {name: value for name, value in (stored or {}).items() if name != "auto_map"}
    if core is not None:
        # Version 4 does not know version 5's class, and version 5 builds some classes anew, with a split of its own.
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        # Nor does version 4 know version 5's list of further special tokens.
        if isinstance(more := settings.get("extra_special_tokens"), list):
            del settings["extra_special_tokens"]
            known = settings.get("additional_special_tokens") or []
            settings["additional_special_tokens"] = [*known, *(token for token in more if token not in known)]
        # Version 4 writes this setting, or false, over what stands in tokenizer.json.
        prefix = (core.get("pre_tokenizer") or {}).get("add_prefix_space", settings.get("add_prefix_space", False))
        if prefix != settings.get("add_prefix_space", False):
            settings["add_prefix_space"] = prefix
    if settings != (stored or {}):
        write_json(path, settings)


def stored_template(directory: Path) -> str | None:
    """Return the chat template that AutoTokenizer finds in a folder (chat_template.json is for processors), or None."""
    if (directory / _TEMPLATE).exists():
        return (directory / _TEMPLATE).read_bytes().decode("utf-8")
    content = read_json(directory / _TOKENIZER_CONFIG, "mend it, or fetch the model again")
    template = content.get("chat_template") if isinstance(content, dict) else None
    if isinstance(template, list):  # several, by name
        named = [part for part in template if isinstance(part, dict) and part.get("name") == "default"]
        template = named[0].get("template") if named else None
    return template if isinstance(template, str) else None
