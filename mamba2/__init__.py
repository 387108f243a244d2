"""Mamba-2 in PyTorch and Triton: the state-space duality layer, its language model, and the study of dt_bias."""
