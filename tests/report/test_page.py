"""The page: everything from data is text, what is missing is left out, nothing is fetched."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from helpers import made_up

from ctpd_jax.errors import UserError
from ctpd_jax.report.curves import POINTS, curves, interval, series, short, thinned
from ctpd_jax.report.page import pair_page, write_report

EMPTY = {"meta", "br", "line", "circle", "polyline"}  # elements without an end


class Page(HTMLParser):
    """Collects the elements and the text of a page, and checks that they nest."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self._open: list[str] = []
        self.source = path.read_text("utf-8")
        self.feed(self.source)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in EMPTY:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Page:
    workdir = tmp_path_factory.mktemp("runs") / "a <b> run"
    made_up.write_run(workdir)
    path = write_report(workdir)
    assert path == workdir / "report.html"
    assert not list(workdir.glob("*.partial"))
    return Page(path)


def test_what_comes_from_data_is_only_text(page):
    assert not {"script", "img", "link", "iframe", "object"} & set(page.tags)
    for said in ("<script>alert(1)</script>", "<img src=x>", "<b>bread</b>", "a <b> run", "pair <7>", "<i>own</i>"):
        assert said in page.text
    assert "\x1b" not in page.source
    titles = [value for name, value in page.attributes if name == "title"]
    assert any("<script> ¦ alert(1) ¦ </script>" in title for title in titles)


HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>{{ 7 * 7 }}</pre></style>\x1b[2J\u202e"


def poisoned(value):
    """Every text of a record with something behind it that must not reach a page as what it is."""
    if isinstance(value, dict):
        return {name: poisoned(part) for name, part in value.items()}
    if isinstance(value, list):
        return [poisoned(part) for part in value]
    return value + HOSTILE if isinstance(value, str) else value


def assert_only_text(page):
    assert not {"script", "img", "link", "iframe", "object"} & set(page.tags)
    assert not any(name.startswith("on") or name in ("src", "href") for name, _ in page.attributes)
    assert (
        "\x1b" not in page.source and "\u202e" not in page.source and "49" not in page.source.split("alert(2)")[1][:30]
    )


def test_whatever_the_files_of_a_run_say_is_only_text(tmp_path):
    """Names of models, settings, counts and stages, text among the metrics, and the manifest."""
    workdir = tmp_path / "run <script>alert(0)<script>"
    made_up.write_run(workdir)
    for name in ("evaluation.json", "config.json", "data_train.json", "data_test.json"):
        (workdir / name).write_text(json.dumps(poisoned(json.loads((workdir / name).read_text()))))
    evaluation = json.loads((workdir / "evaluation.json").read_text())
    for part in ("models", "samples"):
        evaluation[part] = {name + HOSTILE: row for name, row in evaluation[part].items()}
    (workdir / "evaluation.json").write_text(json.dumps(evaluation))
    (workdir / "annotations").mkdir()
    (workdir / "annotations" / "manifest.json").write_text(json.dumps({HOSTILE: HOSTILE}))
    data = json.loads((workdir / "data_train.json").read_text()) | {HOSTILE: 3}
    (workdir / "data_train.json").write_text(json.dumps(data))
    lines = [line | {"stage": line["stage"] + HOSTILE, "note": HOSTILE, "lr": HOSTILE} for line in made_up.metrics()]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = Page(write_report(workdir))
    assert_only_text(page)
    shown = HOSTILE.replace("\x1b", "<U+001B>").replace("\u202e", "<U+202E>")
    for name in ("train", "ctpd", "a & b.jsonl", ""):
        assert name + shown in page.text, name


def test_whatever_a_pair_says_is_only_text(tmp_path):
    (tmp_path / "pair.html").write_bytes(pair_page(poisoned(made_up.example()), 1.5))
    assert_only_text(Page(tmp_path / "pair.html"))


def test_lost_lines_are_told_on_the_page(tmp_path):
    made_up.write_run(tmp_path)
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "done.json").write_text('{"told": 601}')
    with pytest.warns(UserWarning, match=r"metrics\.jsonl has lost lines of train: their curves"):
        assert "has lost lines of train" in Page(write_report(tmp_path)).text


def test_nothing_is_fetched_and_nothing_runs(page):
    names = {name for name, _ in page.attributes}
    assert not names & {"src", "href", "srcset", "xlink:href"} and not any(name.startswith("on") for name in names)
    assert not re.search(r"url\(|@import|https?:", page.source)
    assert "prefers-color-scheme: dark" in page.source


def test_the_page_holds_every_part(page):
    for heading in ("Results", "Training", "An aligned pair", "Samples", "Data", "Settings"):
        assert heading in page.text
    for figure in ("78.0", "[71.0, 84.0]", "0.734", "0.482", "1,234", "1.414", "(empty)"):
        assert figure in page.text
    assert "teacher_sft 30 updates" in page.text and "train 600 updates" in page.text
    assert page.tags.count("figure") == 3 + 7


def test_a_span_shows_its_tokens_and_its_weight(page):
    titles = [value for name, value in page.attributes if name == "title"]
    assert "teacher: , ¦ ␣不客气\nstudent: ,␣ ¦ <0xE4><0xB8> ¦ <0x8D>客 ¦ 气\nweight: 4.200" in titles
    colours = [value for name, value in page.attributes if name == "style"]
    assert "background:rgb(var(--hot)/0.59)" in colours and "background:rgb(var(--cold)/0.57)" in colours


