"""Asking a server in OpenAI's form: a judge, or a teacher that runs elsewhere."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

import requests
from requests.adapters import HTTPAdapter

from ctpd_jax.errors import UserError

KEY = "OPENAI_API_KEY"  # the environment variable that holds the key; none is sent without it
TRIES = 5  # of one question
TIMEOUT = 120.0  # seconds for one reply


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


def asked(session: requests.Session, url: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
    """Return the JSON that a server answers to `body`, or to a GET without one.

    Raises:
        UserError: it refuses, it answers no JSON, or it does not answer after some tries.
    """
    # Who is busy or away is waited for, longer each time; who refuses will refuse again.
    problem = ""
    for attempt in range(TRIES):
        if attempt:
            time.sleep(2.0**attempt / 2)
        try:
            response = session.request(
                "GET" if body is None else "POST", f"{url.rstrip('/')}/{path}", json=body, timeout=TIMEOUT
            )
        except (requests.ConnectionError, requests.Timeout) as error:
            problem = type(error).__name__
            continue
        except requests.RequestException as error:  # an address that is none, or leads in a circle
            raise UserError(f"{url} cannot be asked: {error}") from None
        if response.status_code == 429 or response.status_code >= 500:  # too many at once, or its own trouble
            problem = f"status {response.status_code}"
            continue
        if response.status_code != 200:
            raise UserError(f"{url} answers with status {response.status_code}: {response.text[:200]}")
        try:
            return response.json()
        except ValueError:
            raise UserError(f"{url} answers, but not in JSON: {response.text[:200]}") from None
    raise UserError(f"{url} does not answer ({problem}); the same command goes on where it stopped.")
