"""The Triton backend of `ssd`: allocation, launches, and registration with torch.library.

Two forms of each direction. Forward:

    sequential       decays; one program per sequence, head and tile of channels walks the sequence     2 launches
    chunk-parallel   decays; what each span adds to the state; spans in order; outputs of all spans     4 launches

The backward pass gets R, the gradient of the state, in the same two ways (1 or 2 launches; none where it is zero
between all spans), then dx, dB and dC, then the gradient of dt, then sums (3 launches; on AMD dx, dB and dC are one
each); with a gate, one launch more before. Nothing else runs on the device.

The rule: the sequential form moves fewer bytes and is taken whenever its programs number at least the multiprocessors
of the device.
"""

from collections.abc import Callable

import torch
import triton

from mamba2.ops.backend import TRITON_DTYPES
from mamba2.ops.device import multiprocessors, target_of
from mamba2.ops.gradient import register_gradient
from mamba2.ops.ssd.triton_decays import _decays_kernel
from mamba2.ops.ssd.triton_finish import _finish_kernel
from mamba2.ops.ssd.triton_forward import _scan_kernel
from mamba2.ops.ssd.triton_gradient import _gradient_kernel
from mamba2.ops.ssd.triton_launch import Launch, choose_launch, chunk_for, launch_for, n_tiles, span_for
from mamba2.ops.ssd.triton_reverse import _gate_kernel
from mamba2.ops.ssd.triton_states import _pass_kernel, _reverse_kernel, _states_kernel
from mamba2.ops.triton_reduce import sum_rows


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
    if x.dtype not in TRITON_DTYPES:
        raise ValueError(f"the Triton backend takes x in float32, bfloat16 or float16, not {x.dtype}")
    tensors = (x, dt, A, B, C, D, z, dt_bias, initial_states)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    y, final, *_ = _forward_op(
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
) -> tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor
]:
    """y, the final state, then what the backward pass keeps: see `_forward_outputs`."""
    outputs = _forward_outputs(x, B, z, seq_idx, want_final, keep)
    y, final, kept, ungated, *decays = outputs
    run = _Run(*decays, x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, dt_softplus, dt_low, dt_high)
    parallel = run.parallel("scan")
    states = kept if keep else run.empty_states() if parallel else None
    end = final if want_final else None
    with torch.cuda.device_of(x):
        run.compute_decays()
        if parallel:
            run.states(x, B, initial_states, end, states, reverse=False)
        run.scan(y, ungated if keep and z is not None else None, states, end, from_kept=parallel)
    return outputs


@_forward_op.register_fake
def _(x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, dt_softplus, dt_low, dt_high, want_final, keep):
    return _forward_outputs(x, B, z, seq_idx, want_final, keep)


