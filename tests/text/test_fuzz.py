"""The fuzzer works: a few seconds of each part find nothing, and what is broken on purpose is found and cut small."""

from __future__ import annotations

from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace

import numpy as np
import pytest
from fuzz import Found, alignments, files, run, smallest, templates
from helpers.small_tokenizers import core
from tokenizers import AddedToken, Tokenizer

from ctpd_jax.schema import Message
from ctpd_jax.text import preferences, spans
from ctpd_jax.text.templates import render_chat

# Random templates index numbers, and Python remarks on it.
pytestmark = pytest.mark.filterwarnings("ignore::SyntaxWarning")


@pytest.mark.parametrize("part", run.BATCHES)
def test_a_short_run_finds_nothing(part, tmp_path):
    found = run.run_task(part, seed=5, task=1, real=False, folder=str(tmp_path), batches=3)
    assert not found.failures, found.failures[0]
    assert found.counts[run.UNITS[part]] >= {"alignments": 600, "templates": 150, "files": 60}[part]
    assert run.summary(found, 1.0).endswith(" 0 failures, 1 s")


def test_a_task_is_the_same_when_it_is_repeated(tmp_path):
    both = [run.run_task("alignments", 6, 3, False, str(tmp_path), batches=1) for _ in range(2)]
    assert both[0] == both[1]


def _later(aligned):
    return replace(aligned, bounds=np.delete(aligned.bounds, -2)) if aligned.num_spans > 6 else aligned


def _other_id(aligned):
    ids = aligned.student.ids.copy()
    ids[ids.size // 2 :] += 1
    return replace(aligned, student=replace(aligned.student, ids=ids)) if ids.size > 9 else aligned


def _merged(aligned):
    """Two spans as one, in order and covering everything: only the definition tells."""
    if aligned.num_spans < 5:
        return aligned
    sides = [replace(side, span_ids=side.span_ids - (side.span_ids > 2)) for side in (aligned.teacher, aligned.student)]
    return replace(aligned, bounds=np.delete(aligned.bounds, 3), teacher=sides[0], student=sides[1])


@pytest.mark.parametrize("damage", [_later, _other_id, _merged])
def test_a_broken_aligner_is_found_and_the_text_cut_small(damage, monkeypatch, tmp_path):
    real = spans._align
    monkeypatch.setattr(spans, "_align", lambda *given: damage(real(*given)))
    found = run.run_task("alignments", 5, 1, False, str(tmp_path), batches=1)
    assert found.failures and "seed='5 --only alignments --task 1 --small'" in found.failures[0]
    minimal = found.failures[0].rpartition("minimal text=")[2]
    assert 1 < len(minimal) < 90


def test_a_truncation_that_keeps_too_much_is_found(monkeypatch, tmp_path):
    real = spans.truncate
    monkeypatch.setattr(spans, "truncate", lambda aligned, a, b: real(aligned, a + 1, b))
    assert run.run_task("alignments", 5, 1, False, str(tmp_path), batches=1).failures


def test_a_template_rendered_otherwise_is_found(monkeypatch):
    monkeypatch.setattr(templates, "render_chat", lambda *given: render_chat(*given).replace("</s>", ""))
    found = run.run_task("templates", 5, 1, False, "", batches=2)
    assert found.failures and "minimal template=" in found.failures[0]


@pytest.mark.parametrize("source", ["{{ namespace | escape }}", "{{ namespace | upper }}", "{{ namespace(x=1) }}"])
def test_what_differs_on_purpose_is_no_failure(source):
    assert templates.check(source, [Message("user", "2")], True) in ("rendered", "no pieces", "refused")


@pytest.mark.parametrize(
    "source", ["{{ '1' if nothing else 10**9 * 'a' }}", "{% if nothing %}{{ 'a' * 999999999 }}{% endif %}"]
)
def test_the_reference_is_not_given_what_it_would_compute_while_it_compiles(source):
    assert templates.reference(source, [], True) is None


def test_the_reference_has_a_time(monkeypatch):
    monkeypatch.setattr(templates, "SECONDS_OF_REFERENCE", 0.2)
    source = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    assert templates.reference(source, [], True) is None


def test_a_template_without_limits_is_found(monkeypatch):
    monkeypatch.setattr(templates, "HOSTILE", ("{% for a in range(99999) %}{{ a }}{% endfor %}",))
    monkeypatch.setattr(templates, "MOST_SECONDS", -1.0)
    found = Found()
    templates.run_hostile("5", found)
    assert "it took too long" in found.failures[0]


def test_a_reader_that_raises_or_forgets_is_found(monkeypatch, tmp_path):
    def broken(row, *given):
        raise KeyError("chosen")

    monkeypatch.setattr(preferences, "read_row", broken)
    found = run.run_task("files", 5, 1, False, str(tmp_path), batches=1)
    assert found.failures and "KeyError" in found.failures[0] and str(tmp_path) in found.failures[0]


def test_cutting_small():
    assert smallest("xxaxxxbxx", lambda text: "a" in text and "b" in text) == "ab"


def test_the_command_ends_with_one_line_and_says_by_its_exit_whether_something_failed(capsys, monkeypatch):
    monkeypatch.setitem(run.BATCHES, "files", 1)
    assert run.main(["--small", "--only", "files", "--task", "1", "--seed", "5"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("fuzz: 0 alignments, 0 template renderings, ")
    monkeypatch.setattr(files, "MOST_SECONDS", -1.0)
    assert run.main(["--small", "--only", "files", "--task", "1", "--seed", "5"]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_a_worker_that_is_killed_is_a_failure_and_nobody_waits_for_it(capsys, monkeypatch):
    def killed(*given):
        raise BrokenProcessPool

    monkeypatch.setattr(run, "run_part", killed)
    assert run.main(["--small", "--only", "files"]) == 1
    assert "a worker was killed" in capsys.readouterr().out


def test_the_oracle_leaves_open_what_it_would_take_gigabytes_to_decide():
    backend = Tokenizer.from_str(core("byte").to_str())
    backend.add_tokens([AddedToken("\n", lstrip=True, rstrip=True), AddedToken(" ", lstrip=True, normalized=False)])
    known = alignments.Known("mine", backend.to_str())
    ids = known.tok.backend.token_to_id("\n"), known.tok.backend.token_to_id(" ")
    assert known.endings([ids[0]] * 3000, b"\n" * 3000) == known.endings([*ids] * 900, b"\n " * 900) == [[], []]
    assert known.endings([ids[0]], b"\n" * 30) == [[30]]
