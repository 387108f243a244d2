"""The model card: README.md in a model folder, as the Hugging Face hub shows it."""

import json
from pathlib import Path

from mamba2.config import Mamba2Config
from mamba2.files import write_text

CARD = "README.md"
MARK = "<!-- Written with the model; a file without this line is never replaced. -->"


def write_card(folder: Path, config: Mamba2Config, parameters: int, facts: dict[str, str]) -> None:
    """Write the card of a model, unless the folder holds one that somebody else wrote.

    Arguments: `parameters` their number; `facts`: more rows of the table, of training and evaluation.
    """
    file = folder / CARD
    if file.exists() and MARK not in file.read_text(encoding="utf-8"):
        return
    records = {"dt_bias": config.dt_bias_init, **(config.factors_init or {})}
    rows = {
        "parameters": f"{parameters:,}",
        "layers": f"{config.num_hidden_layers}, hidden size {config.hidden_size}",
        "heads": f"{config.num_heads} of {config.head_dim}, groups {config.n_groups}, state size {config.state_size}",
        "vocabulary": f"{config.vocab_size:,}",
        **({"muP": f"from hidden size {config.mup_base_width}"} if config.mup_base_width else {}),
        **{f"initialisation of {name}": f"`{json.dumps(record)}`" for name, record in records.items() if record},
        **(facts or {"training": "none recorded"}),
    }
    title = f"# Mamba-2, {config.initialization}" if config.initialization else "# Mamba-2"
    library = "mamba2" if config.attn_layer_idx else "transformers"
    lines = ["---", f"library_name: {library}", "pipeline_tag: text-generation", "tags: [mamba2, ssm]", "---", MARK]
    lines += ["", title, "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |".replace("\n", " ") for name, value in rows.items()]
    lines += ["", "`mamba2.Mamba2LM.from_pretrained` opens it, by its folder or by its name here.", ""]
    write_text(file, "\n".join(lines))
