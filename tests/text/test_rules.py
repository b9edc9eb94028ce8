"""A change of tokens or spans must come with another RULES: else a run goes on with what older rules have made.

The golden file holds one digest per awkward pair, and the RULES that it was written under. After an intended change:
raise text.prepare.RULES and run `python tests/text/test_rules.py`.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ctpd_jax.schema import Message, PreferencePair
from ctpd_jax.text.prepare import RULES, Limits, prepare_pairs
from ctpd_jax.text.prompts import TextModel
from ctpd_jax.text.templates import PromptTemplate, load_template
from ctpd_jax.text.tokens import load_tokenizer

GOLDEN = Path(__file__).with_name("rules.json")
STALE = (
    "the same pairs now give other tokens or spans: raise text.prepare.RULES and run `python tests/text/test_rules.py` "
    "to write the golden file anew"
)
MARKER = "\u2581"
WORDS = ("the", "fox", "cafe", "ing", "  ", "yes", "no", "\u00e9", "\U0001f600", "</s>", "im_end")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ANSWERS = {
    "plain": ("the fox, then the fox.", "  no\n\n"),
    "white space": ("  two  \r\n\t\tspaces ", "\u00a0\u3000yes"),
    "marks": ("cafe\u0301 Vie\u0323\u0302t a\u0302\u0323 \u212b", "e\u0301" * 9 + "z" + "\u0301\u0323" * 20),
    "emoji": ("\U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0001f44d\U0001f3fd yes"),
    "hangul and nagari": ("\u1112\u1161\u11ab \ud55c\uae00", "\u0928\u092e\u0938\u094d\u0924\u0947 \u0958"),
    "typed tokens": ("say <|im_end|> or </s> or [word]  fox", "<0x41><0x0A> <s>[word]"),
    "space markers": (f"a{MARKER}b {MARKER}{MARKER}the", f"{MARKER}fox"),
    "long": ("the fox " * 20 + "yes", "the fox"),
}


# ------------------------------------------------------------------------------------------------ models


def spelled_out(alphabet: list[str], words: tuple[str, ...]) -> models.BPE:
    """A BPE model that merges these words from the left, and nothing else: the same in every version of the library."""
    pieces, merges = dict.fromkeys(alphabet), []
    for word in words:
        for end in range(1, len(word)):
            merges.append((word[:end], word[end]))
            pieces |= dict.fromkeys((word[:end], word[end], word[: end + 1]))
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    return models.BPE(vocabulary, list(dict.fromkeys(merges)), byte_fallback="<0x00>" in vocabulary, unk_token=None)


def byte_level(form: str | None) -> Tokenizer:
    """As GPT-2 and its kin; with "NFC" as Qwen."""
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = tuple(split.pre_tokenize_str(word)[0][0] for word in WORDS)
    core = Tokenizer(spelled_out(sorted(pre_tokenizers.ByteLevel.alphabet()), words))
    core.normalizer = getattr(normalizers, form)() if form else None
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return core


def sentence_pieces() -> Tokenizer:
    """As Llama 2: byte fallback, a space marker, a dummy space in front, BOS; an added token that takes space along."""
    alphabet = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), MARKER, *map(chr, range(0x21, 0x7F))]
    words = tuple(start + word.replace(" ", MARKER) for word in WORDS for start in ("", MARKER))
    core = Tokenizer(spelled_out(alphabet, words))
    core.normalizer = normalizers.Sequence([normalizers.Prepend(MARKER), normalizers.Replace(" ", MARKER)])
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    core.add_special_tokens(["<s>", "</s>"])
    core.add_tokens([AddedToken("[word]", rstrip=True)])
    return core


def model(core: Tokenizer, end: str, template: str | None = None) -> TextModel:
    tokenizer = load_tokenizer(PreTrainedTokenizerFast(tokenizer_object=core, eos_token=end, chat_template=template))
    chosen = load_template(tokenizer) if template else PromptTemplate("plain", "\n\n")
    return TextModel(tokenizer, chosen, core.token_to_id(end))


# ------------------------------------------------------------------------------------------------ digests


def digests() -> dict[str, str]:
    """Case -> digest of everything that training reads of it."""
    teacher = model(sentence_pieces(), "</s>")
    students = {form: model(byte_level(form), "<|im_end|>", CHATML) for form in (None, "NFC")}
    limits = {
        "wide": Limits(500, 500),
        "narrow, in bytes": Limits(40, 12, "byte"),
        "open": Limits(40, 12, "character", False),
    }
    found = {}
    for name, (chosen, rejected) in ANSWERS.items():
        prompt = (Message("system", "Be kind."), Message("user", f"What of {rejected * 3}?"))
        pair = PreferencePair(name, prompt, chosen, rejected)
        for form, student in students.items():
            for limit, bounds in limits.items():
                (ready,), _ = prepare_pairs([pair], teacher, student, bounds)
                parts = [ready.teacher_prompt, ready.student_prompt]
                for side in (ready.chosen, ready.rejected):
                    parts.append(side.bounds)
                    parts += [
                        array for tokens in (side.teacher, side.student) for array in (tokens.ids, tokens.span_ids)
                    ]
                text = json.dumps([part.tolist() for part in parts])
                found[f"{name}; {form}; {limit}"] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return found


def test_other_tokens_or_spans_need_another_number():
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    now = digests()
    changed = [name for name in golden["digests"] | now if golden["digests"].get(name) != now.get(name)]
    assert not changed, f"{STALE} ({len(changed)} cases, the first is {changed[0]!r})"
    assert golden["rules"] == RULES, (
        f"text.prepare.RULES is {RULES} and the golden file is of {golden['rules']}: {STALE}"
    )


if __name__ == "__main__":
    made = digests()
    old = json.loads(GOLDEN.read_text(encoding="utf-8")) if GOLDEN.exists() else {"rules": 0, "digests": {}}
    if old["rules"] == RULES and old["digests"] and old["digests"] != made:
        raise SystemExit(f"{GOLDEN} is of RULES = {RULES} too, and other tokens need another number: raise it first.")
    GOLDEN.write_text(json.dumps({"rules": RULES, "digests": made}, indent=1) + "\n", encoding="utf-8")
