"""A teacher and a student for the toy world, made on the spot: fresh weights, and tokenizers that disagree.

              teacher                                             student
    decoder   Gemma 3's (windows, q/k norms, scaled embedding)    Llama's
    tokenizer SentencePiece-like BPE: "▁", dummy prefix, bytes    byte-level BPE
              for what is rare, BOS in front
    chat      <start_of_turn> ... <end_of_turn>                   <|im_start|> ... <|im_end|>

The teacher's vocabulary holds most words whole, the student's their parts; rare accents, CJK and emoji are bytes, which
the two group differently.

That is the mismatch "word". Another one changes the teacher's tokenizer alone; the student and its start stay the same:

    near      byte-level BPE as the student's, a little larger     95 % of the spans are one to one
    word      as above                                             81 %
    unigram   a Unigram model of short pieces, with byte fallback  72 %
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import combinations
from math import log
from pathlib import Path
from typing import Any

import jax
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers import models as token_models
from transformers import PreTrainedTokenizerFast

from ctpd_jax.artifacts import local_path
from ctpd_jax.models.decoder import init_params
from ctpd_jax.models.hf import save_hf
from ctpd_jax.models.hf.config import from_hf
from toy.world import corpus

TEACHER_VOCAB, STUDENT_VOCAB, NEAR_VOCAB = 640, 512, 544
LONGEST_PIECE = 5  # of the Unigram teacher, in letters: most words are two pieces
FREQUENT_LETTERS = 12  # letters beyond ASCII that the teacher's tokenizer knows; the rest are bytes to it

TEACHER_SPECIALS = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]

TEACHER_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<start_of_turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{{ message['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
STUDENT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_toy_models(directory: str | os.PathLike[str], seed: int = 0, mismatch: str = "word") -> tuple[Path, Path]:
    """Write the two model folders.

    Args:
      directory: gets "teacher" and "student", in Hugging Face's format with tokenizer and chat template.
      seed: of the weights and of the text that the tokenizers are trained on.
      mismatch: of the tokenizers, a key of TEACHER_TOKENIZERS.

    Returns:
      The folders of teacher (about 0.85 M parameters) and student (about 0.35 M).
    """
    directory = local_path(directory)
    teacher, student = directory / "teacher", directory / "student"
    # The words of the chat templates are made frequent, so that the tokenizers learn them whole.
    texts = list(corpus(seed)) + 1000 * ["user\n", "model\n", "assistant\n"]
    keys = jax.random.split(jax.random.key(seed), 2)
    for folder, tokenizer, raw, key in (
        (teacher, TEACHER_TOKENIZERS[mismatch](texts), teacher_config(), keys[0]),
        (student, student_tokenizer(texts), student_config(), keys[1]),
    ):
        # 1. What depends on the tokenizer completes config.json.
        ids = {
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        config = from_hf(raw | ids, where=str(folder))
        # 2. Fresh weights, written as any model of the hub.
        save_hf(folder, config, init_params(config, key), tokenizer=tokenizer)
    return teacher, student


def teacher_config() -> dict[str, Any]:
    """config.json of the teacher, without what depends on its tokenizer."""
    return {
        "model_type": "gemma3_text",
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 32,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            "full_attention": {"rope_type": "default", "rope_theta": 100_000.0},
        },
        "max_position_embeddings": 512,
        "initializer_range": 0.05,
        "tie_word_embeddings": True,
    }


def student_config() -> dict[str, Any]:
    """config.json of the student, without what depends on its tokenizer."""
    return {
        "model_type": "llama",
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "max_position_embeddings": 512,
        "initializer_range": 0.05,
        "tie_word_embeddings": True,
    }


def teacher_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Return SentencePiece-like BPE: a space is "▁", a text gets one in front, rare characters are `<0xNN>` bytes."""
    # Rare letters beyond ASCII stay out of the vocabulary: they are what the two tokenizers cut differently.
    texts = list(texts)
    alphabet = _alphabet(texts)
    tokenizer = Tokenizer(token_models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = _words()
    trainer = trainers.BpeTrainer(
        vocab_size=TEACHER_VOCAB,
        special_tokens=TEACHER_SPECIALS + BYTES,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _sentencepiece(_without_added_tokens(tokenizer, TEACHER_SPECIALS))


def unigram_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Return a Unigram model with byte fallback, the same in all else as the teacher's of the mismatch "word"."""
    # 1. The parts of words that save most tokens, and single letters; their log-probabilities by how often they occur.
    # (The trainer of the library takes no piece that only one word has, and its sums differ from call to call.)
    texts = list(texts)
    letters = _alphabet(texts)
    words = Counter(word for text in texts for word, _ in _words().pre_tokenize_str(text))
    counts: Counter[str] = Counter()
    for word, count in words.items():
        for start, end in combinations(range(len(word) + 1), 2):
            part = word[start:end]
            if end - start <= LONGEST_PIECE and all(letter in letters for letter in part):
                counts[part] += count
    longer = sorted((part for part in counts if len(part) > 1), key=lambda p: (-counts[p] * (len(p) - 1), p))
    pieces = letters + longer[: TEACHER_VOCAB - len(TEACHER_SPECIALS) - len(BYTES) - len(letters)]
    total = sum(counts[piece] for piece in pieces)
    scored = [(piece, log(max(counts[piece], 1) / total)) for piece in pieces]
    # 2. With the special tokens and the bytes in front, which no text is likely to be cut into.
    vocabulary = [(piece, 0.0 if piece in TEACHER_SPECIALS else -20.0) for piece in TEACHER_SPECIALS + BYTES]
    unknown = TEACHER_SPECIALS.index("<unk>")
    model = token_models.Unigram([*vocabulary, *scored], unk_id=unknown, byte_fallback=True)
    return _sentencepiece(_without_added_tokens(Tokenizer(model), TEACHER_SPECIALS))


def near_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Return byte-level BPE with the teacher's special tokens: the student's tokenizer with more merges."""
    tokenizer = _byte_level(texts, NEAR_VOCAB, TEACHER_SPECIALS)
    return _teacher_fast(tokenizer)


def _alphabet(texts: Sequence[str]) -> list[str]:
    """Return the letters that the teacher knows whole, in full, because the trainer breaks ties at random."""
    counts = Counter(letter for letter in "".join(texts) if not letter.isascii())
    frequent = sorted(counts, key=lambda letter: (-counts[letter], letter))[:FREQUENT_LETTERS]
    return sorted({letter for text in texts for letter in text if letter.isascii()} - {" "} | {"▁", "\n", *frequent})


def _words() -> pre_tokenizers.PreTokenizer:
    """Keep words and punctuation apart in training. Pieces then keep them apart, so encoding need not split."""
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace("▁", prepend_scheme="always"), pre_tokenizers.Punctuation()]
    )


def _sentencepiece(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Have a trained tokenizer work as a SentencePiece model of the hub does."""
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _teacher_fast(tokenizer)


def _teacher_fast(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Return the tokenizer with BOS in front and the teacher's template."""
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A",
        pair="<bos> $A <bos> $B",
        special_tokens=[("<bos>", TEACHER_SPECIALS.index("<bos>"))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        chat_template=TEACHER_TEMPLATE,
    )


TEACHER_TOKENIZERS = {"near": near_tokenizer, "word": teacher_tokenizer, "unigram": unigram_tokenizer}


def student_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Return byte-level BPE with ChatML's markers; like SmolLM2's, its end of turn is its EOS and its padding."""
    return PreTrainedTokenizerFast(
        tokenizer_object=_byte_level(texts, STUDENT_VOCAB, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]),
        pad_token="<|im_end|>",
        eos_token="<|im_end|>",
        bos_token="<|im_start|>",
        unk_token="<|endoftext|>",
        chat_template=STUDENT_TEMPLATE,
    )


def _byte_level(texts: Iterable[str], vocabulary: int, specials: list[str]) -> Tokenizer:
    """Return trained byte-level BPE; its merges never cross the border between a word and the space before the next."""
    tokenizer = Tokenizer(token_models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _without_added_tokens(tokenizer: Tokenizer, specials: list[str]) -> Tokenizer:
    """Return the same tokenizer with `specials` alone as special tokens: training made the byte tokens special too."""
    raw = json.loads(tokenizer.to_str())
    raw["added_tokens"] = []
    raw["pre_tokenizer"] = None
    plain = Tokenizer.from_str(json.dumps(raw))
    plain.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in specials])
    return plain
