"""Qwen2.5 3B Instruct teaches Llama 3.2 1B Instruct on one v5e chip, such as Colab's (launch/colab.ipynb).

    ctpd run --config configs/colab_v5e.py --workdir runs/colab

Llama is gated on the hub: accept its licence there and log in (`hf auth login`, or HF_TOKEN), or give a local folder,
--config.student.path=DIR.

The chip has 15.75 GiB = 16.9 GB. Everything trains adapters over a bfloat16 base: the teacher's takes 6.2 GB, the
student's 2.5 GB. Trained whole, the student alone would take 1.24e9 x 16 bytes = 19.8 GB. Annotation reads with the
same 6.2 GB; the student that is exported is merged in float32, 4.9 GB. Not tried on a chip: `ctpd plan` says it fits.

1,600 pairs, 100 updates of each of the three models: about an hour, by arithmetic (50 TFLOP/s of the chip's 197), of
which downloads and compiling are a third. More pairs, more updates: --config.data.limit=8000.
"""

from ml_collections import ConfigDict

from ctpd_jax.settings import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.teacher.path = "Qwen/Qwen2.5-3B-Instruct"
    config.student.path = "meta-llama/Llama-3.2-1B-Instruct"
    config.data.train = config.data.test = "hf:HuggingFaceH4/ultrafeedback_binarized"
    config.data.update({"train_split": "train_prefs", "limit": 1600, "test_split": "test_prefs", "test_limit": 200})
    config.data.update({"max_prompt_tokens": 128, "max_response_tokens": 384})  # 128 and 512 in all: the paper's code

    # The paper's: betas, 16 pairs an update, warmup, AdamW (the defaults). SFT is left out (the default): both models
    # are instruct models already.
    config.positive.update({"beta": 0.3, "batch_size": 16})
    config.negative.update({"beta": 0.3, "batch_size": 16})
    config.train.update({"beta": 0.1, "batch_size": 16})

    # Ours: adapters everywhere, with rates for adapters and few updates. Not tuned.
    for stage, lr in ((config.positive, 5e-5), (config.negative, 5e-5), (config.train, 2e-5)):
        stage.lr = lr
        stage.lora.update({"rank": 16, "alpha": 32.0, "base": "bfloat16"})
        stage.update({"micro_batch": 4, "save_every": 25})
    config.annotate.update({"teacher_weights": "bfloat16", "micro_batch": 8})
    config.rows.update({"layout": "shared", "packed": "yes", "multiple": 128})
    config.evaluate.update({"samples": 4, "max_new_tokens": 128})
    config.export.update({"dtype": "bfloat16", "adapters": True})  # 2.5 GB to download, or 45 MB of adapters
    return config
