"""The preset `legacy` against transformers' Trainer, update by update."""

import pytest
import torch
from transformers import Mamba2ForCausalLM, Trainer, TrainingArguments

from mamba2.data import Windows, load_tokens
from mamba2.tokenizer import load_tokenizer
from tests.runs import arguments, make_study, metrics, run_train

STEPS, BATCH, LENGTH = 10, 4, 32
CLIP, EPS = 1 / 17, 1e-8 / 17  # what 1 and 1e-8 were on gradients 17 times too large


class StudysTrainer(Trainer):
    """Decay as in the study's version of transformers: on all parameters without `bias` in their names."""

    def get_decay_parameter_names(self, model) -> list[str]:
        return [name for name, _ in model.named_parameters() if "bias" not in name]


def theirs(study, tmp_path) -> list[dict]:
    torch.manual_seed(0)
    model = Mamba2ForCausalLM.from_pretrained(study / "model")
    windows = Windows(load_tokens(study / "data", "train", load_tokenizer(study / "model")), LENGTH, reset=False)
    rows = []
    for step in range(STEPS):
        inputs, targets, _ = windows.batch(windows.indices(2163, step, BATCH))
        ids = torch.cat([inputs, targets[:, -1:]], dim=1)  # they shift the labels themselves
        rows += [{"input_ids": row, "labels": row} for row in ids]
    options = TrainingArguments(
        output_dir=str(tmp_path / "theirs"),
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=1,
        max_steps=STEPS,
        learning_rate=5e-4,
        lr_scheduler_type="cosine",
        warmup_steps=1,  # 1 % of 10 steps, rounded up
        optim="adamw_torch",
        adam_beta1=0.9,
        adam_beta2=0.99,
        adam_epsilon=EPS,
        weight_decay=0.01,
        max_grad_norm=CLIP,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        train_sampling_strategy="sequential",
    )
    trainer = StudysTrainer(model, options, train_dataset=rows)
    trainer.train()
    return [row for row in trainer.state.log_history if "loss" in row]


def test_the_legacy_preset_makes_the_updates_of_the_replaced_trainer(tmp_path):
    study = make_study(tmp_path)
    options = ["--preset", "legacy", "--no-reset", "--batch-size", BATCH, "--gradient-accumulation-steps", 1]
    command = arguments(study, tmp_path / "run", *options, "--max-steps", STEPS, "--save-steps", 100)
    at = command.index("--warmup-steps")
    run_train(*command[:at], *command[at + 2 :])
    expected = theirs(study, tmp_path)
    ours = metrics(tmp_path / "run", "loss")
    assert [row["learning_rate"] for row in ours] == pytest.approx([row["learning_rate"] for row in expected])
    assert ours[0]["learning_rate"] == 0.0 and ours[0]["gradient_norm"] > 10 * CLIP
    assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in expected], abs=1e-3)
    norms = [row["grad_norm"] for row in expected]
    assert [row["gradient_norm"] for row in ours] == pytest.approx(norms, rel=1e-3)
    # The comparison can tell: with the rate of a usual warm-up the losses are not within 1e-3.
    command[command.index("--output-dir") + 1] = str(tmp_path / "other")
    run_train(*command)
    others = metrics(tmp_path / "other", "loss")
    assert max(abs(a["loss"] - b["loss"]) for a, b in zip(others, expected, strict=True)) > 1e-2
