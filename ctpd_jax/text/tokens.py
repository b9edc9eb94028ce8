"""One tokenizer, tried out: text -> ids, and where each token ends in the bytes of the text.

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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer

from ctpd_jax.errors import UserError
from ctpd_jax.text import backends, spelling, tokenizer_json
from ctpd_jax.text.cuts import clean_cuts, code_points, utf8_lengths
from ctpd_jax.text.spelling import Spelt
from ctpd_jax.text.tokenizer_json import CONTROL, Prefix, Vocabulary

BORDER = 64  # characters on either side of a border that decide whether a token reaches over it


@dataclass(frozen=True, eq=False)
class TextTokenizer:
    """A tokenizer that was tried out. Compare two of them by `fingerprint`, never by vocabulary size."""

    name: str  # as the user gave it, for messages
    hf: Any  # the PreTrainedTokenizerFast as loaded: names of tokens, chat template, decode. Encode with `encode`.
    backend: Tokenizer = field(repr=False)  # tokenizer.json as it stands: for templates
    ordinary: Tokenizer = field(repr=False)  # the copy to which the names of control tokens are ordinary text
    fingerprint: str  # sha256 of the tokenizer's content and control tokens, from the folder or from memory alike
    bos_id: int | None  # the token that the tokenizer's own post-processor puts in front, if it does
    byte_level: bool  # this and the next three: see tokenizer_json.Facts
    marker: str | None
    form: str | None
    prefix: Prefix
    vocabulary: Vocabulary = field(repr=False)  # the bytes of every token
    control: dict[str, int] = field(repr=False)  # tokens that never come from somebody's words -> id
    stand_ins: dict[int, int] = field(repr=False)  # id of a stand-in in `ordinary` -> the control token's
    _normalizer: Any = field(repr=False)  # of the tokenizers library, without the dummy space; None if no form

    def __deepcopy__(self, memo: dict[int, Any]) -> TextTokenizer:
        return self  # nothing in it ever changes

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that a token stands for; empty for control tokens."""
        start, length = int(self.vocabulary.starts[token_id]), max(int(self.vocabulary.lengths[token_id]), 0)
        return self.vocabulary.pool[start : start + length].tobytes()

    @cached_property
    def eos_id(self) -> int | None:
        """The id of the token that the folder calls eos_token; None if it names none."""
        return None if self.hf.eos_token is None else self.backend.token_to_id(self.hf.eos_token)

    # Added tokens and control tokens by id and by name, and patterns that find their names in a text.
    @cached_property
    def added(self) -> dict[int, AddedToken]:
        return self.backend.get_added_tokens_decoder()

    @cached_property
    def ids_of_added(self) -> dict[str, int]:
        return {token.content: token_id for token_id, token in self.added.items()}

    @cached_property
    def added_pattern(self) -> re.Pattern[str]:
        return _pattern(self.ids_of_added)

    @cached_property
    def control_names(self) -> dict[int, str]:
        return {token_id: name for name, token_id in self.control.items()}

    @cached_property
    def control_pattern(self) -> re.Pattern[str]:
        return _pattern(self.control)


def _pattern(names: Iterable[str]) -> re.Pattern[str]:
    # The longest first, as the tokenizer looks for them; without names a pattern that matches nothing.
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or r"(?!)")


def normalize(tok: TextTokenizer, text: str) -> str:
    """Return N(text): what the bytes of the text's tokens spell, without the dummy space."""
    if tok._normalizer is not None:
        text = tok._normalizer.normalize_str(text)
    return text.replace(tok.marker, " ") if tok.marker else text


# ------------------------------------------------------------------------------------------------ loading


def load_tokenizer(source: Any) -> TextTokenizer:
    """Load a tokenizer from a folder, a hub name, a transformers fast tokenizer or a TextTokenizer.

    Raises UserError if it is not lossless: its tokens must spell the text back, up to canonical equivalence (NFC, NFD)
    and a dummy space in front.
    """
    if isinstance(source, TextTokenizer):
        return source
    if hasattr(source, "backend_tokenizer") or hasattr(source, "convert_tokens_to_ids"):
        # An object is tried once, and once more when it has grown or its special tokens have other names.
        return _of_object(source, len(source), str(getattr(source, "special_tokens_map", None)))
    hf, content = backends.open_tokenizer(str(source))
    return _of_content(hf, content, str(source))


