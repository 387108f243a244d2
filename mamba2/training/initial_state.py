"""What the windows of a step start from, other than an empty state (Buitrago Ruiz & Gu 2025, arXiv:2507.02782).

A model that is trained from empty states only never sees those that long texts lead to, and may fail there.

    noise      normal numbers as large as the states with which the last step ended: for each layer and head their root
               mean square. The convolution starts empty.
    passed     the state with which the same row of the batch ended the last step, of another text. The order of the
               data stays as it is.
    continued  the state after the window before, of the same text, without gradient: truncated back-propagation through
               time. Each row of the batch reads 16 windows on before it goes elsewhere (`Windows.streams`), so that a
               small batch sees fewer parts of the data.

A window that begins with a document starts empty, and so do all windows after a step without a finite gradient. Row r
of the batch has the same state however the batch is split among micro-batches and processes.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file

from mamba2.device import widen
from mamba2.distributed import World
from mamba2.files import save_tensors
from mamba2.initializers import seed_stream
from mamba2.mixer import MixerState
from mamba2.model import Mamba2LM

FILE = "states.safetensors"  # in a checkpoint


class InitialStates:
    """The states of this process's rows of the batch, after the last step."""

    def __init__(self, kind: str, model: Mamba2LM, batch: int, seed: int, world: World, device: torch.device):
        """`kind`: noise, passed or continued; `batch`: rows of all processes. Raises ValueError for a model with
        attention, whose state grows with every window."""
        if model.config.attn_layer_idx:
            raise ValueError(f"--initial-state {kind} is for states of a fixed size, and the model has attention")
        self.kind, self.seed, self.world = kind, seed, world
        self.rows = -(-batch // world.size)
        self.mine = len(range(world.rank, batch, world.size))
        with torch.device("meta"):
            shapes = Mamba2LM(model.config).new_state(self.rows)
        self.ended = [MixerState(*(torch.zeros_like(part, device=device) for part in layer)) for layer in shapes]

    def clear(self) -> None:
        """Make all states empty."""
        for layer in self.ended:
            layer.conv.zero_()
            layer.ssm.zero_()

    def begin(self, step: int, empty: list[bool]) -> None:
        """Prepare for the windows of a step. `empty`: which rows of the whole batch start with an empty state."""
        if self.kind == "noise":
            self._draw(step)
        mine = self.world.share(empty)
        kept = ~torch.tensor(mine + [True] * (self.rows - len(mine)), device=self.ended[0].ssm.device)
        for layer in self.ended:
            for part in layer:
                part.mul_(kept.view(-1, *[1] * (part.dim() - 1)))

    def _draw(self, step: int) -> None:
        # A row that this process has only to be as many as the others is not part of the batch.
        squares = torch.stack([widen(layer.ssm[: self.mine]).square().sum((0, 2, 3)) for layer in self.ended])
        counts = self.mine * self.ended[0].ssm[0, 0].numel()
        total, count = self.world.sum(squares), self.world.sum(torch.tensor(float(counts)))
        size = (total / count.to(total.device)).sqrt().float()  # (L, h)
        for row in range(self.mine):
            generator = seed_stream(self.seed, f"initial state {step} {self.world.rank + row * self.world.size}")
            for layer, of_heads in zip(self.ended, size):
                noise = torch.randn(layer.ssm.shape[1:], generator=generator)
                layer.ssm[row] = noise.to(layer.ssm.device) * of_heads[:, None, None]
        for layer in self.ended:
            layer.conv.zero_()

    def take(self, rows: slice) -> list[MixerState]:
        """What these rows start from."""
        return [layer.rows(rows) for layer in self.ended]

    def put(self, rows: slice, states: list[MixerState]) -> None:
        """Keep what these rows ended with."""
        for layer, state in zip(self.ended, states):
            layer.conv[rows], layer.ssm[rows] = state.conv.detach(), state.ssm.detach()

    # ------------------------------------------------------------------------------------------------------ checkpoints

    def save(self, folder: Path) -> None:
        """Write the rows of all processes into a checkpoint; every process must call this."""
        mine = {
            f"{i}.{name}": part[: self.mine].cpu()
            for i, layer in enumerate(self.ended)
            for name, part in zip(layer._fields, layer)
        }
        of_ranks = self.world.gather(mine)

        def write() -> None:
            batch = sum(len(of_rank["0.ssm"]) for of_rank in of_ranks)
            whole = {name: part.new_empty(batch, *part.shape[1:]) for name, part in of_ranks[0].items()}
            for rank, of_rank in enumerate(of_ranks):
                for name, part in of_rank.items():
                    whole[name][rank :: self.world.size] = part
            save_tensors(folder / FILE, whole)

        self.world.first(write)

    def load(self, folder: Path) -> None:
        """Read this process's rows from a checkpoint."""
        whole = load_file(folder / FILE)
        for i, layer in enumerate(self.ended):
            for name, part in zip(layer._fields, layer):
                part[: self.mine] = whole[f"{i}.{name}"][self.world.rank :: self.world.size].to(part.device)
