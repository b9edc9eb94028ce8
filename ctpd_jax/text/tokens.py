"""One tokenizer, probed: text -> ids, and the bytes of every token.

The bytes of a token come from the vocabulary and never from the offsets a tokenizer reports: starts lie (trimmed or
borrowed spaces, one emoji as four tokens at the same place), and ends lie as soon as text is normalised. Every
encoding is checked byte for byte against the normalised text, N(text): the text as the tokenizer's own normaliser
leaves it, its space marker read as a space again, without the dummy space that some tokenizers put in front.

Letters: T tokens, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from ctpd_jax.errors import UserError
from ctpd_jax.text import probe
from ctpd_jax.text.cuts import clean_cuts, code_points, utf8_lengths
from ctpd_jax.text.probe import CONTROL, Prefix, Vocabulary

BORDER = 64  # characters on either side of a border that decide whether a token reaches over it


@dataclass(frozen=True, eq=False)
class TextTokenizer:
    """A tokenizer that passed the probe. Compare two of them by `fingerprint`, never by vocabulary size."""

    name: str  # as the user gave it, for messages
    hf: Any  # the PreTrainedTokenizerFast as loaded: chat template, eos, decode. Encode with the functions below.
    backend: Tokenizer = field(repr=False)  # special tokens typed in a text are ordinary text to this copy
    fingerprint: str  # sha256 of the tokenizer's content, from the folder or from memory alike
    bos_id: int | None  # the token that the tokenizer's own post-processor puts in front, if it does
    byte_level: bool  # vocabulary in the byte-level alphabet, else pieces with a space marker and <0xNN>
    marker: str | None  # the space marker ("\u2581"), if there is one
    form: str | None  # canonical normalisation: "NFC", "NFD" or None
    prefix: Prefix  # when a dummy space is put in front
    vocabulary: Vocabulary = field(repr=False)  # the bytes of every token
    restarts: np.ndarray = field(repr=False)  # bool [V], added tokens after which a dummy space comes again
    _normalizer: Any = field(repr=False)  # of the tokenizers library, without the dummy space; None if no form
    special: dict[str, int] = field(repr=False)  # special token -> id

    def __deepcopy__(self, memo: dict[int, Any]) -> TextTokenizer:
        return self  # nothing in it ever changes

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for; empty for special tokens."""
        vocabulary = self.vocabulary
        start, length = int(vocabulary.starts[token_id]), max(int(vocabulary.lengths[token_id]), 0)
        return vocabulary.pool[start : start + length].tobytes()

    @cached_property
    def template_backend(self) -> Tokenizer:
        """A copy in which special tokens are special: for the text of templates."""
        backend = Tokenizer.from_str(probe.serialize(self.hf.backend_tokenizer))
        backend.encode_special_tokens = False
        return backend

    @cached_property
    def middle_backend(self) -> Tokenizer:
        """`backend` for text that does not stand at the start, where Metaspace "first" puts no dummy space."""
        if not self.prefix.first_only:
            return self.backend
        return Tokenizer.from_str(json.dumps(probe.without_prefix(json.loads(self.backend.to_str()))))

    @cached_property
    def _byte_literal_backend(self) -> Tokenizer:
        """`backend` for texts in which somebody typed "<0x41>", which some models take for the byte token."""
        return Tokenizer.from_str(json.dumps(probe.split_byte_literals(json.loads(self.backend.to_str()))))

    @cached_property
    def special_pattern(self) -> re.Pattern[str] | None:
        longest_first = sorted(self.special, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    @cached_property
    def special_firsts(self) -> frozenset[str]:
        """The characters with which special tokens begin: a text without any of them need not be searched."""
        return frozenset(token[0] for token in self.special)


def normalize(tok: TextTokenizer, text: str) -> str:
    """N(text): what the bytes of the text's tokens spell, without the dummy space."""
    if tok._normalizer is not None:
        text = tok._normalizer.normalize_str(text)
    return text.replace(tok.marker, " ") if tok.marker else text


# ------------------------------------------------------------------------------------------------ loading

_PROBED: OrderedDict[int, tuple[Any, int, TextTokenizer]] = OrderedDict()  # id(hf) -> hf, len(hf), result
_KEEP = 16


def load_tokenizer(source: Any) -> TextTokenizer:
    """A folder, a hub name, a transformers fast tokenizer or a TextTokenizer -> TextTokenizer.

    Raises UserError with the tokenizer's name and the reason if it is not lossless: its tokens must spell the text
    back, up to canonical equivalence (NFC, NFD) and a dummy space in front.
    """
    if isinstance(source, TextTokenizer):
        return source
    if hasattr(source, "backend_tokenizer") or hasattr(source, "convert_tokens_to_ids"):
        known = _PROBED.get(id(source))
        if known is not None and known[0] is source and known[1] == len(source):
            return known[2]
        tok = _probed(source, getattr(source, "name_or_path", "") or type(source).__name__)
        _PROBED[id(source)] = (source, len(source), tok)
        while len(_PROBED) > _KEEP:
            _PROBED.popitem(last=False)
        return tok
    from transformers import AutoTokenizer

    try:
        hf = AutoTokenizer.from_pretrained(str(source))
    except Exception as error:  # transformers raises anything here, KeyError included; the user needs the name
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise UserError(f"The tokenizer {str(source)!r} cannot be loaded: {reason}") from error
    return _probed(hf, str(source))


def _probed(hf: Any, name: str) -> TextTokenizer:
    if not getattr(hf, "is_fast", False) or not hasattr(hf, "backend_tokenizer"):
        raise UserError(
            f"The tokenizer {name!r} has no fast version (a tokenizer.json), and only those give access to their "
            "vocabulary's bytes; convert it with transformers' convert_slow_tokenizer and save it."
        )
    serialized = probe.serialize(hf.backend_tokenizer)
    state = json.loads(serialized)
    special = {t["content"]: t["id"] for t in state["added_tokens"] if t["special"]}
    facts = probe.read_facts(state, name)  # refuses what cannot be lossless
    vocabulary = probe.read_vocabulary(state, facts, name)
    restarts = np.zeros(len(vocabulary.lengths), bool)
    restarts[probe.restarting_tokens(state, facts.prefix)] = True
    tok = TextTokenizer(
        name=name,
        hf=hf,
        backend=Tokenizer.from_str(json.dumps(probe.literal_state(state))),
        fingerprint=hashlib.sha256(serialized.encode()).hexdigest(),
        bos_id=_bos_of_post_processor(state, name),
        byte_level=facts.byte_level,
        marker=facts.marker,
        form=facts.form,
        prefix=facts.prefix,
        vocabulary=vocabulary,
        restarts=restarts,
        _normalizer=probe.form_normalizer(facts.form),
        special=special,
    )
    for text in (*probe.TEXTS, *list(special)[:16]):
        try:
            encode(tok, text)
        except UserError as error:
            raise UserError(f"The tokenizer {name!r} is not lossless and cannot be aligned. {error}") from error
    return tok


def _bos_of_post_processor(state: dict[str, Any], name: str) -> int | None:
    """The token that the tokenizer puts before every text, found by asking its post-processor about one word."""
    word = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    stub = {"version": "1.0", "added_tokens": [], "post_processor": state["post_processor"], "model": word}
    backend = Tokenizer.from_str(json.dumps(stub))
    encoding = backend.encode("a")
    front = []
    for token_id, special in zip(encoding.ids, encoding.special_tokens_mask):
        if not special:
            break
        front.append(token_id)
    if len(front) > 1:
        raise UserError(
            f"The tokenizer {name!r} puts {len(front)} special tokens before every text (ids {front}); "
            "only one BOS token is supported."
        )
    return front[0] if front else None


# ------------------------------------------------------------------------------------------------ encoding


def encode(tok: TextTokenizer, text: str) -> np.ndarray:
    """Ordinary text -> int32 [T]: no BOS, no end-of-turn, and "<|im_end|>" typed in it is seven letters and signs.

    Raises UserError if the tokens do not spell N(text) byte for byte.
    """
    return encode_batch(tok, [text])[0]


def encode_batch(tok: TextTokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """`encode` of several texts at once, on all cores: int32 [T] each."""
    for text in texts:
        require_unicode(tok, text)
    encodings = tok.backend.encode_batch_fast(list(texts), add_special_tokens=False)
    batch = [np.array(encoding.ids, np.int32) for encoding in encodings]
    for index, text in enumerate(texts):
        if not tok.byte_level and "<0x" in text:
            batch[index] = _encode_byte_literals(tok, text, batch[index])
        byte_ends(tok, batch[index], normalize(tok, text), whole=True)
    return batch


def _encode_byte_literals(tok: TextTokenizer, text: str, ids: np.ndarray) -> np.ndarray:
    try:
        byte_ends(tok, ids, normalize(tok, text), whole=True)
    except UserError:
        return np.array(tok._byte_literal_backend.encode(text, add_special_tokens=False).ids, np.int32)
    return ids


def require_unicode(tok: TextTokenizer, text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"The text {_excerpt(text, error.start)} has a lone surrogate (U+{ord(text[error.start]):04X}) at "
            f"character {error.start}, which no tokenizer ({tok.name!r}) can read; repair or drop the example."
        ) from error


def byte_ends(tok: TextTokenizer, ids: np.ndarray, normalized: str, whole: bool = False) -> np.ndarray:
    """Where each token ends in the bytes of N(text): int [T] -> int64 [T].

    normalized: N(text), see `normalize`. The dummy space counts zero bytes, so a token that is nothing else has the
    end of the token before it. ids may stop before the text does (truncation) unless `whole`.
    Raises UserError if the tokens do not spell the text.
    """
    ids = np.asarray(ids, np.int64)
    data = np.frombuffer(normalized.encode("utf-8"), np.uint8)
    size = len(tok.vocabulary.lengths)
    if len(ids) and (ids.min() < 0 or ids.max() >= size):
        raise UserError(f"An id outside 0..{size - 1} does not belong to the tokenizer {tok.name!r}.")
    lengths = tok.vocabulary.lengths[ids]
    if (lengths == CONTROL).any():
        token_id = int(ids[np.argmax(lengths == CONTROL)])
        raise UserError(
            f"The special token {tok.backend.id_to_token(token_id) or token_id!r} (id {token_id}) of {tok.name!r} "
            "stands for no text: a character outside the vocabulary, or an end-of-turn token left in the ids."
        )
    skip = _dummy_spaces(tok, ids, lengths, data)
    ends = np.cumsum(lengths - skip)
    total = int(ends[-1]) if len(ends) else 0
    # Gather the bytes of all tokens: for byte i of the result, its place in the pool.
    begin = tok.vocabulary.starts[ids] + skip
    count = lengths - skip
    spelled = tok.vocabulary.pool[np.arange(total) + np.repeat(begin - (ends - count), count)]
    same = total == len(data) if whole else total <= len(data)
    if not same or not np.array_equal(spelled, data[:total]):
        shared = min(total, len(data))
        differs = np.flatnonzero(spelled[:shared] != data[:shared])
        place = int(differs[0]) if len(differs) else shared
        if place < len(data) and int(data[place]) in tok.vocabulary.missing:
            raise UserError(
                f"The tokenizer {tok.name!r} has no token for the byte 0x{data[place]:02X}, at byte {place} of "
                f"the text, near {_near(data, place)}; remove that character from the text or leave the example out."
            )
        raise UserError(
            f"The tokens of {tok.name!r} do not spell the text: at byte {place}, near {_near(data, place)}, they say "
            f"{spelled[place : place + 12].tobytes()!r}, the text {data[place : place + 12].tobytes()!r}."
        )
    return ends


def _dummy_spaces(tok: TextTokenizer, ids: np.ndarray, lengths: np.ndarray, data: np.ndarray) -> np.ndarray:
    """1 for each token that begins with a dummy space, else 0: int64 [T]."""
    skip = np.zeros(len(ids), np.int64)
    if not tok.prefix.present or not len(ids):
        return skip
    first = np.zeros(len(ids), bool)
    first[0] = not tok.restarts[ids[0]]
    if not tok.prefix.first_only:
        first[1:] = tok.restarts[ids[:-1]] & ~tok.restarts[ids[1:]]
    heads = np.flatnonzero(first)
    if tok.prefix.always:
        skip[heads] = 1
        return skip
    # A dummy space only where the text has none of its own. There is one head per added token typed in the text.
    before = np.cumsum(lengths) - lengths
    skipped = 0
    for head in heads.tolist():
        place = int(before[head]) - skipped
        starts_with_space = tok.vocabulary.pool[tok.vocabulary.starts[ids[head]]] == 0x20
        if starts_with_space and not (place < len(data) and data[place] == 0x20):
            skip[head] = 1
            skipped += 1
    return skip


def cut_offsets(tok: TextTokenizer, text: str) -> np.ndarray:
    """Byte offset in N(text) of each character position that is a clean cut of N, else -1: int64 [n + 1]."""
    if tok.form is None:
        points = code_points(text)
        lengths = utf8_lengths(points)
        if tok.marker:
            lengths[points == ord(tok.marker)] = 1
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    marker = tok.marker
    return clean_cuts(text, lambda t: normalize(tok, t), lambda t: t.replace(marker, " ") if marker else t)


# ------------------------------------------------------------------------------------------------ questions


def special_literals(tok: TextTokenizer, text: str) -> int:
    """How many special tokens' names stand in a text; as somebody's words they are encoded as ordinary text."""
    if tok.special_pattern is None or not any(first in text for first in tok.special_firsts):
        return 0
    return sum(1 for _ in tok.special_pattern.finditer(text))


def merges_across(tok: TextTokenizer, contexts: Sequence[str], responses: Sequence[str]) -> int:
    """In how many places encoding context + response at once would give a token that reaches over their border.

    contexts: ordinary text before each response. The two are always encoded apart; this only counts where it matters.
    """
    # A token that reaches over the border is decided long before the response ends.
    heads = [(context, response[:BORDER]) for context, response in zip(contexts, responses) if context and response]
    count = 0
    for (context, head), ids in zip(heads, encode_batch(tok, [context + head for context, head in heads])):
        text = context + head
        border = int(cut_offsets(tok, text)[len(context)])
        count += border < 0 or border not in byte_ends(tok, ids, normalize(tok, text))
    return count


def can_spell(tok: TextTokenizer, text: str) -> bool:
    """Whether the vocabulary has every byte of the text; a few lack control characters, and `encode` refuses those."""
    return not tok.vocabulary.missing or tok.vocabulary.missing.isdisjoint(normalize(tok, text).encode("utf-8"))


def _near(data: np.ndarray, place: int) -> str:
    return ascii(data[max(0, place - 12) : place + 12].tobytes().decode("utf-8", "replace"))


def _excerpt(text: str, place: int) -> str:
    return ascii(text[max(0, place - 12) : place + 12])
