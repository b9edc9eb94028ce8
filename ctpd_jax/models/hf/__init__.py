"""Hugging Face model folders <-> (config, params): safetensors only, one tensor at a time."""

from ctpd_jax.models.hf.config import read_config
from ctpd_jax.models.hf.load import load_hf, model_directory
from ctpd_jax.models.hf.save import save_hf

__all__ = ["load_hf", "model_directory", "read_config", "save_hf"]
