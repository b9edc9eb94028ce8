"""Reading Hugging Face model folders: tensor by tensor straight into the shards that the devices hold.

The host never holds more than one device's shard of one (stacked) parameter besides what lies on devices.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ctpd_jax.artifacts import read_json
from ctpd_jax.buckets.objects import at_hand
from ctpd_jax.errors import UserError
from ctpd_jax.models.config import DecoderConfig
from ctpd_jax.models.decoder import Params, leaves, param_shapes
from ctpd_jax.models.hf import safetensors
from ctpd_jax.models.hf.config import read_config
from ctpd_jax.models.hf.families import FAMILIES

ParamPath = tuple[str, ...]  # the keys on the way to a parameter
# One sharding for every parameter, or a function of a parameter's path and shape; None: the default device.
Placement = jax.sharding.Sharding | Callable[[ParamPath, tuple[int, ...]], jax.sharding.Sharding] | None

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SAVE_DTYPES = ("float32", "bfloat16", "float16")
LOAD_DTYPES = (*SAVE_DTYPES, "int8")
# What is fetched from the hub. Other files, such as pickles, code and second copies of the weights, stay there.
_FETCHED = ("*.json", "model*.safetensors", "*.jinja", "tokenizer.model*", "spiece.model", "merges.txt", "vocab.txt")
# Buffers that old checkpoints stored, and that the config determines: rotary frequencies, causal masks.
_COMPUTED = re.compile(r"\.rotary_emb\.inv_freq$|\.attention\.(masked_)?bias$")
_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")
_ALIGNMENT = 64  # bytes: XLA's CPU backend takes an array so aligned as it is, without a copy


def load_hf(
    path_or_repo: str | Path, dtype: str = "float32", sharding: Placement = None
) -> tuple[DecoderConfig, Params]:
    """Load a model folder, or a model of the Hugging Face hub.

    Args:
        path_or_repo: a folder with config.json and model.safetensors (or its shards and their index), or a repository
            id "owner/name", which is downloaded into the hub's cache.
        dtype: "float32", "bfloat16" or "float16" of the parameters. bfloat16 and float16 weights widen exactly. "int8":
            the layers' matrices as `rounded` makes them, everything else bfloat16; the config has its `int8`.
        sharding: where the parameters go: None for the default device, a `jax.sharding.Sharding` for all of them, or a
            function (path in the tree, shape) -> Sharding. Each process reads only what its own devices hold.

    Returns:
        The config, and the parameters as a nested dict under Hugging Face's names, the layers stacked on axis 0. The
        vocabulary has as many rows as the checkpoint, which may be more than its tokenizer has tokens.

    Raises:
        UserError: no such folder or repository, no config.json, no safetensors, an unsupported architecture or field,
            a tensor that is missing, unexpected or of the wrong shape, a sharding that does not fit a parameter.
    """
    if dtype not in LOAD_DTYPES:
        raise UserError(f"dtype = {dtype!r} is not supported; use one of {', '.join(LOAD_DTYPES)}.")
    # 1. Everything is checked by the small files and the headers, before any weight is read.
    directory = model_directory(path_or_repo)
    config = held_as(read_config(directory), dtype)
    stored, shapes = check_weights(directory, config), checkpoint_shapes(config)
    held = dict(leaves(param_shapes(config, jnp.dtype("bfloat16" if config.int8 else dtype))))
    # 2. One parameter after the other, each on its devices before the next is read.
    params: Params = {}

    def placed(path: ParamPath, shape: tuple[int, ...]) -> jax.sharding.Sharding | None:
        return sharding(path, shape) if callable(sharding) else sharding

    for path, entry in tensor_table(config).items():
        parent = params
        for key in path[:-1]:
            parent = parent.setdefault(key, {})
        shape, dtype_held = shapes[path], held[path].dtype
        scales = np.full(shape[:-1], np.nan, np.float32) if dtype_held == jnp.int8 else None
        parent[path[-1]] = _read_array(stored, entry, shape, dtype_held, placed(path, shape), scales)
        if scales is not None:
            parent["scale"] = _placed_scales(entry, scales, placed((*path[:-1], "scale"), scales.shape))
    return config, params


def _placed_scales(entry: str, scales: np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array:
    # Left unfilled they would be zeros, and whole outputs of a layer with them.
    def part(index: Any) -> np.ndarray:
        if np.isnan(scales[index]).any():  # rows that this process has not read
            raise UserError(f"{entry}: the scales of its rows are to lie on other processes than the rows do.")
        return scales[index]

    return jnp.asarray(scales) if sharding is None else jax.make_array_from_callback(scales.shape, sharding, part)


def held_as(config: DecoderConfig, dtype: str) -> DecoderConfig:
    """Return the config of a model whose parameters are held as `dtype`, "int8" or a floating point."""
    return replace(config, int8=dtype == "int8")


def rounded(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Round matrices [..., out, in] to int8, with a scale for every output, float32 [..., out]: W is about q * scale.

    The largest entry of a row is 127 scales, and no entry is off by more than half a scale.
    """
    scale = np.abs(weight).max(axis=-1) / np.float32(127)
    scale = np.where(scale > np.float32(1e-40), scale, np.float32(0))  # below, the quotient would not be exact enough
    return np.rint(weight / np.where(scale == 0, np.float32(1), scale)[..., None]).astype(np.int8), scale


