"""Read and write model folders and checkpoints."""

from mamba2.checkpoint.model_folder import Shapes, read_model, weights_sha256, write_model

__all__ = ["Shapes", "read_model", "weights_sha256", "write_model"]
