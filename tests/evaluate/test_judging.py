"""Verdicts and win rates by hand, and the whole command against a judge that stands on this machine."""

from __future__ import annotations

import itertools
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from ctpd_jax.cli import main
from ctpd_jax.evaluate.judging import length_controlled, verdict, win_rate


@pytest.mark.parametrize(
    ("reply", "wins"),
    [("A", 1.0), (" b.\n", 0.0), ("C", 0.5), ("Answer A", 1.0), ("**B**", 0.0), ("answer_b", 0.0)],
)
def test_what_a_reply_means(reply, wins):
    assert verdict(reply) == wins


@pytest.mark.parametrize("reply", ["", "A or B", "Because", "AB", "neither"])
def test_an_unclear_reply_is_no_verdict(reply):
    assert np.isnan(verdict(reply))


def test_the_win_rate_is_the_mean():
    rate = win_rate(np.array([1.0, 0.5, 0.0, 1.0]))
    assert rate.value == 0.625 and rate.low < 0.625 < rate.high and rate.count == 4


def test_at_equal_length_the_longer_answer_has_no_advantage():
    rng = np.random.default_rng(0)
    lengths = rng.integers(50, 500, (4000, 2))
    differences = np.tanh((lengths[:, 0] - lengths[:, 1]) / (lengths[:, 0] - lengths[:, 1]).std())
    # A judge that likes length, and the first model by log(3): 75 % at equal length.
    chance = 1 / (1 + np.exp(-(np.log(3) + 2 * differences)))
    wins = (rng.random(4000) < chance).astype(float)
    assert length_controlled(wins, lengths) == pytest.approx(0.75, abs=0.02)
    longer = lengths + np.array([300, 0])
    assert length_controlled(wins, longer) < 0.75 < length_controlled(wins, lengths - np.array([300, 0]))
    # Where one always wins the fit stays finite.
    assert 0.9 < length_controlled(np.ones(50), np.full((50, 2), 100)) < 1


class Judge(BaseHTTPRequestHandler):
    """Prefers the answer with more "good"; equal ones by their place. The first call of each server fails."""

    def do_POST(self):
        self.server.asked.append(self.headers.get("Authorization"))
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if next(self.server.calls) == 0:  # one of several at once
            self.send_response(503)
            self.end_headers()
            return
        said = body["messages"][0]["content"]
        first, second = (said.split(f"<answer_{name}>")[1].split("</answer")[0].count("good") for name in "ab")
        letter = "unsure" if "hard" in said else "A" if first >= second else "B"
        reply = json.dumps({"choices": [{"message": {"content": letter}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Judge) as server:
        server.asked, server.calls = [], itertools.count()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def answers(path, **texts):
    path.write_text(json.dumps([{"instruction": name, "output": text} for name, text in texts.items()]))
    return str(path)


def test_both_orders_are_asked_and_nothing_twice(tmp_path, server, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setattr("ctpd_jax.processes.server.time.sleep", lambda seconds: None)
    ours = answers(tmp_path / "a.json", one="good good", two="good.", three="bad", hard="x", alone="y")
    others = answers(tmp_path / "b.json", one="good", two="good", three="good", hard="z")
    url, out = f"http://127.0.0.1:{server.server_port}/v1/", tmp_path / "out" / "result.json"
    arguments = ["judge", ours, others, "--url", url, "--model", "j", "--out", str(out)]
    assert main(arguments) == 0
    found = json.loads(out.read_text())
    # One is won in both orders, two goes to whoever comes first, three is lost, hard is unclear both times.
    assert found["win_rate"]["value"] == (1 + 0.5 + 0 + 0.5) / 4 and found["win_rate"]["count"] == 4
    assert found["ties"] == 0.5 and found["orders_disagree"] == 0.25 and found["unclear_replies"] == 2
    assert len(server.asked) == 8 + 1 and set(server.asked) == {"Bearer secret"}
    assert "win rate 50.0" in capsys.readouterr().out
    kept = out.with_suffix(".replies.jsonl")
    assert "secret" not in kept.read_text() + out.read_text()
    # A killed process leaves half a line: that reply alone is asked for again.
    kept.write_bytes(kept.read_bytes()[:-20])
    assert main(arguments) == 0 and len(server.asked) == 10
    assert json.loads(out.read_text()) == found
    assert main(arguments) == 0 and len(server.asked) == 10


def test_what_cannot_be_judged_is_a_sentence(tmp_path, server, capsys, monkeypatch):
    monkeypatch.setattr("ctpd_jax.processes.server.time.sleep", lambda seconds: None)
    ours, rest = answers(tmp_path / "a.json", one="x"), ["--model", "j", "--out", str(tmp_path / "r.json")]
    url = ["--url", f"http://127.0.0.1:{server.server_port}"]
    assert main(["judge", ours, str(tmp_path / "none.json"), *url, *rest]) == 2
    assert main(["judge", ours, answers(tmp_path / "b.json", other="x"), *url, *rest]) == 2
    (tmp_path / "c.json").write_text('{"instruction": 3}')
    assert main(["judge", ours, str(tmp_path / "c.json"), *url, *rest]) == 2
    assert main(["judge", ours, ours, "--url", "http://127.0.0.1:9", *rest]) == 2
    told = capsys.readouterr().err
    for sentence in ("There is no file", "no instruction in common", "no JSON list of", "does not answer"):
        assert sentence in told


@pytest.mark.parametrize(
    ("key", "url", "sentence"),
    [
        ("sk-hidden\nX: y", "http://127.0.0.1:9", "OPENAI_API_KEY holds what no key does"),
        ("sk-hidden", "http://somebody:hidden@127.0.0.1:9", "http://***@127.0.0.1:9 does not answer"),
        ("sk-hidden", "ftp://somebody:hidden@host", "ftp://***@host cannot be asked"),
        ("sk-hidden", "no address", "no address cannot be asked"),
    ],
)
def test_keys_and_passwords_are_not_shown(tmp_path, monkeypatch, capsys, key, url, sentence):
    monkeypatch.setattr("ctpd_jax.processes.server.time.sleep", lambda seconds: None)
    monkeypatch.setenv("OPENAI_API_KEY", key)
    ours = answers(tmp_path / "a.json", one="x")
    arguments = ["judge", ours, ours, "--url", url, "--model", "j", "--out", str(tmp_path / "r.json")]
    assert main(arguments) == 2
    told = "".join(capsys.readouterr())
    assert sentence in told and "hidden" not in told


def test_a_key_may_end_with_a_line_break(tmp_path, server, monkeypatch):
    monkeypatch.setattr("ctpd_jax.processes.server.time.sleep", lambda seconds: None)
    monkeypatch.setenv("OPENAI_API_KEY", "secret\n")
    ours, url = answers(tmp_path / "a.json", one="x"), f"http://127.0.0.1:{server.server_port}"
    assert main(["judge", ours, ours, "--url", url, "--model", "j", "--out", str(tmp_path / "r.json")]) == 0
    assert set(server.asked) == {"Bearer secret"}
