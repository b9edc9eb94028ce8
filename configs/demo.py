"""The whole chain on a toy world with known rewards: no network, no downloads.

ctpd run --config configs/demo.py --workdir runs/demo
"""

from ml_collections import ConfigDict

from ctpd_jax.settings import default_config


def get_config() -> ConfigDict:
    config = default_config()
    return config
