"""What a terminal is shown: token texts, the aligned pair, the end table."""

from __future__ import annotations

import math
import re

import numpy as np
from helpers import made_up
from rich.cells import cell_len
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ctpd_jax.report import format as wording
from ctpd_jax.report import terminal
from ctpd_jax.schema import Counters, TokenSide
from ctpd_jax.text import shown
from ctpd_jax.text.tokens import TextTokenizer, encode, load_tokenizer


def byte_tokenizer() -> TextTokenizer:
    """Every byte a token, and "ab"."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({piece: i for i, piece in enumerate([*letters, "ab"])}, [("a", "b")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.add_special_tokens(["<|im_end|>"])
    return load_tokenizer(PreTrainedTokenizerFast(tokenizer_object=core))


def piece_tokenizer() -> TextTokenizer:
    """Pieces with a space marker and a dummy space; other characters as <0xNN>."""
    vocabulary = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *"abc", "\u2581a", "é"]
    core = Tokenizer(
        models.BPE(
            {piece: i for i, piece in enumerate(vocabulary)}, [("\u2581", "a")], unk_token="<unk>", byte_fallback=True
        )
    )
    core.pre_tokenizer = pre_tokenizers.Metaspace("\u2581", prepend_scheme="always", split=False)
    core.add_special_tokens(["<unk>", "</s>"])
    return load_tokenizer(PreTrainedTokenizerFast(tokenizer_object=core))


def test_pieces_are_the_tokens_own_text():
    tok = byte_tokenizer()
    ids = np.append(encode(tok, "ab é"), tok.hf.convert_tokens_to_ids("<|im_end|>")).astype(np.int32)
    side = TokenSide(ids, np.array([0, 1, 1, 1, 2], np.int32))
    assert shown.pieces(tok, side, 0) == ["ab"]
    assert shown.pieces(tok, side, 1) == [" ", "<0xC3>", "<0xA9>"]
    assert shown.pieces(tok, side, 2) == ["<|im_end|>"]
    assert shown.pieces(tok, side, 3) == []


def test_pieces_of_a_tokenizer_with_a_space_marker():
    tok = piece_tokenizer()
    ids = np.append(encode(tok, "ab 客é"), tok.hf.convert_tokens_to_ids("</s>")).astype(np.int32)
    side = TokenSide(ids, np.zeros(len(ids), np.int32))
    assert shown.pieces(tok, side, 0) == [" a", "b", " ", "<0xE5>", "<0xAE>", "<0xA2>", "é", "</s>"]


def test_broken_utf8_is_shown_byte_by_byte():
    assert shown.decode("aé".encode()) == "aé"
    assert shown.decode(b"\xf0\x9f\x98") == "<0xF0><0x9F><0x98>"
    assert shown.decode(b"ok \xff\xe5\xae\xa2 \x80end") == "ok <0xFF>客 <0x80>end"
    assert shown.decode(b"") == ""


def test_what_cannot_be_seen_is_made_visible():
    assert wording.visible(" a\n\tb") == "␣a↵⇥b"
    assert wording.visible("\u200b\u00a0\u202e") == "<U+200B><U+00A0><U+202E>"
    assert wording.visible("\u0301a") == "◌\u0301a"
    assert "\x1b" not in wording.visible("\x1b[31m") + wording.harmless("\x1b[31m")
    assert wording.harmless("two\nlines\u202e") == "two\nlines<U+202E>"


def blocks(text: str) -> list[list[str]]:
    """The blocks of spans in a pair's text: lines that belong together."""
    found = [part.split("\n") for part in text.split("\n\n")]
    return [[line for line in part if "│" in line] for part in found]


def test_both_tokenizations_stand_above_each_other_beside_wide_characters():
    text = terminal.pair_text(made_up.example())
    assert max(cell_len(line) for line in text.split("\n")) <= terminal.WIDTH
    seen = 0
    for block in blocks(text):
        # The borders of a block stand in the same columns of its lines, whatever lies between them.
        places = [[cell_len(line[:i]) for i, c in enumerate(line) if c == "│"] for line in block]
        assert all(own == places[0] for own in places)
        seen += len(block) == 4
    assert seen >= 4 and "不客气" in text and "Green" in text


def test_a_pair_is_cut_and_says_so(monkeypatch):
    monkeypatch.setattr(terminal, "MAX_SPANS", 40)
    text = terminal.pair_text(made_up.example())
    assert "and 10 more spans" in text and "word37" in text and "word38" not in text
    assert "rejected: 50 spans" in text and "cut to the length limit" in text
    assert "<end_of_turn>" in text and "<|im_end|>" in text
    assert "[31m" in text and "\x1b" not in text  # neither swallowed as markup nor passed on to the terminal


def test_a_span_longer_than_a_line_is_cut_and_long_prompts_are_shortened():
    pair = made_up.example()
    pair["chosen"]["spans"][0]["teacher"] = ["x" * 100_000]
    pair["read"] = {"teacher": ["<bos>", "y" * 5000, "<end>"], "student": ["z"]}
    text = terminal.pair_text(pair)
    assert max(cell_len(line) for line in text.split("\n")) <= terminal.WIDTH and len(text) < 10_000
    assert "x…" in text and "<end>" in text and "characters more" in text and "student reads 1 tokens: z" in text