def _forward_outputs(x, B, z, seq_idx, want_final, keep):
    """y; the final state; the states entering each span; y before the gate; steps, cs and ends; documents' numbers.

    Empty where not wanted; steps, cs and ends always hold values.
    """
    b, l, h, p = x.shape
    g, n = B.shape[2:]
    y = x.new_empty(b, l, h, p)
    steps, cs = (x.new_empty((b, h, l), dtype=torch.float32) for _ in range(2))
    ends = x.new_empty((b, h, -(-l // chunk_for(x.element_size()))), dtype=torch.float32)
    document = x.new_empty((0,) if seq_idx is None else (b, l), dtype=torch.int32)
    final = x.new_empty((b, h, p, n) if want_final else (0,), dtype=torch.float32)
    kept = x.new_empty((b, -(-l // span_for(h, g)), h, n, p) if keep else (0,))
    ungated = x.new_empty((b, l, h, p) if keep and z is not None else (0,))
    return y, final, kept, ungated, steps, cs, ends, document


@torch.library.custom_op("mamba2::ssd_backward", mutates_args=())
def _backward_op(
    dout: torch.Tensor,
    dfinal: torch.Tensor | None,
    kept: torch.Tensor,
    ungated: torch.Tensor,
    steps: torch.Tensor,
    cs: torch.Tensor,
    ends: torch.Tensor,
    document: torch.Tensor,
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
    run = _Run(
        steps, cs, ends, document, x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, dt_softplus, dt_low, dt_high
    )
    gradients = run.empty_states()
    with torch.cuda.device_of(x):
        dy = dout if z is None else run.gate(dout, ungated, grads)
        dinitial = None if initial_states is None else grads[8]
        if run.parallel("reverse"):
            run.states(dy, C, dfinal, dinitial, gradients, reverse=True)
        else:
            run.reverse(dy, dfinal, gradients, dinitial)
        ends = {"INITIAL": initial_states is not None, "CARRY": dfinal is not None}
        sums = run.gradient(dy, kept, gradients, grads, ends)
        run.finish(*sums, grads, ends)
    return grads


@_backward_op.register_fake
def _(dout, dfinal, kept, ungated, steps, cs, ends, document, x, dt, A, B, C, D, z, dt_bias, initial_states, *_):
    return _backward_outputs(x, dt, A, B, C, D, z, dt_bias, initial_states)


def _backward_outputs(*inputs):
    return [inputs[0].new_empty(0) if t is None else t.new_empty(t.shape) for t in inputs]


def _setup_context(ctx, inputs, output):
    *tensors, dt_softplus, dt_low, dt_high, _want_final, _keep = inputs
    ctx.set_materialize_grads(False)
    ctx.activation = (dt_softplus, dt_low, dt_high)
    ctx.save_for_backward(*output[2:], *tensors)


def _backward(ctx, dout, dfinal, *_):
    kept, ungated, steps, cs, ends, document, *tensors = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(tensors[0])
    grads = _backward_op(dout, dfinal, kept, ungated, steps, cs, ends, document, *tensors, *ctx.activation)
    # seq_idx, the activation and the flags have none.
    return *(None if t is None else grad for t, grad in zip(tensors[:9], grads)), None, None, None, None, None, None


register_gradient(_forward_op, _backward, _setup_context)


class _Run:
    """One call's tensors and sizes, and the launches that take them."""

    def __init__(
        self,
        steps,
        cs,
        ends,
        document,
        x,
        dt,
        A,
        B,
        C,
        D,
        z,
        dt_bias,
        initial_states,
        seq_idx,
        dt_softplus,
        dt_low,
        dt_high,
    ):
        self.steps, self.cs, self.ends = steps, cs, ends
        self.document = None if seq_idx is None else document
        self.x, self.dt, self.B, self.C, self.D, self.z = x, dt, B, C, D, z
        self.A = A.contiguous()
        self.dt_bias = None if dt_bias is None else dt_bias.contiguous()
        self.initial_states, self.seq_idx = initial_states, seq_idx
        self.b, self.l, self.h, self.p = x.shape
        self.g, self.n = B.shape[2:]
        self.chunk = chunk_for(x.element_size())
        self.span = span_for(self.h, self.g)
        self.spans = triton.cdiv(self.l, self.span)
        self.target = target_of(x.device)
        self.limits = {"low": dt_low, "high": dt_high}
        self.softplus = dt_softplus
        exact = torch.get_float32_matmul_precision() == "highest"
        self.precision = "ieee" if exact or x.dtype != torch.float32 else "tf32"

    def empty_states(self) -> torch.Tensor:
        return self.x.new_empty(self.b, self.spans, self.h, self.n, self.p)

    def new_floats(self, *shape: int) -> torch.Tensor:
        return self.x.new_empty(shape, dtype=torch.float32)

    def parallel(self, kernel: str) -> bool:
        """Whether the sequential form would leave multiprocessors idle, and there are spans to share out."""
        p_tile = launch_for(kernel, self.target, self.x.element_size(), self.p, self.n).p_tile
        programs = self.b * self.h * triton.cdiv(self.p, p_tile)
        return self.spans > 1 and programs < multiprocessors(self.x.device)

    def launch(self, kernel: str, start: Callable[[Launch], object], from_kept: bool = False) -> object:
        """Run `start` with the launch chosen for a kernel; it may be run with others before, to compare."""
        gated = kernel == "scan" and self.z is not None
        plain = not (gated or from_kept or self.seq_idx is not None)
        sizes = (self.b, self.l, self.h, self.p, self.g, self.n)
        walks = kernel in ("scan", "reverse") and not from_kept and self.spans > 1
        programs = multiprocessors(self.x.device) if walks else 1
        return start(choose_launch(kernel, self.target, self.x.dtype, sizes, plain, programs, start))

    def constants(self, launch: Launch) -> dict:
        """Compile-time values that the large kernels share."""
        n1, n2 = n_tiles(self.n)
        return {
            "h": self.h,
            "p": self.p,
            "n": self.n,
            "HEADS_PER_GROUP": self.h // self.g,
            "SPAN_CHUNKS": self.span // self.chunk,
            "Q": self.chunk,
            "P_TILE": launch.p_tile,
            "N1": n1,
            "N2": n2,
            "PRECISION": self.precision,
            **launch.options(self.target),
        }

    def compute_decays(self) -> None:
        _decays_kernel[(self.spans, self.h, self.b)](
            self.dt,
            self.A,
            self.dt_bias,
            self.seq_idx,
            self.steps,
            self.cs,
            self.ends,
            self.document,
            _batch_strides(self.dt, self.seq_idx),
            self.l,
            **self.limits,
            dt_strides=_strides(self.dt, 2),
            seq_strides=_strides(self.seq_idx, 1),
            h=self.h,
            SPAN_CHUNKS=self.span // self.chunk,
            Q=self.chunk,
            SOFTPLUS=self.softplus,
            num_warps=4,
        )

    def scan(self, y, ungated, kept, final, from_kept: bool) -> None:
        def start(launch: Launch) -> None:
            _scan_kernel[self.walks(launch, self.spans if from_kept else 1)](
                self.x,
                self.B,
                self.C,
                self.D,
                self.z,
                self.steps,
                self.cs,
                self.document,
                self.initial_states,
                y,
                ungated,
                kept,
                None if from_kept else final,
                _batch_strides(self.x, self.B, self.C, self.z, self.initial_states),
                self.l,
                self.spans,
                x_strides=_strides(self.x, 3),
                B_strides=_strides(self.B, 3),
                C_strides=_strides(self.C, 3),
                D_strides=_channel_strides(self.D),
                z_strides=_strides(self.z, 3),
                initial_strides=_strides(self.initial_states, 3),
                FROM_KEPT=from_kept,
                STAGES=launch.num_stages,
                **self.constants(launch),
            )

        self.launch("scan", start, from_kept)

    def gate(self, dout, ungated, grads) -> torch.Tensor:
        """The gradient of y before the gate, contiguous; dz is written to its place in `grads`."""
        dy = self.x.new_empty(self.x.shape)
        rows = 16
        _gate_kernel[(triton.cdiv(self.l, rows), self.h, self.b)](
            dout,
            self.z,
            ungated,
            dy,
            grads[6],
            _batch_strides(dout, self.z),
            self.l,
            dout_strides=_strides(dout, 3),
            z_strides=_strides(self.z, 3),
            h=self.h,
            p=self.p,
            Q=rows,
            P_TILE=triton.next_power_of_2(self.p),
            num_warps=4,
        )
        return dy

    def reverse(self, dout, dfinal, kept, dinitial) -> None:
        """The gradient of the state leaving each span, from that of the last to that of the first, if wanted."""
        if self.spans == 1 and dfinal is None and dinitial is None:
            return  # all are zero

        def start(launch: Launch) -> None:
            _reverse_kernel[self.walks(launch, 1)](
                dout,
                self.C,
                self.cs,
                self.document,
                dfinal,
                kept,
                dinitial,
                _batch_strides(dout, self.C, dfinal),
                self.l,
                self.spans,
                dout_strides=_strides(dout, 3),
                C_strides=_strides(self.C, 3),
                carry_strides=_strides(dfinal, 3),
                STAGES=launch.num_stages,
                **self.constants(launch),
            )

        self.launch("reverse", start)

    def walks(self, launch: Launch, spans: int) -> tuple[int, int, int]:
        return self.h * triton.cdiv(self.p, launch.p_tile), self.b, spans

    def states(self, v, k, carry, end, kept, reverse: bool) -> None:
        """The state entering each span, or in reverse the gradient of the one leaving it, from `carry` to `end`."""
        through = self.new_floats(self.b, self.spans, self.h)
        walked = self.spans - (end is None)

        def start(launch: Launch) -> None:
            _states_kernel[self.walks(launch, walked)](
                v,
                k,
                self.steps,
                self.cs,
                self.document,
                kept,
                through,
                _batch_strides(v, k),
                self.l,
                self.spans,
                self.spans - walked if reverse else 0,
                v_strides=_strides(v, 3),
                k_strides=_strides(k, 3),
                REVERSE=reverse,
                STAGES=launch.num_stages,
                **self.constants(launch),
            )

        self.launch("states", start)
        block = 256
        _pass_kernel[(triton.cdiv(self.n * self.p, block), self.h, self.b)](
            kept,
            through,
            carry,
            end,
            0 if carry is None else carry.stride(0),
            self.spans,
            walked,
            carry_strides=_strides(carry, 3),
            h=self.h,
            p=self.p,
            n=self.n,
            BLOCK=block,
            REVERSE=reverse,
            num_warps=4,
        )

    def gradient(self, dout, kept_S, kept_R, grads, ends: dict[str, bool]) -> tuple[torch.Tensor | None, ...]:
        """dx, dB, dC; returned is what is summed later: rows of dD or None, and what the gradient of dt is made of."""
        dx, _, _, dB, dC, *_ = grads
        per_channel = self.D is not None and self.D.dim() == 2
        sums = self.new_floats(self.span // self.chunk + 1, self.b, self.h, self.l)
        totals = self.new_floats(*self.ends.shape)

        def start(launch: Launch) -> tuple[torch.Tensor | None, ...]:
            tiles = triton.cdiv(self.p, launch.p_tile)
            walked = self.new_floats(2, self.b, self.h, tiles, self.l)
            RS = self.new_floats(self.b, self.spans, self.h, tiles)
            dD = None
            if self.D is not None:
                dD = self.new_floats(self.b * self.spans * (1 if per_channel else tiles), self.D.numel())
            walks, blocks = self.h // self.g * tiles, self.span // self.chunk
            roles = {"all": walks + 2 * blocks, "walk": walks, "write": blocks, "read": blocks}
            # One kernel of all takes more scalar registers than AMD's devices have, and some of scratch memory for it.
            for part in ("walk", "write", "read") if self.target.startswith("gfx") else ("all",):
                _gradient_kernel[(self.spans * roles[part], self.g, self.b)](
                    self.x,
                    self.B,
                    self.C,
                    self.D,
                    self.steps,
                    self.cs,
                    self.ends,
                    self.document,
                    dout,
                    kept_S,
                    kept_R,
                    dx,
                    dB,
                    dC,
                    dD,
                    sums,
                    walked,
                    totals,
                    RS,
                    _batch_strides(self.x, self.B, self.C, dout),
                    self.l,
                    self.spans,
                    sums.stride(0),
                    x_strides=_strides(self.x, 3),
                    B_strides=_strides(self.B, 3),
                    C_strides=_strides(self.C, 3),
                    D_strides=_channel_strides(self.D),
                    dout_strides=_strides(dout, 3),
                    PART=part,
                    **ends,
                    D_PER_CHANNEL=per_channel,
                    STAGES=launch.num_stages,
                    **self.constants(launch),
                )
            return dD, sums, walked, totals, RS

        return self.launch("gradient", start)

    def finish(self, dD_rows, sums, walked, totals, RS, grads, ends: dict[str, bool]) -> None:
        """ddt, dA, dD and d(dt_bias), from what `gradient` left."""
        _, ddt, dA, _, _, dD, _, dbias, _ = grads
        shares = self.new_floats(self.b * self.spans, 2 * self.h)
        _finish_kernel[(self.spans, self.h, self.b)](
            self.dt,
            self.A,
            self.dt_bias,
            sums,
            walked,
            totals,
            RS,
            ddt,
            shares,
            self.dt.stride(0),
            self.l,
            self.spans,
            sums.stride(0),
            **self.limits,
            dt_strides=_strides(self.dt, 2),
            h=self.h,
            P_TILES=walked.shape[3],
            SPAN_CHUNKS=self.span // self.chunk,
            Q=self.chunk,
            **ends,
            SOFTPLUS=self.softplus,
            num_warps=4,
        )
        sum_rows(shares, dA, None if self.dt_bias is None else dbias, dD_rows, None if self.D is None else dD)


def _batch_strides(*tensors: torch.Tensor | None) -> tuple[int, ...]:
    return tuple(0 if tensor is None else tensor.stride(0) for tensor in tensors)


def _strides(tensor: torch.Tensor | None, dims: int) -> tuple[int, ...]:
    """Strides of the last `dims` dimensions, as compile-time constants."""
    return (0,) * dims if tensor is None else tensor.stride()[-dims:]


def _channel_strides(D: torch.Tensor | None) -> tuple[int, int]:
    """Strides over heads and channels; one value per head is the same for every channel."""
    if D is None:
        return 0, 0
    return D.stride() if D.dim() == 2 else (D.stride(0), 0)
