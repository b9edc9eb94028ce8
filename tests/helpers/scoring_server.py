"""A server on loopback that answers completions of token ids as vLLM does, with the log-probabilities of the prompt."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import jax
import numpy as np

from ctpd_jax.models.config import DecoderConfig
from ctpd_jax.models.decoder import Params, apply

LENGTH = 64  # prompts are padded to multiples: few programs


class ScoringServer(ThreadingHTTPServer):
    """Models by name; `asked` are the bodies that came, `limit` how many are answered before the server breaks down."""

    daemon_threads = True

    def __init__(self, models: Mapping[str, tuple[DecoderConfig, Params]]) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.models, self.asked, self.limit = models, [], 10**9
        self.lock = threading.Lock()
        self.programs = {name: jax.jit(partial(apply, decoder)) for name, (decoder, _) in models.items()}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def logprobs(self, name: str, ids: list[int]) -> list[dict[str, Any] | None]:
        """What vLLM lists: None for the first token, then every token with its log-probability, and the likeliest."""
        padded = np.zeros((1, -(-len(ids) // LENGTH) * LENGTH), np.int32)
        padded[0, : len(ids)] = ids
        logps = np.asarray(jax.nn.log_softmax(self.programs[name](self.models[name][1], padded)[0]))
        listed: list[dict[str, Any] | None] = [None]
        for place, token in enumerate(ids[1:]):
            both = {int(logps[place].argmax()), token}
            listed.append({str(one): {"logprob": float(logps[place, one]), "rank": 1} for one in both})
        return listed


class Answer(BaseHTTPRequestHandler):
    server: ScoringServer

    def do_GET(self) -> None:
        self.reply(200, {"object": "list", "data": [{"id": name} for name in self.server.models]})

    def do_POST(self) -> None:
        body, listed = json.loads(self.rfile.read(int(self.headers["Content-Length"]))), None
        with self.server.lock:
            if len(self.server.asked) < self.server.limit:
                self.server.asked.append(body)
                listed = self.server.logprobs(body["model"], body["prompt"])
        if listed is None:
            self.reply(503, {"error": "out of memory"})
        else:
            self.reply(200, {"choices": [{"index": 0, "text": "x", "prompt_logprobs": listed}]})

    def reply(self, status: int, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serving(models: Mapping[str, tuple[DecoderConfig, Params]]) -> Iterator[ScoringServer]:
    with ScoringServer(models) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()
