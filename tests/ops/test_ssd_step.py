"""One token at a time: the state update against the sequence op in float64, and against mamba-ssm's kernel."""

import pytest
import torch

from mamba2.ops import causal_conv1d, causal_conv1d_step, ssd, ssd_step
from mamba2.ops.ssd.step import _ssd_step_op
from tests.ops.kernel_checks import DEVICE, FLOOR, normal, sliced, transposed
from tests.oracles import mamba_ssm_state_update

SHAPES = [
    (1, 1, 1, 1, 1),
    (2, 6, 8, 2, 16),
    (2, 3, 48, 3, 142),
    (1, 4, 64, 1, 128),
    (1, 2, 5, 2, 256),
    (3, 8, 32, 1, 17),
]
OPTIONS = [
    {},
    {"D": 1},
    {"D": 2},
    {"z": True},
    {"dt_bias": True},
    {"dt_softplus": False},
    {"dt_limit": (0.02, 0.1)},
    {"D": 2, "z": True, "dt_bias": True, "dt_limit": (0.0, 0.3)},
]


def make_inputs(
    b: int, h: int, p: int, g: int, n: int, dtype=torch.float32, D: int = 0, z=False, dt_bias=False
) -> dict:
    """Arguments of `ssd_step` but for the options that are not tensors."""
    return {
        "state": normal(b, h, p, n, seed=1),
        "x": normal(b, h, p, dtype=dtype, seed=2),
        "dt": (normal(b, h, seed=3) * 0.5).to(dtype),
        "A": -normal(h, seed=4).exp(),
        "B": normal(b, g, n, dtype=dtype, seed=5),
        "C": normal(b, g, n, dtype=dtype, seed=6),
        "D": None if not D else normal(*(h, p)[:D], seed=7),
        "z": normal(b, h, p, dtype=dtype, seed=8) if z else None,
        "dt_bias": normal(h, seed=9) if dt_bias else None,
    }


def step(inputs: dict, **options) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = {**inputs, "state": inputs["state"].clone()}
    y = ssd_step(**inputs, **options)
    return y, inputs["state"]