@pytest.mark.parametrize(
    ("weights", "legend"),
    [
        ({}, "weight 0.22 … 1 … 4.48,"),
        ({"mu": 0.5, "upper": 2.0}, "weight 0.37 … 1 … 2.72,"),
        ({"lower": -2.0}, "weight 0.14 … 1 … 7.39,"),  # of a rejected response
        ({"k": 2.0, "mu": 0.0}, "weight 0.50 … 1 … 2.00,"),
        ({"mu": 0.0}, "weight below 1 … above 1,"),
        ({"upper": None}, "weight below 1 … above 1,"),
    ],
)
def test_colours_reach_as_far_as_the_settings_let_weights_go(tmp_path, weights, legend):
    made_up.write_run(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["weights"].update(weights)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert legend in Page(write_report(tmp_path)).text


def test_every_answer_to_a_prompt_is_shown_under_it(page):
    models = made_up.evaluation()["samples"]
    assert page.text.count("请谈谈 tea.") == page.text.count("Explain bread to a child.") == 1
    assert page.source.count('class="cards"') == 2
    for name in models:
        assert f"another one of {name}" in page.text
    assert page.text.index("another one of student_start") > page.text.index("Explain bread to a child.")


def test_an_empty_folder_gives_a_page(tmp_path):
    assert "nothing yet" in Page(write_report(tmp_path)).text


@pytest.mark.parametrize("missing", ["evaluation.json", "metrics.jsonl", "config.json", "data_test.json"])
def test_a_missing_file_leaves_out_its_part_only(tmp_path, missing):
    made_up.write_run(tmp_path)
    (tmp_path / missing).unlink()
    text = Page(write_report(tmp_path)).text
    parts = {"evaluation.json": "Results", "metrics.jsonl": "Training", "config.json": "Settings", "data_test.json": ""}
    for name, heading in parts.items():
        if heading:
            assert (heading in text) == (name != missing)
    assert "Data" in text


def test_figures_that_do_not_exist(tmp_path):
    evaluation = made_up.evaluation()
    evaluation["example"] = made_up.example(weighted=False)
    evaluation["longer_is_better"]["length_matched"] = None
    for row in evaluation["models"].values():
        row.update(length_matched=made_up.senses(None), bits_per_byte=None)
        row["lambda"] = None
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation), "utf-8")
    text = Page(write_report(tmp_path)).text
    assert "n = 0" in text and "Not annotated yet" in text and "n/a" in text


def test_a_weight_of_zero_and_a_lone_surrogate(tmp_path):
    evaluation = made_up.evaluation()
    evaluation["example"]["chosen"]["spans"] = [made_up.span("x\ud800", ["x"], ["x"], 0.0)]
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation), "utf-8")
    assert "x<U+D800>" in Page(write_report(tmp_path)).text


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / "evaluation.json").write_text("{", "utf-8")
    with pytest.raises(UserError, match=r"evaluation\.json is damaged"):
        write_report(tmp_path)


# ------------------------------------------------------------------------------------------------ drawings


def test_series_leaves_out_what_is_no_number():
    lines = [{"step": 0, "a": 1.0}, {"step": 1, "a": None}, {"step": 2}, {"step": 3, "a": 2}, {"step": 4, "a": "x"}]
    assert series(lines, "a") == [(0.0, 1.0), (3.0, 2.0)]


def test_long_curves_are_averaged():
    points = [(float(i), float(i % 2)) for i in range(2 * POINTS)]
    assert thinned(points) == [(2 * i + 0.5, 0.5) for i in range(POINTS)]
    assert len(thinned([(0.0, 0.0)] * (POINTS + 1))) <= POINTS
    assert thinned(points[:5]) == points[:5]


@pytest.mark.parametrize("values", [[0.0], [5.0, 5.0, 5.0], [1e-9, 2e-9], [-3e6, 4e6], [0.0, 0.0]])
def test_curves_of_any_range_stay_in_their_frame(values):
    drawn = curves("t", {"a": [(float(i), v) for i, v in enumerate(values)]}, level=0.5)
    assert "nan" not in drawn and "inf" not in drawn
    for x, y in re.findall(r"(-?[\d.]+),(-?[\d.]+)", "".join(re.findall(r'points="([^"]*)"', drawn))):
        assert 0 <= float(x) <= 260 and 0 <= float(y) <= 120
    assert curves("t", {"a": []}) == ""


def test_a_legend_calls_rounding_zero():
    assert "0 → 0.5" in curves("t", {"a": [(0.0, -2e-7), (1.0, 0.5)]})
    assert "2e-07 → 5e-07" in curves("t", {"a": [(0.0, 2e-7), (1.0, 5e-7)]})


def test_an_interval_is_drawn_to_scale():
    drawn = interval({"value": 0.5, "low": 0.25, "high": 1.0, "count": 4}, baseline=None)
    assert 'cx="60.0"' in drawn and 'x1="31.0" x2="118.0"' in drawn and "level" not in drawn


def test_short_numbers():
    assert [short(v) for v in (0.0, 0.69314, 1240.0, 15_320.0, 3_100_000.0, -0.5)] == [
        "0",
        "0.693",
        "1,240",
        "15.3k",
        "3.1M",
        "-0.5",
    ]
