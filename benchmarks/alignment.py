"""How long `align_ids` takes to cut a response into aligned spans, the token ids given; and that it is linear.

    python benchmarks/alignment.py                       # two small tokenizers, trained on the spot
    python benchmarks/alignment.py TEACHER STUDENT       # two folders or hub ids
    python benchmarks/alignment.py --json alignment.json

Four kinds of text, of 1,000, 10,000 and 100,000 characters. Each time is the least of several repeats: the best
estimate of what the work itself costs on a machine that does other things too.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import time
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from timing import write
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from ctpd_jax.errors import UserError
from ctpd_jax.text.spans import align_ids
from ctpd_jax.text.tokens import TextTokenizer, encode, load_tokenizer

LENGTHS = (1_000, 10_000, 100_000)
TARGET = 0.05  # seconds for the longest text

WORDS = {
    "ASCII prose": "the student reads what its teacher wrote and finds, in places, that both agree; a boundary shared "
    "by two tokenizers carries signal across. It doesn't matter (much) how long 3.14 or 2,718 of them are.",
    "CJK": "学生は先生の答えを読む。 两个分词器 共享的边界 才有意义， 한국어 문장도 있다. 切る場所は同じ、 三个字节。",
    "emoji and words": "so 👍🏽 fun 👨‍👩‍👧 yes 🇩🇪 ok ❤️ a 🚀 b 🙂🙂 naïve 🏳️‍🌈 the 🥐 costs 5€ — voilà ✨ and",
    "NFD": "Việt ngữ được viết bằng chữ Quốc ngữ à côté de l'été où naïveté déçoit über größere Bücher 한국어 ぱ ὥρα",
}


def text_of(kind: str, length: int) -> str:
    """`length` characters of a kind's words, in an order that does not repeat."""
    words = (unicodedata.normalize("NFD", WORDS[kind]) if kind == "NFD" else WORDS[kind]).split(" ")
    return " ".join(random.Random(0).choices(words, k=length))[:length]  # a word and its space have two or more


# ------------------------------------------------------------------------------------------------ tokenizers


def small_tokenizers() -> tuple[TextTokenizer, TextTokenizer]:
    """Byte-level BPE behind NFC, as Qwen's; and BPE with a space marker and byte fallback, as Llama 2's."""
    from transformers import PreTrainedTokenizerFast

    corpus = [text_of(kind, 20_000) for kind in WORDS]
    byte_level = Tokenizer(models.BPE())
    byte_level.normalizer = normalizers.NFC()
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    byte_level.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=1000, initial_alphabet=alphabet, show_progress=False)
    )

    byte_pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    marked = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    trainer = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=["<unk>", *byte_pieces], limit_alphabet=80, show_progress=False
    )
    marked.train_from_iterator(("▁" + word for text in corpus for word in text.split(" ")), trainer)
    state = json.loads(marked.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] == "<unk>"]
    marked = Tokenizer.from_str(json.dumps(state))
    marked.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    teacher, student = (
        load_tokenizer(PreTrainedTokenizerFast(tokenizer_object=core, name_or_path=name))
        for core, name in ((marked, "marked BPE"), (byte_level, "byte-level BPE, NFC"))
    )
    return teacher, student


# ------------------------------------------------------------------------------------------------ times


def measure(teacher: TextTokenizer, student: TextTokenizer, repeats: int) -> Iterator[dict[str, Any]]:
    """One record for each kind of text and length."""
    for kind, length in itertools.product(WORDS, LENGTHS):
        text = text_of(kind, length)
        ids = [np.asarray(encode(tok, text)) for tok in (teacher, student)]
        aligned = align_ids(text, teacher, ids[0], student, ids[1])
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            align_ids(text, teacher, ids[0], student, ids[1])
            seconds.append(time.perf_counter() - start)
        yield {
            "text": kind,
            "characters": length,
            "teacher_tokens": len(ids[0]),
            "student_tokens": len(ids[1]),
            "spans": aligned.num_spans,
            "seconds": min(seconds),
        }


def table(records: list[dict[str, Any]]) -> str:
    columns = "".join(f"{length:>12,}" for length in LENGTHS)
    lines = [f"{'text':18}{columns}  100k / 10k   tokens (teacher, student), spans at 100,000"]
    for kind in WORDS:
        own = {record["characters"]: record for record in records if record["text"] == kind}
        times = "".join(f"{1000 * own[length]['seconds']:>9.2f} ms" for length in LENGTHS)
        last = own[LENGTHS[-1]]
        ratio = last["seconds"] / own[LENGTHS[-2]]["seconds"]
        counts = f"{last['teacher_tokens']:,}, {last['student_tokens']:,}, {last['spans']:,}"
        lines.append(f"{kind:18}{times}  {ratio:>10.1f}   {counts}")
    slowest = max(record["seconds"] for record in records if record["characters"] == LENGTHS[-1])
    lines.append(f"Slowest at {LENGTHS[-1]:,} characters: {slowest:.3f} s (target: at most {TARGET} s)")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else None, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("tokenizers", nargs="*", metavar="TOKENIZER", help="none, or teacher and student")
    parser.add_argument("--repeats", type=int, default=15, help="the least time of so many")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the records there too")
    arguments = parser.parse_args()
    if len(arguments.tokenizers) not in (0, 2):
        parser.error("give two tokenizers, teacher and student, or none")
    if arguments.repeats < 1:
        parser.error("--repeats must be at least 1")
    try:
        pair = [load_tokenizer(source) for source in arguments.tokenizers] or small_tokenizers()
    except UserError as error:
        parser.error(str(error))
    records = list(measure(pair[0], pair[1], arguments.repeats))
    print(f"teacher: {pair[0].name}; student: {pair[1].name}")
    print(table(records))
    write(arguments.json, "alignment", teacher=pair[0].name, student=pair[1].name, records=records)


if __name__ == "__main__":
    main()
