"""Several processes that train one model together, started by torchrun: one for each device.

Every process runs the whole of train.py. They share the windows of a step, and what they compute is what one process
would: loss and gradient are sums over the processes, divided by the tokens of all. DDP keeps the model on every device;
FSDP2 keeps a share of every weight, gradient and moment on each and gathers one block's weights when it is their turn.
"""

import os
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from mamba2.model import Mamba2LM

T = TypeVar("T")
PARALLEL = ("ddp", "fsdp")


@dataclass(frozen=True)
class World:
    """This process among `size`. Rank 0 writes what is not sharded and speaks; one process alone is rank 0 of 1."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @classmethod
    def join(cls) -> Self:
        """The processes that torchrun started, by its environment variables, or this one alone."""
        if "WORLD_SIZE" not in os.environ:
            return cls()
        local_rank = int(os.environ["LOCAL_RANK"])
        if torch.cuda.is_available():
            torch.cuda.set_device(local_rank)
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        return cls(dist.get_rank(), dist.get_world_size(), local_rank)

    @staticmethod
    def leave() -> None:
        """For an end that every process comes to; after an error a process just exits, and torchrun ends the others."""
        if dist.is_initialized():
            # gloo's threads let go of their last tensors after the work is done, and need Python's lock for that. A
            # thread that holds it, destroys the group and waits for them would never end; one that sleeps lets it go.
            dist.barrier()
            time.sleep(0.2)
            dist.destroy_process_group()

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """Sum over the processes, on each."""
        if self.size > 1:
            dist.all_reduce(value := value.clone())
        return value

    def max(self, value: int) -> int:
        """Largest over the processes, on each."""
        if self.size > 1:
            tensor = torch.tensor(value)
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
            value = int(tensor)
        return value

    def first(self, function: Callable[[], T]) -> T:
        """What `function` returns on rank 0, where alone it runs. An error of it ends every process."""
        if self.size == 1:
            return function()
        result: list[Any] = [None, None]
        if self.is_main:
            try:
                result[0] = function()
            except Exception as error:
                result[1] = type(error).__name__
                dist.broadcast_object_list(result)
                raise
        dist.broadcast_object_list(result)
        if result[1] is not None:
            raise SystemExit(1)  # rank 0 says why
        return result[0]

    def gather(self, value: T) -> list[T]:
        """The value of every process, on each, by rank."""
        values: list[Any] = [value]
        if self.size > 1:
            dist.all_gather_object(values := [None] * self.size, value)
        return values

    def in_turn_on_a_node(self, function: Callable[[], T]) -> T:
        """What `function` returns; the first process of each node runs it before the others, and fills its caches."""
        result = function() if self.local_rank == 0 else None
        if self.size > 1:
            dist.barrier()
        return function() if self.local_rank else result

    def share(self, items: list[T]) -> list[T]:
        """This process's share of `items`, as even as can be."""
        return items[self.rank :: self.size]


ALONE = World()


def parallelize(model: Mamba2LM, world: World, parallel: str, dtype: torch.dtype) -> nn.Module:
    """The module whose forward and backward train `model` together with the other processes.

    With `fsdp` the model itself is sharded, in place. The projections, nearly all of a block, are gathered in `dtype`;
    dt_bias, A_log, D, norms, convolution, embeddings and every gradient's sum stay in float32.
    """
    if not dist.is_initialized():
        return model
    if parallel == "ddp":
        return DistributedDataParallel(model, gradient_as_bucket_view=True)
    # Blocks return the state, parts of larger tensors, beside their output; nothing writes into either.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (world.size,))
    float32 = MixedPrecisionPolicy(cast_forward_inputs=False)
    reduced = MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in model.backbone.layers:
        fully_shard([layer.mixer.in_proj, layer.mixer.out_proj], mesh=mesh, mp_policy=reduced)
        fully_shard(layer, mesh=mesh, mp_policy=float32)
        register_fsdp_forward_method(layer, "step")
    fully_shard(model, mesh=mesh, mp_policy=float32)
    for method in ("token_losses", "prefill", "step"):
        register_fsdp_forward_method(model, method)
    return model


def gradient_sync(model: nn.Module, wanted: bool) -> AbstractContextManager:
    """Around forward and backward of a micro-batch: gradients are summed over the processes after the last one only."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(wanted)
    elif isinstance(model, DistributedDataParallel) and not wanted:
        return model.no_sync()
    return nullcontext()


def reshard(model: nn.Module) -> None:
    """After a forward pass that no backward pass follows: make the parameters the sharded ones again."""
    if isinstance(model, FSDPModule):
        model.reshard()


def full(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor, of which each process may hold a part. Every process must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
