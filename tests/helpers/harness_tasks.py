"""Tasks of lm-eval that need no network, as YAML and JSONL: two of multiple choice, one of text, one of answers."""

from __future__ import annotations

import json
from pathlib import Path

NAMES = ("own_endings", "own_letters", "own_text", "own_answers")
CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
TASKS = {
    # Endings of several words, of unequal length, and a context that ends in a space.
    "own_endings": {"doc_to_text": "{{question}} ", "num_fewshot": 2, **CHOICE},
    # Endings of one token.
    "own_letters": {"doc_to_text": "{{question}}\n{{listed}}\nAnswer:", "num_fewshot": 1, **CHOICE},
    "own_text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "byte_perplexity"}],
    },
    "own_answers": {
        "output_type": "generate_until",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{gold}}",
        "num_fewshot": 1,
        "generation_kwargs": {"until": ["\n\n", "Question:"], "do_sample": False, "max_gen_toks": 24},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
}
QUESTIONS = [
    ("What do bees make?", ["honey", "bread", "glass", "old iron nails"], 0),
    ("A kettle is used to", ["boil water for tea", "write", "dig a hole in the garden", "sing"], 0),
    ("Die Hauptstadt von Frankreich heißt", ["Rom", "Paris", "Madrid", "Oslo an der Küste"], 1),
    ("2 + 2 =", ["5", "22", "4", "nothing at all"], 2),
    ("The sky on a clear day is", ["green", "made of wood", "blue", "loud 🥐"], 2),
    ("Water freezes at zero degrees", ["Celsius", "Kelvin, which is cold", "on Sundays", "metres"], 0),
    ("Cats say", ["meow", "woof woof woof", "moo", "nothing; they write letters"], 0),
    ("東京は", ["日本の首都です", "魚です", "a kind of bread", "赤い"], 0),
]


def write_tasks(folder: Path, times: int = 1) -> str:
    """Write the tasks of TASKS into a folder, with `times` the questions, each time a little longer."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for turn in range(times):
        for question, choices, answer in QUESTIONS:
            question = "Think about it, and take your time. " * turn + question
            listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip("ABCD", choices))
            row = {"question": question, "choices": choices, "answer": answer, "listed": listed}
            rows.append(row | {"gold": choices[answer]})
    for name, task in TASKS.items():
        own = [row | {"choices": list("ABCD")} for row in rows] if name == "own_letters" else rows
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in own))
        source = {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}
        settings = {"task": name, "dataset_path": "json", "dataset_kwargs": source, "test_split": "test"}
        # JSON is YAML.
        (folder / f"{name}.yaml").write_text(json.dumps(settings | {"fewshot_split": "test"} | task))
    return str(folder)
