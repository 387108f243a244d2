"""Read and write model folders and checkpoints."""

from mamba2.checkpoint.model_folder import WEIGHTS, Shapes, read_model, write_model

__all__ = ["WEIGHTS", "Shapes", "read_model", "write_model"]
