"""Tokenizers of every supported kind, trained on the spot in a moment, and texts that are hard on them."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

MARKER = "\u2581"

HARD_TEXTS = {
    "empty": "",
    "space": " ",
    "plain": "The quick brown fox jumps over the lazy dog.",
    "runs of spaces": "  two  three   four    end  ",
    "line ends": "one\r\ntwo\n\n\nthree\rfour\r\n\r\n",
    "tabs": "\tif x:\n\t\treturn\t1\t",
    "code": "def f(x_1):\n    # comment\n    return {'a': [1.5e-3, 0xFF], \"b\": x_1 ** 2 != 10_000}\n",
    "emoji": "\U0001f600",
    "emoji in text": "so \U0001f600 much\U0001f44d\U0001f3fdfun \U0001f1e9\U0001f1ea!",
    "zero-width joiners": "a \U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f3f3\ufe0f\u200d\U0001f308",
    "cjk": "\u65e5\u672c\u8a9e\u306e\u6587\u7ae0\u3002\u4e2d\u6587\uff0c\u4f60\u597d\uff01 \U00020000\U0002a6d6",
    "kana with voicing marks": "\u304b\u3099\u30cf\u309a\u306f\u3099 \u304c",
    "devanagari": "\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e \u0915\u093c \u0958\u0959",
    "hangul": "\ud55c\uad6d\uc5b4 \ubb38\uc7a5",
    "hangul jamo": "\u1112\u1161\u11ab\u1100\u116e\u11a8 \u1100\u1100\u1161\u11a8\u11a8 \uac00\u11a8 \u1161\u11ab",
    "composed": "\u00e9\u00e8 na\u00efve \u1ec7 \u01d8",
    "decomposed": "cafe\u0301 nai\u0308ve Vie\u0323\u0302t u\u0308\u0301",
    "reordered marks": "a\u0302\u0323 a\u0323\u0302 s\u0307\u0323 q\u0301\u0323\u0327 a\u0302\u0331 \u0344",
    "marks at the start": "\u0301\u0323abc",
    "ligatures": "\ufb01nd the o\ufb03ce, \ufb02y \u0132 \u01c4 \ufdfa",
    "singletons": "\u2126 \u212b \u212a \u037e \u0387 \u1fef \uf900",
    "compatibility": "\u00bd \u2460 \uff21\uff22\uff23 \u00b2\u2122 \u3392",
    "bengali": "\u0995\u09c7\u09be \u09c7\u09d7 \u0b47\u0b3e \u0dd9\u0dcf\u0dca",
    "special tokens": "say <|im_end|> or </s> or <s>, <|endoftext|><bos> <unk> <|eot_id|>\n<|im_start|>user",
    "byte pieces": "print <0x41> and <0x0A><0xF0>",
    "space markers": f"a{MARKER}b {MARKER}{MARKER} c{MARKER}",
    "invisible": "a\u200bb\u00adc\ufeffd\u2028e\u00a0f\u3000g",
    "right to left": "\u0634\u0643\u0631\u0627\u064b \u05e9\u05b8\u05c1\u05dc\u05d5\u05b9\u05dd",
    "thai": "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35\u0e04\u0e33 \u0e19\u0e49\u0e33",
    "many marks": "z" + "\u0301\u0323\u0334" * 20 + "a\u0323" + "\u0302" * 30 + "!",
    "private use": "\ue000\U000f0000",
}

TRAINING = [
    "The quick brown fox jumps over the lazy dog. The dog sleeps; the fox runs over the hill and over the bridge.",
    "def function(value):\n    return value ** 2\n\n    if value:\n\t\tpass\n",
    "caf\u00e9 na\u00efve \u00e9t\u00e9 cafe\u0301 e\u0301te\u0301 Vi\u1ec7t",
    "\ud55c\uad6d\uc5b4 \ubb38\uc7a5 \ud55c\uad6d \u65e5\u672c\u8a9e \u4e2d\u6587 \u65e5\u672c",
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u0928\u092e\u0938\u094d\u0924\u0947",
    "so \U0001f600 much \U0001f600 fun \U0001f44d\U0001f44d  two  spaces   three    four",
    "  leading and trailing  ",
]
BYTE_PIECES = [f"<0x{byte:02X}>" for byte in range(256)]
SPECIALS = ["<unk>", "<s>", "</s>"]


def _byte_level(form: str | None = None, dummy_space: bool = False, ignore_merges: bool = False) -> Tokenizer:
    core = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    if form:
        core.normalizer = getattr(normalizers, form)()
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=dummy_space)
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(TRAINING * 4, trainer)
    core.post_processor = processors.ByteLevel(trim_offsets=True)
    return core


def _bpe_pieces(style: str, form: str | None = None) -> Tokenizer:
    """SentencePiece-style BPE with byte fallback; style "normalizer" as Llama 2, "first" or "always" by Metaspace."""
    core = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    parts: list[Any] = [getattr(normalizers, form)()] if form else []
    if style in ("normalizer", "none"):
        parts += [normalizers.Prepend(MARKER)] if style == "normalizer" else []
        core.normalizer = normalizers.Sequence([*parts, normalizers.Replace(" ", MARKER)])
    else:
        if form:
            core.normalizer = normalizers.Sequence(parts)
        core.pre_tokenizer = pre_tokenizers.Metaspace(MARKER, prepend_scheme=style, split=False)
    trainer = trainers.BpeTrainer(
        vocab_size=560, special_tokens=SPECIALS + BYTE_PIECES, limit_alphabet=60, show_progress=False
    )
    core.train_from_iterator([part for text in TRAINING * 4 for part in (text, *text.split())], trainer)
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return _only_real_specials(core)


def _unigram(style: str, form: str | None = None, prepend: bool = False) -> Tokenizer:
    core = Tokenizer(models.Unigram())
    if form:
        core.normalizer = getattr(normalizers, form)()
    core.pre_tokenizer = pre_tokenizers.Metaspace(MARKER, prepend_scheme=style)
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=SPECIALS, unk_token="<unk>", show_progress=False)
    core.train_from_iterator(TRAINING * 4, trainer)
    state = json.loads(core.to_str())
    # As sentencepiece has it: byte pieces of score 0 in the vocabulary, looked up only for unknown characters.
    kept = [row for row in state["model"]["vocab"] if len(row[0]) > 1 or row[0] < "\u1100" or row[0] == MARKER]
    state["model"]["vocab"] = kept[:3] + [[piece, 0.0] for piece in BYTE_PIECES] + kept[3:]
    state["model"]["byte_fallback"] = True
    return Tokenizer.from_str(json.dumps(state))


def _only_real_specials(core: Tokenizer) -> Tokenizer:
    """The trainer knows byte pieces only as special tokens; a tokenizer made from SentencePiece does not."""
    state = json.loads(core.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in SPECIALS]
    return Tokenizer.from_str(json.dumps(state))


_KINDS = {
    "byte": lambda: _byte_level(),
    "byte-nfc": lambda: _byte_level("NFC"),
    "byte-nfd": lambda: _byte_level("NFD"),
    "byte-dummy": lambda: _byte_level(dummy_space=True),
    "byte-whole-words": lambda: _byte_level(ignore_merges=True),
    "bpe-prepend": lambda: _bpe_pieces("normalizer"),
    "bpe-prepend-nfc": lambda: _bpe_pieces("normalizer", "NFC"),
    "bpe-no-dummy": lambda: _bpe_pieces("none"),
    "bpe-first": lambda: _bpe_pieces("first"),
    "unigram": lambda: _unigram("always"),
    "unigram-nfc": lambda: _unigram("always", "NFC"),
    "unigram-never": lambda: _unigram("never"),
}
KINDS = tuple(_KINDS)
FORMS = {"byte-nfc": "NFC", "byte-nfd": "NFD", "bpe-prepend-nfc": "NFC", "unigram-nfc": "NFC", "qwen2.5": "NFC"}


@cache
def core(kind: str) -> Tokenizer:
    return _KINDS[kind]()


def fast(tokenizer: Tokenizer, **specials: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **specials)


@cache
def small(kind: str) -> Any:
    """The probed TextTokenizer of one kind."""
    from ctpd_jax.text.tokens import load_tokenizer

    return load_tokenizer(fast(core(kind)))
