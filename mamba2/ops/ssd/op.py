"""The Triton backend of `ssd`: sizes, allocation, launches, and registration with torch.library.

    forward    decays; walk                                                2 launches
    backward   walk for S; walk from the end for dx and R; dB and dC;
               gradient of the decays; sums                                5 launches

A sequence that is cut into segments costs two launches more forward, four backward; heads of a group that are shared
out two. Nothing else runs on the device, but for D per channel and the gate, which are left to torch. States are not
kept for the backward pass, which computes them again: they are larger than all else that a layer keeps.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import triton

from mamba2.ops.autotune import autotuning, fastest
from mamba2.ops.backend import TRITON_DTYPES
from mamba2.ops.gradient import empty_gradients, register_gradient, unwatched
from mamba2.ops.kernel import constant, multiprocessors, sum_rows, target_of
from mamba2.ops.ssd.backward import _gradient_kernel
from mamba2.ops.ssd.decay import Activation, Decays, Sums, _decays_gradient_kernel, _decays_kernel
from mamba2.ops.ssd.forward import Edges, Outputs, _pass_kernel, _walk_kernel
from mamba2.ops.ssd.reference import SSDInputs, skip_and_gate
from mamba2.ops.ssd.tiles import Sizes, n_tiles, view


def ssd_triton(inputs: SSDInputs) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See `mamba2.ops.ssd`; the kernels choose their own chunks. Returns y and, if asked for, the last state."""
    x, dt, A, B, C, _, D, z, dt_bias, initial_states, seq_idx, softplus, (low, high), want_final = inputs
    if x.dtype not in TRITON_DTYPES:
        raise ValueError(f"the Triton backend takes x in float32, bfloat16 or float16, not {x.dtype}")
    later = D if D is not None and D.dim() == 2 else None
    skip = D if later is None else None
    tensors = x, dt, A, B, C, skip, dt_bias, initial_states, seq_idx
    y, final, *_ = _forward(*tensors, softplus, float(low), float(high), want_final)
    if later is not None or z is not None:
        y = skip_and_gate(y.float(), x, later, z).to(x.dtype)
    return y, final if want_final else None


