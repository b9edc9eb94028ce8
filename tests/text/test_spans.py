"""Aligned spans against their definition: on small tokenizers of every kind, hard texts and random Unicode."""

from __future__ import annotations

import itertools
import sys
import tracemalloc
import unicodedata

import numpy as np
import pytest
from helpers.small_tokenizers import FORMS, HARD_TEXTS, KINDS, core, fast, small
from helpers.span_oracle import Reference, check_against_oracle, check_aligned
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer

from ctpd_jax.errors import UserError
from ctpd_jax.schema import Aligned, Counters, TokenSide
from ctpd_jax.text import cuts
from ctpd_jax.text.spans import align, align_batch, align_ids, truncate, with_end_of_turn
from ctpd_jax.text.tokens import encode, encode_batch, load_tokenizer

# Assigned characters: about the others Python's Unicode version and the tokenizer's may disagree.
# Marks that are younger than the tokenizers' tables of Unicode: to them these are letters, to the oracle marks.
YOUNG = "".join(
    c
    for c in map(chr, range(0x300, 0x110000))
    if unicodedata.combining(c)
    and core("byte-nfd").normalizer.normalize_str("a\u0301" + c) != unicodedata.normalize("NFD", "a\u0301" + c)
)
UNICODE = st.text(st.characters(exclude_categories=("Cs", "Cn"), exclude_characters=YOUNG), max_size=24)
NASTY = st.text(
    st.sampled_from(
        "aeu zsq\u0304\u0308\u0301\u0302\u0323\u0327\u0331\u0334\u0344\u0345\u0f73\u1100\u1161\u11a8"
        "\uac00\uac01\u09c7\u09be\u09d7\u2581 \n\U0001f600\u00e9\u1ec7\u2126\u0958\u0dd9\u0dcf\u0dca"
    ),
    max_size=24,
)
PAIRS = list(itertools.product(KINDS, KINDS))


def reference(kind: str) -> Reference:
    return Reference(core(kind), FORMS.get(kind))


REFERENCES = {kind: reference(kind) for kind in KINDS}


@pytest.mark.parametrize("unit", ["character", "byte"])
@pytest.mark.parametrize("kinds", PAIRS, ids="|".join)
def test_hard_texts_equal_the_definition(kinds, unit):
    teacher, student = map(small, kinds)
    texts = list(HARD_TEXTS.values())
    for text, aligned in zip(texts, align_batch(texts, teacher, student, unit)):
        check_aligned(aligned, text)
        check_against_oracle(aligned, text, REFERENCES[kinds[0]], REFERENCES[kinds[1]], unit)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(PAIRS), st.one_of(UNICODE, NASTY), st.sampled_from(["character", "byte"]))
def test_random_unicode_equals_the_definition(kinds, text, unit):
    aligned = align(text, small(kinds[0]), small(kinds[1]), unit)
    check_aligned(aligned, text)
    check_against_oracle(aligned, text, REFERENCES[kinds[0]], REFERENCES[kinds[1]], unit)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(PAIRS), st.one_of(UNICODE, NASTY), st.data())
def test_cut_tokenizations_equal_the_definition(kinds, text, data):
    """Either side may stop early: tokens past the last common boundary are -1, and what lies before is the same."""
    teacher, student = map(small, kinds)
    ids = [encode(tok, text) for tok in (teacher, student)]
    kept = [side[: data.draw(st.integers(0, len(side)))] for side in ids]
    aligned = align_ids(text, teacher, kept[0], student, kept[1])
    check_against_oracle(aligned, text, REFERENCES[kinds[0]], REFERENCES[kinds[1]], "character")
    whole = align_ids(text, teacher, ids[0], student, ids[1])
    assert whole.bounds[: len(aligned.bounds)].tolist() == aligned.bounds.tolist()


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(KINDS), st.one_of(UNICODE, NASTY))
def test_one_tokenizer_twice_gives_a_span_per_token_or_per_indivisible_text(kind, text):
    tok = small(kind)
    aligned = align(text, tok, tok)
    np.testing.assert_array_equal(aligned.teacher.span_ids, aligned.student.span_ids)
    positions = {len(text[:c].encode()) for c in range(1, len(text))}
    clean = {len(text[:c].encode()) for c in range(1, len(text)) if _clean(REFERENCES[kind], text, c)}
    ends = REFERENCES[kind].prefixes(text, aligned.teacher.ids)
    for span in range(aligned.num_spans):
        start, end = aligned.bounds[span : span + 2]
        tokens = np.flatnonzero(aligned.teacher.span_ids == span)
        real = [j for j in tokens if len(ends[j + 1]) > len(ends[j])]
        if len(real) > 1:
            inside = {p for p in positions if start < p < end}
            # several tokens share one character, or one sequence that its normaliser binds together
            assert not inside or _tokens_miss_every_cut(REFERENCES[kind], text, ends, inside & clean)


def _clean(ref: Reference, text: str, position: int) -> bool:
    return ref.normal(text[:position]) + ref.normal(text[position:]) == ref.normal(text)


