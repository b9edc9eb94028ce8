"""What PEFT and torch make of adapters. Runs where they are installed, apart from the tests.

    python peft_reference.py JOB.json

JOB.json: {"base": FOLDER, "adapters": FOLDER, "merged": FOLDER, "tokens": [...], "out": FILE.npz}. Writes the logits
of the base, of the base with its adapters, and of the merged model, as "base", "adapters" and "merged".
"""

from __future__ import annotations

import json
import sys

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


def main() -> None:
    with open(sys.argv[1]) as stream:
        job = json.load(stream)

    def logits(model: torch.nn.Module) -> np.ndarray:
        return model.eval()(torch.tensor([job["tokens"]])).logits[0].numpy()

    def load(folder: str) -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")

    with torch.no_grad():
        found = {"base": logits(load(job["base"])), "merged": logits(load(job["merged"]))}
        found["adapters"] = logits(PeftModel.from_pretrained(load(job["base"]), job["adapters"]))
    np.savez(job["out"], **found)


if __name__ == "__main__":
    main()
