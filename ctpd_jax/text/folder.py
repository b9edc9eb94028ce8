"""A tokenizer's folder, or hub id -> the text of its tokenizer.json, and the names that transformers reads beside it.

No code of the folder is ever run, and nobody is asked whether it may be.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ctpd_jax.errors import UserError
from ctpd_jax.files import read_json

_FETCHED = ("tokenizer*", "*.jinja", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model")
_LFS_POINTER = "version https://git-lfs.github.com/spec/"


def open_tokenizer(source: str) -> tuple[Any, str]:
    """A folder or hub id -> (PreTrainedTokenizerFast, content of tokenizer.json).

    The first knows the special tokens by their names, the chat templates, and decodes; the second has the ids. Where
    there is no tokenizer.json, as in folders that hold a SentencePiece model alone, it is what transformers makes.

    Raises UserError, by the tokenizer's name, where it cannot be read or needs code of its own.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        folder = _fetched(source)
    file = folder / "tokenizer.json"
    content = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else None
    settings = read_json(folder / "tokenizer_config.json", "mend it, or fetch the model again") or {}
    code = settings.get("auto_map")
    if code:
        raise UserError(
            f"The tokenizer {source!r} needs code of its own (auto_map in tokenizer_config.json: {json.dumps(code)}), "
            "and code that comes with a model is not run here. If its tokenizer.json is complete, remove auto_map."
        )
    if content is not None and content.startswith(_LFS_POINTER):
        raise UserError(f"{file} is a pointer of git-lfs, not the file itself; fetch it with `git lfs pull`.")
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # The base class reads tokenizer.json as it stands; the model's own class may build another tokenizer from it.
    kind = AutoTokenizer if content is None else PreTrainedTokenizerFast
    try:
        hf = kind.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # transformers raises anything here, KeyError included; the user needs the name
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise UserError(f"The tokenizer {source!r} cannot be loaded: {reason}") from error
    if content is None:
        if not getattr(hf, "is_fast", False):
            raise UserError(
                f"The tokenizer {source!r} has no tokenizer.json and transformers makes none of it; convert it with "
                "transformers' convert_slow_tokenizer and save it."
            )
        content = hf.backend_tokenizer.to_str()
    return hf, content


def _fetched(source: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=list(_FETCHED)))
    except Exception as error:  # the hub client raises a dozen kinds, from HTTP to its own offline mode
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise UserError(
            f"The tokenizer {source!r} is no local folder, and could not be fetched from the Hugging Face hub: {reason}"
        ) from error
