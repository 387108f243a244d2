"""The language model's head and its loss together, by chunks of tokens, so that the logits are never stored whole.

    loss = Σ_t  log Σ_v exp(logits_tv) - logits_{t,target_t}        logits = hidden · weightᵀ

At vocabulary 50 280 and a batch of 59 392 tokens the logits alone would take 11 GiB in float32.

The gradients of a chunk are computed in the forward pass, while its logits are there. The matrix products are torch's;
`torch_softmax` or a kernel goes from logits to their gradient:

    lse = log Σ_v exp(logits_v)          loss = lse - logits_target
    logits_v <- softmax_v - [v = target]            all 0 where the target is ignored

Grid (rows). A program reads its row twice: once for the maximum and the sum of exponentials, kept per lane of 8 logits
so that the loop reduces only within lanes and each logit costs little more than one exponential; once to overwrite it
with its gradient. The second read comes from L2: the rows in flight are a few tens of megabytes.

Bytes per token, 16-bit logits: read 2 v, written 2 v, and 12 for target and loss.
"""

from collections.abc import Callable

import torch

from mamba2.ops.backend import choose_backend
from mamba2.ops.fusion import block_elements, fusable, is_fused
from mamba2.ops.gradient import is_transformed, register_gradient, unwatched
from mamba2.ops.kernel import LOG2E, aligned, alignment, require_kernel_tensors
from mamba2.ops.language import tl, triton

IGNORE_INDEX = -100


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    ignore_index: int = IGNORE_INDEX,
) -> torch.Tensor:
    """Sum over tokens of the cross-entropy of `hidden @ weight.T`, in nats, differentiable in hidden and weight.

    Arguments (v vocabulary, d hidden size):
        hidden: (..., d), floating; the products run in its dtype, the softmax and every sum at least in float32.
        weight: (v, d).
        targets: (...) int64, each in [0, v) or `ignore_index`, whose tokens add nothing to the loss.

    Returns a scalar, float32 (float64 for float64 hidden): a sum, so that a batch can be split freely and divided once.
    Raises ValueError for shapes and dtypes that do not fit and for a target outside the vocabulary (from a compiled
    model torch's RuntimeError); the Triton backend, whose kernels cannot raise, returns NaN instead.
    """
    backend, hidden, targets = _prepare(hidden, weight, targets, ignore_index)
    if backend == "reference":
        return token_losses_reference(hidden, weight, targets, ignore_index).sum()
    need_hidden, need_weight = (torch.is_grad_enabled() and t.requires_grad for t in (hidden, weight))
    return _loss(hidden, weight, targets, ignore_index, need_hidden, need_weight, backend)[0]


def linear_token_losses(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, ignore_index: int = IGNORE_INDEX
) -> torch.Tensor:
    """Cross-entropy of each token, (...) float32 in nats, 0 where ignored. For evaluation: carries no gradient.

    Arguments and errors are those of `linear_cross_entropy`.
    """
    shape = targets.shape
    backend, hidden, targets = _prepare(hidden, weight, targets, ignore_index)
    with torch.no_grad():
        if backend == "reference":
            return token_losses_reference(hidden, weight, targets, ignore_index).view(shape)
        return _token_losses(hidden, weight, targets, ignore_index, backend).view(shape)


def _prepare(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, ignore_index: int
) -> tuple[str, torch.Tensor, torch.Tensor]:
    """Check the arguments; the backend, hidden as (t, d) and targets as (t,)."""
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(f"weight must have shape (vocab, {hidden.shape[-1]}), not {tuple(weight.shape)}")
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(f"targets must have shape {tuple(hidden.shape[:-1])}, not {tuple(targets.shape)}")
    if 0 <= ignore_index < weight.shape[0]:
        raise ValueError(
            f"ignore_index {ignore_index} is a valid target; choose a value outside [0, {weight.shape[0]})"
        )
    if targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64, not {targets.dtype}")
    backend = choose_backend(hidden, ("reference", *SOFTMAX))
    if backend == "triton":
        require_kernel_tensors(hidden=hidden, weight=weight)
    elif targets.device.type == "cpu" and not torch.compiler.is_compiling() and not is_transformed():
        outside = (targets != ignore_index) & ((targets < 0) | (targets >= weight.shape[0]))
        if outside.any():
            raise ValueError(f"the target {targets[outside][0]} is outside the vocabulary of {weight.shape[0]}")
    return backend, hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)