def by_sequence(inputs: dict, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by `ssd` in float64, a sequence of one token."""
    wide = {name: None if t is None else t.double() for name, t in inputs.items()}
    for name in ("x", "dt", "B", "C", "z"):
        wide[name] = None if wide[name] is None else wide[name][:, None]
    state = wide.pop("state")
    y, state = ssd(**wide, chunk_size=1, initial_states=state, return_final_states=True, **options)
    return y[:, 0], state


def check(inputs: dict, backend: str, monkeypatch, **options) -> None:
    expected = by_sequence(inputs, **options)
    monkeypatch.setenv("MAMBA2_BACKEND", backend)
    for actual, wanted in zip(step(inputs, **options), expected):
        error = (actual.double() - wanted).norm() / wanted.norm().clamp(min=1e-12)
        assert error < FLOOR[actual.dtype]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_equals_a_sequence_of_one_token(monkeypatch, backend, options):
    options = dict(options)
    limit, softplus = options.pop("dt_limit", (0.0, float("inf"))), options.pop("dt_softplus", True)
    inputs = make_inputs(2, 6, 8, 2, 16, **options)
    check(inputs, backend, monkeypatch, dt_limit=limit, dt_softplus=softplus)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_and_dtype_equals_a_sequence_of_one_token(monkeypatch, shape, dtype):
    inputs = make_inputs(*shape, dtype, D=2, z=True, dt_bias=True)
    check(inputs, "triton", monkeypatch, dt_softplus=True, dt_limit=(0.001, 0.5))


@pytest.mark.parametrize("form", ["D per head", "D per channel", "z"])
def test_the_kernel_equals_mamba_ssms(monkeypatch, form):
    b, h, p, g, n = 2, 4, 8, 2, 20
    options = {"D": 1 if form == "D per head" else 2, "z": form == "z"}
    inputs = make_inputs(b, h, p, g, n, dt_bias=True, **options)
    monkeypatch.setenv("MAMBA2_BACKEND", "triton")
    y, state = step(inputs, dt_softplus=True)
    theirs = {**inputs, "state": inputs["state"].clone(), "A": inputs["A"][:, None, None].expand(h, p, n)}
    theirs["dt"] = inputs["dt"][:, :, None].expand(b, h, p)
    theirs["dt_bias"] = inputs["dt_bias"][:, None].expand(h, p)
    theirs["D"] = inputs["D"] if inputs["D"].dim() == 2 else inputs["D"][:, None].expand(h, p)
    expected = mamba_ssm_state_update()(**theirs, dt_softplus=True)
    assert (y - expected).norm() < 1e-5 * expected.norm()
    assert (state - theirs["state"]).norm() < 1e-5 * state.norm()


def test_any_strides_give_the_same_bits_and_only_the_state_changes(monkeypatch):
    monkeypatch.setenv("MAMBA2_BACKEND", "triton")
    inputs = make_inputs(2, 6, 8, 2, 16, D=2, z=True, dt_bias=True)
    expected = step(inputs)
    for layout in (sliced, transposed):
        other = {name: layout(t) if t.dim() > 1 else t for name, t in inputs.items()}
        before = {name: t.clone() for name, t in other.items()}
        y = ssd_step(**other)
        assert torch.equal(y, expected[0]) and torch.equal(other["state"], expected[1])
        assert all(torch.equal(other[name], t) for name, t in before.items() if name != "state")


@pytest.mark.skipif(DEVICE == "cuda", reason="addresses are seen in the interpreter")
def test_no_address_is_written_by_two_programs(monkeypatch):
    from benchmarks.interpreter import record

    monkeypatch.setenv("MAMBA2_BACKEND", "triton")
    with record(keep_stores=True) as launches:
        step(make_inputs(2, 3, 48, 3, 142, D=2, z=True))
    assert len(launches) == 1 and not launches[0].shared_stores()


def test_the_op_is_registered_as_torch_compile_needs_it(monkeypatch):
    monkeypatch.setenv("MAMBA2_BACKEND", "triton")
    inputs = make_inputs(2, 4, 8, 2, 16, D=2)
    args = (*inputs.values(), True, 0.0, 1.0)
    torch.library.opcheck(_ssd_step_op, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(("name", "shape"), [("state", (2, 6, 8, 15)), ("C", (2, 3, 16)), ("D", (5,)), ("dt", (2, 5))])
def test_a_shape_that_does_not_fit_is_named(name, shape):
    inputs = {**make_inputs(2, 6, 8, 2, 16, D=1), name: torch.zeros(shape)}
    with pytest.raises(ValueError, match=f"{name} must have shape"):
        ssd_step(**inputs)


@pytest.mark.parametrize("width", [1, 2, 4, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_window_moves_on_as_in_a_sequence(width, dtype):
    x, weight, bias = normal(2, 10, 6, dtype=dtype), normal(6, width, seed=1), normal(6, seed=2)
    for arguments in ((weight, bias), (weight, None)):
        expected, _ = causal_conv1d(x, *arguments, return_final_state=True)
        window = x.new_zeros(2, width - 1, 6)
        for t in range(10):
            y = causal_conv1d_step(window, x[:, t], *arguments)
            assert torch.allclose(y.float(), expected[:, t].float(), atol=FLOOR[dtype], rtol=FLOOR[dtype])
            assert torch.equal(window[:, max(0, width - 2 - t) :], x[:, max(0, t - width + 2) : t + 1])
    plain = causal_conv1d_step(x.new_zeros(2, width - 1, 6), x[:, 0], weight, activation=False)
    assert torch.allclose(plain.float(), x[:, 0].float() * weight[:, -1], atol=FLOOR[dtype], rtol=FLOOR[dtype])
    with pytest.raises(ValueError, match="window must have shape"):
        causal_conv1d_step(x.new_zeros(2, width, 6), x[:, 0], weight)
