"""One tokenizer, probed: text -> ids, and the bytes of every token.

The ids are those of the folder's tokenizer.json, read by the `tokenizers` library as it stands: classes that
transformers would rebuild it with have no say. One copy is made of it, for words that somebody typed: the same
tokenizer, in which the names of control tokens are ordinary text. It is compared with the original when it is made.

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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer

from ctpd_jax.errors import UserError
from ctpd_jax.text import spelling, tokenizer_json
from ctpd_jax.text.backends import (
    STAND_INS,
    bos_of_post_processor,
    open_tokenizer,
    ordinary_copy,
    without_limits,
    written_added_tokens,
)
from ctpd_jax.text.cuts import clean_cuts, code_points, utf8_lengths
from ctpd_jax.text.tokenizer_json import CONTROL, Prefix, Vocabulary

BORDER = 64  # characters on either side of a border that decide whether a token reaches over it


@dataclass(frozen=True, eq=False)
class TextTokenizer:
    """A tokenizer that passed the probe. Compare two of them by `fingerprint`, never by vocabulary size."""

    name: str  # as the user gave it, for messages
    hf: Any  # the PreTrainedTokenizerFast as loaded: names of tokens, chat template, decode. Encode with `encode`.
    backend: Tokenizer = field(repr=False)  # tokenizer.json as it stands: for templates
    ordinary: Tokenizer = field(repr=False)  # the copy to which the names of control tokens are ordinary text
    fingerprint: str  # sha256 of the tokenizer's content and control tokens, from the folder or from memory alike
    bos_id: int | None  # the token that the tokenizer's own post-processor puts in front, if it does
    byte_level: bool  # vocabulary in the byte-level alphabet, else pieces with a space marker and <0xNN>
    marker: str | None  # the space marker ("\u2581"), if there is one
    form: str | None  # canonical normalisation: "NFC", "NFD" or None
    prefix: Prefix  # when a dummy space is put in front
    vocabulary: Vocabulary = field(repr=False)  # the bytes of every token
    control: dict[str, int] = field(repr=False)  # tokens that never come from somebody's words -> id
    stand_ins: dict[int, int] = field(repr=False)  # id of a stand-in in `ordinary` -> the control token's
    _normalizer: Any = field(repr=False)  # of the tokenizers library, without the dummy space; None if no form

    def __deepcopy__(self, memo: dict[int, Any]) -> TextTokenizer:
        return self  # nothing in it ever changes

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for; empty for control tokens."""
        vocabulary = self.vocabulary
        start, length = int(vocabulary.starts[token_id]), max(int(vocabulary.lengths[token_id]), 0)
        return vocabulary.pool[start : start + length].tobytes()

    @cached_property
    def eos_id(self) -> int | None:
        """The id of the token that the folder calls eos_token; None if it names none."""
        return None if self.hf.eos_token is None else self.backend.token_to_id(self.hf.eos_token)

    @cached_property
    def added(self) -> dict[int, AddedToken]:
        """The added tokens by id."""
        return self.backend.get_added_tokens_decoder()

    @cached_property
    def ids_of_added(self) -> dict[str, int]:
        """The ids of the added tokens by name."""
        return {token.content: token_id for token_id, token in self.added.items()}

    @cached_property
    def added_pattern(self) -> re.Pattern[str]:
        """Finds the names of added tokens, the longest first as the tokenizer does."""
        names = sorted((token.content for token in self.added.values()), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names)) or r"(?!)")

    @cached_property
    def control_names(self) -> dict[int, str]:
        """The names of the control tokens by id."""
        return {token_id: name for name, token_id in self.control.items()}

    @cached_property
    def control_pattern(self) -> re.Pattern[str]:
        """Finds the names of control tokens, the longest first as the tokenizer does."""
        longest_first = sorted(self.control, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    @cached_property
    def _control_firsts(self) -> frozenset[str]:
        return frozenset(token[0] for token in self.control)

    def names_control(self, text: str) -> bool:
        """Whether the name of a control token stands in a text."""
        # A text without any of their first characters need not be searched.
        return any(map(text.__contains__, self._control_firsts)) and self.control_pattern.search(text) is not None


def normalize(tok: TextTokenizer, text: str) -> str:
    """N(text): what the bytes of the text's tokens spell, without the dummy space."""
    if tok._normalizer is not None:
        text = tok._normalizer.normalize_str(text)
    return text.replace(tok.marker, " ") if tok.marker else text


# ------------------------------------------------------------------------------------------------ loading

# id(hf) -> hf, what tells whether it has changed, result
_PROBED: OrderedDict[int, tuple[Any, tuple[int, str], TextTokenizer]] = OrderedDict()
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
        told = (len(source), str(getattr(source, "special_tokens_map", None)))
        if known is not None and known[0] is source and known[1] == told:
            return known[2]
        name = getattr(source, "name_or_path", "") or type(source).__name__
        if not getattr(source, "is_fast", False) or not hasattr(source, "backend_tokenizer"):
            raise UserError(
                f"The tokenizer {name!r} has no fast version (a tokenizer.json), and only those give access to their "
                "vocabulary's bytes; convert it with transformers' convert_slow_tokenizer and save it."
            )
        tok = _probed(source, source.backend_tokenizer.to_str(), name)
        _PROBED[id(source)] = (source, told, tok)
        while len(_PROBED) > _KEEP:
            _PROBED.popitem(last=False)
        return tok
    hf, content = open_tokenizer(str(source))
    return _probed(hf, content, str(source))


def _probed(hf: Any, content: str, name: str) -> TextTokenizer:
    """`content`: tokenizer.json, whose ids are the truth. `hf`: the names of its special tokens."""
    backend = without_limits(content)
    state = json.loads(backend.to_str())
    for token in written_added_tokens(content):
        # The library numbers anew what does not follow the vocabulary without a gap.
        if backend.token_to_id(token["content"]) != token["id"]:
            raise UserError(
                f"The tokenizer {name!r} gives the added token {token['content']!r} the id {token['id']}, but reads it "
                f"as {backend.token_to_id(token['content'])}; repair its tokenizer.json or take the original one."
            )
    there = {token.content: token_id for token_id, token in backend.get_added_tokens_decoder().items()}
    never_read = {hf.pad_token, hf.unk_token} - {hf.eos_token, hf.bos_token}
    for token, token_id in hf.get_added_vocab().items():
        # Any other one would be text here, and a token to transformers.
        if there.get(token) != token_id and token not in never_read:
            raise UserError(
                f"The tokenizer {name!r} names the token {token!r} (id {token_id}) in tokenizer_config.json, but the "
                "added tokens of its tokenizer.json do not have it; load it with transformers, save it again, and take "
                "that folder."
            )
    named = {str(token) for token in hf.all_special_tokens}
    control = {t["content"] for t in state["added_tokens"] if t["special"] or t["content"] in named}
    facts = tokenizer_json.read_facts(state, name)  # refuses what cannot be lossless
    tok = TextTokenizer(
        name=name,
        hf=hf,
        backend=backend,
        ordinary=backend,
        fingerprint="",
        bos_id=bos_of_post_processor(hf, name),
        byte_level=facts.byte_level,
        marker=facts.marker,
        form=facts.form,
        prefix=facts.prefix,
        vocabulary=tokenizer_json.read_vocabulary(state, facts, name),
        control={},
        stand_ins={},
        _normalizer=tokenizer_json.form_normalizer(facts.form),
    )
    return _with_control(tok, control)


def with_control(tok: TextTokenizer, names: Iterable[str]) -> TextTokenizer:
    """The tokenizer to which these added tokens are control tokens too, flagged as special or not.

    Raises UserError as `load_tokenizer` does.
    """
    control = set(names).intersection(token.content for token in tok.added.values()) | set(tok.control)
    return tok if control == set(tok.control) else _with_control(tok, control)


def _with_control(tok: TextTokenizer, control: set[str]) -> TextTokenizer:
    ids = {token: tok.ids_of_added[token] for token in sorted(control)}
    content = tok.backend.to_str()
    ordinary, stand_ins = ordinary_copy(Tokenizer.from_str(content), ids)
    lengths = tok.vocabulary.lengths.copy()
    lengths[list(ids.values())] = CONTROL
    found = replace(
        tok,
        ordinary=ordinary,
        fingerprint=hashlib.sha256(json.dumps([content, sorted(control)]).encode("ascii")).hexdigest(),
        vocabulary=replace(tok.vocabulary, lengths=lengths),
        control=ids,
        stand_ins=stand_ins,
    )
    _try_out(found)
    return found


def _try_out(tok: TextTokenizer) -> None:
    """Holds the copy against the original, token by token and on texts, and both against the texts' bytes."""
    there = tok.ordinary.get_added_tokens_decoder()
    for token_id, token in tok.added.items():
        if token_id not in there or there[token_id].content != token.content:
            raise UserError(f"The tokenizer {tok.name!r} cannot be copied: {token.content!r} loses its id {token_id}.")
    words = [token.content for token in tok.added.values() if token.content not in tok.control]
    texts = list(tokenizer_json.TEXTS)
    for word in words:
        texts += [word, f"{word}{word}", f"x.{word} {word}\n{word}y", f" a {word}  b"]
    texts = [text for text in texts if not tok.names_control(text)]
    theirs = tok.backend.encode_batch_fast(texts, add_special_tokens=False)
    names = list(tok.control)
    typed = [*names[:16], *("a {} b ".format(" ".join(names[i : i + 64])) for i in range(0, len(names), 64))]
    try:
        found = encode_batch(tok, texts)
        encode_batch(tok, [*typed, *(text for text in tokenizer_json.TEXTS if tok.names_control(text))])
    except UserError as error:
        raise UserError(f"The tokenizer {tok.name!r} is not lossless and cannot be aligned. {error}") from error
    for text, ids, encoding in zip(texts, found, theirs, strict=True):
        if ids.tolist() != encoding.ids:
            raise UserError(
                f"The tokenizer {tok.name!r} cannot be copied: {text[:60]!r} would get the ids {ids.tolist()[:12]} "
                f"instead of {encoding.ids[:12]}."
            )


# ------------------------------------------------------------------------------------------------ encoding


def encode(tok: TextTokenizer, text: str) -> np.ndarray:
    """Ordinary text -> int32 [T]: no BOS, no end-of-turn, and "<|im_end|>" typed in it is ten letters and signs.

    Raises UserError if the tokens do not spell N(text) byte for byte.
    """
    return encode_batch(tok, [text])[0]


def encode_batch(tok: TextTokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """`encode` of several texts at once, on all cores: int32 [T] each."""
    for text in texts:
        require_readable(tok, text)
    encodings = tok.ordinary.encode_batch_fast(list(texts), add_special_tokens=False)
    return [spelling_of(tok, without_control(tok, encoding.ids), text) for text, encoding in zip(texts, encodings)]


def spelling_of(tok: TextTokenizer, ids: Sequence[int], text: str, control: bool = False) -> np.ndarray:
    """The ids of a text, int32 [T], held against its bytes as `byte_ends` does, and raising as it does.

    A typed "<0x41>", which some models take for the byte piece, is taken apart into characters.
    """
    found, normalized = np.array(ids, np.int32), normalize(tok, text)
    if tok.vocabulary.byte_names and "<0x" in normalized:
        data = normalized.encode("utf-8")
        ends = spelling.search(tok.vocabulary, tok.prefix, found, data, whole=True, names=True)
        if ends is not None and not np.array_equal(ends, np.cumsum(tok.vocabulary.sizes[found])):
            names = tok.vocabulary.byte_names
            sizes = np.diff(ends, prepend=0).tolist()
            pieces = [
                _spelled(tok, names[i].decode()) if i in names and size > 1 else [i] for i, size in zip(ids, sizes)
            ]
            found = np.array([i for piece in pieces for i in piece], np.int32)
    byte_ends(tok, found, normalized, whole=True, control=control)
    return found


def without_control(tok: TextTokenizer, ids: Sequence[int]) -> list[int]:
    """Ids of ordinary text, control tokens that the model itself has spelled taken apart into characters.

    Some models can: a Unigram model by its vocabulary, a BPE model by its merges or by `ignore_merges`.
    """
    names = tok.control_names
    if names.keys().isdisjoint(ids):
        return list(ids)
    return [piece for i in ids for piece in (_spelled(tok, names[i]) if i in names else [i])]


def _spelled(tok: TextTokenizer, name: str) -> list[int]:
    """A text as the tokens of its characters, or of their bytes."""

    def ids(pieces: Iterable[str]) -> list[int]:
        found = [tok.backend.token_to_id(piece) for piece in pieces]
        return [token_id for token_id in found if token_id is not None]

    if tok.byte_level:
        alphabet = {byte: chr(point) for point, byte in tokenizer_json.byte_alphabet().items()}
        return ids(alphabet[byte] for byte in name.encode("utf-8"))
    characters = name.replace(" ", tok.marker or " ")
    whole = {c: ids([c]) for c in characters if c not in tok.control}
    return [i for c in characters for i in whole.get(c) or ids(f"<0x{byte:02X}>" for byte in c.encode("utf-8"))]


def require_readable(tok: TextTokenizer, text: str) -> None:
    """Raises UserError for text that no tokenizer can read, and for text that poses as a control token's stand-in."""
    if posing := STAND_INS.search(text):
        raise UserError(
            f"The text {_excerpt(text, posing.start())} holds a number between the noncharacters U+FDD0 and "
            "U+FDD1, which are reserved here; remove them or drop the example."
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"The text {_excerpt(text, error.start)} has a lone surrogate (U+{ord(text[error.start]):04X}) at "
            f"character {error.start}, which no tokenizer ({tok.name!r}) can read; repair or drop the example."
        ) from error


def byte_ends(
    tok: TextTokenizer, ids: np.ndarray, normalized: str, whole: bool = False, control: bool = False
) -> np.ndarray:
    """Where each token ends in the bytes of N(text): int [T] -> int64 [T].

    normalized: N(text), see `normalize`. The dummy space counts zero bytes, so a token that is nothing else has the
    end of the token before it. ids may stop before the text does (truncation) unless `whole`. With `control` a control
    token spells its name, as in the text of a template; else it is refused.
    Raises UserError if the tokens do not spell the text.
    """
    ids = np.asarray(ids, np.int64)
    vocabulary = tok.vocabulary
    size = len(vocabulary.lengths)
    if len(ids) and (ids.min() < 0 or ids.max() >= size):
        raise UserError(f"An id outside 0..{size - 1} does not belong to the tokenizer {tok.name!r}.")
    lengths = (vocabulary.sizes if control else vocabulary.lengths)[ids]
    if (lengths == CONTROL).any():
        token_id = int(ids[np.argmax(lengths == CONTROL)])
        raise UserError(
            f"The special token {tok.backend.id_to_token(token_id) or token_id!r} (id {token_id}) of {tok.name!r} "
            "stands for no text: a character outside the vocabulary, or an end-of-turn token left in the ids."
        )
    text = normalized.encode("utf-8")
    data = np.frombuffer(text, np.uint8)
    ends, place = spelling.compare(vocabulary, tok.prefix, ids, data, whole)
    # A token at the end may have taken white space along, which its bytes alone do not show.
    takes_more = not whole and len(ids) and ids[-1] in vocabulary.added and vocabulary.added[ids[-1]].rstrip
    if ends is None or takes_more:
        ends = spelling.search(vocabulary, tok.prefix, ids, text, whole)
    if ends is None:
        if place < len(data) and int(data[place]) in vocabulary.missing:
            raise UserError(
                f"The tokenizer {tok.name!r} has no token for the byte 0x{data[place]:02X}, at byte {place} of "
                f"the text, near {_near(data, place)}; remove that character from the text or leave the example out."
            )
        raise UserError(
            f"The tokens of {tok.name!r} do not spell the text: they differ at byte {place}, near {_near(data, place)}."
        )
    return ends


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
    """How many control tokens' names stand in a text; as somebody's words they are encoded as ordinary text."""
    if not tok.names_control(text):
        return 0
    return sum(1 for _ in tok.control_pattern.finditer(text))


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
