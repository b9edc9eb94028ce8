"""What transformers and torch make of model folders. Runs where they are installed, apart from the tests.

    python torch_reference.py JOBS.json

JOBS.json is a list of jobs:
  {"create": FOLDER, "config": {...}}       a model of random parameters, saved by transformers
  {"logits": FOLDER, "tokens": [[...], ...], "out": FILE.npz}
                                            float32 logits of each sequence, as arrays "0", "1", ...
  {"score": FOLDER, "tokens": [...], "greedy": [prompt length, new tokens], "out": FILE.npz}
                                            log-probability of each next token, and a greedy continuation
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

_CHUNK = 256  # positions whose logits are held at a time


def _load(folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def create(job: dict[str, Any]) -> None:
    raw = dict(job["config"])
    config = AutoConfig.for_model(raw.pop("model_type"), **raw)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(job["create"])


def logits(job: dict[str, Any]) -> None:
    model = _load(job["logits"])
    out = {str(i): model(torch.tensor([ids])).logits[0].numpy() for i, ids in enumerate(job["tokens"])}
    np.savez(job["out"], **out)


def score(job: dict[str, Any]) -> None:
    model, tokens = _load(job["score"]), torch.tensor([job["tokens"]])
    hidden, targets = model.model(tokens).last_hidden_state[0, :-1], tokens[0, 1:, None]
    logprobs = [
        torch.log_softmax(model.lm_head(part), -1).gather(1, wanted)[:, 0]
        for part, wanted in zip(hidden.split(_CHUNK), targets.split(_CHUNK))
    ]
    prompt, new = job["greedy"]
    greedy = model.generate(tokens[:, :prompt], max_new_tokens=new, min_new_tokens=new, do_sample=False)
    np.savez(job["out"], logprobs=torch.cat(logprobs).numpy(), greedy=greedy[0, prompt:].numpy())


def main() -> None:
    with open(sys.argv[1]) as stream:
        jobs = json.load(stream)
    with torch.no_grad():
        for job in jobs:
            next(run for run in (create, logits, score) if run.__name__ in job)(job)


if __name__ == "__main__":
    main()
