"""lm-evaluation-harness' own command, with the model `mamba2` added:

    python -m mamba2.evaluation --model mamba2 --model_args pretrained=FOLDER,max_length=1024 --tasks lambada_openai

`mamba2.evaluation.harness` says what --model_args takes.
"""

from mamba2.cli import run


def main() -> None:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import register_model

    from mamba2.evaluation.harness import HarnessLM

    register_model("mamba2")(HarnessLM)
    cli_evaluate()


if __name__ == "__main__":
    run(main)
