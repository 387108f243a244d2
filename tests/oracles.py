"""Independent implementations that tests compare with. Nothing in the package may import them."""

import contextlib
import importlib
import os
import sys
import types
from collections.abc import Callable
from unittest import mock

import torch


def mamba_ssm_scan(multiprocessors: int = 1) -> Callable:
    """mamba-ssm's `mamba_chunk_scan_combined`, its own Triton kernels; without a GPU, in Triton's interpreter.

    mamba-ssm asks the driver for the device's properties, which an interpreter does not have: the function returned
    answers these questions for as long as it runs; run the backward pass inside `mamba_ssm_environment` as well.
    `multiprocessors` decides into how many partial sums its backward splits the heads of a group.
    """
    function = _import_mamba_ssm().mamba_chunk_scan_combined

    def scan(*args, **kwargs):
        with mamba_ssm_environment(multiprocessors):
            return function(*args, **kwargs)

    return scan


@contextlib.contextmanager
def mamba_ssm_environment(multiprocessors: int = 1):
    """What mamba-ssm's launchers ask of the CUDA driver, answered without one; nothing is changed where a GPU is."""
    if torch.cuda.is_available():
        yield
        return
    properties = types.SimpleNamespace(multi_processor_count=multiprocessors)
    with (
        mock.patch("torch.cuda.device", lambda *_: contextlib.nullcontext()),
        mock.patch("torch.cuda.get_device_properties", lambda *_: properties),
        mock.patch("torch.cuda.get_device_capability", lambda *_: (9, 0)),
    ):
        yield


def mamba_ssm_classes() -> types.SimpleNamespace:
    """mamba-ssm's `MambaConfig` and `MambaLMHeadModel`; call a model with `mamba_ssm_logits`."""
    _import_mamba_ssm()
    with mamba_ssm_environment():
        config = importlib.import_module("mamba_ssm.models.config_mamba")
        model = importlib.import_module("mamba_ssm.models.mixer_seq_simple")
    _first_configuration("layer_norm", "layernorm_gated")
    return types.SimpleNamespace(MambaConfig=config.MambaConfig, MambaLMHeadModel=model.MambaLMHeadModel)


def mamba_ssm_logits(model: torch.nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """Logits of a MambaLMHeadModel, by its own kernels; its fused path needs an extension that is not built."""
    for layer in model.backbone.layers:
        layer.mixer.use_mem_eff_path = False
    with torch.no_grad(), mamba_ssm_environment():
        return model(input_ids).logits


def mamba_ssm_state_update() -> Callable:
    """mamba-ssm's `selective_state_update`."""
    _import_mamba_ssm()
    with mamba_ssm_environment():
        function = importlib.import_module("mamba_ssm.ops.triton.selective_state_update").selective_state_update
    _first_configuration("selective_state_update")

    def update(*args, **kwargs):
        with mamba_ssm_environment():
            return function(*args, **kwargs)

    return update


def _import_mamba_ssm() -> types.ModuleType:
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("without a GPU mamba-ssm's kernels need TRITON_INTERPRET=1 before Triton is imported")
    # Its CUDA extension is not built; the modules imported below use none of it.
    sys.modules.setdefault("selective_scan_cuda", types.ModuleType("selective_scan_cuda"))
    with mamba_ssm_environment():
        module = importlib.import_module("mamba_ssm.ops.triton.ssd_combined")
    _first_configuration("ssd_combined", "ssd_bmm", "ssd_chunk_scan", "ssd_chunk_state", "ssd_state_passing")
    return module


def _first_configuration(*names: str) -> None:
    """Without a GPU, leave each autotuner of these modules one configuration: there is nothing to time with."""
    if torch.cuda.is_available():
        return
    from triton.runtime.autotuner import Autotuner

    for name in names:
        for kernel in vars(importlib.import_module(f"mamba_ssm.ops.triton.{name}")).values():
            if isinstance(kernel, Autotuner):
                kernel.configs = kernel.configs[:1]