def _tokens_miss_every_cut(ref: Reference, text: str, prefixes: list[bytes], inside: set[int]) -> bool:
    raw = text.encode()
    return not any(ref.normal(raw[:offset].decode()) in prefixes for offset in inside)


def test_an_emoji_in_four_tokens_is_one_span_by_character_and_four_by_byte():
    tok = small("unigram")  # the emoji is left to byte fallback, behind a lone dummy space
    by_character = align("\U0001f680", tok, tok)
    assert [tok.token_bytes(i) for i in by_character.teacher.ids] == [b" ", b"\xf0", b"\x9f", b"\x9a", b"\x80"]
    assert by_character.bounds.tolist() == [0, 4]
    assert by_character.teacher.span_ids.tolist() == [0, 0, 0, 0, 0]
    by_byte = align("\U0001f680", tok, tok, unit="byte")
    assert by_byte.bounds.tolist() == [0, 1, 2, 3, 4]
    assert by_byte.teacher.span_ids.tolist() == [0, 0, 1, 2, 3]  # the token without bytes joins what follows


def test_a_dummy_space_in_the_middle_joins_what_follows():
    with_word = Tokenizer.from_str(core("bpe-prepend").to_str())
    with_word.add_tokens([AddedToken("[word]", normalized=False)])
    tok = load_tokenizer(fast(with_word))
    aligned = align("[word]\U0001f680", tok, small("byte"))
    assert [tok.token_bytes(i) for i in aligned.teacher.ids[:3]] == [b"[word]", b" ", b"\xf0"]
    start = aligned.bounds.tolist().index(6)  # the span of the emoji
    assert aligned.teacher.span_ids[1:].tolist() == [start] * 5


def test_no_boundary_where_a_normaliser_composes_across_it():
    decomposed = "fe\u0301e"  # bytes: f e 0xcc 0x81 e
    assert align(decomposed, small("byte-nfd"), small("byte-nfd"), "byte").bounds.tolist() == [0, 1, 2, 4, 5]
    assert align(decomposed, small("byte-nfc"), small("byte-nfd"), "byte").bounds.tolist() == [0, 1, 4, 5]


@settings(max_examples=400, deadline=None)
@given(st.one_of(NASTY, UNICODE), st.sampled_from(["byte-nfc", "byte-nfd"]))
@example("u\u0308\u0301\u0304", "byte-nfc")  # two marks of one class compose, the third does not
@example("a\u0302\u0331\u0323\u0302\u0302", "byte-nfc")
def test_long_stretches_are_cut_as_short_ones(text, kind):
    """The incremental rule for long runs of marks, forced onto every stretch, equals the definition."""
    ref = REFERENCES[kind]
    normal = core(kind).normalizer.normalize_str
    short = cuts.SHORT_STRETCH
    cuts.SHORT_STRETCH = 0
    try:
        found = cuts.clean_cuts(text, normal, lambda t: t)
    finally:
        cuts.SHORT_STRETCH = short
    expected = [len(ref.normal(text[:c])) if _clean(ref, text, c) else -1 for c in range(len(text) + 1)]
    assert found.tolist() == expected


@pytest.mark.parametrize("run", ["\u0301\u0323", "\u0301\u0301", "\u1161\u1161"], ids=ascii)
def test_a_long_run_of_marks_is_linear_work(run):
    """Counted, not timed: characters given to the normaliser grow with the text, not with its square.

    Of the runs the first has no clean cut and the others have one everywhere.
    """
    seen = [0, 0]
    for round_, length in enumerate((1000, 4000)):
        normal = core("byte-nfc").normalizer.normalize_str

        def counted(text: str, round_: int = round_, normal=normal) -> str:
            seen[round_] += len(text)
            return normal(text)

        cuts.clean_cuts("e\u0301\u1100" + run * length + "!", counted, lambda t: t)
    assert seen[1] < 4.5 * seen[0]


@pytest.mark.parametrize("unit", ["character", "byte"])
@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("The quick brown fox, so to speak, runs. ", 0.0),
        ("日本語の文章。한국어 문장 🙂👍🏽 naïve ", 0.0),
        ("cafe\u0301 Vie\u0323\u0302t ngu\u031b\u0303 ", 1.0),
    ],
    ids=["prose", "wide", "decomposed"],
)
def test_ten_times_the_text_is_ten_times_the_work(text, share, unit):
    """Counted, not timed: memory at its peak, and lines of Python.

    NumPy works on arrays whose sizes the peak bounds; the lines do not grow with the text, except where a normaliser
    changes it (one loop over stretches of several characters).
    """
    kinds = small("bpe-prepend"), small("byte-nfc")
    peaks, lines = [], []
    for repeats in (200, 2000):
        response = text * repeats
        ids = [encode(tok, response) for tok in kinds]
        align_ids(response, kinds[0], ids[0], kinds[1], ids[1], unit)  # fills the caches
        tracemalloc.start()
        align_ids(response, kinds[0], ids[0], kinds[1], ids[1], unit)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        lines.append(_lines_run(lambda r=response, i=ids: align_ids(r, kinds[0], i[0], kinds[1], i[1], unit)))
    assert peaks[1] <= 10.5 * peaks[0]
    assert lines[1] <= (1 + 9.5 * share) * lines[0]


