"""Training one model in several processes, one per device, started by torchrun.

Every process runs train.py. They divide the windows of each step among themselves; loss and gradient are summed over
the processes and divided by the total number of tokens, so the result is that of one process. DDP keeps a copy of the
model on every device; FSDP2 shards weights, gradients and moments, and gathers the weights of one block at a time.
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

from mamba2.device import choose_device
from mamba2.model import Mamba2LM

T = TypeVar("T")
PARALLEL = ("ddp", "fsdp")
CPU = torch.device("cpu")
COLLECTIVES = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl", "xpu": "cpu:gloo,xpu:xccl"}


@dataclass(frozen=True)
class World:
    """This process's rank among `size`. Rank 0 prints and writes what is not sharded. Default: a single process."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = CPU

    @classmethod
    def join(cls, device: str = "auto") -> Self:
        """Join the processes that torchrun started, found by its environment variables; without them, a World of 1.

        `device`: see `choose_device`. Raises ValueError if it is not there or serves no second process.
        """
        if "WORLD_SIZE" not in os.environ:
            return cls(device=choose_device(device))
        local_rank = int(os.environ["LOCAL_RANK"])
        chosen = choose_device(device, local_rank)
        if ":" in device:
            raise ValueError(f"--device {device} names one GPU, and every process has its own: leave out the number")
        if chosen.type not in COLLECTIVES:
            raise ValueError(f"several processes train on {', '.join(COLLECTIVES)}, not on {chosen.type}")
        if chosen.type != "cpu":
            torch.accelerator.set_device_index(chosen.index)
        dist.init_process_group(COLLECTIVES[chosen.type])
        return cls(dist.get_rank(), dist.get_world_size(), local_rank, chosen)

    @staticmethod
    def leave() -> None:
        """Destroy the process group. Every process must call this, except after an error, when torchrun ends them."""
        if dist.is_initialized():
            # gloo's threads need Python's lock to free their last tensors. destroy_process_group holds the lock while
            # it waits for them, a deadlock; sleeping first releases it.
            dist.barrier()
            time.sleep(0.2)
            dist.destroy_process_group()

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """The sum over the processes, in every process."""
        if self.size > 1:
            dist.all_reduce(value := value.clone())
        return value

    def max(self, value: int) -> int:
        """The largest value over the processes, in every process."""
        if self.size > 1:
            tensor = torch.tensor(value)
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
            value = int(tensor)
        return value

    def first(self, function: Callable[[], T]) -> T:
        """Run `function` on rank 0 only; every process gets its result. An error in it ends every process."""
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
            raise SystemExit(1)  # rank 0 prints the error
        return result[0]

    def gather(self, value: T) -> list[T]:
        """The values of all processes by rank, in every process."""
        values: list[Any] = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def in_turn_on_a_node(self, function: Callable[[], T]) -> T:
        """The result of `function`. The first process of each node runs it before the others, to fill the caches."""
        result = function() if self.local_rank == 0 else None
        if self.size > 1:
            dist.barrier()
        return function() if self.local_rank else result

    def share(self, items: list[T]) -> list[T]:
        """This process's share of `items`: every `size`-th one."""
        return items[self.rank :: self.size]


ALONE = World()


def parallelize(model: Mamba2LM, world: World, parallel: str, dtype: torch.dtype) -> nn.Module:
    """The module to call in place of `model`, whose backward sums the gradients over the processes.

    `fsdp` shards the model in place. The projections, nearly all of a block's weights, are gathered in `dtype`;
    dt_bias, A_log, D, norms, convolution, embeddings, and the sums of all gradients stay in float32.
    """
    if not dist.is_initialized():
        return model
    if parallel == "ddp":
        return DistributedDataParallel(model, gradient_as_bucket_view=True)
    # The states that blocks return are views of larger tensors; nothing writes into them.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(world.device.type, (world.size,))
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
    """Context for forward and backward of a micro-batch: gradients are summed over the processes only if `wanted`."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(wanted)
    elif isinstance(model, DistributedDataParallel) and not wanted:
        return model.no_sync()
    return nullcontext()


def reshard(model: nn.Module) -> None:
    """Free the gathered weights after a forward pass without a backward pass."""
    if isinstance(model, FSDPModule):
        model.reshard()


def full(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor that may be sharded. Every process must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
