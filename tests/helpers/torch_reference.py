"""What transformers and torch make of model folders. Runs where they are installed, apart from the tests.

    python torch_reference.py JOBS.json

JOBS.json is a list of jobs:
  {"create": FOLDER, "config": {...}}       a model of random parameters, saved by transformers
  {"logits": FOLDER, "tokens": [[...], ...], "out": FILE.npz}
                                            float32 logits of each sequence, as arrays "0", "1", ...
  {"dpo": FOLDER, "pairs": [{"prompt": [...], "chosen": [...], "rejected": [...], "reference": [c, r]}, ...],
   "beta": B, "out": FILE.npz}              the gradient of the summed DPO loss by each parameter, in float64 and under
                                            the checkpoint's names; "loss"; and for each parameter "float32:NAME", how
                                            far torch's own float32 is from it
  {"ids": FOLDER, "texts": [...], "out": FILE.json}
                                            the ids of each text by AutoTokenizer, without and with special tokens
  {"score": FOLDER, "tokens": [...], "greedy": [prompt length, new tokens], "out": FILE.npz}
                                            log-probability of each next token, and a greedy continuation
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.nn.functional import logsigmoid
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

_THREADS = torch.get_num_threads()
_CHUNK = 256  # positions whose logits are held at a time
_ON_DISK = {"gpt_neox": {"lm_head.weight": "embed_out.weight"}}  # named otherwise in memory


def _load(folder: str) -> Any:
    kind = _kind(AutoConfig.from_pretrained(folder))
    model = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    # On a busy machine threads that wait for one another cost a tiny model ten times its work.
    torch.set_num_threads(_THREADS if model.num_parameters() > 1_000_000 else 1)
    return model


def _kind(config: Any) -> Any:
    return AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM


def create(job: dict[str, Any]) -> None:
    raw = dict(job["config"])
    config = AutoConfig.for_model(raw.pop("model_type"), **raw)
    torch.manual_seed(0)
    model = _kind(config).from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(job["create"])


def logits(job: dict[str, Any]) -> None:
    model = _load(job["logits"])
    with torch.no_grad():
        out = {str(i): model(torch.tensor([ids])).logits[0].numpy() for i, ids in enumerate(job["tokens"])}
    np.savez(job["out"], **out)


def dpo(job: dict[str, Any]) -> None:
    model = _load(job["dpo"])
    rough_loss, rough = _dpo_gradient(model, job)
    with _everything_in_float64():
        loss, exact = _dpo_gradient(model.double(), job)
    assert abs(rough_loss - loss) < 1e-4 * abs(loss), (rough_loss, loss)
    out = {"loss": np.float64(loss)}
    names = _ON_DISK.get(model.config.model_type, {})
    for name, gradient in exact.items():
        out[names.get(name, name)] = gradient.numpy()
        out["float32:" + names.get(name, name)] = (rough[name] - gradient).abs().max().numpy()
    np.savez(job["out"], **out)


def _dpo_gradient(model: Any, job: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    """The sigmoid loss of arXiv 2305.18290, summed over the pairs, each response run alone."""
    model.zero_grad()
    loss = sum(
        -logsigmoid(job["beta"] * (_moved(model, pair, "chosen", 0) - _moved(model, pair, "rejected", 1)))
        for pair in job["pairs"]
    )
    loss.backward()
    return loss.item(), {name: parameter.grad.double() for name, parameter in model.named_parameters()}


def _moved(model: Any, pair: dict[str, Any], side: str, column: int) -> torch.Tensor:
    """log pi(response | prompt) - log pi_ref(response | prompt)"""
    prompt, response = pair["prompt"], torch.tensor(pair[side])
    logits = model(torch.tensor([prompt + pair[side]])).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits, -1).gather(1, response[:, None]).sum() - pair["reference"][column]


@contextlib.contextmanager
def _everything_in_float64() -> Iterator[None]:
    """The models ask for float32 by name in norms, soft maxima and rotations, whatever the dtype of their weights."""
    wide = {"float32": torch.float64}, {"float": torch.Tensor.double}
    with mock.patch.multiple(torch, **wide[0]), mock.patch.multiple(torch.Tensor, **wide[1]):
        yield


def score(job: dict[str, Any]) -> None:
    model, tokens = _load(job["score"]), torch.tensor([job["tokens"]])
    prompt, new = job["greedy"]
    with torch.no_grad():
        hidden, targets = model.model(tokens).last_hidden_state[0, :-1], tokens[0, 1:, None]
        logprobs = [
            torch.log_softmax(model.lm_head(part), -1).gather(1, wanted)[:, 0]
            for part, wanted in zip(hidden.split(_CHUNK), targets.split(_CHUNK))
        ]
        greedy = model.generate(tokens[:, :prompt], max_new_tokens=new, min_new_tokens=new, do_sample=False)
    np.savez(job["out"], logprobs=torch.cat(logprobs).numpy(), greedy=greedy[0, prompt:].numpy())


def ids(job: dict[str, Any]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(job["ids"])
    found = [[tokenizer.encode(text, add_special_tokens=add) for add in (False, True)] for text in job["texts"]]
    with open(job["out"], "w") as stream:
        json.dump(found, stream)


def main() -> None:
    with open(sys.argv[1]) as stream:
        jobs = json.load(stream)
    for job in jobs:
        next(run for run in (create, logits, dpo, ids, score) if run.__name__ in job)(job)


if __name__ == "__main__":
    main()
