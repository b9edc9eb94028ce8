"""Asking a server: whoever waits for it can be stopped, and whatever it sends is an answer or a sentence."""

import signal
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from ctpd_jax.errors import UserError
from ctpd_jax.processes import preempt, server


@pytest.fixture
def silent():
    """What waits for a reply until the test is over; `begun` once somebody does."""
    begun, over = threading.Event(), threading.Event()

    def ask(number):
        if number:
            begun.set()
            over.wait(60)
        return number

    yield ask, begun
    over.set()


def test_answers_come_in_the_order_of_the_questions():
    turns = [threading.Event() for _ in range(4)]

    def ask(number):  # the last one is answered first
        assert number == 3 or turns[number + 1].wait(10)
        turns[number].set()
        return 10 * number

    assert list(server.in_order(ask, range(4), 4, "")) == [0, 10, 20, 30]
    assert list(server.in_order(str, [], 4, "")) == []


def test_a_signal_ends_a_wait_for_a_silent_server(silent):
    ask, begun = silent
    answers = server.in_order(ask, range(3), 2, "what is whole is kept")
    with preempt.listening():
        assert next(answers) == 0 and begun.wait(10)
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(preempt.Preempted, match="what is whole is kept"):
            next(answers)


def test_an_error_does_not_wait_for_those_that_are_silent(silent):
    ask, begun = silent

    def refused(number):
        if number == 0:
            assert begun.wait(10)
            raise UserError("no")
        return ask(number)

    with pytest.raises(UserError, match="no"):
        list(server.in_order(refused, range(100), 2, ""))
    assert not any(thread.name.startswith("ThreadPool") for thread in threading.enumerate())


@contextmanager
def sending(*replies):
    """The address of a server that sends (status, headers, bytes) after one another, the last one for ever."""
    coming = list(replies)

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            status, headers, data = coming.pop(0) if len(coming) > 1 else coming[0]
            self.send_response(status)
            for name, value in ({"Content-Length": len(data)} | headers).items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as made:
        threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{made.server_port}/v1"
        made.shutdown()


def asked(url):
    with server.opened(1) as session:
        return server.asked(session, url, "models")


@pytest.mark.parametrize(
    ("reply", "sentence"),
    [
        ((200, {}, b"<html>\x1b[2J\nhello"), r"/v1/models answers, but not in JSON: <html>\\x1b\[2J hello$"),
        ((200, {}, b""), "not in JSON: nothing"),
        ((200, {}, b"[" * 100_000), r"not in JSON: \[\["),  # deeper than Python reads
        ((404, {}, b"\xff"), "/v1/models answers with status 404: "),
        ((401, {}, b"no"), r"status 401 \(its key belongs into OPENAI_API_KEY\): no"),
        ((302, {"Location": "/v1/models"}, b""), "cannot be asked: Exceeded 30 redirects"),
        ((302, {"Location": "http://" + "a" * 300}, b""), "cannot be asked: "),  # an error of urllib3's own
        ((200, {"Content-Encoding": "gzip"}, b"none"), "cannot be asked: "),
        ((200, {"Content-Length": 99}, b"{"), r"does not answer \(ChunkedEncodingError\)"),
    ],
)
def test_whatever_it_sends_is_a_sentence(monkeypatch, reply, sentence):
    monkeypatch.setattr(server.time, "sleep", lambda seconds: None)
    with sending(reply) as url, pytest.raises(UserError, match=sentence):
        asked(url)


def test_a_reply_that_broke_off_is_asked_for_again(monkeypatch):
    monkeypatch.setattr(server.time, "sleep", lambda seconds: None)
    with sending((200, {"Content-Length": 99}, b"{"), (503, {}, b""), (200, {}, b"[1]")) as url:
        assert asked(url) == [1]


def test_a_reply_is_bounded(monkeypatch):
    monkeypatch.setattr(server, "LARGEST", 10)
    with sending((200, {}, b" " * 20)) as url, pytest.raises(UserError, match="answers with more than"):
        asked(url)