def _lines_run(work) -> int:
    """How many lines of Python `work` executes."""
    count = 0

    def trace(frame, event, argument):
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


def test_context_counts_merges_and_changes_nothing():
    counters = Counters()
    alone = align("fox", small("byte"), small("byte"))
    with_context = align("fox", small("byte"), small("byte"), "character", "the ", "the ", counters)
    assert counters["teacher_border_merges"] == 1  # " fox" is one token
    np.testing.assert_array_equal(alone.teacher.ids, with_context.teacher.ids)
    counters = Counters()
    align(" fox", small("byte"), small("byte"), "character", "the", "the", counters)
    assert counters["teacher_border_merges"] == 0


def test_unknown_unit_is_refused():
    with pytest.raises(UserError, match="'token'"):
        align("a", small("byte"), small("byte"), unit="token")  # type: ignore[arg-type]


def test_ids_of_another_text_are_refused():
    tok = small("byte")
    with pytest.raises(UserError, match="do not spell the text"):
        align_ids("the fox", tok, encode(tok, "the dog"), tok, encode(tok, "the fox"))


# ------------------------------------------------------------------------------------------------ truncation


def two_sides(teacher_spans: list[int], student_spans: list[int]) -> Aligned:
    count = max(teacher_spans + student_spans) + 1
    both = (np.array(spans, np.int32) for spans in (teacher_spans, student_spans))
    sides = [TokenSide(np.arange(len(spans), dtype=np.int32), spans) for spans in both]
    return Aligned(np.arange(count + 1, dtype=np.int32) * 2, *sides)


@pytest.mark.parametrize(
    ("limits", "spans", "dropped"),
    [
        ((9, 9), 3, False),
        ((4, 4), 3, False),
        ((3, 9), 2, True),
        ((9, 3), 2, True),
        ((9, 2), 1, True),
        ((0, 9), 0, True),
    ],
)
def test_truncation_keeps_whole_spans_that_fit_both_limits(limits, spans, dropped):
    aligned = two_sides([0, 1, 1, 2], [0, 0, 1, 2])
    left, cut = truncate(aligned, *limits)
    assert (left.num_spans, cut) == (spans, dropped)
    assert left.bounds.tolist() == [2 * i for i in range(spans + 1)]
    assert left.teacher.span_ids.tolist() == [s for s in [0, 1, 1, 2] if s < spans]
    assert left.student.span_ids.tolist() == [s for s in [0, 0, 1, 2] if s < spans]


def test_truncation_drops_tokens_past_the_last_boundary_and_says_so():
    aligned = two_sides([0, 1, -1], [0, 1])
    left, cut = truncate(aligned, 9, 9)
    assert cut and left.teacher.ids.tolist() == [0, 1] and left.num_spans == 2


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(PAIRS), UNICODE, st.integers(0, 30), st.integers(0, 30))
def test_truncation_is_the_longest_that_fits(kinds, text, teacher_limit, student_limit):
    aligned = align(text, small(kinds[0]), small(kinds[1]))
    left, cut = truncate(aligned, teacher_limit, student_limit)
    limits = ((aligned.teacher, teacher_limit), (aligned.student, student_limit))
    fits = [k for k in range(aligned.num_spans + 1) if all((s.span_ids < k).sum() <= limit for s, limit in limits)]
    assert left.num_spans == max(fits)
    assert cut == (left.num_spans < aligned.num_spans)
    assert len(left.teacher.ids) <= teacher_limit and len(left.student.ids) <= student_limit


def test_end_of_turn_is_one_last_span_of_no_bytes():
    aligned = with_end_of_turn(two_sides([0, 1, 1], [0, 1]), 70, 80)
    assert aligned.bounds.tolist() == [0, 2, 4, 4]
    assert aligned.teacher.ids.tolist()[-1] == 70 and aligned.teacher.span_ids.tolist() == [0, 1, 1, 2]
    assert aligned.student.ids.tolist()[-1] == 80 and aligned.student.span_ids.tolist() == [0, 1, 2]
    assert aligned.bounds.dtype == aligned.student.ids.dtype == aligned.student.span_ids.dtype == np.int32


def test_end_of_turn_of_an_empty_response():
    empty = align("", small("byte"), small("bpe-prepend"))
    assert empty.bounds.tolist() == [0] and empty.num_spans == 0
    assert with_end_of_turn(empty, 1, 2).bounds.tolist() == [0, 0]


def test_batch_equals_one_by_one():
    texts = list(HARD_TEXTS.values())
    tok = small("bpe-first")
    for one, many in zip((encode(tok, t) for t in texts), encode_batch(tok, texts)):
        np.testing.assert_array_equal(one, many)
