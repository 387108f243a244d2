"""Which implementation runs: by device and dtype, or as MAMBA2_BACKEND says."""

import types

import pytest
import torch

from mamba2.ops.backend import choose_backend

ALL = ("reference", "torch", "triton")


def tensor_on(device: str, dtype: torch.dtype = torch.bfloat16) -> types.SimpleNamespace:
    """What the choice looks at of a tensor, for a device that may not be there."""
    return types.SimpleNamespace(is_cuda=device == "cuda", dtype=dtype, device=torch.device(device))


@pytest.mark.parametrize(
    ("tensor", "available", "fits", "expected"),
    [
        (tensor_on("cuda"), ALL, True, "triton"),
        (tensor_on("cuda", torch.float32), ALL, True, "triton"),
        (tensor_on("cuda", torch.float64), ALL, True, "torch"),
        (tensor_on("cuda"), ALL, False, "torch"),
        (tensor_on("cuda"), ("reference", "torch"), True, "torch"),
        (tensor_on("cpu"), ALL, True, "torch"),
    ],
)
def test_the_device_decides(monkeypatch, tensor, available, fits, expected):
    monkeypatch.delenv("MAMBA2_BACKEND", raising=False)
    assert choose_backend(tensor, available, fits) == expected


def test_the_environment_overrides(monkeypatch):
    monkeypatch.setenv("MAMBA2_BACKEND", "reference")
    assert choose_backend(tensor_on("cuda"), ALL) == "reference"
    with pytest.raises(ValueError, match="'reference' is not built for this op; it has torch"):
        choose_backend(tensor_on("cuda"), ("torch",))
    monkeypatch.setenv("MAMBA2_BACKEND", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert choose_backend(tensor_on("cuda"), ALL) == "triton"
    with pytest.raises(ValueError, match="needs tensors on a GPU, this one is on cpu; set TRITON_INTERPRET=1"):
        choose_backend(tensor_on("cpu"), ALL)
    monkeypatch.setenv("MAMBA2_BACKEND", "cuda")
    with pytest.raises(ValueError, match="MAMBA2_BACKEND='cuda' is unknown; choose one of reference, torch, triton"):
        choose_backend(tensor_on("cpu"), ALL)
