"""What every Triton op is held to, each check written once: accuracy, memory that nobody wrote, races, repeatability.

Accuracy: the error of every value and gradient against the torch form in float64 is at most twice that of the torch
form in the same dtype, with a floor of a few roundings for what torch gets exactly right.
"""

import itertools
from collections.abc import Callable

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOOR = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
HALF_PRECISIONS_AND_SINGLE = [torch.float32, torch.bfloat16, torch.float16]


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def run(op: Callable, inputs: dict[str, torch.Tensor | None]) -> dict[str, torch.Tensor]:
    """Values and gradients of `op(**inputs)`, whose outputs all carry a gradient of random signs and sizes.

    A gradient that does not flow counts as zero.
    """
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items() if tensor is not None}
    outputs = op(**{**inputs, **leaves})
    outputs = {f"output {i}": y for i, y in enumerate(outputs if isinstance(outputs, tuple) else (outputs,))}
    gradients = [normal(*y.shape, seed=7).to(y) for y in outputs.values()]
    results = torch.autograd.grad(list(outputs.values()), list(leaves.values()), gradients, allow_unused=True)
    gradients = {f"d{k}": torch.zeros_like(leaves[k]) if g is None else g for k, g in zip(leaves, results)}
    return {**outputs, **gradients}


LENGTHS = (1, 7, 64, 0, 33)  # of documents in one row, one of them empty; 105 tokens


def cu_seqlens(dtype: torch.dtype) -> torch.Tensor:
    """Where these documents begin and end."""
    return torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=dtype, device=DEVICE)


def one_by_one(op: Callable, inputs: dict[str, torch.Tensor], of_tokens: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """As `run`, of an op that returns y (1, l, ...) and a state, over these documents one after another: the results
    put together. `of_tokens` names the inputs (1, l, ...)."""

    def apart(**inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ys, states = [], []
        for start, stop in itertools.pairwise(cu_seqlens(torch.int64).tolist()):
            if start < stop:
                y, state = op(**{k: t[:, start:stop] if k in of_tokens else t for k, t in inputs.items()})
                ys.append(y)
            states.append(state if start < stop else torch.zeros_like(state))
        return torch.cat(ys, dim=1), torch.cat(states)

    return run(apart, inputs)


def relative_errors(actual: dict, expected: dict) -> dict[str, float]:
    return {
        name: ((actual[name].double() - value.double()).norm() / value.double().norm().clamp(min=1e-12)).item()
        for name, value in expected.items()
    }


def assert_close(actual: dict, expected: dict, tolerance: float) -> None:
    worse = {name: error for name, error in relative_errors(actual, expected).items() if not error < tolerance}
    assert not worse, worse


def accuracy(
    monkeypatch, op: Callable, inputs: dict[str, torch.Tensor | None], exact: str = "torch"
) -> dict[str, tuple[float, float, float]]:
    """For each value and gradient of the kernels: its error, that of the torch form in the same dtype, the bound.

    `exact` is the backend that gives the values in float64.
    """
    monkeypatch.setenv("MAMBA2_BACKEND", exact)
    expected = run(op, {name: None if tensor is None else tensor.double() for name, tensor in inputs.items()})
    monkeypatch.setenv("MAMBA2_BACKEND", "torch")
    plain = run(op, inputs)
    monkeypatch.setenv("MAMBA2_BACKEND", "triton")
    actual = run(op, inputs)
    assert {k: (v.dtype, v.shape) for k, v in actual.items()} == {k: (v.dtype, v.shape) for k, v in plain.items()}
    theirs, ours = relative_errors(plain, expected), relative_errors(actual, expected)
    return {name: (ours[name], theirs[name], max(2 * theirs[name], FLOOR[plain[name].dtype])) for name in ours}


def check_accuracy(monkeypatch, op: Callable, inputs: dict[str, torch.Tensor | None], exact: str = "torch") -> None:
    found = accuracy(monkeypatch, op, inputs, exact)
    worse = {name: errors for name, errors in found.items() if not errors[0] <= errors[2]}
    assert not worse, worse


def check_memory(monkeypatch, op: Callable, inputs: dict[str, torch.Tensor | None]) -> int | None:
    """Two runs give the same bits, in the second one all new memory filled with NaN or a large integer; no address is
    stored by two programs of a launch. Returns the number of launches, which a GPU does not tell."""
    monkeypatch.setenv("MAMBA2_BACKEND", "triton")
    launches = None
    expected = run(op, inputs)
    plain = {(owner, name): getattr(owner, name) for owner, name in ((torch.Tensor, "new_empty"), (torch, "empty"))}

    def poison(make: Callable) -> Callable:
        def poisoned(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(float("nan") if tensor.is_floating_point() else 1 << 30)

        return poisoned

    with monkeypatch.context() as patch:
        for (owner, name), make in plain.items():
            patch.setattr(owner, name, poison(make))
        if DEVICE == "cuda":
            actual = run(op, inputs)
        else:
            from benchmarks.interpreter import record

            with record(keep_stores=True) as launches:
                actual = run(op, inputs)
            assert launches and [launch.name for launch in launches if launch.shared_stores()] == []
    assert_same_bits(actual, expected)
    return None if launches is None else len(launches)


def assert_same_bits(actual: dict, expected: dict) -> None:
    different = [name for name, value in expected.items() if not torch.equal(actual[name], value)]
    assert not different, different


def check_strides(monkeypatch, op: Callable, inputs: dict[str, torch.Tensor | None], names: tuple[str, ...]) -> None:
    """The same bits whatever the strides of the tensors named: slices of wider ones, transposed, far apart."""
    monkeypatch.setenv("MAMBA2_BACKEND", "triton")
    expected = run(op, inputs)
    for layout in (sliced, transposed):
        assert_same_bits(run(op, {**inputs, **{name: layout(inputs[name]) for name in names}}), expected)


def sliced(tensor: torch.Tensor) -> torch.Tensor:
    """The same values as columns of a wider tensor whose rows are not aligned to anything."""
    return torch.cat([tensor[..., :3], tensor, tensor[..., :2]], dim=-1)[..., 3:-2][..., -tensor.shape[-1] :]


def transposed(tensor: torch.Tensor) -> torch.Tensor:
    """The same values with the memory order of the dimensions turned round."""
    return tensor.transpose(0, -1).contiguous().transpose(0, -1)


def far_apart(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """The same values with offsets past 2**31 along one dimension. A processor never touches the address space between;
    a GPU has to own it: four gigabytes in 16 bits."""
    strides = list(tensor.contiguous().stride())
    strides[dim] = 2**31 // (tensor.shape[dim] - 1) + 8
    far = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device)
    return far.copy_(tensor)


def check_registration(op, *args) -> None:
    """Schema, fake implementation and autograd of a custom op, as torch.compile relies on them."""
    torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))
