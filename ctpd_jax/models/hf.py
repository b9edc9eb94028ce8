"""Hugging Face model folders <-> (config, params): safetensors only, one tensor at a time, both ways from one table.

`tensor_table` says which tensors of a checkpoint make which parameter; reading and writing both follow it.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ctpd_jax.errors import UserError
from ctpd_jax.files import PARTIAL, local_path, read_json, write_json
from ctpd_jax.models import safetensors
from ctpd_jax.models.config import DecoderConfig
from ctpd_jax.models.decoder import Params, param_shapes
from ctpd_jax.models.hf_config import eos_field, read_config, to_hf

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_LOAD_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
_COMPUTED = re.compile(r"\.rotary_emb\.inv_freq$")  # buffers that old checkpoints stored; the config determines them
_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")


def tensor_table(config: DecoderConfig) -> dict[tuple[str, ...], str]:
    """Path in the parameter tree -> name in the checkpoint, with "{}" for the layer's number where it is stacked."""
    flat, _ = jax.tree.flatten_with_path(param_shapes(config))
    paths = [tuple(entry.key for entry in path) for path, _ in flat]
    return {path: ".".join(path).replace("model.layers.", "model.layers.{}.") for path in paths}


def _names(config: DecoderConfig, name: str) -> list[str]:
    return [name.format(layer) for layer in range(config.num_layers)] if "{}" in name else [name]


# ------------------------------------------------------------------------------------------------ reading


def load_hf(path_or_repo: str | Path, dtype: str = "float32") -> tuple[DecoderConfig, Params]:
    """Load a model folder, or a model of the Hugging Face hub.

    Args:
        path_or_repo: a folder with config.json and model.safetensors (or its shards and their index), or a repository
            id "owner/name", which is downloaded into the hub's cache.
        dtype: "float32", "bfloat16" or "float16" of the parameters. bfloat16 and float16 weights widen exactly.

    Returns:
        The config, and the parameters as a nested dict under Hugging Face's names, the layers stacked on axis 0.

    Raises:
        UserError: no such folder or repository, no config.json, no safetensors, an unsupported architecture or field,
            a tensor that is missing, unexpected or of the wrong shape.
    """
    if dtype not in _LOAD_DTYPES:
        raise UserError(f"dtype = {dtype!r} is not supported; use one of {', '.join(_LOAD_DTYPES)}.")
    directory = model_directory(path_or_repo)
    config = read_config(directory)
    return config, read_params(directory, config, _LOAD_DTYPES[dtype])


