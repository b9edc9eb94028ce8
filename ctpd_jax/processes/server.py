"""Asking a server in OpenAI's form: a judge, or a teacher that runs elsewhere."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from typing import Any, TypeVar

import requests
from requests.adapters import HTTPAdapter

from ctpd_jax.errors import UserError, printable
from ctpd_jax.processes import preempt

KEY = "OPENAI_API_KEY"  # the environment variable that holds the key; none is sent without it
TRIES = 5  # of one question
TIMEOUT = 120.0  # seconds for one reply
LARGEST = 1 << 28  # bytes of one reply; what is asked for here takes some megabytes
EVERY = 0.5  # seconds between two looks whether the command is to stop

Asked = TypeVar("Asked")
Told = TypeVar("Told")


def opened(parallel: int) -> requests.Session:
    """Return a session for so many questions at once, with the key where there is one.

    Raises:
        UserError: what the environment holds is no key.
    """
    key = os.environ.get(KEY, "").strip()
    if not all("!" <= character <= "~" for character in key):  # else the message about the header would show it
        raise UserError(f"{KEY} holds what no key does, such as a blank or a line break; set it anew.")
    session = requests.Session()
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(pool_maxsize=parallel))
    if key:
        session.headers["Authorization"] = f"Bearer {key}"
    return session


def in_order(ask: Callable[[Asked], Told], some: Sequence[Asked], parallel: int, kept: str) -> Iterator[Told]:
    """Yield what `ask` returns for each, in their order, `parallel` of them asked at once.

    SIGTERM (`kept` ends its sentence), Ctrl-C and an error end it at once: who still waits for a reply is left alone.
    """
    # The threads of a pool would be waited for, here and again where Python ends: as long as a silent server likes.
    told: list[Future[Told]] = [Future() for _ in some]
    coming, ended = iter(zip(some, told, strict=True)), threading.Event()
    turn = threading.Lock()

    def work() -> None:
        while not ended.is_set():
            with turn:
                one, future = next(coming, (None, None))
            if future is None:
                return
            try:
                future.set_result(ask(one))  # type: ignore[arg-type]
            except BaseException as error:  # it belongs to whoever waits for it
                future.set_exception(error)

    for _ in range(min(parallel, len(some))):
        threading.Thread(target=work, daemon=True).start()
    try:
        for future in told:
            # Not without end: a signal is noted by Python's handler, and would be seen after the reply.
            while not future.done():
                preempt.check(kept)
                wait([future], EVERY)
            yield future.result()
    finally:
        ended.set()


def asked(session: requests.Session, url: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
    """Return the JSON that a server answers to `body`, or to a GET without one.

    Raises:
        UserError: it refuses, it answers no JSON, or it does not answer after some tries.
    """
    # Who is busy or away is waited for, longer each time; who refuses will refuse again.
    problem, where = "", f"{url.rstrip('/')}/{path}"
    for attempt in range(TRIES):
        if attempt:
            time.sleep(2.0**attempt / 2)
        try:
            with session.request(
                "GET" if body is None else "POST", where, json=body, timeout=TIMEOUT, stream=True
            ) as response:
                status, data = response.status_code, _read(response, url)
        except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
            problem = type(error).__name__
            continue
        except UserError:
            raise
        except (requests.RequestException, ValueError) as error:  # an address that is none, or leads in a circle
            raise UserError(f"{url} cannot be asked: {printable(str(error))}") from None
        if status == 429 or status >= 500:  # too many at once, or its own trouble
            problem = f"status {status}"
            continue
        if status != 200:
            advice = f" (its key belongs into {KEY})" if status in (401, 403) else ""
            raise UserError(f"{where} answers with status {status}{advice}: {shown(data)}")
        # By Python's own reader, which takes NaN: who asked says whose number it is.
        try:
            return json.loads(data)
        except (ValueError, RecursionError):
            raise UserError(f"{where} answers, but not in JSON: {shown(data)}") from None
    raise UserError(f"{url} does not answer ({problem}); the same command goes on where it stopped.")


def _read(response: requests.Response, url: str) -> bytes:
    """Return a reply's bytes; a server that never ends is not waited for until the memory is full."""
    data = bytearray()
    for part in response.iter_content(1 << 20):
        data += part
        if len(data) > LARGEST:
            raise UserError(f"{url} answers with more than {LARGEST >> 20} MB: it is no server in OpenAI's form.")
    return bytes(data)


def shown(reply: Any) -> str:
    """Return the beginning of a reply for a sentence: one line, and nothing that a terminal obeys."""
    text = reply[:1000].decode("utf-8", "replace") if isinstance(reply, bytes) else json.dumps(reply)[:1000]
    return printable(" ".join(text.split()))[:200] or "nothing"
