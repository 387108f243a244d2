"""Peaks, memory and versions as they are said before a run."""

import dataclasses
import functools
import subprocess
import types

import pytest
import torch
from torch.profiler import profile

from mamba2.config import Mamba2Config
from mamba2.model import Mamba2LM, num_parameters
from mamba2.training import hardware, versions
from mamba2.training.hardware import choose_dtype, memory_estimate, peak_flops

TOKENS, LAYERS = 256, 2


def shallow(file: str) -> Mamba2Config:
    return dataclasses.replace(Mamba2Config.from_json(file), num_hidden_layers=LAYERS, vocab_size=64, chunk_size=64)


@functools.cache
def kept_for_backward(file: str, dtype: torch.dtype, checkpoint_every: int, keep_products_only: bool) -> int:
    """Bytes that the forward pass really keeps for the backward pass: what it allocates less what it frees."""
    model = Mamba2LM(shallow(file)).train()
    model.backbone.checkpoint_every = checkpoint_every
    for layer in model.backbone.layers:
        layer.keep_products_only = keep_products_only
    ids = torch.zeros(1, TOKENS, dtype=torch.int64)
    with profile(profile_memory=True) as profiler, torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        hidden = model.backbone(ids)[0]
    return sum(event.self_cpu_memory_usage for event in profiler.events()) - hidden.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("file", "every", "products"),
    [
        *(("configs/config.json", every, False) for every in (0, 1, 2)),
        *(("configs/130m.json", every, False) for every in (0, 1, 2)),
        ("configs/config.json", 0, True),
    ],
)
def test_the_memory_estimate_is_near_what_is_kept(file, every, products, dtype):
    measured = kept_for_backward(file, dtype, every, products)
    if every or products:  # in the backward pass one block after the other has all of its activations
        measured += kept_for_backward(file, dtype, 0, False) // LAYERS
    config = shallow(file)
    estimate = memory_estimate(config, 1, TOKENS, dtype, every, products) - 16 * num_parameters(config)
    assert estimate == pytest.approx(measured, rel=0.25)


def test_weights_gradients_and_moments_are_shared_by_shards():
    config = Mamba2Config.from_json("configs/config.json")
    whole, half = (memory_estimate(config, 0, 512, torch.float32, 0, shards=shards) for shards in (1, 2))
    assert whole == 16 * num_parameters(config) and half == whole // 2


def test_the_peak_of_a_gpu_comes_from_the_table_and_is_unknown_for_others(monkeypatch):
    device = torch.device("cuda", 0)
    for name, peak in (
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("AMD Instinct MI300X", 1307e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L400", None),
        ("Unheard Of 9000", None),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert peak_flops(device, torch.bfloat16) == peak
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100-SXM4-80GB")
    assert peak_flops(device, torch.float32) == 19.5e12


def test_the_peak_of_a_processor_is_measured():
    assert 1e8 < peak_flops(torch.device("cpu"), torch.float32) < 1e15


def test_versions_name_the_revision_or_say_that_it_is_unknown(monkeypatch):
    revision = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert f"torch {torch.__version__}" in versions()
    if revision:
        assert f"revision {revision[:7]}" in versions()

    def fails(*_, **__):
        raise FileNotFoundError("git")

    monkeypatch.setattr(hardware.subprocess, "run", fails)
    assert "revision unknown" in versions()


@pytest.mark.parametrize(("capability", "dtype"), [((7, 0), torch.float32), ((8, 0), torch.bfloat16)])
def test_a_gpu_that_only_emulates_bfloat16_is_not_given_it(monkeypatch, capability, dtype):
    """Volta and Turing, unless it is asked for by name; asked as torch asks, of a device's capability."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    properties = types.SimpleNamespace(major=capability[0], minor=capability[1])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: properties)
    device = torch.device("cuda", 0)
    assert choose_dtype("auto", device) == dtype
    assert choose_dtype("bf16", device) == torch.bfloat16 and choose_dtype("fp32", device) == torch.float32
