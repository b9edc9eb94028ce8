"""Tokenizers of the `tokenizers` library: opened from a folder or the hub, and copied. No code of a folder is run."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, models

from ctpd_jax.artifacts import read_object, refuse_impostor
from ctpd_jax.buckets.objects import at_hand
from ctpd_jax.errors import UserError

_FETCHED = (
    *("tokenizer*", "*.jinja", "chat_template.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab*", "merges.txt", "*.model"),
)
# Stands for a control token where a template's text is read beside what somebody typed. Noncharacters are not for
# interchange, so they do not turn up in texts; one that has them is refused.
_STAND_IN = "\ufdd0{}\ufdd1"
STAND_INS = re.compile(_STAND_IN.format("[0-9]+"))


def open_tokenizer(source: str) -> tuple[Any, str]:
    """Open a folder or hub id as (PreTrainedTokenizerFast, content of tokenizer.json).

    The first knows the special tokens by their names, the chat templates, and decodes; the second has the ids. Where
    there is no tokenizer.json, as in folders that hold a SentencePiece model alone, it is what transformers makes.

    Raises UserError, by the tokenizer's name, where it cannot be read or needs code of its own.
    """
    # 1. The files, and that they ask for no code.
    folder = at_hand(source, weights=False)
    if not folder.is_dir():
        folder = _fetched(source)
    file = folder / "tokenizer.json"
    content = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else None
    if code := (read_object(folder / "tokenizer_config.json") or {}).get("auto_map"):
        raise UserError(
            f"The tokenizer {source!r} needs code of its own (auto_map in tokenizer_config.json: {json.dumps(code)}), "
            "and code that comes with a model is not run here. If its tokenizer.json is complete, remove auto_map."
        )
    if content is not None:
        refuse_impostor(file, content[:64].encode("utf-8"))
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # 2. The base class reads tokenizer.json as it stands; the model's own class may build another tokenizer from it.
    kind = AutoTokenizer if content is None else PreTrainedTokenizerFast
    try:
        hf = kind.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # transformers raises anything here, KeyError included; the user needs the name
        read_object(file)  # damaged, it is named as that
        raise UserError(
            f"The tokenizer {source!r} cannot be loaded, by its tokenizer.json and tokenizer_config.json: "
            f"{_first_line(error)}"
        ) from error
    if content is None:
        # 3. A folder without tokenizer.json: transformers has made one, or it cannot.
        if not getattr(hf, "is_fast", False):
            raise UserError(
                f"The tokenizer {source!r} has no tokenizer.json and transformers makes none of it; convert it with "
                "transformers' convert_slow_tokenizer and save it."
            )
        content = hf.backend_tokenizer.to_str()
    # 4. Vision-language models may have their template in a file that only their processors read.
    if hf.chat_template is None:
        processors = folder / "chat_template.json"
        template = (read_object(processors) or {}).get("chat_template")
        if not isinstance(template, str | None):
            raise UserError(f"{processors}: chat_template must be text; give a .jinja file as the template instead.")
        hf.chat_template = template
    return hf, content


def _fetched(source: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=list(_FETCHED)))
    except Exception as error:  # the hub client raises a dozen kinds, from HTTP to its own offline mode
        raise UserError(
            f"The tokenizer {source!r} is no local folder, and could not be fetched from the Hugging Face hub: "
            f"{_first_line(error)}"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]


def without_limits(content: str) -> Tokenizer:
    """Make the tokenizer of a tokenizer.json, whatever limits it was saved with."""
    backend = Tokenizer.from_str(content)
    backend.no_truncation()
    backend.no_padding()
    if getattr(backend.model, "dropout", None):
        backend.model.dropout = None  # a tokenizer saved amid training reads a text another way each time
    return backend


def encoded(backend: Tokenizer, texts: Sequence[str], name: str, offsets: bool = False) -> list[Any]:
    """Encode texts, without what a post-processor adds. `offsets` are true only if they are asked for.

    Raises UserError where the library itself gives up, as it does where two added tokens take the same white space.
    """
    encode = backend.encode_batch if offsets else backend.encode_batch_fast
    try:
        return encode(list(texts), add_special_tokens=False)
    except BaseException as error:
        # A panic of the library is no Exception, and has no name that could be imported.
        if type(error).__name__ != "PanicException":
            raise
        for text in texts if len(texts) > 1 else ():
            encoded(backend, [text], name, offsets)  # which of them it is
        raise UserError(
            f"The tokenizer {name!r} cannot read {texts[0][:60]!a}: the tokenizers library fails ({error}), as it does "
            "where two added tokens with lstrip or rstrip take the same white space; leave the example out."
        ) from None


def written_added_tokens(content: str) -> list[dict[str, Any]]:
    """Read the added tokens of a tokenizer.json, without the seconds that the rest of it takes."""
    place = content.find('"added_tokens"')
    return json.JSONDecoder().raw_decode(content, content.index("[", place))[0] if place >= 0 else []


def ordinary_copy(copy: Tokenizer, control: dict[str, int]) -> tuple[Tokenizer, dict[int, int]]:
    """Make a copy take the names of control tokens for ordinary text; return it and the ids of their stand-ins.

    Nothing is taken out of it, so that no id moves; the stand-ins come after all others, and each is looked for as
    its control token is: with the same flags.
    """
    # Flags decide what a token takes of the white space around it: a stand-in must take the same.
    known = copy.get_added_tokens_decoder()

    def like(token_id: int, content: str, special: bool) -> AddedToken:
        flags = {name: getattr(known[token_id], name) for name in ("single_word", "lstrip", "rstrip", "normalized")}
        return AddedToken(content, special=special, **flags)

    copy.add_special_tokens([like(token_id, token, True) for token, token_id in control.items()])
    copy.add_tokens([like(token_id, stand_in(token_id), False) for token_id in control.values()])
    copy.encode_special_tokens = True
    there = {token.content: token_id for token_id, token in copy.get_added_tokens_decoder().items()}
    return copy, {there[stand_in(token_id)]: token_id for token_id in control.values()}


def stand_in(token_id: int) -> str:
    """Return the text that stands for a control token in `TextTokenizer.ordinary`."""
    return _STAND_IN.format(token_id)


def bos_of_post_processor(hf: Any, name: str) -> int | None:
    """Return the token that the tokenizer puts before every text, found by asking its post-processor about one word.

    It is that of transformers, which follows `add_bos_token` in tokenizer_config.json.
    """
    # One word that needs no vocabulary: whatever stands before it was put there.
    word = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    word.post_processor = hf.backend_tokenizer.post_processor
    encoding = word.encode("a")
    if 0 not in encoding.special_tokens_mask:
        raise UserError(f"The tokenizer {name!r} leaves out the text itself (post_processor in its tokenizer.json).")
    front = encoding.ids[: encoding.special_tokens_mask.index(0)]
    if len(front) > 1:
        raise UserError(
            f"The tokenizer {name!r} puts {len(front)} special tokens before every text (ids {front}); "
            "only one BOS token is supported."
        )
    return front[0] if front else None