@torch.library.custom_op("mamba2::ssd_forward", mutates_args=())
def _forward_op(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    initial_states: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    softplus: bool,
    low: float,
    high: float,
    want_final: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """y, the final state, then what the backward pass keeps: cs, source, first and last."""
    outputs = _forward_outputs(x, B, seq_idx, want_final)
    y, final, *kept = outputs
    run = _Run((x, dt, A, B, C, D, dt_bias, initial_states, seq_idx), (softplus, low, high), kept)
    with torch.cuda.device_of(x):
        run.compute_decays()
        begin = run.edges(x, B, initial_states, reverse=False)
        run.walk(x, B, C, Edges(begin, final if want_final else None, None), None, Outputs(y, D, None, None, None))
    return outputs


@_forward_op.register_fake
def _(x, dt, A, B, C, D, dt_bias, initial_states, seq_idx, softplus, low, high, want_final):
    return _forward_outputs(x, B, seq_idx, want_final)


def _forward_outputs(x, B, seq_idx, want_final):
    b, l, h, p = x.shape
    cs, source = (x.new_empty((b, h, l), dtype=torch.float32) for _ in range(2))
    documents = x.new_empty((2, 0) if seq_idx is None else (2, b, l), dtype=torch.int32)
    final = x.new_empty((b, h, p, B.shape[3]) if want_final else (0,), dtype=torch.float32)
    return x.new_empty(b, l, h, p), final, cs, source, documents


@torch.library.custom_op("mamba2::ssd_backward", mutates_args=())
def _backward_op(
    dout: torch.Tensor,
    dfinal: torch.Tensor | None,
    kept: Sequence[torch.Tensor],
    tensors: Sequence[torch.Tensor | None],
    softplus: bool,
    low: float,
    high: float,
) -> list[torch.Tensor]:
    """Gradients of x, dt, A, B, C, D, dt_bias, initial_states; empty for those not given."""
    grads = list(empty_gradients(*tensors[:8]))
    run = _Run(tensors, (softplus, low, high), kept)
    with torch.cuda.device_of(dout):
        run.backward(dout, dfinal, grads)
    return grads


@_backward_op.register_fake
def _(dout, dfinal, kept, tensors, softplus, low, high):
    return list(empty_gradients(*tensors[:8]))


def _setup_context(ctx, inputs, output):
    *tensors, softplus, low, high, _want_final = inputs
    ctx.set_materialize_grads(False)
    ctx.activation = (softplus, low, high)
    ctx.save_for_backward(*output[2:], *tensors)


def _backward(ctx, dout, dfinal, *_):
    saved = ctx.saved_tensors
    kept, tensors = saved[:3], saved[3:]
    if dout is None:
        dout = torch.zeros_like(tensors[0])
    grads = _backward_launches(dout, dfinal, kept, tensors, *ctx.activation)
    # seq_idx, the activation and the flag have none.
    return *(None if t is None else grad for t, grad in zip(tensors[:8], grads)), None, None, None, None, None


_forward = register_gradient(_forward_op, _backward, _setup_context)
_backward_launches = unwatched(_backward_op)


@dataclass(frozen=True)
class Launch:
    p_tile: int  # channels of a head that a program holds
    num_warps: int
    num_stages: int  # of the loop over chunks or heads
    registers: int = 255  # at most, per thread; CUDA only
    whole: bool = False  # d_state in one tile

    def options(self, target: str) -> dict[str, int]:
        options = {"num_warps": self.num_warps, "num_stages": 1}  # of loops that say nothing
        return options if target.startswith("gfx") else {**options, "maxnreg": self.registers}


def cdiv(a: int, b: int) -> int:
    """Triton's own takes longer than it takes Triton to start a kernel."""
    return -(-a // b)


@functools.cache
def chunk_for(target: str, itemsize: int, n: int, documents: bool) -> int:
    """Tokens that are multiplied out at a time, by every kernel.

    64 rows are what Hopper's and CDNA's matrix units want; elsewhere operands live in registers, and 32 fit. So it is
    on Hopper where d_state takes two tiles and documents registers of their own. Float32 operands without rounding are
    multiplied by ordinary instructions, and fit at 16.
    """
    if itemsize == 4:
        return 16
    crowded = n > 160 or (documents and n_tiles(n)[1] > 0)
    return 64 if target.startswith("gfx") or (target == "sm_90" and not crowded) else 32


@functools.cache
def launch_for(kernel: str, target: str, itemsize: int, p: int, n: int, documents: bool) -> Launch:
    """The table. `kernel` is walk, states (a walk without outputs) or gradient."""
    widest = max(16, triton.next_power_of_2(p))
    if itemsize == 4:
        return Launch(16, 4, 1)
    if target.startswith("gfx"):
        return Launch(min(32 if documents and kernel == "walk" else 64, widest), 4, 1)
    if kernel == "gradient":
        return Launch(min(64, widest), 8, 2, whole=chunk_for(target, itemsize, n, documents) == 32)
    if n > 160:
        return Launch(min(16, widest), 8, 2)
    p_tile = 64 if chunk_for(target, itemsize, n, documents) == 64 else 32
    # Loads ahead go through shared memory, whose addresses take registers as well.
    return Launch(min(p_tile, widest), 4, 2 if target in ("sm_80", "sm_90", "sm_100") else 1)


@functools.cache
def choose_segments(walks: int, chunks: int, slots: int) -> int:
    """Segments of each sequence that are walked side by side, for the shortest time by the estimate of
    `benchmarks/estimate.py`, in units of a chunk of a walk that has nothing to wait for.

    Arguments: `walks`: programs of one segment each; `slots`: programs that the device holds at once. A walk takes as
    long as its chain of chunks, or where the device is full as its bytes, 1.4 for what all slots do together. With more
    than one segment each is walked twice, for its state alone in 0.6 of the time.
    """

    def cost(segments: int) -> float:
        chain = cdiv(walks * segments, slots) * cdiv(chunks, segments)
        return max(chain, 1.4 * walks * chunks / slots) * (1.6 if segments > 1 else 1.0)

    best = min(range(1, max(1, min(chunks, 2 * slots // walks)) + 1), key=cost)
    return cdiv(chunks, cdiv(chunks, best))


class _Run:
    """One call's tensors and sizes, and the launches that take them."""

    def __init__(
        self,
        tensors: Sequence[torch.Tensor | None],
        activation: tuple[bool, float, float],
        kept: Sequence[torch.Tensor],
    ):
        self.x, self.dt, A, self.B, self.C, self.D, bias, self.initial_states, seq_idx = tensors
        self.b, self.l, self.h, self.p = self.x.shape
        self.g, self.n = self.B.shape[2:]
        self.dtype, self.target = self.x.dtype, target_of(self.x.device)
        self.documents = seq_idx is not None
        self.seq_idx = view(seq_idx.unsqueeze(-1)) if self.documents else None
        self.Q = chunk_for(self.target, self.dtype.itemsize, self.n, self.documents)
        self.chunks = cdiv(self.l, self.Q)
        self.spans = cdiv(self.chunks, 2)  # of two chunks
        self.tiles = cdiv(self.p, self.table("walk").p_tile)
        slots = 2 * multiprocessors(self.x.device)
        self.segments = choose_segments(self.b * self.h * self.tiles, self.chunks, slots)
        self.segment_chunks = cdiv(self.chunks, self.segments)
        self.decays = Decays(*kept[:2], *(kept[2] if self.documents else (None, None)))
        softplus, low, high = activation
        bias = None if bias is None else bias.contiguous()
        self.activation = Activation(view(self.dt), A.contiguous(), bias, low, high, constant(softplus))
        # torch's setting for float32 products holds here, too. The device kernels round 16-bit operands not at all.
        tf32 = self.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
        self.precision = "tf32" if tf32 and self.target.startswith("sm") else "ieee"

    def table(self, kernel: str) -> Launch:
        return launch_for(kernel, self.target, self.dtype.itemsize, self.p, self.n, self.documents)

    def launch(self, kernel: str, start: Callable[[Launch], object]) -> None:
        """Call `start` with the table's launch, or with MAMBA2_AUTOTUNE=1 the fastest of its neighbours."""
        launch = self.table(kernel)
        if autotuning():
            l = triton.next_power_of_2(self.l)
            shape = f"batch {self.b}, length to {l}, {self.h} heads of {self.p}, {self.g} groups, d_state {self.n}"
            form = "documents" if self.documents else "plain"
            key = f"ssd {kernel}, {self.target}, {self.dtype}, {shape}, {form}, triton {triton.__version__}"
            launch = fastest(key, neighbours(launch, self.target), start)
        start(launch)

    def sizes(self, launch: Launch) -> Sizes:
        tiles = (1 << (self.n - 1).bit_length(), 0) if launch.whole else n_tiles(self.n)
        numbers = (self.h, self.p, self.n, self.h // self.g, self.Q, launch.p_tile, *tiles, self.precision)
        return Sizes(*map(constant, numbers))

    def floats(self, *shape: int) -> torch.Tensor:
        return self.x.new_empty(shape, dtype=torch.float32)

    def compute_decays(self) -> None:
        grid = (cdiv(self.l, TOKENS), self.h, self.b)
        _decays_kernel[grid](
            self.activation, self.decays, self.seq_idx, self.l, h=self.h, Q=self.Q, CHUNKS=TOKENS // self.Q
        )

    def edges(self, v, k, begin, reverse: bool):
        """View of the states that the segments begin with, `begin` or None being that of the first."""
        begin = None if begin is None else view(begin.unsqueeze(1))
        if self.segments == 1:
            return begin
        edges = self.floats(self.b, self.segments, self.h, self.p, self.n)
        through = self.floats(self.b, self.segments, self.h)
        walked = range(1, self.segments) if reverse else range(self.segments - 1)
        self.walk(v, k, None, Edges(None, edges, through), None, None, reverse, walked)
        block = 256
        _pass_kernel[(cdiv(self.n * self.p, block), self.h, self.b)](
            edges, through, begin, self.segments, self.sizes(self.table("walk")), REVERSE=reverse, BLOCK=block
        )
        return view(edges)

    def walk(self, v, k, q, edges, kept, outputs, reverse: bool = False, segments: range | None = None) -> None:
        segments = range(self.segments) if segments is None else segments

        def start(launch: Launch) -> None:
            _walk_kernel[(self.h * cdiv(self.p, launch.p_tile), self.b, len(segments))](
                view(v),
                view(k),
                view(q),
                self.decays,
                edges,
                kept,
                outputs,
                self.l,
                self.segment_chunks,
                segments.start,
                self.sizes(launch),
                REVERSE=reverse,
                STAGES=launch.num_stages,
                **launch.options(self.target),
            )

        self.launch("states" if outputs is None else "walk", start)

    def backward(self, dout, dfinal, grads) -> None:
        dx, ddt, dA, dB, dC, dD, dbias, dinitial = grads
        b, l, h, x = self.b, self.l, self.h, self.x
        ux, of_dD = self.floats(2, self.tiles, b, h, l)
        sums = Sums(*self.floats(4, b, h, l), self.floats(b, h, self.spans), ux, None if self.D is None else of_dD)
        S, R = x.new_empty(2, b, self.spans, h, self.n, self.p)
        begin = self.edges(x, self.B, self.initial_states, reverse=False)
        self.walk(x, self.B, None, Edges(begin, None, None), S, None)
        begin = self.edges(dout, self.C, dfinal, reverse=True)
        end = None if self.initial_states is None else dinitial
        outputs = Outputs(dx, self.D, view(x), sums, b * h * l)
        self.walk(dout, self.C, self.B, Edges(begin, end, None), R, outputs, reverse=True)
        self.gradient(dout, S, R, dB, dC, sums)
        blocks = cdiv(l, TOKENS)
        shares = self.floats(b * blocks, 2 * h)
        dD_shares, dD = (None, None) if self.D is None else (self.floats(b * blocks, h), dD)
        _decays_gradient_kernel[(blocks, h, b)](
            self.activation,
            sums,
            ddt,
            shares,
            dD_shares,
            b * h * l,
            l,
            h=h,
            Q=self.Q,
            CHUNKS=TOKENS // self.Q,
            P_TILES=self.tiles,
        )
        sum_rows(shares, dA, None if self.activation.bias is None else dbias, dD_shares, dD)

    def gradient(self, dout, S, R, dB, dC, sums) -> None:
        """dB and dC, the heads of a group shared out where there are too few programs for the device."""
        programs = 4 * self.spans * self.g * self.b
        parts = min(self.h // self.g, cdiv(multiprocessors(self.x.device), programs))
        partial = self.floats(2, parts, *dB.shape) if parts > 1 else (dB, dC)

        def start(launch: Launch) -> None:
            _gradient_kernel[(4 * parts * self.spans, self.g, self.b)](
                view(self.x),
                view(dout),
                view(self.B),
                view(self.C),
                self.decays,
                S,
                R,
                *partial,
                sums,
                self.l,
                self.sizes(launch),
                PARTS=parts,
                STAGES=launch.num_stages,
                **launch.options(self.target),
            )

        self.launch("gradient", start)
        if parts > 1:
            for of_parts, dk in zip(partial, (dB, dC)):
                sum_rows(of_parts.view(parts, -1), dk.view(-1))


TOKENS = 256  # of a program of the kernels of the decays, which are short


def neighbours(launch: Launch, target: str) -> list[Launch]:
    """What autotuning tries: the launch itself, then one thing changed at a time."""
    others = [
        replace(launch, num_stages=3 - launch.num_stages),
        replace(launch, num_warps=12 - launch.num_warps),
        replace(launch, p_tile=32 if launch.p_tile == 16 else 16),
    ]
    if not target.startswith("gfx"):
        others.append(replace(launch, registers=168 if launch.registers == 255 else 255))  # spills show in the time
    return [launch, *others]