def model_directory(path_or_repo: str | Path) -> Path:
    """The local folder of a model: the path itself, or the downloaded snapshot of a hub repository."""
    path = Path(path_or_repo).expanduser()
    if path.is_dir():
        return path
    name = str(path_or_repo)
    if not _REPO_ID.fullmatch(name) or path.exists():
        raise UserError(f"{name} is not a folder, and not a Hugging Face repository id of the form owner/name either.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]))
    except Exception as error:  # the hub client raises a dozen kinds, from HTTP to its own offline mode
        reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise UserError(
            f"{name} is no local folder, and could not be fetched from the Hugging Face hub "
            f"({type(error).__name__}: {reason}). Check the spelling, the network and, for a gated model, the login "
            f"(`hf auth login`)."
        ) from error


def read_params(directory: Path, config: DecoderConfig, dtype: Any) -> Params:
    """Read a folder's weights into arrays of `dtype`, with at most one stacked parameter held on the host besides."""
    stored, shapes = check_weights(directory, config), param_shapes(config)
    params: Params = {}
    for path, entry in tensor_table(config).items():
        host = np.empty(_at(shapes, path).shape, jnp.dtype(dtype))
        for part, name in zip(host if "{}" in entry else host[None], _names(config, entry)):
            safetensors.read_into(stored[name], name, part)
        _put(params, path, jnp.asarray(host))
    return params


def check_weights(directory: Path, config: DecoderConfig) -> dict[str, safetensors.Tensor]:
    """Read only the headers of a folder's weights: every tensor by name, all there and of the right shape.

    Raises:
        UserError: a file or a tensor that is missing, unexpected or of the wrong shape.
    """
    stored, shapes, table = _stored_tensors(directory), param_shapes(config), tensor_table(config)
    _check_names(directory, config, stored, [name for entry in table.values() for name in _names(config, entry)])
    for path, entry in table.items():
        whole = _at(shapes, path).shape
        expected = whole[1:] if "{}" in entry else whole
        for name in _names(config, entry):
            if stored[name].shape != expected:
                raise UserError(
                    f"{stored[name].file}: tensor {name} has shape {stored[name].shape}, but config.json implies "
                    f"{expected}."
                )
    return stored


def _stored_tensors(directory: Path) -> dict[str, safetensors.Tensor]:
    """Every tensor of the folder by name, from the single file or from the shards that the index lists."""
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
        if Path(shard).name != shard or not (directory / shard).exists():
            raise UserError(f"{index} lists {shard}, but there is no such file in {directory}.")
        stored |= safetensors.read_header(directory / shard)
    missing = sorted(set(weight_map) - set(stored))
    if missing:
        raise UserError(f"{index} lists tensors that no shard holds: {_some(missing)}.")
    return stored


def _check_names(
    directory: Path, config: DecoderConfig, stored: dict[str, safetensors.Tensor], expected: list[str]
) -> None:
    missing = sorted(set(expected) - set(stored))
    if missing:
        raise UserError(f"{directory} lacks tensors that its config.json implies: {_some(missing)}.")
    extra = {name for name in set(stored) - set(expected) if not _COMPUTED.search(name)}
    if config.tied and "lm_head.weight" in extra:
        _check_tied(stored)
        extra.remove("lm_head.weight")
    if extra:
        raise UserError(f"{directory} holds tensors that its config.json does not imply: {_some(sorted(extra))}.")


def _check_tied(stored: dict[str, safetensors.Tensor]) -> None:
    """A tied model may store its head a second time; then it must be the same matrix."""
    head, embedding = stored["lm_head.weight"], stored["model.embed_tokens.weight"]
    same = head.shape == embedding.shape
    if same:
        first, second = np.empty(head.shape, np.float32), np.empty(embedding.shape, np.float32)
        safetensors.read_into(head, "lm_head.weight", first)
        safetensors.read_into(embedding, "model.embed_tokens.weight", second)
        same = np.array_equal(first, second)
    if not same:
        raise UserError(
            f"{head.file}: config.json has tie_word_embeddings = true, but lm_head.weight is not the embedding. Set "
            f"tie_word_embeddings to false if the stored head is meant."
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _at(tree: Params, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _put(tree: Params, path: tuple[str, ...], value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


# ------------------------------------------------------------------------------------------------ writing


def save_hf(
    directory: str | Path,
    config: DecoderConfig,
    params: Params,
    tokenizer: Any = None,
    dtype: str | None = None,
) -> None:
    """Write a model folder that `transformers` opens; `load_hf` of it gives the same parameters, bit for bit.

    The folder is written beside its place and renamed when it is whole. An earlier model folder is replaced; a folder
    that holds anything else is refused. What a killed save left is removed, or put back, by the next.

    Args:
        directory: where to.
        config: what the parameters belong to.
        params: as from `load_hf`.
        tokenizer: a folder (or hub id) whose tokenizer files are copied byte for byte, or an object with
            `save_pretrained`; None writes no tokenizer.
        dtype: "float32", "bfloat16" or "float16" of the weights; None keeps each parameter's own.

    Raises:
        UserError: the folder is in use by something else, an unknown dtype, a tokenizer folder without tokenizer files.
    """
    if dtype is not None and dtype not in _LOAD_DTYPES:
        raise UserError(f"dtype = {dtype!r} is not supported; use one of {', '.join(_LOAD_DTYPES)}.")
    directory = local_path(directory)
    beside, old = (directory.with_name(f".{directory.name}{suffix}{PARTIAL}") for suffix in ("", ".old"))
    _clear(directory, beside, old)
    if (
        directory.exists()
        and not (directory / "config.json").exists()
        and (not directory.is_dir() or any(directory.iterdir()))
    ):
        raise UserError(f"{directory} exists and is not a model folder; choose another place for the export.")
    beside.mkdir(parents=True)
    try:
        _write_model(beside, config, params, dtype)
        if tokenizer is not None:
            _write_tokenizer(beside, tokenizer)
        if directory.exists():
            directory.rename(old)  # nothing can be renamed onto a folder that holds files
        beside.rename(directory)
    finally:
        _clear(directory, beside, old)


def _clear(directory: Path, beside: Path, old: Path) -> None:
    """Removes what a save has beside its folder, and puts the earlier model back if it stopped between its renames."""
    if old.exists() and not directory.exists():
        old.rename(directory)
    for left in (beside, old):
        shutil.rmtree(left, ignore_errors=True)


def _write_model(directory: Path, config: DecoderConfig, params: Params, dtype: str | None) -> None:
    table = tensor_table(config)
    dtypes = {
        name: jnp.dtype(dtype or _at(params, path).dtype)
        for path, entry in table.items()
        for name in _names(config, entry)
    }
    main = str(dtypes["model.embed_tokens.weight"])
    safetensors.write(directory / WEIGHTS, _tensors(config, params, table), lambda name: dtypes[name])
    write_json(directory / "config.json", to_hf(config, main))
    generation = {
        "bos_token_id": config.bos_id,
        "eos_token_id": eos_field(config),
        "pad_token_id": config.pad_id,
    }
    write_json(directory / "generation_config.json", {k: v for k, v in generation.items() if v is not None})


def _tensors(config: DecoderConfig, params: Params, table: dict[tuple[str, ...], str]) -> Iterator[tuple]:
    for path, entry in table.items():
        array = _at(params, path)
        if "{}" not in entry:
            yield entry, array.shape, lambda array=array: np.asarray(array)
            continue
        for layer, name in enumerate(_names(config, entry)):
            yield name, array.shape[1:], lambda array=array, layer=layer: np.asarray(array[layer])


def _write_tokenizer(directory: Path, tokenizer: Any) -> None:
    if not isinstance(tokenizer, str | Path):
        tokenizer.save_pretrained(directory)
        return
    source = model_directory(tokenizer)
    found = [source / name for name in _TOKENIZER_FILES if (source / name).exists()]
    if not found:
        raise UserError(f"There are no tokenizer files in {source}.")
    for file in found:
        shutil.copyfile(file, directory / file.name)
