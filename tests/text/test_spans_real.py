"""Aligned spans on six real tokenizers, every ordered pair of them, against the definition. Slow."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from helpers.real_assets import TOKENIZERS
from helpers.small_tokenizers import FORMS, HARD_TEXTS
from helpers.span_oracle import Reference, check_against_oracle, check_aligned
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ctpd_jax.text.prompts import encode_prompt
from ctpd_jax.text.spans import align, align_batch
from ctpd_jax.text.templates import Piece
from ctpd_jax.text.tokens import encode, load_tokenizer

pytestmark = pytest.mark.slow
PAIRS = list(itertools.product(TOKENIZERS, TOKENIZERS))


@pytest.fixture(scope="module")
def tokenizers(real_tokenizers):
    return {name: load_tokenizer(folder) for name, folder in real_tokenizers.items()}


@pytest.fixture(scope="module")
def references(tokenizers):
    return {name: Reference(tok.hf.backend_tokenizer, FORMS.get(name)) for name, tok in tokenizers.items()}


@pytest.mark.parametrize("unit", ["character", "byte"])
@pytest.mark.parametrize("pair", PAIRS, ids="|".join)
def test_hard_texts_equal_the_definition(pair, unit, tokenizers, references):
    teacher, student = (tokenizers[name] for name in pair)
    texts = list(HARD_TEXTS.values())
    for text, aligned in zip(texts, align_batch(texts, teacher, student, unit)):
        check_aligned(aligned, text)
        check_against_oracle(aligned, text, references[pair[0]], references[pair[1]], unit)


@pytest.mark.parametrize("pair", PAIRS, ids="|".join)
def test_random_unicode_equals_the_definition(pair, tokenizers, references):
    teacher, student = (tokenizers[name] for name in pair)
    # SmolLM2's vocabulary lacks eight bytes: control characters and the first bytes of planes 4 to 11.
    missing = teacher.vocabulary.missing | student.vocabulary.missing

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
    @given(
        st.text(st.characters(exclude_categories=("Cs", "Cn")), max_size=24).filter(
            lambda text: not missing.intersection(text.encode())
        ),
        st.sampled_from(["character", "byte"]),
    )
    def check(text, unit):
        aligned = align(text, teacher, student, unit)
        check_aligned(aligned, text)
        check_against_oracle(aligned, text, references[pair[0]], references[pair[1]], unit)

    check()


@pytest.mark.parametrize("name", TOKENIZERS)
def test_one_tokenizer_twice_gives_one_token_or_one_indivisible_text_per_span(name, tokenizers, references):
    tok, ref = tokenizers[name], references[name]
    for text in HARD_TEXTS.values():
        aligned = align(text, tok, tok)
        prefixes = ref.prefixes(text, aligned.teacher.ids)
        for span in range(aligned.num_spans):
            tokens = np.flatnonzero(aligned.teacher.span_ids == span)
            real = [j for j in tokens if len(prefixes[j + 1]) > len(prefixes[j])]
            if len(real) > 1:
                start, end = aligned.bounds[span : span + 2]
                piece = text.encode()[start:end].decode()
                bound = [c for c in range(1, len(piece)) if _divisible(ref, piece, c)]
                # one character, or characters that the normaliser binds or that share tokens
                assert len(piece) == 1 or not any(
                    len(ref.normal(text.encode()[:start].decode() + piece[:c])) in map(len, prefixes) for c in bound
                )


def _divisible(ref: Reference, piece: str, position: int) -> bool:
    return ref.normal(piece[:position]) + ref.normal(piece[position:]) == ref.normal(piece)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_literal_safe_copy_is_what_encode_special_tokens_gives(name, tokenizers):
    tok = tokenizers[name]
    copy = type(tok.backend).from_str(tok.hf.backend_tokenizer.to_str())
    copy.encode_special_tokens = True
    for label, text in HARD_TEXTS.items():
        if label not in ("special tokens", "byte pieces"):
            assert encode(tok, text).tolist() == copy.encode(text, add_special_tokens=False).ids
    special = {token_id for token_id, token in copy.get_added_tokens_decoder().items() if token.special}
    assert not special.intersection(encode(tok, HARD_TEXTS["special tokens"]).tolist())


def test_bos_is_that_of_the_post_processor(tokenizers):
    found = {name: tok.bos_id for name, tok in tokenizers.items()}
    assert found == {
        "llama3": 128000, "qwen2.5": None, "mistral-v0.1": 1, "deepseek": None, "smollm2": None, "gemma3": 2
    }  # fmt: skip


def test_the_chat_template_of_smollm2_brings_its_own_first_token(tokenizers):
    tok = tokenizers["smollm2"]
    messages = [{"role": "user", "content": "Hi"}]
    rendered = tok.hf.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = encode_prompt(tok, [Piece(rendered, True)])
    assert ids.tolist() == tok.hf(rendered, add_special_tokens=False)["input_ids"]
    assert ids[0] == tok.hf.convert_tokens_to_ids("<|im_start|>")
