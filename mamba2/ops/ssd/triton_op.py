"""The Triton backend of `ssd`: allocation, launches, and registration with torch.library.

Forward, one of two forms:

    sequential       one program per sequence, head and tile of channels walks the whole sequence     1 launch
    chunk-parallel   states of all spans from zero; combined in order; outputs of all spans           3 launches

The rule: the sequential form moves fewer bytes and is taken whenever its programs number at least the multiprocessors
of the device. The backward pass gets R, the gradient of the state at each span's end, in the same two ways (1 or 2
launches), then every gradient in one launch and the sums over tokens in another. Nothing else runs on the device.
"""

import torch
import triton

from mamba2.ops.device import multiprocessors, target_of
from mamba2.ops.ssd.triton_backward import _gradient_kernel, _reduce_kernel
from mamba2.ops.ssd.triton_forward import _scan_kernel
from mamba2.ops.ssd.triton_launch import SPAN, launch_for, n_tiles
from mamba2.ops.ssd.triton_states import _pass_kernel, _states_kernel

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def ssd_triton(
    x: torch.Tensor,  # (b, l, h, p)
    dt: torch.Tensor,  # (b, l, h)
    A: torch.Tensor,  # (h,)
    B: torch.Tensor,  # (b, l, g, n)
    C: torch.Tensor,  # (b, l, g, n)
    chunk_size: int,
    D: torch.Tensor | None,  # (h,) or (h, p)
    z: torch.Tensor | None,  # (b, l, h, p)
    dt_bias: torch.Tensor | None,  # (h,)
    initial_states: torch.Tensor | None,  # (b, h, p, n)
    seq_idx: torch.Tensor | None,  # (b, l)
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    return_final_states: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See `mamba2.ops.ssd`; the kernels choose their own chunks. Returns y and, if asked for, the last state."""
    if x.dtype not in DTYPES:
        raise ValueError(f"the Triton backend takes x in float32, bfloat16 or float16, not {x.dtype}")
    tensors = (x, dt, A, B, C, D, z, dt_bias, initial_states)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    y, final, _ = _forward_op(
        x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, dt_softplus, *dt_limit, return_final_states, keep
    )
    return y, final if return_final_states else None


@torch.library.custom_op("mamba2::ssd_forward", mutates_args=())
def _forward_op(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    initial_states: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    dt_softplus: bool,
    dt_low: float,
    dt_high: float,
    want_final: bool,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y, the final state and the states entering each span; the latter two are empty where not wanted."""
    y, final, kept = _forward_outputs(x, B, want_final, keep)
    run = _Run(x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, dt_softplus, dt_low, dt_high)
    parallel = run.parallel("scan")
    states = kept if keep else run.empty_states() if parallel else None
    end = final if want_final else None
    with torch.cuda.device_of(x):
        if parallel:
            run.local_states(x, None, B, states, reverse=False)
            run.pass_states(states, initial_states, end, reverse=False)
        run.scan(y, states, end, from_kept=parallel)
    return y, final, kept


@_forward_op.register_fake
def _(x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, dt_softplus, dt_low, dt_high, want_final, keep):
    return _forward_outputs(x, B, want_final, keep)


def _forward_outputs(x, B, want_final, keep):
    b, l, h, p = x.shape
    n = B.shape[3]
    y = x.new_empty(b, l, h, p)
    final = x.new_empty((b, h, p, n) if want_final else (0,), dtype=torch.float32)
    kept = x.new_empty((b, -(-l // SPAN), h, n, p) if keep else (0,))
    return y, final, kept


@torch.library.custom_op("mamba2::ssd_backward", mutates_args=())
def _backward_op(
    dout: torch.Tensor,
    dfinal: torch.Tensor | None,
    kept: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    initial_states: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    dt_softplus: bool,
    dt_low: float,
    dt_high: float,
) -> list[torch.Tensor]:
    """Gradients of x, dt, A, B, C, D, z, dt_bias, initial_states; empty for those not given."""
    grads = _backward_outputs(x, dt, A, B, C, D, z, dt_bias, initial_states)
    run = _Run(x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, dt_softplus, dt_low, dt_high)
    dinitial = None if initial_states is None else grads[8]
    gradients = run.empty_states()
    with torch.cuda.device_of(x):
        if run.parallel("states"):
            run.local_states(dout, z, C, gradients, reverse=True)
            run.pass_states(gradients, dfinal, dinitial, reverse=True)
        else:
            run.walk_gradients(dout, dfinal, gradients, dinitial)
        run.gradient(dout, kept, gradients, grads)
    return grads


@_backward_op.register_fake
def _(dout, dfinal, kept, x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, dt_softplus, dt_low, dt_high):
    return _backward_outputs(x, dt, A, B, C, D, z, dt_bias, initial_states)


def _backward_outputs(*inputs):
    return [inputs[0].new_empty(0) if t is None else t.new_empty(t.shape) for t in inputs]


def _setup_context(ctx, inputs, output):
    *tensors, dt_softplus, dt_low, dt_high, _want_final, _keep = inputs
    ctx.set_materialize_grads(False)
    ctx.activation = (dt_softplus, dt_low, dt_high)
    ctx.save_for_backward(output[2], *tensors)


def _backward(ctx, dout, dfinal, _):
    kept, *tensors = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(tensors[0])
    grads = _backward_op(dout, dfinal, kept, *tensors, *ctx.activation)
    # seq_idx, the activation and the flags have none.
    return *(None if t is None else grad for t, grad in zip(tensors[:9], grads)), None, None, None, None, None, None


_forward_op.register_autograd(_backward, setup_context=_setup_context)


class _Run:
    """One call's tensors and sizes, and the launches that take them."""

    def __init__(self, x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, dt_softplus, dt_low, dt_high):
        self.x, self.dt, self.B, self.C, self.D, self.z = x, dt, B, C, D, z
        self.A = A.contiguous()
        self.dt_bias = None if dt_bias is None else dt_bias.contiguous()
        self.initial_states, self.seq_idx = initial_states, seq_idx
        self.b, self.l, self.h, self.p = x.shape
        self.g, self.n = B.shape[2:]
        self.spans = -(-self.l // SPAN)
        self.device = x.device
        self.limits = {"low": dt_low, "high": dt_high}
        self.softplus = dt_softplus
        exact = torch.get_float32_matmul_precision() == "highest"
        self.precision = "ieee" if exact or x.dtype != torch.float32 else "tf32"

    def empty_states(self) -> torch.Tensor:
        return self.x.new_empty(self.b, self.spans, self.h, self.n, self.p)

    def launch(self, kernel: str):
        return launch_for(kernel, target_of(self.device), self.x.element_size(), self.p, self.n)

    def parallel(self, kernel: str) -> bool:
        """Whether the sequential form would leave multiprocessors idle, and there are spans to share out."""
        programs = self.b * self.h * -(-self.p // self.launch(kernel).p_tile)
        return self.spans > 1 and programs < multiprocessors(self.device)

    def constants(self, launch, *tensors: torch.Tensor) -> dict:
        """Compile-time values that the three large kernels share; `tensors` are all that they index by token."""
        n1, n2 = n_tiles(self.n)
        reach = max(t.stride(1) * launch.q + t.stride(-1) * max(self.p, n1 + n2) for t in tensors)
        return {
            "p": self.p,
            "n": self.n,
            "HEADS_PER_GROUP": self.h // self.g,
            "SPAN_STEPS": SPAN // launch.q,
            "Q": launch.q,
            "P_TILE": launch.p_tile,
            "N1": n1,
            "N2": n2,
            "SOFTPLUS": self.softplus,
            "PRECISION": self.precision,
            "WIDE": reach >= 2**31,
            "num_warps": launch.num_warps,
        }

    def indexed(self, *more: torch.Tensor | None) -> list[torch.Tensor]:
        tensors = (self.x, self.dt, self.B, self.C, self.z, self.seq_idx, *more)
        return [t for t in tensors if t is not None]

    def scan(self, y, kept, final, from_kept: bool) -> None:
        launch = self.launch("scan")
        tiles = triton.cdiv(self.p, launch.p_tile)
        _scan_kernel[(self.h * tiles, self.b, self.spans if from_kept else 1)](
            self.x,
            self.dt,
            self.A,
            self.B,
            self.C,
            self.D,
            self.z,
            self.dt_bias,
            self.seq_idx,
            None if from_kept else self.initial_states,
            y,
            kept,
            None if from_kept else final,
            self.x.stride(),
            self.dt.stride(),
            self.B.stride(),
            self.C.stride(),
            _channel_strides(self.D),
            _strides(self.z, 4),
            _strides(self.seq_idx, 2),
            _strides(self.initial_states, 4),
            self.l,
            self.h,
            self.spans,
            **self.limits,
            **self.constants(launch, *self.indexed()),
            FROM_KEPT=from_kept,
            STAGES=launch.num_stages,
        )

    def local_states(self, v, z, k, kept, reverse: bool) -> None:
        """What each span adds to the state (or, in reverse, to its gradient), from zero, and the decay through it."""
        self.through = self.x.new_empty(self.b, self.spans, self.h, dtype=torch.float32)
        self._states(v, z, k, None, kept, None, self.through, reverse, local=True)

    def walk_gradients(self, dout, dfinal, kept, dinitial) -> None:
        self._states(dout, self.z, self.C, dfinal, kept, dinitial, None, reverse=True, local=False)

    def _states(self, v, z, k, carry, kept, end, through, reverse: bool, local: bool) -> None:
        launch = self.launch("states")
        tiles = triton.cdiv(self.p, launch.p_tile)
        _states_kernel[(self.h * tiles, self.b, self.spans if local else 1)](
            v,
            z,
            k,
            self.dt,
            self.A,
            self.dt_bias,
            self.seq_idx,
            carry,
            kept,
            end,
            through,
            v.stride(),
            _strides(z, 4),
            k.stride(),
            self.dt.stride(),
            _strides(self.seq_idx, 2),
            _strides(carry, 4),
            self.l,
            self.h,
            self.spans,
            **self.limits,
            **self.constants(launch, *self.indexed(v)),
            REVERSE=reverse,
            LOCAL=local,
            num_stages=launch.num_stages,
        )

    def pass_states(self, states, carry, end, reverse: bool) -> None:
        block = 256
        _pass_kernel[(triton.cdiv(self.n * self.p, block), self.h, self.b)](
            states,
            self.through,
            carry,
            end,
            _strides(carry, 4),
            self.h,
            self.spans,
            p=self.p,
            n=self.n,
            BLOCK=block,
            REVERSE=reverse,
            num_warps=4,
        )

    def gradient(self, dout, kept_S, kept_R, grads) -> None:
        dx, ddt, dA, dB, dC, dD, dz, dbias, _ = grads
        launch = self.launch("gradient")
        steps = triton.cdiv(self.l, launch.q)
        d = 0 if self.D is None else self.D.numel()
        partial = self.x.new_empty(self.b, steps, 2 * self.h + d, dtype=torch.float32)
        _gradient_kernel[(steps, self.g, self.b)](
            self.x,
            self.dt,
            self.A,
            self.B,
            self.C,
            self.D,
            self.z,
            self.dt_bias,
            self.seq_idx,
            dout,
            kept_S,
            kept_R,
            dx,
            ddt,
            dB,
            dC,
            None if self.z is None else dz,
            partial,
            self.x.stride(),
            self.dt.stride(),
            self.B.stride(),
            self.C.stride(),
            _channel_strides(self.D),
            _strides(self.z, 4),
            _strides(self.seq_idx, 2),
            dout.stride(),
            self.l,
            self.g,
            self.spans,
            **self.limits,
            **self.constants(launch, *self.indexed(dout)),
            D_PER_CHANNEL=self.D is not None and self.D.dim() == 2,
            num_stages=launch.num_stages,
        )
        columns = 32
        _reduce_kernel[(triton.cdiv(2 * self.h + d, columns),)](
            partial,
            dA,
            None if self.dt_bias is None else dbias,
            None if self.D is None else dD,
            self.b * steps,
            self.h,
            d,
            ROWS=64,
            COLUMNS=columns,
            num_warps=4,
        )


def _strides(tensor: torch.Tensor | None, dims: int) -> tuple[int, ...]:
    return (0,) * dims if tensor is None else tensor.stride()


def _channel_strides(D: torch.Tensor | None) -> tuple[int, int]:
    """Strides over heads and channels; one value per head is the same for every channel."""
    if D is None:
        return 0, 0
    return D.stride() if D.dim() == 2 else (D.stride(0), 0)