@lru_cache(maxsize=16)
def _of_object(hf: Any, size: int, special_tokens: str) -> TextTokenizer:
    name = getattr(hf, "name_or_path", "") or type(hf).__name__
    if not getattr(hf, "is_fast", False) or not hasattr(hf, "backend_tokenizer"):
        raise UserError(
            f"The tokenizer {name!r} has no fast version (a tokenizer.json), and only those give access to their "
            "vocabulary's bytes; convert it with transformers' convert_slow_tokenizer and save it."
        )
    return _of_content(hf, hf.backend_tokenizer.to_str(), name)


def _of_content(hf: Any, content: str, name: str) -> TextTokenizer:
    """Make a tokenizer of the content of tokenizer.json, whose ids are the truth; `hf` names its special tokens."""
    backend = backends.without_limits(content)
    state = json.loads(backend.to_str())
    # 1. What would have other ids here than elsewhere. The library numbers anew what does not follow the vocabulary
    # without a gap, and a token that only the settings name would be text here and a token to transformers.
    for token in backends.written_added_tokens(content):
        if backend.token_to_id(token["content"]) != token["id"]:
            raise UserError(
                f"The tokenizer {name!r} gives the added token {token['content']!r} the id {token['id']}, but reads it "
                f"as {backend.token_to_id(token['content'])}; repair its tokenizer.json or take the original one."
            )
    there = {token.content: token_id for token_id, token in backend.get_added_tokens_decoder().items()}
    never_read = {hf.pad_token, hf.unk_token} - {hf.eos_token, hf.bos_token}
    for token, token_id in hf.get_added_vocab().items():
        if there.get(token) != token_id and token not in never_read:
            raise UserError(
                f"The tokenizer {name!r} names the token {token!r} (id {token_id}) in tokenizer_config.json, but the "
                "added tokens of its tokenizer.json do not have it; load it with transformers, save it again, and take "
                "that folder."
            )
    # 2. What it is, and whether that can be lossless.
    facts = tokenizer_json.read_facts(state, name)
    tok = TextTokenizer(
        name=name,
        hf=hf,
        backend=backend,
        ordinary=backend,
        fingerprint="",
        bos_id=backends.bos_of_post_processor(hf, name),
        byte_level=facts.byte_level,
        marker=facts.marker,
        form=facts.form,
        prefix=facts.prefix,
        vocabulary=tokenizer_json.read_vocabulary(state, facts, name),
        control={},
        stand_ins={},
        _normalizer=tokenizer_json.form_normalizer(facts.form),
    )
    # 3. Its copy for ordinary text; both are tried out.
    special = {str(token) for token in hf.all_special_tokens}
    return with_control(tok, (t["content"] for t in state["added_tokens"] if t["special"] or t["content"] in special))


def with_control(tok: TextTokenizer, names: Iterable[str]) -> TextTokenizer:
    """Return the tokenizer to which these added tokens are control tokens too, flagged as special or not.

    Raises UserError as `load_tokenizer` does.
    """
    control = tok.control.keys() | tok.ids_of_added.keys() & set(names)
    if tok.fingerprint and control == tok.control.keys():
        return tok
    # The copy reads them as text, and in ids of ordinary text they stand for nothing.
    ids = {token: tok.ids_of_added[token] for token in sorted(control)}
    content = tok.backend.to_str()
    ordinary, stand_ins = backends.ordinary_copy(Tokenizer.from_str(content), ids)
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
    """Hold the copy against the original, and both against the bytes of texts."""
    # 1. The copy has the added tokens under their ids.
    there = tok.ordinary.get_added_tokens_decoder()
    for token_id, token in tok.added.items():
        if token_id not in there or there[token_id].content != token.content:
            raise UserError(f"The tokenizer {tok.name!r} cannot be copied: {token.content!r} loses its id {token_id}.")
    # 2. Texts are spelled: hard ones, ordinary added tokens, and control tokens that somebody typed.
    texts = list(tokenizer_json.TEXTS)
    for word in (token.content for token in tok.added.values() if token.content not in tok.control):
        texts += [word, f"{word}{word}", f"x.{word} {word}\n{word}y", f" a {word}  b"]
    typed = [text for text in tokenizer_json.TEXTS if tok.control_pattern.search(text)]
    texts = [text for text in texts if not tok.control_pattern.search(text)]
    names = list(tok.control)
    typed += [*names[:16], *("a {} b ".format(" ".join(names[i : i + 64])) for i in range(0, len(names), 64))]
    try:
        found = encode_batch(tok, texts)
        encode_batch(tok, typed)
    except UserError as error:
        raise UserError(f"The tokenizer {tok.name!r} is not lossless and cannot be aligned. {error}") from error
    # 3. Where no control token was typed, the ids are those of the original.
    theirs = backends.encoded(tok.backend, texts, tok.name)
    for text, ids, encoding in zip(texts, found, theirs, strict=True):
        if ids.tolist() != encoding.ids:
            raise UserError(
                f"The tokenizer {tok.name!r} cannot be copied: {text[:60]!r} would get the ids {ids.tolist()[:12]} "
                f"instead of {encoding.ids[:12]}."
            )


