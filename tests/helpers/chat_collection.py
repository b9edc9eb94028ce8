"""A collection of chat templates, what tokenizers they are tried on, and conversations that are hard on both."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from ctpd_jax.schema import Message
from ctpd_jax.text.templates import PromptTemplate, render_prompt

TEMPLATES = Path(__file__).with_name("chat_templates")


def render_text(template: PromptTemplate, messages: Sequence[Message]) -> str:
    """A prompt as one text."""
    return "".join(piece.text for piece in render_prompt(template, messages))


@dataclass(frozen=True)
class Case:
    """A template on one kind of tokenizer."""

    template: str  # of TEMPLATES
    kind: str  # of small_tokenizers
    real: str  # of the real tokenizers
    tokens: tuple[AddedToken, ...]  # that the tokenizer is given
    bos: str | None
    eos: str | None
    variables: tuple[str, ...] = ()  # switches that the template knows

    @property
    def source(self) -> str:
        return (TEMPLATES / f"{self.template}.jinja").read_text(encoding="utf-8")

    def give(self, core: Tokenizer) -> Tokenizer:
        """A copy of the tokenizer with the tokens."""
        given = Tokenizer.from_str(core.to_str())
        for token in self.tokens:  # one by one, so that each keeps its flags
            (given.add_special_tokens if token.special else given.add_tokens)([token])
        return given

    def names(self) -> dict[str, str]:
        """The special tokens as tokenizer_config.json names them."""
        return {key: name for key, name in (("bos_token", self.bos), ("eos_token", self.eos)) if name}


def special(*names: str, **flags: bool) -> tuple[AddedToken, ...]:
    return tuple(AddedToken(name, special=True, normalized=False, **flags) for name in names)


def added(*names: str, normalized: bool = True, **flags: bool) -> tuple[AddedToken, ...]:
    """As `add_tokens` has them: not special, and `normalized` unless told otherwise."""
    return tuple(AddedToken(name, special=False, normalized=normalized, **flags) for name in names)


# Ordinary words of a vocabulary, which anybody may type and no template frames its turns with.
_WORDS = added("<tool_call>", "</tool_call>", "<think>", "</think>", normalized=False)
_CHATML = ("<|im_start|>", "<|im_end|>")
_LLAMA3 = special("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>")
_GEMMA = (
    *special("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
    *added("\n", "\n\n", "\t", "\u2581\u2581", "<b>", "</b>", normalized=False),
)
_DEEPSEEK = special("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>")
_ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
_COMMAND = special("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>")
_GRANITE = special("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>")


def _cases() -> list[Case]:
    def add(template: str, kinds: str, real: str, tokens: Any, bos: str | None, eos: str | None, *variables: str):
        for kind in kinds.split():
            found.append(Case(template, kind, real, (*tokens, *_WORDS), bos, eos, variables))

    found: list[Case] = []
    im, end = "<|im_end|>", "<|endoftext|>"
    chatml = special(*_CHATML)
    add("qwen2", "byte-nfc", "smollm2", special(end, *_CHATML), None, im)
    add("qwen2.5", "byte-nfc byte-whole-words", "qwen2.5", special(end, *_CHATML), None, im)
    add("qwen3", "byte-nfc byte", "qwen2.5", special(end, *_CHATML), None, im, "enable_thinking")
    add("hermes", "byte", "llama3", (*_LLAMA3, *chatml), "<|begin_of_text|>", im)
    # Words that somebody has added to a vocabulary may stand in a template too.
    add("hermes", "byte-nfc", "smollm2", (*special(*_CHATML), *added("user", "assistant", "you", "\n")), None, im)
    # ChatML on a SentencePiece vocabulary, as fine-tunes add it: with and without the flags.
    add("hermes", "bpe-prepend unigram", "mistral-v0.1", chatml, "<s>", im)
    add("hermes", "bpe-prepend bpe-first unigram", "mistral-v0.1", added(*_CHATML, normalized=False), "<s>", "</s>")
    add("hermes", "bpe-prepend bpe-first bpe-no-dummy", "mistral-v0.1", added(*_CHATML), "<s>", "</s>")
    add("smollm2", "byte byte-dummy", "smollm2", special(end, *_CHATML), "<|im_start|>", im)
    add("smollm3", "byte", "llama3", special(end, *_CHATML), None, im, "enable_thinking")
    add("llama2", "bpe-prepend bpe-first unigram", "mistral-v0.1", (), "<s>", "</s>")
    add("llama3", "byte-whole-words byte", "llama3", _LLAMA3, "<|begin_of_text|>", "<|end_of_text|>")
    add("llama3.1", "byte-whole-words", "llama3", _LLAMA3, "<|begin_of_text|>", "<|eot_id|>")
    add("llama3.2", "byte-whole-words", "llama3", _LLAMA3, "<|begin_of_text|>", "<|eot_id|>")
    add("mistral-v0.1", "bpe-prepend unigram-never", "mistral-v0.1", (), "<s>", "</s>")
    inst = special("[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]")
    add("mistral-v0.3", "bpe-first bpe-prepend", "mistral-v0.1", inst, "<s>", "</s>")
    add("mistral-nemo", "byte", "smollm2", (*special("<s>", "</s>"), *inst), "<s>", "</s>")
    add("zephyr", "bpe-prepend unigram", "mistral-v0.1", (), "<s>", "</s>")
    add("gemma2", "bpe-no-dummy unigram-never", "gemma3", _GEMMA, "<bos>", "<eos>")
    add("gemma3", "bpe-no-dummy", "gemma3", _GEMMA, "<bos>", "<eos>")
    phi3 = special(*_ROLES, "<|end|>", rstrip=True)
    add("phi3", "bpe-prepend bpe-first", "mistral-v0.1", (*special(end), *phi3), "<s>", end)
    # The same, as a fine-tune keeps them that has lost the flag, and with white space taken from the left.
    add("phi3", "bpe-prepend", "mistral-v0.1", (*special(end), *added(*_ROLES, "<|end|>", rstrip=True)), "<s>", end)
    add("phi3-small", "byte", "smollm2", (*special(end), *special(*_ROLES, "<|end|>")), end, end)
    add("phi3-small", "byte", "smollm2", (*special(end), *special(*_ROLES, "<|end|>", lstrip=True)), end, end)
    add("phi4-mini", "byte", "qwen2.5", (*special(end), *phi3), end, end)
    add("phi4", "byte", "smollm2", special(end, *_CHATML, "<|im_sep|>", lstrip=True, rstrip=True), end, end)
    add("olmo2", "byte", "smollm2", special(end, *_ROLES), end, end)
    add("olmo2", "byte-nfd", "smollm2", special(end), end, end)
    add("tulu3", "byte", "smollm2", _LLAMA3, "<|begin_of_text|>", "<|end_of_text|>")
    add("deepseek-v2", "byte", "deepseek", _DEEPSEEK, _DEEPSEEK[0].content, _DEEPSEEK[1].content)
    turns = added("<｜User｜>", "<｜Assistant｜>", normalized=False)
    add("deepseek-r1", "byte byte-nfc", "deepseek", (*_DEEPSEEK, *turns), _DEEPSEEK[0].content, _DEEPSEEK[1].content)
    add("vicuna", "bpe-prepend bpe-prepend-nfc", "mistral-v0.1", (), "<s>", "</s>")
    add("alpaca", "bpe-prepend unigram-nfc", "mistral-v0.1", (), "<s>", "</s>")
    openchat = added("<|end_of_turn|>", "<|pad_0|>", normalized=False)
    add("openchat3.5", "bpe-prepend", "mistral-v0.1", openchat, "<s>", "<|end_of_turn|>")
    add("granite3", "byte", "smollm2", _GRANITE, "<|end_of_text|>", "<|end_of_text|>")
    add("command-r", "byte-nfc", "smollm2", (*special("<BOS_TOKEN>"), *_COMMAND), "<BOS_TOKEN>", _COMMAND[1].content)
    add("stablelm2", "byte-nfc", "smollm2", special(end, *_ROLES), end, end)
    add("nemotron", "unigram", "mistral-v0.1", special("<extra_id_0>", "<extra_id_1>"), "<s>", "</s>")
    add("nemotron", "unigram", "gemma3", added("<extra_id_0>", "<extra_id_1>", lstrip=True), "<s>", "</s>")
    add("grounded", "byte", "smollm2", (*_LLAMA3, *special(*_ROLES)), "<|begin_of_text|>", "<|eot_id|>")
    add("training", "byte-nfd", "smollm2", chatml, None, im)
    add("macros", "byte", "smollm2", _LLAMA3, "<|begin_of_text|>", "<|eot_id|>")
    add("numbered", "bpe-first", "mistral-v0.1", (), "<s>", "</s>")
    return found


CASES = _cases()

# ------------------------------------------------------------------------------------------------ conversations

_FRAGMENTS = (
    "Tell me about tea",
    "2 + 2 = 4?",
    "1,000.50 or 10_000",
    "don't",
    "caf\u00e9 cafe\u0301 \u212b",
    "\u65e5\u672c\u8a9e \u4e2d\u6587\u3002",
    "\ud55c\uad6d\uc5b4",
    "\U0001f600",
    "\U0001f44d\U0001f3fd \U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\u0634\u0643\u0631\u0627\u064b",
    "def f(x_1):\n    return x_1 ** 2\n",
    "\tif x:\n\t\treturn 1",
    "- one\n- two",
    "<b>bold</b> & {{ x }} {% if y %}",
    '{"a": [1, "b"]}',
    "<tool_call>",
    "<tool_call>f(1)</tool_call>",
    "<think>hm</think>",
    "a <think> b",
    "User: hi\n\nAssistant:",
    "### Response:",
    "<|im_",
    "d|>",
    "<",
    "|>",
    "[/",
    "\u2581x",
    "a\u00a0b\u3000c",
    "/no_think",
    "you",
)
_SEPARATORS = ("", " ", " ", " ", "\n", "  ", "\n\n", "\t", ". ")
_EDGES = ("", "", "", "", " ", "\n", "  \n", "\n\n", "\t")


def _text(rng: random.Random) -> str:
    if rng.random() < 0.08:
        return rng.choice(("", " ", "\n", " \n "))
    text = rng.choice(_EDGES)
    for number in range(rng.randint(1, 4)):
        text += (rng.choice(_SEPARATORS) if number else "") + rng.choice(_FRAGMENTS)
    return text + rng.choice(_EDGES)


def conversations(count: int, seed: int, prefill: bool = False) -> list[list[Message]]:
    """Conversations of 1 to 6 turns, most of which take turns; with `prefill` the last is begun by the assistant."""
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        roles = ["user", "assistant"] * 3
        roles = ["system"] * (rng.random() < 0.4) + roles[: rng.choice((1, 1, 3, 3, 5)) + prefill]
        if rng.random() < 0.1:
            roles = [*rng.choices(("user", "assistant", "system"), k=len(roles) - 1), roles[-1]]
        found.append([Message(role, _text(rng)) for role in roles])
    return found


def with_typed(turns: list[Message], names: list[str], seed: int) -> tuple[list[Message], list[Message], set[int]]:
    """The same conversation with control tokens' names, whole and in halves, typed into it; the same with an ordinary
    word in the place of each; and the messages that were touched."""
    rng = random.Random(seed)
    typed, clean, where = list(turns), list(turns), set()
    for index, message in enumerate(turns):
        if message.content.strip() and (rng.random() < 0.6 or (not where and index == len(turns) - 1)):
            text, name, other = message.content, rng.choice(names), rng.choice(names)
            form = rng.choice(("{0}", "{0}", " {0} ", "{0} {0}", "{0}\n", "{0}{1}"))
            half = rng.randrange(1, len(name))  # one that waits for the template, or for the next message
            cut = rng.choice((0, len(text), rng.randrange(len(text) + 1)))
            ends = rng.choice((("", ""), ("", ""), ("", name[:half]), (name[half:], "")))
            for found, words in ((typed, (name, other)), (clean, ("word", "word"))):
                left, right = (("word" if end and found is clean else end) for end in ends)
                found[index] = Message(message.role, left + text[:cut] + form.format(*words) + text[cut:] + right)
            where.add(index)
    return typed, clean, where
