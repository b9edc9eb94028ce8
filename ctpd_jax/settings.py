"""Every setting, once, with its default and its meaning. A file in configs/ starts from here and changes what it needs.

The names are ml_collections keys: `ctpd run --config configs/demo.py --config.train.beta=0.2`.
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

LESS_IS_BETTER = ("loss",)
MEASURES = ("rewards/accuracies", "rewards/margins", *LESS_IS_BETTER)  # by which the best update of a stage is chosen


def training(lr: float, **changes) -> ConfigDict:
    """Settings that every stage which trains shares."""
    # Optimizer first, then how long, how much at once, and what is trained at all.
    settings = ConfigDict(
        {
            "lr": lr,  # peak learning rate of AdamW
            "steps": 0,  # updates; 0: as many as `epochs` gives, -1: leave the stage out
            "epochs": 1.0,  # passes over the data, where `steps` is 0
            "batch_size": 16,  # pairs per update (SFT: responses)
            "micro_batch": 4,  # pairs per forward and backward pass, at most (see rows.fewer)
            "warmup": 0.1,  # share of the steps with rising learning rate; then cosine to zero
            "weight_decay": 0.01,  # not on norms and biases
            "clip": 1.0,  # global gradient norm
            "adam_b1": 0.9,  # decay of the mean of gradients
            "adam_b2": 0.999,  # of the mean of their squares
            "moments": "float32",  # "bfloat16": Adam's first moment, kept in two bytes a parameter instead of four
            "save_every": 100,  # updates between checkpoints, at most
            "save_minutes": 30.0,  # and minutes, by the time that updates take; 0: those of save_every alone
            "nonfinite": "stop",  # what an update does whose loss or gradient is not finite: "stop", or "skip" it
            "lora": {  # adapters instead of all parameters; the result is relative to what the stage started from
                "rank": 0,  # 0: train all parameters
                "alpha": 16.0,  # the adapters' product counts alpha / rank times
                "targets": "all",  # matrices of a layer: "all", or names with commas, "q_proj,v_proj"
                # The parameters under the adapters: "bfloat16" takes half the memory while they train, "int8" a
                # quarter, as another model: docs/method.md, What a stage is measured against.
                "base": "float32",
            },
        }
    )
    settings.update(changes)
    return settings


def preference(lr: float, beta: float, **changes) -> ConfigDict:
    """Settings of a stage that trains on pairs."""
    pairwise: dict[str, Any] = {
        "beta": beta,  # strength of the KL term; rewards are beta times the return
        "loss": "sigmoid",  # "sigmoid", "ipo", "hinge", "robust", "dpop", "apo": the table of core/losses.py
        "label_smoothing": 0.0,  # the probability that a label is wrong, for losses that have it
        "sft_weight": 0.0,  # of the chosen response's mean negative log-likelihood, added to the loss
        # Held-out pairs while it trains, against its own start: eval/... in the metrics.
        "eval_every": 0,  # updates between two looks; 0: none
        "eval_pairs": 64,  # the first N of the held-out pairs
        # What the stage leaves: "", its last update, or that of the best look: "rewards/accuracies", "rewards/margins"
        # or "loss".
        "keep_best": "",
        "patience": 0,  # looks without a better one after which it ends; 0: never
    }
    return training(lr, **pairwise, **changes)


def distilling(ce_weight: float = 1.0, weight: float = 1.0, **changes) -> ConfigDict:
    """Settings of a stage that learns the teacher's distributions.

    `top_k`: how many of its probabilities are kept, the largest ones. `temperature`: at which both divergences are
    taken. `projector_lr`: peak learning rate of the matrices between the two models' spaces.
    """
    shared: dict[str, Any] = {
        "teacher": "teacher_sft",  # whose distributions: "teacher_sft", or "positive", the teacher's DPO
        "ce_weight": ce_weight,  # of the chosen response's mean negative log-likelihood
        "weight": weight,  # of what is distilled
    }
    return training(2e-6, steps=-1, warmup=0.05, **shared, **changes)


def model() -> ConfigDict:
    """Which model, how it is asked, and what of it is kept for the gradient."""
    return ConfigDict(
        {
            "path": "",  # folder in Hugging Face format, here or in a bucket (gs://BUCKET/NAME), or a hub id
            # "chat", "chat:NAME", "plain", FILE.jinja, or "auto": chat where the tokenizer brings a template.
            "template": "auto",
            "template_variables": "",  # what it is told, as JSON: '{"enable_thinking": false}'
            # What is recomputed for the gradient: "full" all, "dots" no matrix products, "none"; auto: dots on a CPU,
            # full elsewhere, where memory is dearer than arithmetic.
            "remat": "auto",
        }
    )


def default_config() -> ConfigDict:
    """Returns the whole configuration with the settings of the paper where it gives them (arXiv 2601.11865)."""
    config = ConfigDict(
        {
            "seed": 0,  # of the order of training, adapters, random weights and samples
            "compute_dtype": "auto",  # "float32", "bfloat16"; auto: bfloat16 on TPUs and GPUs that have it
            "mesh": {  # how many devices to each axis; -1: those that are left
                "data": -1,  # rows of a batch
                "fsdp": 1,  # rows too, and parameters, gradients and moments are cut into so many parts
                "tensor": 1,  # heads, MLP width and vocabulary
            },
            "attention": "auto",  # "plain", "xla", "cudnn" (GPU), "splash" (TPU); auto: the fastest that can do it
            "platform": "auto",  # "cpu", "tpu", "gpu": fail where JAX finds another one
            "smaller_teacher": False,  # allow a teacher with fewer parameters than the student
            "data": {
                "train": "",  # FILE.jsonl, .json, .csv, .parquet or a folder, here or in a bucket; tfds:NAME, hf:NAME
                "test": "",  # held-out pairs, likewise
                "train_split": "train",  # of a data set that has several: tfds:NAME, hf:NAME
                "test_split": "test",  # likewise
                "limit": 0,  # first N pairs; 0: all
                "test_limit": 0,  # first N held-out pairs; 0: all
                "max_prompt_tokens": 128,  # on both sides
                "max_response_tokens": 384,  # on both sides, end-of-turn included
                "unit": "character",  # span boundaries at characters or, where both tokenizers allow it, at bytes
                "end_of_turn": True,  # score the end-of-turn token, in a span of its own
                "end_of_turn_both": True,  # where the limit cuts one response of a pair, on neither
                # What rows mean (docs/data.md), and what is to be done with those that cannot be used.
                "columns": "",  # names of yours: "prompt=question,chosen=good,rejected=bad"
                "ignore": "",  # fields that change neither prompt nor answer, with commas
                "ranked": "best_worst",  # of several ranked answers; "all": every pair of different rank
                "strip_template": False,  # take the markers of a chat template off texts that carry them
                "min_kept": 0.6,  # share of rows and pairs that must be usable; ties can be a third of a data set
            },
            "teacher": model(),
            "student": model(),
            "rows": {
                # "response": one response a row; "shared": both of a pair after one prompt; auto: shared on a CPU.
                "layout": "auto",
                "packed": "auto",  # several of them in a row: "yes", "no"; auto: no on a CPU, yes elsewhere
                # Passes of fewer pairs than `micro_batch`, and more of them, where that lays out less padding: "yes",
                # "no"; auto: yes on a CPU without packing.
                "fewer": "auto",
                "length": 0,  # of a row, in tokens; 0: chosen from the data
                # Shapes of a batch to compile for, at most; 0: four, and on a CPU as many as save more time than they
                # take to compile.
                "buckets": 0,
                "multiple": 64,  # lengths of rows are multiples of it
            },
            "teacher_sft": training(lr=3e-6, warmup=0.05, clip=10.0, steps=-1),
            "student_sft": training(lr=2e-6, warmup=0.05, clip=10.0, steps=-1),
            # The contrastive pair. `positive` learns the pairs as they are, `negative` with the sides swapped.
            "positive": preference(lr=2e-6, beta=0.3, clip=3.0),
            "negative": preference(lr=2e-6, beta=0.3, clip=1.0),
            "weights": {
                # "dpo", "sft" (on chosen, on rejected), "prompts", "uniform", "random"; "dpo_reference": the DPO model
                # against its own start, so that no reverse DPO is trained.
                "source": "dpo",
                "positive_scorer": "teacher",  # whose tokens the positive model reads: "teacher" or "student"
                "negative_scorer": "teacher",  # teacher+teacher: the paper; teacher+student: mixed
                "good_prompt": "Answer helpfully, correctly and politely.",  # for source = "prompts"
                "bad_prompt": "Answer unhelpfully, wrongly and rudely.",  # likewise
                "mu": 1.0,  # sign for the chosen response; the rejected one gets the opposite
                "k": 1.0,  # a weight is k exp(mu clip(log pi+ / pi-, lower, upper))
                "lower": -0.5,  # bounds of the log-ratio of a span, nats
                "upper": 1.5,  # likewise
                "transform": "none",  # "threshold", "scale", "rank", "binary", "mean_one", "agree"
                "top_share": 0.5,  # for transform = "binary"
            },
            "annotate": {
                "pairs_per_shard": 256,  # annotation goes on after the last whole shard
                "micro_batch": 4,  # pairs per forward pass
                # The teacher's parameters while it reads. "bfloat16": half the memory, also where it is evaluated and
                # answers; exact for a bfloat16 checkpoint. What a DPO is held against is its own start all the same.
                # "int8": a quarter, where its contrastive pair was trained over int8 too (lora.base).
                "teacher_weights": "float32",
                # What a model that reads is cut over: "host", the devices of a process, each of which has a copy and
                # reads its own shards; "all", every device, for one that no host holds. Then all read the same shard.
                "devices": "host",
                # With bfloat16 and a contrastive pair that was trained whole: so many pairs are read in float32 first,
                # and it is told how much of their weights the rounding leaves. 0: none.
                "compared_pairs": 8,
                # A teacher that is elsewhere (docs/elsewhere.md); teacher.path has its tokenizer, and needs no weights.
                # The address of a server that returns log-probabilities of prompts, as vLLM's: http://HOST:8000/v1
                "endpoint": "",
                # Its models by their names there; of weights.source = "prompts" the reference alone.
                "served": {"reference": "", "positive": "", "negative": ""},
                "parallel": 32,  # pairs that it is asked about at once
                "table": "",  # FILE.parquet that has the log-probabilities, measured by whatever you like
            },
            "train": preference(
                lr=1e-6,
                beta=0.1,
                objective="ctpd",  # "ctpd" (the paper), "regression", "mixed": docs/method.md, Objectives
                contrast="start",  # the teacher's log-ratio: pi+ to what it was trained from, or to "negative"
                tau=1.0,  # how far the student goes where the teacher went one nat
                target_clip=2.0,  # bound of the teacher's log-ratio of a span, both ways, in nats
                # How the rows' own margins enter, "margin" or "score_chosen" less "score_rejected": as a soft "label",
                # an "offset", the pair's "weight", or "none".
                margin_as="none",
                trust=1.0,  # of label and weight the share that the margin has beside the label alone; offset: a factor
                regression=1.0,  # weight of the spans' regression in mixed
                offset=0.0,  # by which the chosen response's reward has to lead (SimPO's gamma)
                reference="teacher",  # "teacher", "student" (its own start), "none"
                span_logprob="sum",  # "mean": over the span's own tokens, each side over its own
                normalize="none",  # "span", "byte", "start" (margin relative to the student's start)
            ),
            "student_dpo": preference(lr=1e-6, beta=0.1, steps=-1),  # the plain DPO student, for comparison
            # TIS-DPO of the student, weights from student_dpo and student_reverse: mu, k, lower, upper of `weights`.
            "student_reverse": preference(lr=1e-6, beta=0.1, steps=-1),
            "student_tis": preference(lr=1e-6, beta=0.1, steps=-1),
            # Logit distillation on the chosen responses (docs/method.md, Baselines), from the start of the student.
            "student_uld": distilling(top_k=128, ce_weight=0.5, weight=0.5),
            "student_ot": distilling(top_k=50, weight=0.15),
            "student_dskd": distilling(temperature=2.0, projector_lr=1e-3),
            "propose": {  # pairs for student_proposed: the student answers prompts, the teacher ranks its answers
                "prompts": "",  # a data set as data.train takes it; "": data.train. Labels are not looked at
                "limit": 0,  # first N distinct prompts; 0: all
                "answers": 4,  # to each prompt; the best and the worst of them become a pair
                "pairs": 1,  # of each prompt; 2: and the second best with the second worst
                "temperature": 1.0,  # of the answers
                "batch": 64,  # answers that are drawn together, and kept on disk from then on
                # What ranks, per byte: "weights", the two models whose log-ratio the weights of spans are made of; or
                # "start", the positive one against what it was trained from.
                "contrast": "weights",
                "min_contrast": 0.0,  # nats per byte by which the best has to lead the worst
            },
            "evaluate": {
                "samples": 2,  # answers to draw from every model, from one held-out prompt after the other
                "temperature": 0.7,  # of these; 0: the likeliest token
                "max_new_tokens": 128,  # of these
                "length_tolerance": 0.2,  # the length-matched subset: lengths differ by at most this share
            },
            "export": {
                "dtype": "float32",  # of the exported weights
                "adapters": False,  # also write the adapters of a student trained with LoRA, for PEFT, to DIR/adapters
            },
            "log_every": 1,  # updates between lines of metrics.jsonl
            "profile": "",  # "train=5:8": updates 5 to 7 of that stage are traced, WORKDIR/profile, for TensorBoard
            "stall_minutes": 30.0,  # several processes end, to be started again, if no bar moves for so long; 0: never
            "wandb": "",  # a project of Weights & Biases that gets the metrics too
            "models_in_memory": 0.5,  # parameters kept for later stages, against what a host then has free; 0: none
            "compile_cache": True,  # keep compiled programs in WORKDIR/compile_cache
        }
    )
    # The student that learns from proposals has the settings of `train`, and is left out unless it is asked for.
    config.student_proposed = ConfigDict(config.train.to_dict() | {"steps": -1})
    config.lock()
    return config


def paper_on_tpu(teacher: str, student: str, micro_batch: int, layout: str = "shared") -> ConfigDict:
    """The paper's training (arXiv 2601.11865) of a student whose teacher is too large to be trained whole on the slice.

    UltraFeedback; a micro-batch of `micro_batch` pairs should give every chip at least one. Where it gives no more,
    `layout` "response" leaves less padding: its units are shorter. `ctpd plan` tells how much.
    """
    config = default_config()
    config.teacher.path, config.student.path = teacher, student
    config.data.train = config.data.test = "hf:HuggingFaceH4/ultrafeedback_binarized"
    config.data.update({"train_split": "train_prefs", "test_split": "test_prefs"})
    config.data.update({"max_prompt_tokens": 128, "max_response_tokens": 384})  # 128 and 512 in all: the paper's code

    # The paper's: one epoch in every stage, learning rates, betas, 16 pairs an update, warmup, AdamW (the defaults).
    config.student_sft.update({"steps": 0, "lr": 4e-6, "batch_size": 64})  # the paper: 16 to 128
    config.train.update({"lr": 1e-6, "beta": 0.1, "batch_size": 16})
    for stage in (config.positive, config.negative):
        stage.update({"beta": 0.3, "batch_size": 16})

    # Ours: adapters instead of all of the teacher, and ten times the paper's rates for them.
    config.teacher_sft.update({"steps": 0, "batch_size": 64})
    for stage, lr in ((config.teacher_sft, 4e-5), (config.positive, 2e-5), (config.negative, 2e-5)):
        stage.lr = lr
        stage.lora.update({"rank": 16, "alpha": 32.0, "base": "bfloat16"})
    config.annotate.update({"teacher_weights": "bfloat16", "micro_batch": 8})

    # Ours: the length of rows is chosen from the data, so that every chip gets about as many tokens.
    config.mesh.update({"data": 1, "fsdp": -1, "tensor": 1})
    config.rows.update({"layout": layout, "packed": "yes", "multiple": 128})
    trained = ("teacher_sft", "student_sft", "positive", "negative", "train", "student_proposed")
    for stage in (config[name] for name in trained):
        stage.micro_batch = micro_batch
    return config