def token_losses_reference(
    hidden: torch.Tensor,  # (t, d)
    weight: torch.Tensor,  # (v, d)
    targets: torch.Tensor,  # (t,)
    ignore_index: int,
) -> torch.Tensor:
    """Loss of each token, (t,), 0 where the target is `ignore_index`."""
    with torch.autocast(hidden.device.type, enabled=False):
        logits = (hidden @ weight.to(hidden.dtype).t()).to(torch.promote_types(hidden.dtype, torch.float32))
    lse = logits.logsumexp(dim=-1)
    kept = targets != ignore_index
    picked = logits.gather(1, torch.where(kept, targets, 0)[:, None])[:, 0]
    return torch.where(kept, lse - picked, 0.0)


# Logits of one chunk, in float32. Not smaller, because every chunk also reads and writes the whole gradient of the
# weight: with this size, at a vocabulary of 50 280 in 16 bits, half of the bytes of the products and the softmax.
CHUNK_BYTES = 128 * 2**20

# On a CPU, in the logits' own dtype: allocating memory there is slower than reading it.
CPU_CHUNK_BYTES = 50 * 2**20

# (logits (t, v), targets (t,), ignore_index, whether the gradient is wanted) -> losses (t,), at least float32,
# and the gradient of their sum in the logits, in the logits' dtype, or None. May overwrite the logits.
Softmax = Callable[[torch.Tensor, torch.Tensor, int, bool], tuple[torch.Tensor, torch.Tensor | None]]


