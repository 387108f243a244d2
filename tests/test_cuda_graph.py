"""Forward and backward as one CUDA graph, without a GPU: what it captures, and what it gives where a replay runs that.

A GPU that holds the graph is in `benchmarks.gpu`; nothing here says that a capture works.
"""

import functools
import types

import pytest
import torch

from mamba2 import cuda_graph
from mamba2.cuda_graph import GraphGradients
from mamba2.model import Mamba2LM
from mamba2.training import make_optimizer
from mamba2.training.step import accumulate_gradients, add_gradients, update
from tests.runs import arguments, make_study, run_train
from tests.test_model import small_config
from tests.training.test_training_step import make_windows


def test_steps_equal_those_without_a_graph(monkeypatch):
    """Warming up leaves nothing behind; batches of two sizes; gradients kept from step to step."""
    captures = []

    def run_and_keep(run):
        captures.append(run)
        for _ in range(2):
            result = run()
        return types.SimpleNamespace(replay=run), result  # in place of a graph: what it captured, run again

    monkeypatch.setattr(cuda_graph, "capture", run_and_keep)
    windows, weights = make_windows(), []
    for graphed in (False, True):
        model = Mamba2LM(small_config())
        optimizer = make_optimizer(model, 1e-2, (0.9, 0.99), 0.1)
        add = GraphGradients(model, functools.partial(add_gradients, model, torch.float32, 1)) if graphed else None
        losses = []
        for step in range(3):
            indices = [(step + i) % 12 for i in range(5)]
            losses.append(accumulate_gradients(model, windows, indices, 2, torch.float32, add=add)[0])
            losses.append(update(model, optimizer, 1.0, keep_gradients=graphed))
        weights.append((losses, [p.detach().clone() for p in model.parameters()]))
    assert weights[0][0] == weights[1][0]
    assert all(torch.equal(a, b) for a, b in zip(weights[0][1], weights[1][1], strict=True))
    assert len(captures) >= 2


def test_without_a_gpu_it_is_refused_before_anything_is_written(tmp_path):
    study = make_study(tmp_path)
    with pytest.raises(ValueError, match="one GPU does in one process, and this runs on cpu"):
        run_train(*arguments(study, study / "run", "--compile", "graph"))
    assert not (study / "run").exists()


def test_the_device_waits_for_nothing_that_a_graph_holds(monkeypatch):
    """Nor where a block is computed again."""
    monkeypatch.setenv("MAMBA2_BACKEND", "triton")
    model = Mamba2LM(small_config(num_hidden_layers=1, hidden_size=16, num_heads=2, head_dim=16, n_groups=1))
    model.backbone.checkpoint_every = 1
    batch, total = make_windows().batch([0]), torch.zeros((), dtype=torch.float64)

    def waits(*_, **__):
        raise AssertionError("a value was read from the device")

    for method in ("item", "tolist", "cpu", "nonzero", "numpy", "__bool__", "__int__", "__float__", "__index__"):
        monkeypatch.setattr(torch.Tensor, method, waits)
    monkeypatch.setattr(torch, "get_rng_state", waits)
    add_gradients(model, torch.float32, 1, batch, torch.full((), 30.0), total)
    monkeypatch.undo()
    assert all(p.grad.isfinite().all() for p in model.parameters()) and total > 0
