"""Qwen2.5 7B Instruct teaches Llama 3.2 1B Instruct on one v5e chip: colab_v5e.py with the teacher over int8.

    ctpd run --config configs/colab_v5e_7b.py --workdir runs/colab_7b

The chip has 15.75 GiB. In bfloat16 the teacher alone would take 14.2; with the matrices of its layers as int8 it takes
8.1, and its adapters train beside it (docs/method.md says what int8 changes). Not tried on a chip: `ctpd plan` says it
fits. 1,600 pairs, 100 updates of each model: two hours, by arithmetic.
"""

import sys
from pathlib import Path

from ml_collections import ConfigDict

sys.path.insert(0, str(Path(__file__).resolve().parent))
import colab_v5e


def get_config() -> ConfigDict:
    config = colab_v5e.get_config()
    config.teacher.path = "Qwen/Qwen2.5-7B-Instruct"
    for stage in (config.positive, config.negative):
        stage.lora.base = "int8"
        stage.micro_batch = 2
    config.annotate.update({"teacher_weights": "int8", "micro_batch": 4})
    return config