def torch_softmax(
    logits: torch.Tensor, targets: torch.Tensor, ignore_index: int, want_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    tokens, vocab = logits.shape
    wide = torch.promote_types(logits.dtype, torch.float32)
    kept = targets != ignore_index
    safe = torch.where(kept, targets, 0)[:, None]  # (t, 1)
    lse = torch.empty(tokens, 1, dtype=wide, device=logits.device)
    narrow_picked = torch.empty(tokens, 1, dtype=logits.dtype, device=logits.device)
    # A few rows at a time, so that their wide copy stays in cache; when fused, there is no such copy.
    rows = tokens if is_fused() else max(1, block_elements(logits.device) // vocab)
    for start in range(0, tokens, rows):
        part = slice(start, start + rows)
        torch.gather(logits[part], 1, safe[part], out=narrow_picked[part])
        lse[part] = _softmax_rows(logits[part], kept[part, None], want_gradient)
    picked = narrow_picked.to(wide)
    if want_gradient:
        # Subtract 1 before rounding: where the softmax is near 1, rounding it could lose the difference.
        target = torch.exp(picked - lse) - 1.0
        logits[torch.arange(tokens, device=logits.device), safe[:, 0]] = (target[:, 0] * kept).to(logits.dtype)
    losses = torch.where(kept, (lse - picked)[:, 0], 0.0)
    return losses, logits if want_gradient else None


@fusable
def _softmax_rows(logits: torch.Tensor, kept: torch.Tensor, want_gradient: bool) -> torch.Tensor:
    """log Σ exp of rows (t, v), (t, 1); the rows become the softmax, or 0 where not `kept` (t, 1)."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    largest = logits.amax(dim=-1, keepdim=True).to(wide)
    exponentials = (logits.to(wide) - largest).exp_()
    total = exponentials.sum(dim=-1, keepdim=True)
    lse = total.log() + largest
    if want_gradient:
        logits.copy_(exponentials.mul_(kept / total))
    return lse


def losses_and_gradients(
    softmax: Softmax,
    hidden: torch.Tensor,  # (t, d)
    weight: torch.Tensor,  # (v, d)
    targets: torch.Tensor,  # (t,)
    ignore_index: int,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Loss of each token (t,), 0 where ignored; gradients of their sum with respect to hidden and to weight (at least
    float32), None where not needed."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    narrow_weight = weight.to(hidden.dtype)
    losses = torch.empty(hidden.shape[0], dtype=wide, device=hidden.device)
    grad_hidden = torch.empty_like(hidden) if need_hidden else None
    grad_weight = torch.zeros_like(weight, dtype=wide) if need_weight else None
    chunks = _chunks(hidden, weight)
    # Rows begin at multiples of 8 whatever the vocabulary: products and kernels load 16 bytes at a time.
    buffer = hidden.new_empty(len(targets[chunks[0]]) if chunks else 0, -(-weight.shape[0] // 8) * 8)
    # oneDNN's small products of bfloat16 read past the width and multiply that by zero: it must not be NaN.
    buffer[:, weight.shape[0] :] = 0
    for rows in chunks:
        logits = buffer[: len(targets[rows]), : weight.shape[0]]  # (t, v)
        torch.mm(hidden[rows], narrow_weight.t(), out=logits)
        losses[rows], grad = softmax(logits, targets[rows], ignore_index, need_hidden or need_weight)
        if need_hidden:
            torch.mm(grad, narrow_weight, out=grad_hidden[rows])
        if need_weight:
            _add_product(grad_weight, grad, hidden[rows])
    return losses, grad_hidden, grad_weight


def _add_product(result: torch.Tensor, grad: torch.Tensor, hidden: torch.Tensor) -> None:
    """result (v, d) += gradᵀ hidden, for grad (t, v) and hidden (t, d): summed over the chunks in result's dtype."""
    if result.dtype == hidden.dtype:
        result.addmm_(grad.t(), hidden)
        return
    # A 16-bit product is computed in blocks of rows that stay in cache until they are added.
    rows = max(1, block_elements(result.device) // result.shape[1])
    for start in range(0, result.shape[0], rows):
        part = slice(start, start + rows)
        result[part] += grad[:, part].t() @ hidden


def _chunks(hidden: torch.Tensor, weight: torch.Tensor) -> list[slice]:
    if hidden.device.type == "cpu":
        step = CPU_CHUNK_BYTES // (hidden.element_size() * weight.shape[0])
    else:
        step = CHUNK_BYTES // (4 * weight.shape[0])
    step = max(16, step)
    if step > 128:
        step -= step % 128  # matrix products come in tiles of that many rows
    return [slice(start, start + step) for start in range(0, hidden.shape[0], step)]


LANE = tl.constexpr(8)


@triton.jit
def _load_logits(pointer, columns, start, v: tl.constexpr, end: tl.constexpr):
    """Logits from `start` on, float32; -inf past the vocabulary."""
    x = tl.load(pointer + start + columns, mask=columns < end - start, other=float("-inf")).to(tl.float32)
    if end != v:
        x = tl.where(columns < v - start, x, float("-inf"))
    return x


@triton.jit
def _softmax_kernel(
    logits,  # (rows, v); overwritten with the gradient if GRADIENT
    targets,  # (rows)
    losses,  # out: (rows), float32
    row_stride,
    ignore_index,
    v: tl.constexpr,
    BLOCK: tl.constexpr,
    GRADIENT: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Grid (rows). A target outside the vocabulary makes the loss and the gradient of its row NaN."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * aligned(row_stride, ALIGN)
    # Read and write past v up to the next multiple of ALIGN, for which the row stride leaves room.
    end: tl.constexpr = (v + ALIGN - 1) // ALIGN * ALIGN
    columns = tl.arange(0, BLOCK // LANE)[:, None] * LANE + tl.arange(0, LANE)[None, :]

    # Not -inf: in lanes that lie past the end -inf - -inf would be NaN.
    highest = tl.full((BLOCK // LANE,), -1.0e38, dtype=tl.float32)
    total = tl.zeros((BLOCK // LANE,), dtype=tl.float32)
    for start in range(0, v, BLOCK):
        x = _load_logits(logits, columns, start, v, end)
        higher = tl.maximum(highest, tl.max(x, axis=1))
        terms = tl.exp2((x - higher[:, None]) * LOG2E)
        total = total * tl.exp2((highest - higher) * LOG2E) + tl.sum(terms, axis=1)
        highest = higher
    top = tl.max(highest, axis=0)
    lse = top + tl.log(tl.sum(total * tl.exp2((highest - top) * LOG2E), axis=0))

    target = tl.load(targets + row)
    kept = target != ignore_index
    outside = (target < 0) | (target >= v)
    at_target = tl.load(logits + target, mask=kept & (not outside), other=float("nan")).to(tl.float32)
    loss = lse - at_target
    tl.store(losses + row, tl.where(kept, loss, 0.0))

    if GRADIENT:
        # Every thread must have read logits[target] before one of them overwrites it.
        tl.debug_barrier()
        factor = tl.where(outside, float("nan"), 1.0)
        for start in range(0, v, BLOCK):
            x = _load_logits(logits, columns, start, v, end)
            gradient = tl.exp2((x - lse) * LOG2E) * factor
            gradient = tl.where(start + columns == target, gradient - 1.0, gradient)
            gradient = tl.where(kept, gradient, 0.0)
            tl.store(logits + start + columns, gradient.to(logits.dtype.element_ty), mask=columns < end - start)


def triton_softmax(
    logits: torch.Tensor, targets: torch.Tensor, ignore_index: int, want_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Losses (t,), float32; `logits` (t, v), rows of contiguous columns, become their gradient if it is wanted.

    A row may be overwritten up to the next multiple of 8 that its stride leaves room for.
    """
    rows, v = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    # Sixteen logits per thread: two loads of 16 bytes on the way at once, and few enough registers for full occupancy.
    block = min(4096, max(256, triton.next_power_of_2(v)))
    with torch.cuda.device_of(logits):
        _softmax_kernel[(rows,)](
            logits,
            targets.contiguous(),
            losses,
            logits.stride(0),
            ignore_index,
            v=v,
            BLOCK=block,
            GRADIENT=want_gradient,
            ALIGN=alignment(logits),
            num_warps=max(1, block // 512),
        )
    return losses, logits if want_gradient else None


SOFTMAX = {"torch": torch_softmax, "triton": triton_softmax}


@torch.library.custom_op("mamba2::linear_cross_entropy", mutates_args=())
def loss_op(
    hidden: torch.Tensor,  # (t, d)
    weight: torch.Tensor,  # (v, d)
    targets: torch.Tensor,  # (t,)
    ignore_index: int,
    need_hidden: bool,
    need_weight: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sum of the tokens' losses and its gradients, empty where not needed.

    The backward only scales the gradients that the forward has computed: three products in all, not four.
    """
    # Which dtype each product uses is decided here, not by an enclosing autocast.
    with torch.autocast(hidden.device.type, enabled=False):
        losses, grad_hidden, grad_weight = losses_and_gradients(
            SOFTMAX[backend], hidden, weight, targets, ignore_index, need_hidden, need_weight
        )
    grads = (hidden.new_empty(0) if grad is None else grad for grad in (grad_hidden, grad_weight))
    return losses.sum(), *grads


@loss_op.register_fake
def _(hidden, weight, targets, ignore_index, need_hidden, need_weight, backend):
    wide = torch.promote_types(hidden.dtype, torch.float32)
    grad_hidden = torch.empty_like(hidden) if need_hidden else hidden.new_empty(0)
    grad_weight = torch.empty_like(weight, dtype=wide) if need_weight else hidden.new_empty(0)
    return hidden.new_empty((), dtype=wide), grad_hidden, grad_weight


def _setup_context(ctx, inputs, output):
    _, weight, *_, ctx.need_hidden, ctx.need_weight, _ = inputs
    ctx.weight_dtype = weight.dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])


def _backward(ctx, grad_output, *_):
    grad_hidden, grad_weight = ctx.saved_tensors
    no_more = (None,) * 5
    if grad_output is None:
        return None, None, *no_more
    # In the gradient's own precision: a factor like 1 / tokens must not be rounded to 16 bits.
    hidden = (grad_hidden.to(grad_output.dtype) * grad_output).to(grad_hidden.dtype) if ctx.need_hidden else None
    weight = (grad_weight * grad_output).to(ctx.weight_dtype) if ctx.need_weight else None
    return hidden, weight, *no_more


_loss = register_gradient(loss_op, _backward, _setup_context)


@torch.library.custom_op("mamba2::linear_token_losses", mutates_args=())
def token_losses_op(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, ignore_index: int, backend: str
) -> torch.Tensor:
    """Loss of each token, (t,), 0 where the target is `ignore_index`."""
    with torch.autocast(hidden.device.type, enabled=False):
        return losses_and_gradients(SOFTMAX[backend], hidden, weight, targets, ignore_index, False, False)[0]


@token_losses_op.register_fake
def _(hidden, weight, targets, ignore_index, backend):
    return hidden.new_empty(hidden.shape[0], dtype=torch.promote_types(hidden.dtype, torch.float32))


_token_losses = unwatched(token_losses_op)
