"""Hugging Face model folders <-> (config, params): safetensors only, one tensor at a time, both ways from one table.

`hf_table` says which tensors of a checkpoint make which parameter, `hf_import` reads, `hf_export` writes.
"""

from ctpd_jax.models.hf_export import save_hf
from ctpd_jax.models.hf_import import check_weights, load_hf, model_directory, read_params
from ctpd_jax.models.hf_table import tensor_table

__all__ = ["check_weights", "load_hf", "model_directory", "read_params", "save_hf", "tensor_table"]
