"""Tokens and spans as text, for eyes."""

from __future__ import annotations

import re
from html import escape

import numpy as np

from ctpd_jax.schema import Aligned, TokenSide
from ctpd_jax.text.tokenizer_json import CONTROL
from ctpd_jax.text.tokens import TextTokenizer


def pieces(tokenizer: TextTokenizer, side: TokenSide, span: int) -> list[str]:
    """Return the text of each token of one span, in order, as `spelled` writes them."""
    return spelled(tokenizer, side.ids[side.span_ids == span])


def spelled(tokenizer: TextTokenizer, ids: np.ndarray) -> list[str]:
    """Return the text of each token, int32 [T].

    It is the tokens' own text, from the vocabulary: a dummy space in front is there, and bytes that are no whole
    character read <0xF0>. A special token reads as its name.
    """
    lengths, texts = tokenizer.vocabulary.lengths, []
    for token in ids.tolist():
        # A control token has no bytes of its own, and neither has an id past the vocabulary.
        if token >= len(lengths) or lengths[token] == CONTROL:
            texts.append(tokenizer.backend.id_to_token(token) or f"<id {token}>")
        else:
            texts.append(decode(tokenizer.token_bytes(token)))
    return texts


def decode(data: bytes) -> str:
    """Return UTF-8 as text; every byte that belongs to no whole character reads <0xF0>."""
    text = data.decode("utf-8", errors="surrogateescape")  # such a byte becomes U+DC00 and its value
    return re.sub("[\udc80-\udcff]", lambda found: f"<0x{ord(found[0]) - 0xDC00:02X}>", text)


def spans_html(aligned: Aligned, response: str, teacher: TextTokenizer, student: TextTokenizer) -> str:
    """Return a response's spans as HTML, the teacher's tokens above the student's: what a notebook shows."""
    data, boxes = response.encode("utf-8"), []
    # White space is kept, and no text of the response is anything but text.
    chip = '<code style="white-space:pre;border:1px solid #8886;border-radius:3px;margin:1px">{}</code>'
    for span in range(aligned.num_spans):
        text = data[aligned.bounds[span] : aligned.bounds[span + 1]].decode("utf-8", errors="replace")
        lines = [
            "".join(chip.format(escape(piece)) for piece in pieces(tokenizer, side, span))
            for tokenizer, side in ((teacher, aligned.teacher), (student, aligned.student))
        ]
        box = "display:inline-block;border:1px solid #8886;border-radius:4px;padding:2px 4px;margin:2px"
        boxes.append(f'<div style="{box}" title="{escape(text)}">{"<br>".join(lines)}</div>')
    return f"<div>{''.join(boxes)}</div>"
