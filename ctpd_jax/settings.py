"""Every setting, once, with its default and its meaning. A file in configs/ starts from here and changes what it needs.

The names are ml_collections keys: `ctpd run --config configs/demo.py --config.train.beta=0.2`.
"""

from __future__ import annotations

from ml_collections import ConfigDict


def training(lr: float, steps: int = 0, epochs: float = 1.0, batch_size: int = 16, **changes) -> ConfigDict:
    """Settings that every stage which trains shares."""
    settings = ConfigDict(
        {
            "lr": lr,  # peak learning rate of AdamW
            "steps": steps,  # updates; 0: as many as `epochs` gives, -1: leave the stage out
            "epochs": epochs,
            "batch_size": batch_size,  # pairs per update (SFT: responses)
            "micro_batch": 4,  # pairs per forward and backward pass; updates sum over micro-batches
            "warmup": 0.1,  # share of the steps with rising learning rate; then cosine to zero
            "weight_decay": 0.01,  # not on norms and biases
            "clip": 1.0,  # global gradient norm
            "adam_b1": 0.9,
            "adam_b2": 0.999,
            "save_every": 100,  # updates between checkpoints
        }
    )
    settings.update(changes)
    return settings


def preference(lr: float, beta: float, **changes) -> ConfigDict:
    """Settings of a stage that trains on pairs."""
    return training(lr, beta=beta, label_smoothing=0.0, loss="sigmoid", sft_weight=0.0, **changes)


def model() -> ConfigDict:
    return ConfigDict(
        {
            "path": "",  # folder in Hugging Face format, or a hub id
            "template": "auto",  # "chat", "plain", or "auto": chat where the tokenizer brings a template
            "remat": True,  # recompute activations in the backward pass, layer by layer
        }
    )


def default_config() -> ConfigDict:
    """Returns the whole configuration with the settings of the paper where it gives them (arXiv 2601.11865)."""
    config = ConfigDict(
        {
            "seed": 0,
            "compute_dtype": "auto",  # "float32", "bfloat16"; auto: bfloat16 on TPU, float32 elsewhere
            "platform": "auto",  # "cpu", "tpu", "gpu": fail where JAX finds another one
            "data": {
                "train": "",  # FILE.jsonl, tfds:NAME, hf:NAME
                "test": "",
                "train_split": "train",
                "test_split": "test",
                "limit": 0,  # first N pairs; 0: all
                "test_limit": 0,
                "max_prompt_tokens": 128,  # on both sides
                "max_response_tokens": 384,  # on both sides, end-of-turn included
                "unit": "character",  # span boundaries at characters or, where both tokenizers allow it, at bytes
                "end_of_turn": True,  # score the end-of-turn token, in a span of its own
            },
            "teacher": model(),
            "student": model(),
            "rows": {
                "layout": "response",  # "response": one response a row; "pair": both; "shared": both after one prompt
                "buckets": 4,  # row lengths to compile for
                "multiple": 64,  # row lengths are multiples of it
            },
            "teacher_sft": training(lr=3e-6, warmup=0.05, clip=10.0, steps=-1),
            "student_sft": training(lr=2e-6, warmup=0.05, clip=10.0, steps=-1),
            # The contrastive pair. `positive` learns the pairs as they are, `negative` with the sides swapped.
            "positive": preference(lr=2e-6, beta=0.3, clip=3.0),
            "negative": preference(lr=2e-6, beta=0.3, clip=1.0),
            "weights": {
                "source": "dpo",  # "dpo", "sft" (on chosen, on rejected), "prompts", "uniform", "random"
                "positive_scorer": "teacher",  # whose tokens the positive model reads: "teacher" or "student"
                "negative_scorer": "teacher",  # teacher+teacher: the paper; teacher+student: mixed
                "good_prompt": "Answer helpfully, correctly and politely.",  # for source = "prompts"
                "bad_prompt": "Answer unhelpfully, wrongly and rudely.",
                "mu": 1.0,  # sign for the chosen response; the rejected one gets the opposite
                "k": 1.0,
                "lower": -0.5,
                "upper": 1.5,
                "transform": "none",  # "threshold", "scale", "rank", "binary"
                "top_share": 0.5,  # for transform = "binary"
            },
            "annotate": {
                "pairs_per_shard": 256,  # annotation goes on after the last whole shard
                "micro_batch": 4,  # pairs per forward pass
            },
            "train": preference(
                lr=1e-6,
                beta=0.1,
                reference="teacher",  # "teacher", "student" (its own start), "none"
                span_logprob="sum",  # "mean": over the span's own tokens, each side over its own
                normalize="none",  # "span", "byte", "start" (margin relative to the student's start)
            ),
            "student_dpo": preference(lr=1e-6, beta=0.1, steps=-1),  # the plain DPO student, for comparison
            "evaluate": {
                "micro_batch": 4,
                "samples": 2,  # answers to draw from every model; shown in the report
                "temperature": 0.7,
                "max_new_tokens": 128,
                "length_tolerance": 0.2,  # the length-matched subset: lengths differ by at most this share
            },
            "export": {"dtype": "float32"},  # of the exported weights
            "toy": {  # data.train = "toy": the demo's world and its two small models, made on the spot
                "pairs": 2000,
                "test_pairs": 300,
                "noise": 0.2,
            },
            "log_every": 1,  # updates between lines of metrics.jsonl
            "compile_cache": True,  # keep compiled programs in WORKDIR/compile_cache
        }
    )
    config.lock()
    return config
