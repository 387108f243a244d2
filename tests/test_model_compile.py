"""torch.compile of the whole model, loss and backward, without a graph break, on both backends."""

import pytest
import torch

from mamba2.model import Mamba2LM
from tests.test_model import small_config

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def loss_and_gradients(model, function, ids: torch.Tensor, seq_idx: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss = function(ids[:, :-1], ids[:, 1:], seq_idx=seq_idx)
    (loss / ids[:, 1:].numel()).backward()
    return {"loss": loss.detach(), **{name: p.grad.clone() for name, p in model.named_parameters()}}


def compare(monkeypatch, implementation: str, compiler: str, keep_products_only: bool = False) -> None:
    monkeypatch.setenv("MAMBA2_BACKEND", implementation)
    torch.compiler.reset()
    model = Mamba2LM(small_config(num_hidden_layers=1, num_heads=4, head_dim=16), seed=1).to(DEVICE)
    model.backbone.layers[0].keep_products_only = keep_products_only
    ids = torch.randint(0, model.config.vocab_size, (2, 15), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    seq_idx = (torch.arange(14, device=DEVICE) >= 9).int().expand(2, 14)
    expected = loss_and_gradients(model, model, ids, seq_idx)
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    actual = loss_and_gradients(model, compiled, ids, seq_idx)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("implementation", "keep_products_only"),
    [("torch", False), ("triton", False), ("torch", True), pytest.param("triton", True, marks=pytest.mark.slow)],
)
def test_the_model_compiles_whole(monkeypatch, implementation, keep_products_only):
    compare(monkeypatch, implementation, "aot_eager", keep_products_only)


@torch.no_grad()
def test_documents_by_cu_seqlens_and_their_states_compile_whole():
    torch.compiler.reset()
    model = Mamba2LM(small_config(num_hidden_layers=1), seed=1)
    ids, cu_seqlens = torch.arange(15)[None], torch.tensor([0, 4, 4, 15])
    expected, state = model(ids, return_state=True, cu_seqlens=cu_seqlens)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    actual, compiled_state = compiled(ids, return_state=True, cu_seqlens=cu_seqlens)
    for value, other in zip((expected, *state[0]), (actual, *compiled_state[0]), strict=True):
        torch.testing.assert_close(other, value)
    with pytest.raises(RuntimeError, match="cu_seqlens must begin with 0, never fall, and end with 15"):
        compiled(ids, return_state=True, cu_seqlens=cu_seqlens - 1)


@pytest.mark.slow
@pytest.mark.parametrize("keep_products_only", [False, True])
def test_the_model_compiles_with_inductor(monkeypatch, keep_products_only):
    compare(monkeypatch, "torch", "inductor", keep_products_only)
