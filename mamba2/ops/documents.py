"""Documents of any lengths one after another in one row, as flash-attention's kernels take them: `cu_seqlens`."""

import torch


def document_numbers(cu_seqlens: torch.Tensor, x: torch.Tensor, **excluded: object) -> torch.Tensor:
    """`seq_idx` of the documents that x (1, l, ...) consists of: the number of each token's document, (1, l) int32.

    Arguments: cu_seqlens (documents + 1,) int32 or int64: 0, then where each document ends, the last one at l. An empty
    document, two equal neighbours, owns no token. `excluded`: arguments that must be None beside it, by name.

    Raises ValueError naming a shape, dtype, device or argument that does not fit, and wrong values on a CPU. To read
    values on a GPU would be to wait for it: there they fail an assertion on the device, as an id outside a table does.
    """
    for name, value in excluded.items():
        if value is not None:
            raise ValueError(f"{name} does not go with cu_seqlens: leave out one of them")
    if not isinstance(cu_seqlens, torch.Tensor):
        raise ValueError(f"cu_seqlens must be a tensor of int32 or int64, not {type(cu_seqlens).__name__}")
    b, l = x.shape[:2]
    if b != 1:
        raise ValueError(f"with cu_seqlens all documents are in one row, a batch of 1, and this batch is of {b}")
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
        raise ValueError(f"cu_seqlens must have shape (documents + 1,), not {tuple(cu_seqlens.shape)}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens must be int32 or int64, not {cu_seqlens.dtype}")
    if cu_seqlens.device != x.device:
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device} and x on {x.device}; both must be on one device")
    first, last, shortest = cu_seqlens.select(0, 0), cu_seqlens.select(0, -1), cu_seqlens.diff().min()
    fits = (first == 0) & (last == l) & (shortest >= 0)
    rule = f"cu_seqlens must begin with 0, never fall, and end with {l}, the number of tokens"
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        torch._assert_async(fits, rule)
    elif not fits:
        raise ValueError(f"{rule}; it goes from {first} to {last}, and its smallest step is {shortest}")
    tokens = torch.arange(l, dtype=cu_seqlens.dtype, device=x.device)
    ends = cu_seqlens.narrow(0, 1, len(cu_seqlens) - 1)
    return torch.searchsorted(ends, tokens, right=True, out_int32=True).unsqueeze(0)
