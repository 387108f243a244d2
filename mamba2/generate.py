"""Text from a model: the prompt in one pass, then token after token with the state carried along."""

import torch

from mamba2.model import Mamba2LM


@torch.no_grad()
def generate(
    model: Mamba2LM,
    input_ids: torch.Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Continue each row of `input_ids` (b, l) by `max_new_tokens` ids. Returns (b, l + max_new_tokens) int64.

    Samples from softmax(logits / temperature) with `generator` (on the model's device); temperature 0 takes the most
    likely id. Memory and time per token do not depend on the length. Raises ValueError for a negative temperature.
    """
    if temperature < 0:
        raise ValueError(f"temperature must be at least 0, not {temperature}")
    training = model.training
    model.eval()
    ids, state, step_ids = input_ids, None, input_ids
    for _ in range(max_new_tokens):
        logits, state = model(step_ids, state=state, return_state=True)
        logits = logits[:, -1].float()  # (b, v)
        if temperature == 0:
            step_ids = logits.argmax(dim=-1, keepdim=True)  # (b, 1)
        else:
            probabilities = torch.softmax(logits / temperature, dim=-1)
            step_ids = torch.multinomial(probabilities, 1, generator=generator)
        ids = torch.cat([ids, step_ids], dim=1)
    model.train(training)
    return ids
