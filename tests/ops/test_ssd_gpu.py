"""What only a device can show of the SSD kernels: programs side by side, long sequences, every dtype compiled.

The values themselves are checked by test_ssd_triton.py, which runs on a device too, and in the interpreter without one.
"""

import pytest
import torch

from mamba2.ops import ssd
from tests.ops.test_ssd import make_inputs, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(),
        reason="no CUDA or ROCm device; test_ssd_triton.py runs the same kernels in Triton's interpreter",
    ),
]


# (b, l, h, p, g, n): enough programs for the sequential form, and one long sequence for the chunk-parallel one.
@pytest.mark.parametrize("shape", [(16, 1024, 24, 32, 8, 142), (1, 16384, 24, 64, 1, 128)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_long_sequences_agree_with_torch_and_with_themselves(monkeypatch, shape, dtype):
    inputs = make_inputs(*shape, optional=("D", "dt_bias"))
    inputs = {name: tensor.detach().to("cuda", dtype).requires_grad_() for name, tensor in inputs.items()}
    wide = {name: tensor.detach().double().requires_grad_() for name, tensor in inputs.items()}
    monkeypatch.setenv("MAMBA2_BACKEND", "torch")
    expected = run(ssd, wide, chunk_size=64)
    monkeypatch.setenv("MAMBA2_BACKEND", "triton")
    first, second = (run(ssd, inputs, chunk_size=64) for _ in range(2))
    bound = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-4}[dtype]
    for name, value in expected.items():
        assert torch.equal(first[name], second[name]), name
        error = (first[name].double() - value).norm() / value.norm()
        assert error < bound, f"{name}: relative error {error:.1e}"
