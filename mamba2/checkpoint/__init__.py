"""Models on the disk: safetensors in and out."""

from mamba2.checkpoint.files import atomic_folder, flush
from mamba2.checkpoint.model_folder import WEIGHTS, read_model, tensor_shapes, write_model

__all__ = ["WEIGHTS", "atomic_folder", "flush", "read_model", "tensor_shapes", "write_model"]
