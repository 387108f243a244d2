"""Accuracy in a synthetic task, by the distance between an answer and what it depends on."""

import math

import torch
import torch.nn.functional as F

from mamba2.data import synthetic_samples
from mamba2.model import Mamba2LM


@torch.no_grad()
def recall(model: Mamba2LM, source: str, split: str, batch_size: int) -> dict:
    """Accuracy and loss of the answers of a task (see mamba2/data/synthetic.py), JSON-ready.

    "distances" are the right ends of bins (2^(k-1), 2^k]; "counts", "right" and "nats" are sums over each bin. Raises
    ValueError when the model's vocabulary is too small.
    """
    samples = synthetic_samples(source, split)
    if samples.ids.max() >= model.config.vocab_size:
        raise ValueError(
            f"{source} has the id {samples.ids.max()}, outside the vocabulary of {model.config.vocab_size}"
        )
    device = next(model.parameters()).device
    ids, distance = torch.from_numpy(samples.ids), torch.from_numpy(samples.distance)
    bins = distance.clamp(min=1).double().log2().ceil().long()  # (samples, length)
    sums = torch.zeros(3, int(bins.max()) + 1, dtype=torch.float64)  # counts, right, nats
    for start in range(0, len(ids), batch_size):
        rows = slice(start, start + batch_size)
        answers = distance[rows, 1:] > 0
        hidden, _ = model.backbone(ids[rows, :-1].to(device))
        logits = F.linear(hidden[answers.to(device)], model.lm_head.weight).float().cpu()
        wanted, its_bin = ids[rows, 1:][answers], bins[rows, 1:][answers]
        nats = F.cross_entropy(logits, wanted, reduction="none")
        for row, values in enumerate((torch.ones_like(nats), logits.argmax(-1) == wanted, nats)):
            sums[row].index_add_(0, its_bin, values.double())
    used = sums[0] > 0
    counts, right, nats = sums[:, used]
    total = counts.sum()
    accuracy = (right.sum() / total).item()
    return {
        "source": source,
        "split": split,
        "accuracy": accuracy,
        # Binomial with one trial per sample, since the answers within a sample are not independent.
        "standard_error": math.sqrt(accuracy * (1 - accuracy) / len(ids)),
        "nats_per_answer": (nats.sum() / total).item(),
        "distances": [2 ** int(k) for k in used.nonzero()[:, 0]],
        "counts": counts.tolist(),
        "right": right.tolist(),
        "nats": nats.tolist(),
    }