def test_weights_are_coloured_by_their_logarithm():
    pair = made_up.example()
    pair["chosen"]["spans"] = [made_up.span(f"w{w}", ["t"], ["s"], w) for w in (2.0, 1.0, 0.5, 0.0)]
    line = next(
        line for line in terminal.pair_text(pair, math.log(2.0), colour=True).split("\n") if "teacher  " in line
    )
    # Warm and cold in full, nothing at 1, and a weight of zero is as cold as it gets.
    assert line.count("48;2;236;132;54") == 1 and line.count("48;2;62;148;188") == 2
    assert "\x1b" not in terminal.pair_text(pair, math.log(2.0))


def test_a_pair_without_weights_has_no_line_for_them():
    assert "weight" not in terminal.pair_text(made_up.example(weighted=False))


def test_statistics_say_what_was_found():
    figures = dict.fromkeys(("one_one", "one_many", "many_one", "many_many", "bytes_kept", "cut"), 0.25)
    group = {"responses": 1234, "spans": 12.5, "teacher": 1.5, "student": 2.25, **figures}
    weights = {"shares": {"clipped high": 0.125}, "histogram": [0.25, 0.75], "edges": [-1.0, 0.0, 1.0]}
    text = terminal.statistics_text({"groups": {"all": group}, "weights": weights})
    assert re.search(r"all +1,234 +12.5( +25.0){4} +1.50 +2.25 +25.0 +25.0", text)
    assert "clipped high 12.5 %" in text and text.count("█") == 17 + 50


def test_the_table_fits_and_holds_every_figure():
    text = terminal.evaluation_text(made_up.evaluation())
    assert max(cell_len(line) for line in text.split("\n")) <= 120
    names = [line.split()[0] for line in text.split("\n") if line.strip().startswith(("student", "ctpd", "teacher"))]
    assert names == 2 * ["student_start", "student_dpo", "ctpd", "teacher", "teacher_dpo"]
    for expected in ("78.0 [71.0, 84.0]", "0.734", "31.0 %", "27.5 %", "1.414", "n = 43"):
        assert expected in text
    assert "12.0 % of the pairs and 34.5 % of the prompts are in the training data too" in text
    assert "cuts one response of 85 pairs (end of turn on neither side) and both of 21" in text


def test_the_table_without_matched_pairs():
    evaluation = made_up.evaluation()
    evaluation["longer_is_better"]["length_matched"] = None
    for row in evaluation["models"].values():
        row["length_matched"] = made_up.senses(None)
        row["bits_per_byte"] = None
    text = terminal.evaluation_text(evaluation)
    assert "n = 0" in text
    matched = [line for line in text.split("\n") if line.strip().startswith("length-matched") and "n =" not in line]
    assert len(matched) == 5 and all(line.count(wording.NONE) == 3 for line in matched)


def test_scores_of_lm_eval_take_the_papers_metrics_and_average_shares_alone():
    """hellaswag has both accuracies, gsm8k two readings of an answer; a perplexity is no share."""
    stderr = {"acc_stderr,none": 0.01, "name": "x"}
    results = {
        "hellaswag": {"acc,none": 0.4, "acc_norm,none": 0.5, **stderr},
        "mmlu": {"acc,none": 0.25, **stderr},
        "gsm8k": {"exact_match,flexible-extract": 0.9, "exact_match,strict-match": 0.75},
        "wikitext": {"word_perplexity,none": 12.345, "word_perplexity_stderr,none": "N/A"},
    }
    text = terminal.harness_text({"ctpd": results, "teacher": results | {"mmlu": {"acc,none": 1.0}}}, list(results))
    rows = [line.split() for line in text.split("\n") if line.split()[:1] in (["ctpd"], ["teacher"])]
    assert rows == [
        ["ctpd", "50.00", "25.00", "75.00", "12.35", "50.00"],
        ["teacher", "50.00", "100.00", "75.00", "12.35", "75.00"],
    ]


def test_what_was_read_is_told_with_the_first_rows_of_each_reason():
    counters = Counters({"rows": 9, "kept": 4, "exact repeats": 1})
    for name, rows in (("left out: a tie", ("a:1", "a:2")), ("left out: empty answer", ("a:3", "a:4", "a:5", "a:6"))):
        for row in rows:
            counters.add(name)
            counters.note(name, row)
    counters.note("harmless columns", "id")
    assert terminal.counts(counters).split("\n") == [
        "exact repeats 1",
        "  left out: empty answer: 4 (a:3; a:4; a:5)",
        "  left out: a tie: 2 (a:1; a:2)",
        "  harmless columns: id",
    ]
    merged = Counters()
    merged.merge(counters)
    assert (merged.counts, merged.notes) == (counters.counts, counters.notes)


def test_figures():
    assert wording.figure(None, 2) == wording.NONE
    assert wording.figure(0.0, 2) == "0.00"
    assert wording.figure(0.0012, 2) == "0.0012"  # never a 0.00 that is not zero
    assert wording.figure(-1.234, 2) == "-1.23"
    assert wording.percent(0.5) == "50.0 %"