# ------------------------------------------------------------------------------------------------ encoding


def encode(tok: TextTokenizer, text: str) -> np.ndarray:
    """Encode ordinary text as int32 [T]: no BOS, no end-of-turn, and "<|im_end|>" typed in it is letters and signs.

    Raises UserError if the tokens do not spell N(text) byte for byte.
    """
    return encode_batch(tok, [text])[0]


def encode_batch(tok: TextTokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """Do `encode` for several texts at once, on all cores: int32 [T] each."""
    return [spelt.ids for spelt in spell_batch(tok, texts)]


def spell_batch(tok: TextTokenizer, texts: Sequence[str]) -> list[Spelt]:
    """Do `encode_batch`, and keep where the tokens end, which is found on the way."""
    for text in texts:
        require_readable(tok, text)
    encodings = backends.encoded(tok.ordinary, texts, tok.name)
    return [spelling_of(tok, without_control(tok, encoding.ids), text) for text, encoding in zip(texts, encodings)]


def spelling_of(tok: TextTokenizer, ids: Sequence[int], text: str, control: bool = False) -> Spelt:
    """Return the ids of a text after `byte_ends` has held them against its bytes.

    A typed "<0x41>", which some models take for the byte piece, is taken apart into characters.
    """
    normalized = normalize(tok, text)
    names = tok.vocabulary.byte_names
    found = np.array(ids, np.int32)
    if names and "<0x" in normalized:
        ends = spelling.search(tok.vocabulary, tok.prefix, found, normalized.encode("utf-8"), whole=True, names=True)
        if ends is not None and not np.array_equal(ends, np.cumsum(tok.vocabulary.sizes[found])):
            # A token longer than its byte is one that was typed.
            apart: list[int] = []
            for token_id, size in zip(ids, np.diff(ends, prepend=0).tolist()):
                typed = token_id in names and size > 1
                apart += _in_characters(tok, names[token_id].decode()) if typed else [token_id]
            found = np.array(apart, np.int32)
    return Spelt(found, byte_ends(tok, found, normalized, whole=True, control=control), normalized)


def without_control(tok: TextTokenizer, ids: Sequence[int]) -> list[int]:
    """Take control tokens that the model itself has spelled in ordinary text apart into characters.

    Some models can: a Unigram model by its vocabulary, a BPE model by its merges or by `ignore_merges`.
    """
    names = tok.control_names
    if names.keys().isdisjoint(ids):
        return list(ids)
    return [piece for i in ids for piece in (_in_characters(tok, names[i]) if i in names else [i])]


def _in_characters(tok: TextTokenizer, text: str) -> list[int]:
    """Encode a text as the tokens of its characters, or of their bytes."""
    if tok.byte_level:
        alphabet = {byte: chr(point) for point, byte in tokenizer_json.byte_alphabet().items()}
        pieces = [alphabet[byte] for byte in text.encode("utf-8")]
    else:
        pieces = []
        for character in text.replace(" ", tok.marker or " "):
            whole = character not in tok.control and tok.backend.token_to_id(character) is not None
            pieces += [character] if whole else [f"<0x{byte:02X}>" for byte in character.encode("utf-8")]
    found = map(tok.backend.token_to_id, pieces)
    return [token_id for token_id in found if token_id is not None]


def require_readable(tok: TextTokenizer, text: str) -> None:
    """Raise UserError for text that no tokenizer can read, and for text that poses as a control token's stand-in."""
    if posing := backends.STAND_INS.search(text):
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
    """Return where each token ends in the bytes of N(text), which is `normalized`: int [T] -> int64 [T].

    The dummy space counts zero bytes: a token that is nothing else has the end of the token before it. ids may stop
    before the text does (truncation) unless `whole`. With `control` a control token spells its name, as in the text of
    a template; else it is refused. Raises UserError if the tokens do not spell the text.
    """
    # 1. Every id stands for bytes.
    ids = np.asarray(ids, np.int64)
    vocabulary = tok.vocabulary
    size = len(vocabulary.lengths)
    if len(ids) and (ids.min() < 0 or ids.max() >= size):
        raise UserError(f"An id outside 0..{size - 1} does not belong to the tokenizer {tok.name!r}.")
    silent = (vocabulary.sizes if control else vocabulary.lengths)[ids] == CONTROL
    if silent.any():
        token_id = int(ids[np.argmax(silent)])
        raise UserError(
            f"The special token {tok.backend.id_to_token(token_id) or token_id!r} (id {token_id}) of {tok.name!r} "
            "stands for no text: a character outside the vocabulary, or an end-of-turn token left in the ids."
        )
    # 2. One comparison, or the search. A token at the end may have taken white space along, which its bytes alone do
    # not show.
    text = normalized.encode("utf-8")
    data = np.frombuffer(text, np.uint8)
    ends, place = spelling.compare(vocabulary, tok.prefix, ids, data, whole)
    takes_more = not whole and len(ids) and ids[-1] in vocabulary.added and vocabulary.added[ids[-1]].rstrip
    if ends is None or takes_more:
        ends = spelling.search(vocabulary, tok.prefix, ids, text, whole)
    if ends is not None:
        return ends
    # 3. The first byte that differs.
    near = ascii(text[max(0, place - 12) : place + 12].decode("utf-8", "replace"))
    if place < len(text) and text[place] in vocabulary.missing:
        raise UserError(
            f"The tokenizer {tok.name!r} has no token for the byte 0x{text[place]:02X}, at byte {place} of "
            f"the text, near {near}; remove that character from the text or leave the example out."
        )
    raise UserError(f"The tokens of {tok.name!r} do not spell the text: they differ at byte {place}, near {near}.")


def cut_offsets(tok: TextTokenizer, text: str, normalized: str) -> np.ndarray:
    """Return the byte offset in N(text) of each character that N can be cut before, else -1: int64 [n + 1]."""
    marker = tok.marker

    def plain(part: str) -> str:
        return part.replace(marker, " ") if marker else part

    if tok.form is not None and normalized != plain(text):
        return clean_cuts(text, lambda part: normalize(tok, part), plain)
    # A normalised text has normalised prefixes and suffixes: it can be cut anywhere.
    points = code_points(text)
    lengths = utf8_lengths(points)
    if marker:
        lengths[points == ord(marker)] = 1
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])


def merges_across(tok: TextTokenizer, contexts: Sequence[str], responses: Sequence[str]) -> int:
    """Count in how many places encoding context + response at once would give a token that reaches over their border.

    contexts: ordinary text before each response. The two are always encoded apart; this only counts where it matters.
    """
    # A token that reaches over the border is decided long before the response ends.
    heads = [(context, response[:BORDER]) for context, response in zip(contexts, responses) if context and response]
    count = 0
    for (context, head), spelt in zip(heads, spell_batch(tok, [context + head for context, head in heads])):
        border = int(cut_offsets(tok, context + head, spelt.normalized)[len(context)])
        count += border < 0 or border not in spelt.ends
    return count


def can_spell(tok: TextTokenizer, text: str) -> bool:
    """Tell whether the vocabulary has every byte of the text; a few lack control characters, which `encode` refuses."""
    return not tok.vocabulary.missing or tok.vocabulary.missing.isdisjoint(normalize(tok, text).encode("utf-8"))


def _excerpt(text: str, place: int) -> str:
    return ascii(text[max(0, place - 12) : place + 12])
