"""The Triton backend of `ssd`: sizes, allocation, launches, and registration with torch.library.

    forward    decays; walk                                                2 launches
    backward   walk for S; walk from the end for dx and R; dB and dC;
               gradient of the decays; sums                                5 launches

Cutting sequences into segments adds two launches in each direction, splitting the heads of a group among programs two
in the backward. D per channel and the gate are left to torch. Of the states only those between segments are kept for
the backward pass, which recomputes the others: they are larger than all else that a layer keeps.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from mamba2.ops.autotune import autotuning, fastest
from mamba2.ops.backend import TRITON_DTYPES
from mamba2.ops.gradient import empty_gradients, register_gradient, unwatched
from mamba2.ops.kernel import constant, multiprocessors, sum_rows, target_of
from mamba2.ops.language import triton
from mamba2.ops.ssd.backward import _gradient_kernel
from mamba2.ops.ssd.decay import Activation, Decays, Sums, _decays_gradient_kernel, _decays_kernel
from mamba2.ops.ssd.forward import Edges, Outputs, _pass_kernel, _walk_kernel
from mamba2.ops.ssd.reference import SSDInputs, skip_and_gate
from mamba2.ops.ssd.tiles import Sizes, View, n_tiles, view


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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """y, the final state, then what the backward pass keeps: cs, source, first and last, states between segments."""
    plan = _plan(*_sizes(x, B, seq_idx))
    outputs = _forward_outputs(plan, x, want_final)
    y, final, *kept = outputs
    run = _Run(plan, (x, dt, A, B, C, D, dt_bias, initial_states, seq_idx), (softplus, low, high), kept)
    with torch.cuda.device_of(x):
        run.compute_decays()
        begin = run.edges(kept[3], x, B, initial_states, reverse=False)
        run.walk(x, B, C, Edges(begin, final if want_final else None, None), None, Outputs(y, D, None, None, None))
    return outputs


@_forward_op.register_fake
def _(x, dt, A, B, C, D, dt_bias, initial_states, seq_idx, softplus, low, high, want_final):
    return _forward_outputs(_Plan(*_sizes(x, B, seq_idx)), x, want_final)


def _forward_outputs(plan, x, want_final):
    b, l, h, p, n = plan.b, plan.l, plan.h, plan.p, plan.n
    cs, source = (x.new_empty((b, h, l), dtype=torch.float32) for _ in range(2))
    documents = x.new_empty((2, b, l) if plan.documents else (2, 0), dtype=torch.int32)
    final = x.new_empty((b, h, p, n) if want_final else (0,), dtype=torch.float32)
    edges = x.new_empty((b, plan.segments, h, p, n) if plan.segments > 1 else (0,), dtype=torch.float32)
    return x.new_empty(b, l, h, p), final, cs, source, documents, edges


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
    plan = _plan(*_sizes(tensors[0], tensors[3], tensors[-1]))
    run = _Run(plan, tensors, (softplus, low, high), kept)
    with torch.cuda.device_of(dout):
        run.backward(dout, dfinal, kept[3], grads)
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
    kept, tensors = saved[:4], saved[4:]
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
    transposed: bool = False  # products as their transposes

    def options(self, target: str) -> dict[str, int]:
        options = {"num_warps": self.num_warps, "num_stages": 1}  # of the other loops
        return options if target.startswith("gfx") else {**options, "maxnreg": self.registers}


def cdiv(a: int, b: int) -> int:
    """In place of `triton.cdiv`, which takes longer than Triton needs to start a kernel."""
    return -(-a // b)


@functools.cache
def chunk_for(target: str, itemsize: int, n: int, documents: bool) -> int:
    """Q, the tokens of a chunk in every kernel.

    Matrix units of Hopper and CDNA take 64 rows; elsewhere operands are held in registers, and 32 rows fit. So it is on
    Hopper where n > 160, or where d_state takes two tiles and documents take registers, too. Unrounded float32
    operands are multiplied by ordinary instructions, and 16 rows fit.
    """
    if itemsize == 4:
        return 16
    crowded = n > 160 or (documents and n_tiles(n)[1] > 0)
    return 64 if target.startswith("gfx") or (target == "sm_90" and not crowded) else 32


@functools.cache
def launch_for(kernel: str, target: str, itemsize: int, p: int, n: int, documents: bool) -> Launch:
    """The launch table. `kernel` is walk, reverse (walk from the end), states (either without outputs) or gradient."""
    widest = max(16, triton.next_power_of_2(p))
    if itemsize == 4:
        return Launch(16, 4, 1)
    few = chunk_for(target, itemsize, n, documents) == 32
    if target.startswith("gfx"):
        return Launch(min(32 if documents and kernel in ("walk", "reverse") else 64, widest), 4, 1)
    roomy = target in ("sm_80", "sm_90", "sm_100")  # 160 KiB of shared memory and more
    if kernel == "gradient":
        # 4 warps where two such programs fit on a multiprocessor: half as many warps load the same operands.
        return Launch(min(64, widest), 4 if few and roomy else 8, 2, whole=few)
    if n > 160:
        return Launch(min(16, widest), 8, 2)
    # Prefetched loads go through shared memory, whose addresses also take registers.
    stages = 2 if roomy else 1
    if target == "sm_80" and widest >= 64 and kernel != "reverse":
        # Products take their first operand from registers: transposed, the state is that operand as it is.
        return Launch(64, 4, stages, transposed=True)
    return Launch(min(32 if few else 64, widest), 4, stages)


FEW_CHUNKS = 12  # of a walk take about as long as two more launches


def choose_segments(walks: int, chunks: int, slots: int) -> int:
    """Segments of each sequence that are walked in parallel: as many as run at once, where that pays.

    Arguments: `walks`: programs of one segment each; `slots`: programs that the device holds at once. More than one
    segment are walked twice, the first time for the state alone in 0.6 of the time, and on a full device a chunk takes
    1.4 times as long, because of memory traffic (estimates of `benchmarks/estimate.py`): it pays where
    1.6 * 1.4 walks < slots. Sizes can be symbolic under torch.compile.
    """
    if 9 * walks > 4 * slots or chunks <= FEW_CHUNKS:
        return 1
    return cdiv(chunks, cdiv(chunks, torch.sym_min(chunks, slots // walks)))


class _Plan:
    """What depends only on the sizes of a call; cached, because a call should take little longer than its launches."""

    def __init__(self, b, l, h, p, g, n, dtype, documents: bool, tf32: bool, target: str, multiprocessors: int):
        self.b, self.l, self.h, self.p, self.g, self.n = b, l, *map(int, (h, p, g, n))
        self.dtype, self.documents, self.target, self.multiprocessors = dtype, documents, target, multiprocessors
        self.Q = chunk_for(target, dtype.itemsize, self.n, documents)
        self.chunks = cdiv(l, self.Q)
        self.spans = cdiv(self.chunks, 2)  # of two chunks
        self.tiles = cdiv(self.p, self.table("reverse").p_tile)
        walks = b * self.h * cdiv(self.p, self.table("walk").p_tile)
        self.segments = choose_segments(walks, self.chunks, 2 * multiprocessors)
        self.segment_chunks = cdiv(self.chunks, self.segments)
        # torch's setting for float32 matrix products applies here, too. 16-bit operands are never rounded.
        self.precision = "tf32" if tf32 and target.startswith("sm") else "ieee"

    def table(self, kernel: str) -> Launch:
        return launch_for(kernel, self.target, self.dtype.itemsize, self.p, self.n, self.documents)

    def sizes(self, launch: Launch) -> Sizes:
        tiles = (1 << (self.n - 1).bit_length(), 0) if launch.whole else n_tiles(self.n)
        return Sizes(
            self.h, self.p, self.n, self.h // self.g, self.Q, launch.p_tile, *tiles, self.precision, launch.transposed
        )


_plan = functools.lru_cache(1024)(_Plan)


def _sizes(x: torch.Tensor, B: torch.Tensor, seq_idx: torch.Tensor | None) -> tuple:
    """The arguments of `_Plan`."""
    tf32 = x.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    places = target_of(x.device), multiprocessors(x.device)
    return *x.shape, *B.shape[2:], x.dtype, seq_idx is not None, tf32, *places


def first_state(state: torch.Tensor | None) -> View | None:
    """A state before or after a sequence (b, h, p, n) as that of its only segment."""
    return None if state is None else view(state.unsqueeze(1))


class _Run:
    """One call's tensors and plan, and the launches that take them."""

    def __init__(
        self,
        plan: _Plan,
        tensors: Sequence[torch.Tensor | None],
        activation: tuple[bool, float, float],
        kept: Sequence[torch.Tensor],
    ):
        self.plan = plan
        self.x, dt, A, self.B, self.C, self.D, bias, self.initial_states, seq_idx = tensors
        self.seq_idx = view(seq_idx.unsqueeze(-1)) if plan.documents else None
        self.decays = Decays(*kept[:2], *(kept[2] if plan.documents else (None, None)))
        softplus, low, high = activation
        bias = None if bias is None else bias.contiguous()
        self.activation = Activation(view(dt), A.contiguous(), bias, low, high, constant(softplus))

    def launch(self, kernel: str, start: Callable[[Launch], object]) -> None:
        """Call `start` with the table's launch, or with MAMBA2_AUTOTUNE=1 the fastest of its neighbours."""
        plan = self.plan
        launch = plan.table(kernel)
        if autotuning():
            l = triton.next_power_of_2(plan.l)
            shape = f"batch {plan.b}, length to {l}, {plan.h} heads of {plan.p}, {plan.g} groups, d_state {plan.n}"
            form = "documents" if plan.documents else "plain"
            key = f"ssd {kernel}, {plan.target}, {plan.dtype}, {shape}, {form}, triton {triton.__version__}"
            launch = fastest(key, neighbours(kernel, launch, plan.target), start)
        start(launch)

    def floats(self, *shape: int) -> torch.Tensor:
        return self.x.new_empty(shape, dtype=torch.float32)

    def compute_decays(self) -> None:
        plan = self.plan
        _decays_kernel[(cdiv(plan.l, TOKENS), plan.h, plan.b)](
            self.activation, self.decays, self.seq_idx, plan.l, h=plan.h, Q=plan.Q, CHUNKS=TOKENS // plan.Q
        )

    def edges(self, edges, v, k, begin, reverse: bool):
        """View of the states that the segments begin with, written to `edges`; `begin` or None: that of the first."""
        plan = self.plan
        begin = first_state(begin)
        if plan.segments == 1:
            return begin
        through = self.floats(plan.b, plan.segments, plan.h)
        walked = range(1, plan.segments) if reverse else range(plan.segments - 1)
        self.walk(v, k, None, Edges(None, edges, through), None, None, reverse, walked)
        block = 256
        _pass_kernel[(cdiv(plan.n * plan.p, block), plan.h, plan.b)](
            edges, through, begin, plan.segments, plan.sizes(plan.table("walk")), REVERSE=reverse, BLOCK=block
        )
        return view(edges)

    def walk(self, v, k, q, edges, kept, outputs, reverse: bool = False, segments: range | None = None) -> None:
        plan = self.plan
        segments = range(plan.segments) if segments is None else segments

        def start(launch: Launch) -> None:
            _walk_kernel[(plan.h * cdiv(plan.p, launch.p_tile), plan.b, len(segments))](
                view(v),
                view(k),
                view(q),
                self.decays,
                edges,
                kept,
                outputs,
                plan.l,
                plan.segment_chunks,
                segments.start,
                plan.sizes(launch),
                REVERSE=reverse,
                STAGES=launch.num_stages,
                **launch.options(plan.target),
            )

        self.launch("states" if outputs is None else "reverse" if reverse else "walk", start)

    def backward(self, dout, dfinal, edges, grads) -> None:
        dx, ddt, dA, dB, dC, dD, dbias, dinitial = grads
        plan, x = self.plan, self.x
        b, l, h = plan.b, plan.l, plan.h
        ux, of_dD = self.floats(2, plan.tiles, b, h, l).unbind()
        per_token = self.floats(4, b, h, l).unbind()
        sums = Sums(*per_token, self.floats(b, h, plan.spans), ux, None if self.D is None else of_dD)
        S, R = x.new_empty(2, b, plan.spans, h, plan.n, plan.p).unbind()
        begin = first_state(self.initial_states) if plan.segments == 1 else view(edges)
        self.walk(x, self.B, None, Edges(begin, None, None), S, None)
        begin = self.edges(self.floats(*edges.shape), dout, self.C, dfinal, reverse=True)
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
            Q=plan.Q,
            CHUNKS=TOKENS // plan.Q,
            P_TILES=plan.tiles,
        )
        sum_rows(shares, dA, None if self.activation.bias is None else dbias, dD_shares, dD)

    def gradient(self, dout, S, R, dB, dC, sums) -> None:
        """dB and dC; the heads of a group are split among programs where there are too few programs for the device."""
        plan = self.plan
        programs = 4 * plan.spans * plan.g * plan.b
        parts = min(plan.h // plan.g, cdiv(plan.multiprocessors, programs))
        partial = self.floats(2, parts, *dB.shape) if parts > 1 else (dB, dC)

        def start(launch: Launch) -> None:
            _gradient_kernel[(4 * parts * plan.spans, plan.g, plan.b)](
                view(self.x),
                view(dout),
                view(self.B),
                view(self.C),
                self.decays,
                S,
                R,
                *partial,
                sums,
                plan.l,
                plan.sizes(launch),
                PARTS=parts,
                STAGES=launch.num_stages,
                **launch.options(plan.target),
            )

        self.launch("gradient", start)
        if parts > 1:
            for of_parts, dk in zip(partial, (dB, dC)):
                sum_rows(of_parts.view(parts, -1), dk.view(-1))


TOKENS = 256  # of a program of the two decay kernels, which are short


def neighbours(kernel: str, launch: Launch, target: str) -> list[Launch]:
    """What autotuning tries: the launch itself, then one thing changed at a time."""
    others = [
        replace(launch, num_stages=3 - launch.num_stages),
        replace(launch, num_warps=12 - launch.num_warps),
    ]
    if kernel in ("states", "gradient"):  # not reverse, whose sums have one plane per tile
        others.append(replace(launch, p_tile=32 if launch.p_tile == 16 else 16))
    if not target.startswith("gfx"):
        others.append(replace(launch, registers=168 if launch.registers == 255 else 255))  # spills show in the time
    return [launch, *others]
