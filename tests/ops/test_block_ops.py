"""Convolution, norms and the chunked cross-entropy against torch's own forms and float64 differences."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from mamba2.ops import add_rms_norm, causal_conv1d, fusion, gated_rms_norm, linear_cross_entropy, linear_token_losses
from mamba2.ops import cross_entropy as chunked
from tests.ops import kernel_checks as checks


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def assert_same_gradients(actual: torch.Tensor, expected: torch.Tensor, tensors: tuple[torch.Tensor, ...]) -> None:
    for ours, wanted in zip(torch.autograd.grad(actual, tensors), torch.autograd.grad(expected, tensors)):
        torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize("width", [1, 2, 4, 8])
@pytest.mark.parametrize("length", [1, 3, 17])
def test_convolution_equals_torch(width, length):
    x, weight, bias = randn(2, length, 5), randn(5, width, seed=1), randn(5, seed=2)
    padded = F.pad(x.transpose(1, 2), (width - 1, 0))
    expected = F.silu(F.conv1d(padded, weight[:, None], bias, groups=5)).transpose(1, 2)
    actual, final = causal_conv1d(x, weight, bias, return_final_state=True)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(final, padded.transpose(1, 2)[:, length:])
    assert_same_gradients(actual.sum(), expected.sum(), (x, weight, bias))


def test_convolution_gradcheck_with_documents_and_windows():
    seq_idx = torch.tensor([[0, 0, 1, 1, 1, 2]])

    def function(*tensors):
        x, weight, bias, state = tensors
        return causal_conv1d(x, weight, bias, seq_idx=seq_idx, initial_state=state, return_final_state=True)

    assert torch.autograd.gradcheck(function, (randn(1, 6, 3), randn(3, 4), randn(3), randn(1, 3, 3)))


@pytest.mark.parametrize("cut", [1, 2, 5, 9])
def test_convolution_continues_from_its_window(cut):
    """The second part begins inside the document that the first one ended in."""
    x, weight = randn(2, 12, 3).detach(), randn(3, 4).detach()
    seq_idx = torch.tensor([[0] * 4 + [1] * 8, [3] * 12])
    whole = causal_conv1d(x, weight, seq_idx=seq_idx)
    first, window = causal_conv1d(x[:, :cut], weight, seq_idx=seq_idx[:, :cut], return_final_state=True)
    second = causal_conv1d(x[:, cut:], weight, seq_idx=seq_idx[:, cut:], initial_state=window)
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole)


def test_convolution_sees_nothing_of_earlier_documents():
    x, weight = randn(1, 9, 3).detach(), randn(3, 4).detach()
    seq_idx = torch.tensor([[0, 0, 0, 0, 1, 0, 0, 0, 0]])
    parts = [causal_conv1d(part, weight) for part in x.split([4, 1, 4], dim=1)]
    torch.testing.assert_close(causal_conv1d(x, weight, seq_idx=seq_idx), torch.cat(parts, dim=1))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_convolution_of_documents_by_cu_seqlens_equals_that_of_each(monkeypatch, backend, dtype):
    inputs = {"x": randn(1, 105, 3), "weight": randn(3, 4, seed=1), "bias": randn(3, seed=2)}
    op = partial(causal_conv1d, return_final_state=True)
    monkeypatch.setenv("MAMBA2_BACKEND", "reference")
    expected = checks.one_by_one(op, inputs, ("x",))
    monkeypatch.setenv("MAMBA2_BACKEND", backend)
    checks.assert_close(checks.run(partial(op, cu_seqlens=checks.cu_seqlens(dtype)), inputs), expected, 1e-12)


def test_convolution_refuses_what_does_not_go_with_cu_seqlens():
    x, weight, cu_seqlens = randn(1, 105, 3), randn(3, 4), checks.cu_seqlens(torch.int64)
    for name, value in (("seq_idx", torch.zeros(1, 105, dtype=torch.int64)), ("initial_state", randn(1, 3, 3))):
        with pytest.raises(ValueError, match=f"{name} does not go with cu_seqlens"):
            causal_conv1d(x, weight, cu_seqlens=cu_seqlens, **{name: value})
    with pytest.raises(ValueError, match="a batch of 1, and this batch is of 2"):
        causal_conv1d(x.expand(2, -1, -1), weight, cu_seqlens=cu_seqlens)


def test_add_rms_norm_equals_torch_and_adds_in_the_streams_dtype():
    x, residual, weight = randn(2, 3, 8), randn(2, 3, 8, seed=1), randn(8, seed=2)
    normed, stream = add_rms_norm(x, residual, weight, 1e-5)
    torch.testing.assert_close(stream, x + residual)
    torch.testing.assert_close(normed, F.rms_norm(x + residual, (8,), weight, 1e-5))
    assert torch.autograd.gradcheck(lambda *t: add_rms_norm(*t, 1e-5), (x, residual, weight))
    normed, stream = add_rms_norm(x.bfloat16(), residual.float(), weight.float(), 1e-5, dtype=torch.float16)
    assert (normed.dtype, stream.dtype) == (torch.float16, torch.float32)


@pytest.mark.parametrize("ngroups", [1, 2, 8])
def test_gated_norm_normalises_each_group(ngroups):
    x, z, weight = randn(2, 3, 16), randn(2, 3, 16, seed=1), randn(16, seed=2)
    u = x * F.silu(z)
    expected = torch.cat([F.rms_norm(part, part.shape[-1:], eps=1e-5) for part in u.chunk(ngroups, dim=-1)], dim=-1)
    expected = expected * weight
    actual = gated_rms_norm(x, z, weight, 1e-5, ngroups)
    torch.testing.assert_close(actual, expected)
    assert torch.autograd.gradcheck(lambda *t: gated_rms_norm(*t, 1e-5, ngroups), (x, z, weight))


@pytest.mark.parametrize("tokens_per_chunk", [3, 100])
def test_cross_entropy_equals_torch(monkeypatch, tokens_per_chunk):
    n = tokens_per_chunk
    monkeypatch.setattr(chunked, "_chunks", lambda h, _: [slice(i, i + n) for i in range(0, len(h), n)])
    hidden, weight = randn(2, 7, 5), randn(11, 5, seed=1)
    targets = torch.arange(14).view(2, 7) % 11
    targets[1, 2:5] = -100
    logits = (hidden @ weight.t()).flatten(0, 1)
    expected = F.cross_entropy(logits, targets.flatten(), reduction="sum")
    actual = linear_cross_entropy(hidden, weight, targets)
    torch.testing.assert_close(actual, expected)
    assert_same_gradients(3 * actual, 3 * expected, (hidden, weight))
    losses = linear_token_losses(hidden, weight, targets)
    torch.testing.assert_close(losses.flatten(), F.cross_entropy(logits, targets.flatten(), reduction="none"))


def test_cross_entropy_never_holds_all_logits():
    """The largest tensor that any operation makes is a chunk, gradients included."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = [0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else [result]:
                if isinstance(tensor, torch.Tensor):
                    largest[0] = max(largest[0], tensor.numel())
            return result

    hidden, weight = torch.randn(4096, 4), torch.randn(20000, 4)
    targets = torch.zeros(4096, dtype=torch.int64)
    with Watch():
        chunked.losses_and_gradients(chunked.torch_softmax, hidden, weight, targets, -100, True, True)
    assert weight.numel() < largest[0] <= chunked.CHUNK_BYTES // 4 < 4096 * 20000 // 2