def model_directory(path_or_repo: str | Path, weights: bool = True) -> Path:
    """Return the local folder of a model: the path itself, or a hub repository, downloaded with or without weights."""
    path = at_hand(path_or_repo, weights)
    if path.is_dir():
        return path
    name = str(path_or_repo)
    if not _REPO_ID.fullmatch(name) or path.exists():
        raise UserError(f"{name} is not a folder, and not a Hugging Face repository id of the form owner/name either.")
    # Imported only here: a local folder needs no hub.
    from huggingface_hub import snapshot_download

    try:
        fetched = [pattern for pattern in _FETCHED if weights or not pattern.endswith(".safetensors")]
        return Path(snapshot_download(name, allow_patterns=fetched))
    except Exception as error:  # the hub client raises a dozen kinds, from HTTP to its own offline mode
        reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise UserError(
            f"{name} is no local folder, and could not be fetched from the Hugging Face hub "
            f"({type(error).__name__}: {reason}). Check the spelling, the network and, for a gated model, the login "
            f"(`hf auth login`)."
        ) from error


# ------------------------------------------------------------------------------------------------ names of tensors


@lru_cache
def tensor_table(config: DecoderConfig) -> dict[ParamPath, str]:
    """Map each parameter's path in the tree to its name in the checkpoint.

    A first "{}" in the name is the number of the layer, a second one that of the expert: such a parameter is the stack
    of all those tensors, [layers, ...] or [layers, experts, ...]. Adapters stand in no checkpoint.
    """
    return {path: checkpoint_name(config, path) for path in checkpoint_shapes(config)}


@lru_cache
def checkpoint_shapes(config: DecoderConfig) -> dict[ParamPath, tuple[int, ...]]:
    """Map the path of each parameter of a checkpoint to its shape, layers and experts stacked."""
    return {path: leaf.shape for path, leaf in leaves(param_shapes(replace(config, lora=None, int8=False)))}


def checkpoint_name(config: DecoderConfig, path: ParamPath) -> str:
    """Return what the family's checkpoints call a parameter, with "{}" as in `tensor_table`."""
    name = f".{'.'.join(path)}."
    for ours, theirs in FAMILIES[config.family].renamed.items():
        name = name.replace(f".{ours}.", f".{theirs}.")
    return name.replace(".layers.", ".layers.{}.").strip(".")


def tensor_names(config: DecoderConfig, entry: str) -> dict[str, tuple[int, ...]]:
    """Map the names of an entry's tensors to their places in its stack: (layer,), (layer, expert), or ()."""
    counts = (config.num_layers, config.experts)[: entry.count("{}")]
    return {entry.format(*place): place for place in product(*map(range, counts))}


# ------------------------------------------------------------------------------------------------ parameters


def _read_array(
    stored: dict[str, safetensors.Tensor],
    entry: str,
    shape: tuple[int, ...],
    dtype: np.dtype,
    sharding: jax.sharding.Sharding | None,
    scales: np.ndarray | None = None,
) -> jax.Array:
    """Read one parameter. Each part that devices hold is read once, and only then the next.

    With `scales` it becomes int8, and they are filled for the rows that this process's devices hold.
    """
    if sharding is None:
        whole = [range(size) for size in shape]
        return jax.block_until_ready(jax.device_put(_read_part(stored, entry, whole, dtype, scales)))
    # 1. Which devices hold the same part.
    try:
        indices = sharding.addressable_devices_indices_map(shape)
    except ValueError as error:
        raise UserError(f"{entry}, of shape {shape}, cannot be laid out as {sharding}: {error}") from error
    holders: dict[tuple[range, ...], list[jax.Device]] = {}
    for device, index in indices.items():
        parts = tuple(range(size)[part] for size, part in zip(shape, index or ()))
        holders.setdefault(parts, []).append(device)
    # 2. Part by part from the file onto them.
    arrays = []
    for parts, devices in holders.items():
        host = _read_part(stored, entry, parts, dtype, scales)
        arrays += jax.block_until_ready([jax.device_put(host, device) for device in devices])
        del host
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays, dtype=dtype)


def _read_part(
    stored: dict[str, safetensors.Tensor], entry: str, parts: Any, dtype: np.dtype, scales: np.ndarray | None
) -> np.ndarray:
    """Read the part of a parameter that `parts`, one range an axis, say, into an array that nothing else holds."""
    out, stacked = empty_aligned([len(part) for part in parts], dtype), entry.count("{}")
    index = tuple(slice(part.start, part.stop) for part in parts[stacked:])
    for place in product(*(range(len(part)) for part in parts[:stacked])):
        there = tuple(part[i] for part, i in zip(parts, place))
        name = entry.format(*there)
        if scales is None:
            safetensors.read_into(stored[name], name, out[place], index)
        else:  # a scale is that of a whole row, however it is cut
            rows = np.empty((len(parts[-2]), stored[name].shape[-1]), np.float32)
            safetensors.read_into(stored[name], name, rows, index[:-1])
            whole, scales[(*there, *index[:-1])] = rounded(rows)
            out[place] = whole[:, index[-1]]
    return out


