"""Random texts that are hard on tokenizers."""

from __future__ import annotations

import random
from collections.abc import Sequence

from helpers.small_tokenizers import HARD_TEXTS

PIECES = (
    *("\u0301", "\u0323", "\u0302\u0323", "\u0345", "\u0f73", "\u0344", "\u20dd", "\ufe0f", "\U0001d165"),  # marks
    *("\u1100", "\u1161", "\u11a8", "\uac00", "\uac01", "\ud55c", "\u1112\u1161\u11ab", "\ua960", "\ud7b0"),  # Hangul
    *("\u09c7\u09be", "\u0dd9\u0dcf\u0dca", "\u0915\u093c", "\u0958", "\u0e19\u0e49\u0e33", "\u304b\u3099"),
    *("\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0001f3f3\ufe0f\u200d\U0001f308", "\U0001f44d\U0001f3fd"),
    *("\U0001f1e9\U0001f1ea", "\U0001f1fa", "\U0001f600", "\U0001f3f4\U000e0067\U000e0062\U000e007f", "1\ufe0f\u20e3"),
    *("\u65e5\u672c\u8a9e", "\u4e2d\u6587\u3002", "\U00020000", "\uf900", "\u3000", "\u30fc"),
    *("\u202a", "\u202e", "\u2066", "\u2069", "\u200f", "\u200e", "\u061c", "\u05e9\u05b8\u05c1", "\u0634\u0643\u0631"),
    *("\x00", "\ufeff", "\x01", "\x1b[31m", "\x7f", "\x85", "\u2028", "\u2029", "\ufffd", "\uffff", "\ufdd0", "\ufdd1"),
    *("\t", "\t\t", "\r\n", "\n", "\n\n", "\r", " ", "  ", "    ", "\u00a0", "\u2003", "\u200b", "\v", "\f"),
    *("\ue000", "\uf8ff", "\U000f0000", "\U0010ffff", "\U000e0041", "\u2581", "\u2581\u2581", "\u0120", "\u010a"),
    *("\u00e9", "e\u0301", "\u1e69", "\u212b", "\u2126", "\u037e", "\ufb01", "\u01c4", "\u00bd", "\u0130", "\u00df"),
    *("The", " quick", "fox", "don't", " 1,000.50", "10_000", "x_1 ** 2", "{'a': [1]}", "# no", "</p>", "http://x.y/z"),
    *("<0x41>", "<0x0A><0xF0>", "<0x4", "<unk>", "[UNK]", "##ing", "</w>", "@@"),
    *("<|im_start|>user\n", "<|im_end|>\n", "<|im_start|>assistant\n", "[INST] ", " [/INST]", "<start_of_turn>model\n"),
    *("<|eot_id|>", "<|start_header_id|>user<|end_header_id|>\n\n", "<bos>", "<eos>", "<s>", "</s>", "<pad>"),
    *("\n\nHuman: ", "\n\nAssistant:", "<think>", "</think>", "<tool_call>", "/no_think", "<<SYS>>"),
)
_HARD = tuple(HARD_TEXTS.values())


def character(rng: random.Random) -> str:
    """Any character of any plane, assigned or not; no surrogate."""
    top = rng.choice((0x80, 0x250, 0x3000, 0x10000, 0x20000, 0x110000))
    point = rng.randrange(top)
    return chr(point) if not 0xD800 <= point < 0xE000 else "\ud7ff"


def part_of(rng: random.Random, text: str) -> str:
    start = rng.randrange(len(text) + 1)
    return text[start : start + rng.randrange(1, 12)]


def text(rng: random.Random, names: Sequence[str]) -> str:
    """A text, short mostly; `names` are those of added tokens, of which whole ones and parts are typed."""
    parts = []
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4, 7))):
        kind = rng.random()
        if kind < 0.42:
            parts.append(rng.choice(PIECES))
        elif kind < 0.62:
            parts.append(character(rng))
        elif kind < 0.74:
            parts.append(part_of(rng, rng.choice(_HARD)))
        elif kind < 0.82 and names:
            parts.append(rng.choice(names))
        elif kind < 0.86 and names:
            parts.append(part_of(rng, rng.choice(names)))
        else:
            parts.append(rng.choice((" ", " a", "b", ".", " the", "\n", "Z", "9")))
    # Of one in some hundreds a piece is a very long run.
    if rng.random() < 0.002:
        place = rng.randrange(len(parts))
        parts[place] = (parts[place] or "a") * rng.randrange(100, 1500)
    return "".join(parts)
