"""What a tokenizer.json says about its tokenizer: kind, normaliser, dummy space, bytes of the vocabulary.

Everything here reads the parsed JSON of the `tokenizers` library; nothing edits it. What cannot be lossless is refused
by the tokenizer's name; what is accepted is then tried on TEXTS (tokens.py).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import normalizers

from ctpd_jax.errors import UserError

CONTROL = -1  # "length" of a token that stands for no text
SPACE_MARKER = "\u2581"
# Bytes that a byte-level vocabulary may lack and still be useful (SmolLM2's lacks eight): control characters, and the
# first bytes of the planes 4 to 11 and 16, where no character is assigned. A text that has one is refused by encode.
DISPENSABLE = frozenset({*range(0x09), 0x0B, 0x0C, *range(0x0E, 0x20), 0x7F, 0xF1, 0xF2, 0xF4})
BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>\Z")

# Each text breaks some tokenizer: lossy normalisers, missing bytes, dropped or collapsed white space, offsets.
TEXTS = (
    "a",
    " a",
    "  a  b   c ",
    "Plain text, then code:\n\tif x_1 >= 10**3:\r\n\t\treturn 'ok'\n\n\n    # done\n",
    "\u00e9\u00c5\u212b\u2126 cafe\u0301 a\u0323\u0302 a\u0302\u0323 \u1e69 s\u0307\u0323",
    "\ufb01ne \uff21\uff22 \u00bd \u2460 \u00b2 \u2122 \u200b\u00a0\u3000|\u2028\u00ad",
    "\u1112\u1161\u11ab\u1100\u1173\u11af \ud55c\uae00",
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u0915\u093c \u0958",
    "\u65e5\u672c\u8a9e \u4e2d\u6587\u3002 \u304b\u3099",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f3f3\ufe0f\u200d\U0001f308 \U0001f44d\U0001f3fd",
    "\U0001f600",
    "Upper CASE \u0130\u00df `` '' -- ...",
    SPACE_MARKER + "x" + SPACE_MARKER,
    "<0x41> [UNK] <unk> </w> ##x",
    "".join(map(chr, (*range(0x20, 0x7F), *range(0xA0, 0x180)))),
    "\ufeff\ufffd\ue000\U000e0041",
)


@dataclass(frozen=True)
class Prefix:
    """When the tokenizer puts a dummy space in front of a text."""

    present: bool = False
    always: bool = False  # also before a text that starts with a space


@dataclass(frozen=True)
class Facts:
    """What kind of tokenizer it is."""

    byte_level: bool  # vocabulary in the byte-level alphabet, else pieces with a space marker and <0xNN>
    marker: str | None  # the space marker, if there is one
    form: str | None  # canonical normalisation: "NFC", "NFD" or None
    prefix: Prefix


def _flat(component: dict[str, Any] | None, inside: str) -> list[dict[str, Any]]:
    if component is None or component["type"] != "Sequence":
        return [component] if component else []
    return [part for child in component[inside] for part in _flat(child, inside)]


def _refuse(name: str, reason: str) -> UserError:
    return UserError(
        f"The tokenizer {name!r} is not supported: {reason} Aligning spans needs a lossless tokenizer: byte-level BPE, "
        "or BPE or Unigram with byte fallback, with no normaliser beyond NFC or NFD."
    )


def read_facts(state: dict[str, Any], name: str) -> Facts:
    """Read the kind of a tokenizer; raise UserError if its kind cannot be lossless."""
    # 1. The model.
    model = state["model"]
    kind = model.get("type", "?")
    if kind not in ("BPE", "Unigram"):
        raise _refuse(name, f"its model is {kind}, which drops white space and unknown characters.")
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise _refuse(name, f"its pieces carry the {key.replace('_', ' ')} {model[key]!r} instead of white space.")

    # 2. The normalisers: of several canonical forms the last one stands.
    form: str | None = None
    marker: str | None = None
    prefix = Prefix()
    byte_level = False
    for part in _flat(state["normalizer"], "normalizers"):
        kind = part["type"]
        if kind in ("NFC", "NFD"):
            form = kind
        elif kind == "Prepend" and part["prepend"] in (SPACE_MARKER, " "):
            prefix = Prefix(present=True, always=True)
        elif kind == "Replace" and part["pattern"].get("String") == " " and len(part["content"]) == 1:
            marker = part["content"]
        elif kind == "Replace":
            raise _refuse(name, f"its normaliser replaces {part['pattern']} by {part['content']!r}.")
        elif kind == "ByteLevel":
            byte_level = True
        elif kind != "Precompiled":
            raise _refuse(name, f"its normaliser {kind} rewrites the text.")
        elif part["precompiled_charsmap"]:
            raise _refuse(name, "its normaliser is a precompiled character map (NFKC), which rewrites the text.")

    # 3. The pre-tokenizers.
    for part in _flat(state["pre_tokenizer"], "pretokenizers"):
        if part["type"] == "Metaspace":
            marker = part["replacement"]
            dummy = part.get("prepend_scheme", "always") != "never"
        elif part["type"] == "ByteLevel":
            byte_level = True
            dummy = part["add_prefix_space"]
        else:
            continue
        if dummy and not prefix.present:
            prefix = Prefix(present=True)
    return Facts(byte_level, None if byte_level else marker, form, prefix)


def form_normalizer(form: str | None) -> Any:
    """Return the canonical normaliser of the `tokenizers` library; None without one."""
    return None if form is None else getattr(normalizers, form)()


# ------------------------------------------------------------------------------------------------ vocabulary


def byte_alphabet() -> dict[int, int]:
    """Map code points of the byte-level alphabet to bytes: printable Latin-1 as itself, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: byte for byte in printable} | {0x100 + i: byte for i, byte in enumerate(others)}


