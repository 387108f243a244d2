"""Accuracy by distance against the plain logits."""

import pytest
import torch

from mamba2.data import synthetic_samples
from mamba2.evaluation.recall import recall
from mamba2.model import Mamba2LM
from tests.test_model import small_config

SOURCE = "synthetic:mqar:length=32,pairs=4,values=16"


def test_accuracy_by_distance_is_that_of_the_answers():
    model = Mamba2LM(small_config(num_hidden_layers=1), seed=1)
    result = recall(model, SOURCE, "test", 100)
    samples = synthetic_samples(SOURCE, "test")
    with torch.no_grad():
        logits = model(torch.from_numpy(samples.ids[:, :-1]))
    right = (logits.argmax(-1).numpy() == samples.ids[:, 1:]) & (samples.distance[:, 1:] > 0)
    distance = samples.distance[:, 1:]
    for end, count, hits in zip(result["distances"], result["counts"], result["right"], strict=True):
        chosen = (distance > end // 2) & (distance <= end)
        assert count == chosen.sum() and hits == right[chosen].sum()
    assert sum(result["counts"]) == 4000
    assert result["accuracy"] == pytest.approx(right.sum() / 4000)
    losses = -logits.log_softmax(-1).gather(-1, torch.from_numpy(samples.ids[:, 1:, None]))[..., 0]
    assert result["nats_per_answer"] == pytest.approx(losses[torch.from_numpy(distance > 0)].mean().item(), rel=1e-4)
    assert recall(model, SOURCE, "test", 300)["nats"] == pytest.approx(result["nats"], rel=1e-4)


def test_a_small_vocabulary_is_refused():
    with pytest.raises(ValueError, match="outside the vocabulary of 30"):
        recall(Mamba2LM(small_config(vocab_size=30)), SOURCE, "test", 10)
