"""`ctpd judge A.json B.json`: which of two models answers better, by a judge behind an OpenAI-compatible endpoint.

The files are lists of {"instruction", "output"}, as `ctpd generate --prompts` and AlpacaEval write them. What a judge
has said is kept line by line: a command that was killed goes on where it stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import requests

from ctpd_jax.artifacts import write_json
from ctpd_jax.errors import UserError
from ctpd_jax.evaluate.judging import QUESTION, length_controlled, verdict, win_rate
from ctpd_jax.processes import server
from ctpd_jax.report.format import share
from ctpd_jax.train.metrics import Progress


def judge(known: argparse.Namespace) -> None:
    """Asks about every instruction twice, and prints and writes win rates.

    Raises:
        UserError: a file that is no such list, no instruction in common, or an endpoint that does not answer.
    """
    # 1. The instructions that both files answer.
    first, second = answers_of(known.answers[0]), answers_of(known.answers[1])
    asked = [instruction for instruction in first if instruction in second]
    if not asked:
        raise UserError(f"{known.answers[0]} and {known.answers[1]} answer no instruction in common.")
    # 2. Both orders of each, those that have no verdict yet.
    questions = {}
    for instruction in asked:
        for order, both in enumerate(((first, second), (second, first))):
            texts = {"first": both[0][instruction], "second": both[1][instruction]}
            questions[instruction, order] = QUESTION.format(instruction=instruction, **texts)
    replies = ask_all(list(questions.values()), known)
    # 3. What the first file wins of each instruction: the mean of both orders. No clear reply is a tie.
    told = {key: verdict(replies[question]) for key, question in questions.items()}
    wins = np.array([[told[i, 0], 1 - told[i, 1]] for i in asked])  # NaN: unclear
    scores = np.nan_to_num(wins, nan=0.5).mean(axis=1)
    lengths = np.array([[len(first[i]), len(second[i])] for i in asked])
    rate = win_rate(scores)
    found = {
        "win_rate": {"value": rate.value, "low": rate.low, "high": rate.high, "count": rate.count},
        "length_controlled_win_rate": length_controlled(scores, lengths),
        "ties": float((scores == 0.5).mean()),
        "orders_disagree": float((np.nan_to_num(np.abs(np.diff(wins, axis=1))) == 1).mean()),
        "unclear_replies": int(np.isnan(wins).sum()),
        "mean_length": lengths.mean(axis=0).tolist(),
        "judge": known.model,
        "answers": [str(path) for path in known.answers],
    }
    # 4. Into a file, and on the screen.
    write_json(known.out, found)
    print(
        f"{known.answers[0]} against {known.answers[1]}, {len(asked)} instructions in both orders, by {known.model}:\n"
        f"win rate {share(found['win_rate'])} %, at equal length {100 * found['length_controlled_win_rate']:.1f} %; "
        f"ties {100 * found['ties']:.1f} %, orders that disagree {100 * found['orders_disagree']:.1f} %, "
        f"unclear replies {found['unclear_replies']}; mean length {lengths.mean(axis=0).round().tolist()} characters\n"
        f"{known.out}"
    )


def answers_of(path: Path) -> dict[str, str]:
    """Return instruction -> answer of an AlpacaEval file."""
    try:
        rows = json.loads(path.read_text("utf-8"))
        return {str(row["instruction"]): str(row["output"]) for row in rows}
    except FileNotFoundError:
        raise UserError(f"There is no file {path}.") from None
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f'{path} is no JSON list of {{"instruction", "output"}}: {error}') from None


def ask_all(questions: Sequence[str], known: argparse.Namespace) -> dict[str, str]:
    """Return the judge's reply to each question; those of before stand beside the output and are not asked again."""
    # 1. What was asked before: the same words of the same judge.
    path = known.out.with_suffix(".replies.jsonl")
    names = {question: hashlib.sha256(f"{known.model}\0{question}".encode()).hexdigest() for question in questions}
    kept = replies_of(path)
    missing = [question for question in dict.fromkeys(questions) if names[question] not in kept]
    # 2. The others, several at once; each is on disk before the next is counted.
    path.parent.mkdir(parents=True, exist_ok=True)
    torn = path.exists() and not path.read_bytes().endswith(b"\n")
    with (
        server.opened(known.parallel) as session,
        open(path, "ab", buffering=0) as file,
        Progress(len(names), "judged", len(names) - len(missing), unit="reply") as progress,
    ):
        file.write(b"\n" * torn)
        replies = server.in_order(partial(ask, session, known.url, known.model), missing, known.parallel, "")
        for question, reply in zip(missing, replies):
            line = {"question": names[question], "reply": reply}
            file.write(json.dumps(line).encode() + b"\n")  # by one write: a kill leaves whole lines or half of one
            kept[names[question]] = reply
            progress.update()
    return {question: kept[name] for question, name in names.items()}


def replies_of(path: Path) -> dict[str, str]:
    """Return question's name -> reply of the lines that are whole."""
    found = {}
    for text in path.read_text("utf-8").splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
            found[line["question"]] = line["reply"]
        except (ValueError, KeyError):
            continue  # what a killed process left half written
    return found


def ask(session: requests.Session, url: str, model: str, question: str) -> str:
    """Return one reply. Raises UserError where the endpoint refuses, or does not answer after some tries."""
    said = [{"role": "user", "content": question}]
    body: Any = {"model": model, "messages": said, "temperature": 0, "max_tokens": 16}
    reply = server.asked(session, url, "chat/completions", body)
    try:
        return str(reply["choices"][0]["message"]["content"])
    except (KeyError, IndexError, TypeError):
        raise UserError(f"{url} answers, but not as a chat does: {server.shown(reply)}") from None