@dataclass(frozen=True)
class Added:
    """An added token: all that may stand for it in N(text), and which white space beside it it takes along."""

    spellings: tuple[bytes, ...]
    lstrip: bool
    rstrip: bool


@dataclass(frozen=True)
class Vocabulary:
    """The bytes of every token. What stands for no text has the length CONTROL."""

    lengths: np.ndarray  # int64 [V]
    sizes: np.ndarray  # int64 [V], the same with control tokens as their own names: how a template spells them
    starts: np.ndarray  # int64 [V], into the pool
    pool: np.ndarray  # uint8, the bytes of all tokens
    missing: frozenset[int]  # bytes that no token spells, all of them dispensable
    added: dict[int, Added]  # the tokens that are looked up in the text before the model reads it
    byte_names: dict[int, bytes]  # byte piece -> "<0x41>", which some models also read where somebody typed that


def read_vocabulary(state: dict[str, Any], facts: Facts, name: str) -> Vocabulary:
    """Read the bytes of every token, from the vocabulary alone; raise UserError if a byte that texts need has none."""
    # 1. Piece -> id, and the token of unknown characters.
    model = state["model"]
    if model["type"] == "Unigram":
        pieces = {piece: token_id for token_id, (piece, _) in enumerate(model["vocab"])}
        unknown = model.get("unk_id")
    else:
        pieces = model["vocab"]
        unknown = pieces.get(model.get("unk_token") or "")
    if not facts.byte_level and not model.get("byte_fallback"):
        raise _refuse(name, "its vocabulary has no byte fallback, so unknown characters are lost.")
    missing = _missing_bytes(pieces, facts, name)

    # 2. The bytes of the pieces. One outside the byte-level alphabet can never be produced from text.
    size = max([*pieces.values(), *(token["id"] for token in state["added_tokens"])], default=-1) + 1
    table: list[bytes | None] = [None] * size
    byte_names = {}
    alphabet = byte_alphabet()
    letters = set(map(chr, alphabet))
    for piece, token_id in pieces.items():
        if facts.byte_level:
            table[token_id] = piece.translate(alphabet).encode("latin-1") if letters.issuperset(piece) else None
        elif match := BYTE_PIECE.match(piece):
            table[token_id] = bytes([int(match[1], 16)])
            byte_names[token_id] = piece.encode("ascii")
        else:
            table[token_id] = _spaced(piece, facts)

    # 3. The added tokens, which may have a piece in the vocabulary too.
    added = {}
    for token in state["added_tokens"]:
        spellings = _added_spellings(token, facts, table[token["id"]])
        added[token["id"]] = Added(spellings, token["lstrip"], token["rstrip"])
        table[token["id"]] = spellings[0]

    # 4. All bytes one after another.
    sizes = np.fromiter((CONTROL if b is None else len(b) for b in table), np.int64, size)
    lengths = sizes.copy()
    if unknown is not None:
        lengths[unknown] = CONTROL
    stored = np.maximum(sizes, 0)
    pool = np.frombuffer(b"".join(b or b"" for b in table), np.uint8)
    return Vocabulary(lengths, sizes, np.cumsum(stored) - stored, pool, missing, added, byte_names)


def _spaced(text: str, facts: Facts) -> bytes:
    return (text.replace(facts.marker, " ") if facts.marker else text).encode("utf-8")


def _added_spellings(token: dict[str, Any], facts: Facts, piece: bytes | None) -> tuple[bytes, ...]:
    """Return what may stand for an added token in N(text), the likeliest first.

    One marked `normalized` is looked up as the normaliser leaves it, a space in front included; and the model may
    spell the same id, as a piece of its vocabulary, where the token was not found.
    """
    text = token["content"]
    normal = form_normalizer(facts.form).normalize_str(text) if facts.form else text
    found = [normal, text, " " + normal] if token["normalized"] else [text, normal]
    spelled = [_spaced(each, facts) for each in found]
    return tuple(dict.fromkeys(spelled if piece is None else [*spelled, piece]))


def _missing_bytes(pieces: dict[str, int], facts: Facts, name: str) -> frozenset[int]:
    """Return the bytes that no piece spells; raise UserError where texts need them."""
    letters = {byte: chr(point) for point, byte in byte_alphabet().items()}
    # From 0xF5 on no byte occurs in UTF-8.
    missing = set()
    for byte in range(0xF5):
        if facts.byte_level:
            spelled = letters[byte] in pieces
        else:  # below 0x80 the character itself may stand for its byte
            spelled = f"<0x{byte:02X}>" in pieces or (byte < 0x80 and chr(byte) in pieces)
        if not spelled and byte not in (0xC0, 0xC1):  # these, and F5..FF, never occur in UTF-8
            missing.add(byte)
    if needful := sorted(missing - DISPENSABLE):
        what = "its byte-level vocabulary" if facts.byte_level else "its byte fallback"
        shown = ", ".join(f"0x{byte:02X}" for byte in needful[:8]) + (", ..." if len(needful) > 8 else "")
        raise _refuse(name, f"{what} has no token for the bytes {shown}.")
    return frozenset(missing)