def test_cross_entropy_of_bfloat16_scales_both_gradients_alike():
    """A small upstream factor, as 1/tokens is, must not be rounded to bfloat16 for one of them."""
    hidden = torch.randn(64, 8, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(33, 8, requires_grad=True)
    targets = torch.arange(64) % 33
    factor = 1 / 1023
    (linear_cross_entropy(hidden, weight, targets)).backward()
    whole = hidden.grad.clone(), weight.grad.clone()
    hidden.grad = weight.grad = None
    (linear_cross_entropy(hidden, weight, targets) * factor).backward()
    assert abs((hidden.grad.double().norm() / whole[0].double().norm()).item() / factor - 1) < 1e-3
    assert abs((weight.grad.double().norm() / whole[1].double().norm()).item() / factor - 1) < 1e-5


@pytest.mark.parametrize(
    ("message", "op", "shapes", "options"),
    [
        ("x must have shape", causal_conv1d, [(3, 4), (4, 2)], {}),
        ("weight must have shape", causal_conv1d, [(1, 3, 4), (3, 2)], {}),
        ("bias must have shape", causal_conv1d, [(1, 3, 4), (4, 2), (3,)], {}),
        ("splits must be", causal_conv1d, [(1, 3, 4), (4, 2)], {"splits": (1, 2)}),
        ("splits must be", causal_conv1d, [(1, 3, 4), (4, 2)], {"splits": (4, 0)}),
        ("weight must have shape", add_rms_norm, [(2, 4), (2, 4), (3,)], {"eps": 1e-5}),
        ("residual must have", add_rms_norm, [(2, 4), (1, 4), (4,)], {"eps": 1e-5}),
        ("z must have", gated_rms_norm, [(2, 4), (2, 3), (4,)], {"eps": 1e-5}),
        ("ngroups must divide", gated_rms_norm, [(2, 4), (2, 4), (4,)], {"eps": 1e-5, "ngroups": 3}),
        ("weight must have", linear_cross_entropy, [(2, 4), (5, 3)], {"targets": torch.tensor([0, 0])}),
        ("targets must have", linear_cross_entropy, [(2, 4), (5, 4)], {"targets": torch.tensor([0, 0, 0])}),
        (
            "ignore_index 1 is a valid target",
            linear_cross_entropy,
            [(2, 4), (5, 4)],
            {"targets": torch.tensor([0, 0]), "ignore_index": 1},
        ),
    ],
)
def test_a_bad_argument_is_named(message, op, shapes, options):
    with pytest.raises(ValueError, match=message):
        op(*map(torch.zeros, shapes), **options)


def assert_forms_agree(monkeypatch, function, tensors: list[torch.Tensor], dtype: torch.dtype) -> None:
    """The fast form in `dtype` against the readable one in float64 on the same values, in blocks of few rows."""
    monkeypatch.setattr(fusion, "CACHED_ELEMENTS", 40)
    inputs = {f"argument {i}": t.to(dtype) for i, t in enumerate(tensors)}
    tolerance = {torch.bfloat16: 2e-2, torch.float32: 1e-5, torch.float64: 1e-12}[dtype]

    def op(**inputs):
        return function(*inputs.values())

    monkeypatch.setenv("MAMBA2_BACKEND", "reference")
    expected = checks.run(op, {name: t.double() for name, t in inputs.items()})
    monkeypatch.setenv("MAMBA2_BACKEND", "torch")
    checks.assert_close(checks.run(op, inputs), expected, tolerance)


FAST_DTYPES = [torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", FAST_DTYPES)
@pytest.mark.parametrize("activation", [False, True])
@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize(("length", "width"), [(1, 4), (2, 4), (23, 4), (23, 1), (23, 2)])
def test_fast_convolution_equals_the_readable_form(monkeypatch, length, width, with_documents, activation, dtype):
    generator = torch.Generator().manual_seed(length)
    shapes = [(2, length, 9), (9, width), (9,), (2, width - 1, 9)]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    seq_idx = (torch.rand(2, length, generator=generator) < 0.3).cumsum(dim=1) if with_documents else None

    def function(x, weight, bias, *initial):
        pieces, final = causal_conv1d(
            x, weight, bias, seq_idx, *(initial or [None]), activation, return_final_state=True, splits=(4, 2, 3)
        )
        return (*pieces, final)

    assert_forms_agree(monkeypatch, function, tensors if width > 1 else tensors[:3], dtype)


@pytest.mark.parametrize("v", [33, 34, 997])
def test_what_memory_held_before_does_not_reach_the_gradients(monkeypatch, v):
    """oneDNN's small products of bfloat16 read past the width: NaN there came through in 241 of 300 calls."""
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *size, **kw: self.new_full(size, float("nan"), **kw))
    hidden = torch.randn(64, 8, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(v, 8, requires_grad=True)
    linear_cross_entropy(hidden, weight, torch.arange(64) % v).backward()
    assert hidden.grad.isfinite().all()
    assert weight.grad.isfinite().all()


@pytest.mark.parametrize("dtype", FAST_DTYPES)
@pytest.mark.parametrize("ngroups", [1, 3])
def test_fast_norms_equal_the_readable_forms(monkeypatch, ngroups, dtype):
    generator = torch.Generator().manual_seed(ngroups)
    x, z = (torch.randn(2, 7, 12, generator=generator, dtype=torch.float64) for _ in range(2))
    weight = torch.randn(12, generator=generator, dtype=torch.float64)

    def gated(x, z, weight):
        return (gated_rms_norm(x, z[..., :12], weight, 1e-5, ngroups),)

    assert_forms_agree(monkeypatch, gated, [x, torch.cat([z, z], dim=-1), weight], dtype)
    assert_forms_agree(monkeypatch, lambda x, z, w: add_rms_norm(x, z, w, 1e-5), [x, z, weight], dtype)
    assert_forms_agree(monkeypatch, lambda x, w: add_rms_norm(x, None, w, 1e-5)[:1], [x, weight], dtype)


def test_cross_entropy_in_blocks_equals_one_block(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(40, 8, generator=generator), torch.randn(50, 8, generator=generator)
    targets = torch.randint(50, (40,), generator=generator)
    targets[3] = -100
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        results = []
        for elements, chunk in ((2**17, chunked.CPU_CHUNK_BYTES), (70, 1)):
            monkeypatch.setattr(fusion, "CACHED_ELEMENTS", elements)
            monkeypatch.setattr(chunked, "CPU_CHUNK_BYTES", chunk)
            arguments = (chunked.torch_softmax, hidden.to(dtype), weight, targets, -100, True, True)
            results.append(chunked.losses_and_gradients(*arguments))
        for one, many in zip(*results):
            torch.testing.assert_close(many, one, rtol=tolerance, atol=tolerance)