def empty_aligned(shape: list[int], dtype: np.dtype) -> np.ndarray:
    """Return an uninitialized array so aligned that on the CPU it becomes the device's array and not a second copy."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


# ------------------------------------------------------------------------------------------------ checks


def check_weights(directory: Path, config: DecoderConfig) -> dict[str, safetensors.Tensor]:
    """Read only the headers of a folder's weights: every tensor by name, all there and of the right shape.

    Raises:
        UserError: a file or a tensor that is missing, unexpected or of the wrong shape.
    """
    stored, shapes = _of_text(_stored_tensors(directory)), checkpoint_shapes(config)
    # 1. What the config implies. So many names are only made where the file may have them.
    if (least := config.num_layers * max(1, config.experts)) > len(stored):
        raise UserError(f"{directory} holds {len(stored)} tensors; its config.json implies {least} at least.")
    expected: dict[str, tuple[int, ...]] = {}
    for path, entry in tensor_table(config).items():
        expected |= dict.fromkeys(tensor_names(config, entry), shapes[path][entry.count("{}") :])
    if missing := sorted(expected.keys() - stored.keys()):
        raise UserError(f"{directory} lacks tensors that its config.json implies: {_some(missing)}.")
    # 2. What is there besides. A tied model may store its head a second time; then it must be the same matrix.
    extra = {name for name in stored.keys() - expected.keys() if not _COMPUTED.search(name)}
    head = checkpoint_name(config, ("lm_head", "weight"))
    embedding = checkpoint_name(config, ("model", "embed_tokens", "weight"))
    if config.tied and head in extra:
        if not safetensors.same_values(stored[head], stored[embedding], head):
            raise UserError(
                f"{stored[head].file}: config.json has tie_word_embeddings = true, but {head} is not the embedding. "
                f"Set tie_word_embeddings to false if the stored head is meant."
            )
        extra.remove(head)
    if extra:
        raise UserError(f"{directory} holds tensors that its config.json does not imply: {_some(sorted(extra))}.")
    # 3. The shapes.
    for name, shape in expected.items():
        if stored[name].shape != shape:
            raise UserError(
                f"{stored[name].file}: tensor {name} has shape {stored[name].shape}, but config.json implies {shape}."
            )
    return stored


def _stored_tensors(directory: Path) -> dict[str, safetensors.Tensor]:
    """Return every tensor of the folder by name, from the single file or from the shards that the index lists."""
    index = directory / INDEX
    if (directory / WEIGHTS).exists():
        return safetensors.read_header(directory / WEIGHTS)
    if not index.exists():
        if any(directory.glob("*.bin")) or any(directory.glob("*.pth")) or any(directory.glob("*.pt")):
            raise UserError(
                f"{directory} holds its weights as PyTorch pickles only. Pickles can run code when opened: only "
                f"safetensors are read. Save the model again with save_pretrained (safetensors is its default)."
            )
        raise UserError(f"There is neither {WEIGHTS} nor {INDEX} in {directory}.")
    content = read_json(index, "fetch the model again")
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise UserError(f"{index} is not a safetensors index: it must hold a JSON object with a weight_map.")
    stored: dict[str, safetensors.Tensor] = {}
    for shard in sorted(set(weight_map.values())):
        # A shard is a plain name: the index may not lead out of the folder.
        if Path(shard).name != shard or not os.path.isfile(directory / shard):  # False for names that can be none, too
            raise UserError(f"{index} lists {shard[:200]}, but there is no such file in {directory}.")
        header = safetensors.read_header(directory / shard)
        if twice := sorted(stored.keys() & header.keys()):
            raise UserError(f"{shard} in {directory} holds tensors that another shard holds too: {_some(twice)}.")
        stored |= header
    if missing := sorted(set(weight_map) - set(stored)):
        raise UserError(f"{index} lists tensors that no shard holds: {_some(missing)}.")
    return stored


def _of_text(stored: dict[str, safetensors.Tensor]) -> dict[str, safetensors.Tensor]:
    """Return the tensors of a vision-language model's text model, under that model's names; any other's as they are."""
    # The text model stands beside the others, or within "model", by the version of transformers that wrote it; the head
    # with it, or outside.
    prefixes = {"language_model.": "", "model.language_model.": "model.", "lm_head.": "lm_head."}
    if not any(name.startswith(("language_model.", "model.language_model.")) for name in stored):
        return stored
    found: dict[str, safetensors.Tensor] = {}
    for name, tensor in stored.items():
        for prefix, own in prefixes.items():
            if name.startswith(prefix) and found.setdefault(own + name.removeprefix(prefix), tensor) is not tensor:
                raise UserError(
                    f"{tensor.file} holds tensor {name} of the text model under another name too: it is not known "
                    f"which of them counts. Save the model again with save_pretrained."
                )
    return found


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
