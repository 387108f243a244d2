"""Devices: which one is chosen, and what Apple's has of the operations that a model needs."""

import contextlib
from pathlib import Path

import pytest
import torch
import torchgen
from torch import nn
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchgen.gen import parse_native_yaml
from torchgen.model import DispatchKey

from mamba2 import model as model_module
from mamba2.decoding.sampling import Sampling
from mamba2.device import choose_device, widen
from mamba2.distributed import World
from mamba2.model import Mamba2LM
from mamba2.training.optimizer import OPTIMIZERS, make_optimizer
from mamba2.training.step import update
from tests.test_model import small_config

NATIVE = Path(torchgen.__file__).parent / "packaged/ATen/native"  # PyTorch's own table of what each device has


class Seen(TorchDispatchMode):
    """The operations that run while this is entered, and those of them that meet float64."""

    def __init__(self):
        super().__init__()
        self.operations: set[str] = set()
        self.wide: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        if name in OPDEFS:  # ours: what it is made of counts
            with self:
                return OPDEFS[name]._init_fn(*args, **(kwargs or {}))
        result = function(*args, **(kwargs or {}))
        if function.namespace != "profiler":
            self.operations.add(str(function))
        if any(getattr(leaf, "dtype", None) == torch.float64 for leaf in tree_leaves((args, kwargs, result))):
            self.wide.add(str(function))
        return result


def without_mps(operations: set[str]) -> list[str]:
    """Those that PyTorch lists no kernel of MPS for, nor one for any device."""
    parsed = parse_native_yaml(str(NATIVE / "native_functions.yaml"), str(NATIVE / "tags.yaml"))
    of_mps = parsed.backend_indices[DispatchKey.MPS]
    named = {f"aten.{f.func.name.name}.{f.func.name.overload_name or 'default'}": f for f in parsed.native_functions}

    def there(name: str) -> bool:
        function = named[name]
        delegate = function.structured_delegate
        through = delegate and named[f"aten.{delegate.name}.{delegate.overload_name or 'default'}"]
        return function.has_composite_kernel or of_mps.has_kernel(function) or (through and of_mps.has_kernel(through))

    return sorted(name for name in operations if not there(name))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("changes", [{}, {"attn_layer_idx": [1], "attn_cfg": {"num_heads": 4, "causal": True}}])
def test_mps_has_every_operation_of_training_and_sampling(monkeypatch, optimizer, changes):
    """Not run on MPS, which is not here: on tensors without memory, that are on no CPU, and the optimizer on one."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # it knows no such device
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: False)
    monkeypatch.setattr(model_module, "check_ids", lambda *_: None)  # which reads values
    with torch.device("meta"):
        model = Mamba2LM(small_config(**changes))
        ids, seq_idx = torch.zeros(2, 300, dtype=torch.int64), torch.zeros(2, 300, dtype=torch.int32)
    with Seen() as seen:
        model(ids, ids, seq_idx=seq_idx).backward()
        with torch.no_grad():
            state = model.prefill(ids)[1]
            model.step(ids[:, 0], state)
    model = Mamba2LM(small_config(**changes))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    steps = make_optimizer(model, 1e-3, (0.9, 0.99), 0.01, name=optimizer)
    sampling = Sampling(repetition_penalty=1.1, temperature=0.8, top_k=5, top_p=0.9, min_p=0.01)
    with seen:
        assert update(model, steps, clip=1.0)
        sampling.draw(torch.randn(2, 61), torch.zeros(2, 61, dtype=torch.bool), torch.Generator())
    assert len(seen.operations) > 40
    assert not without_mps(seen.operations)
    assert not seen.wide
    assert without_mps({"aten.geqrf.default", "aten.add.Tensor"}) == ["aten.geqrf.default"]


def test_a_device_that_is_not_there_is_refused_by_name(monkeypatch):
    assert choose_device("cpu").type == "cpu"
    gpu = torch.accelerator.current_accelerator(check_available=True)
    assert choose_device().type == (gpu.type if gpu else "cpu")
    for name in ("tpu", "cuda:x", "xpu:1", "meta", "cpu:3", "cpu:", ""):
        with pytest.raises(ValueError, match=f"device '{name}' is not here: this machine, with torch .* has"):
            choose_device(name)
    for there, chosen in (("mps", "mps"), ("xpu", "xpu:2"), ("cuda", "cuda:2")):
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda there=there, **_: torch.device(there))
        assert str(choose_device(local_rank=2)) == chosen
        assert choose_device("cpu", 2).type == "cpu"
    assert str(choose_device("cuda:1")) == "cuda:1"


def test_several_processes_have_a_device_each(monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    cases = {"cuda": ("cuda:1", "cuda:1 names one GPU"), "mps": ("auto", "train on cpu, cuda, xpu, not on mps")}
    for there, (device, message) in cases.items():
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda there=there, **_: torch.device(there))
        with pytest.raises(ValueError, match=message):
            World.join(device)


def test_sums_are_in_float64_where_the_device_has_it():
    assert widen(torch.ones(2)).dtype == torch.float64
    assert widen(nn.Parameter(torch.ones(2)).bfloat16()).dtype == torch.float64
