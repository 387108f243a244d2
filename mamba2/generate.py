"""Generate text: read the prompt in one pass, then draw one token at a time with the state carried along.

    python -m mamba2.generate runs/tiny/trained/seed-42-uniform-final "def main"
    echo "def main" | python -m mamba2.generate MODEL --temperature 0.8 --top-p 0.95 --samples 3
    python -m mamba2.generate MODEL --interactive

Time and memory per token do not depend on the length of the text.
"""

import argparse
import codecs
import sys
from collections.abc import Iterator

import torch

from mamba2.checkpoint.hub import fetch
from mamba2.cli import run
from mamba2.decoding import make_decoder
from mamba2.decoding.sampling import Sampling
from mamba2.device import choose_device
from mamba2.host_memory import keep_freed_memory
from mamba2.model import Mamba2LM, State
from mamba2.tokenizer import Tokenizer, get_tokenizer, load_tokenizer


class NoDistribution(ValueError):
    """The model's logits are not finite, so that nothing can be drawn from them."""


class TokenStream:
    """An endless iterator that draws the next id of every row, (b,) int64.

    `last` is what was drawn last (None at first), and `state()` the state before it: a new stream from that state with
    `last` as its prompt continues the same text.
    """

    def __init__(
        self,
        model: Mamba2LM,
        input_ids: torch.Tensor,
        sampling: Sampling,
        generator: torch.Generator | None = None,
        lengths: list[int] | None = None,
        state: list[State] | None = None,
        samples: int = 1,
        compiled: bool = False,
    ):
        """Read the prompts; for the arguments see `generate`. Each prompt is read once and continued `samples` times:
        row i of what is drawn continues prompt i // samples. Raises NoDistribution."""
        self.sampling, self.generator, self.last = sampling, generator, None
        self.logits, state = model.prefill(input_ids, lengths, state)
        if not self.logits.isfinite().all():
            raise NoDistribution("the model gives logits that are not finite: nothing can be drawn from them")
        self.seen = None
        if sampling.repetition_penalty != 1.0:
            self.seen = torch.zeros_like(self.logits, dtype=torch.bool)
            for row, ids in enumerate(input_ids):
                self.seen[row, ids if lengths is None else ids[: lengths[row]]] = True
        if samples > 1:
            rows = [row for row in range(len(self.logits)) for _ in range(samples)]
            self.logits, state = self.logits[rows], [s.rows(rows) for s in state]
            self.seen = None if self.seen is None else self.seen[rows]
        self._decoder = make_decoder(model, state, compiled)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self

    @torch.no_grad()
    def __next__(self) -> torch.Tensor:
        if self.last is not None:
            self.logits = self._decoder.step(self.last)
        self.last = self.sampling.draw(self.logits, self.seen, self.generator)
        if self.seen is not None:
            self.seen.scatter_(1, self.last[:, None], True)
        return self.last

    def state(self) -> list[State]:
        """A copy of the state before `last`."""
        return self._decoder.state()


@torch.no_grad()
def generate(
    model: Mamba2LM,
    input_ids: torch.Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    *,
    lengths: list[int] | None = None,
    eos_token_id: int | None = None,
    compiled: bool = False,
    vocab_size: int | None = None,
    repetition_penalty: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> torch.Tensor:
    """Continue each row of `input_ids` (b, l) by `max_new_tokens` ids. Returns (b, l + max_new_tokens) int64.

    Arguments:
        temperature, vocab_size, repetition_penalty, top_k, top_p, min_p: see `mamba2.decoding.sampling.Sampling`;
            temperature 0 takes the most likely id.
        generator: on the model's device; None draws from torch's global one.
        lengths: the length of each row's prompt, if they differ. The new ids follow the prompt directly, and the rest
            of the row is filled with eos_token_id, or 0.
        eos_token_id: a row ends when it draws this id and is filled up with it.
        compiled: on a CPU, compile the step first (`mamba2.decoding.compiled`): 15 seconds, once.

    Raises ValueError naming an id outside the vocabulary or an option out of range, NoDistribution if the logits after
    the prompt are not finite.
    """
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be at least 0, not {max_new_tokens}")
    filters = Sampling(
        vocab_size=vocab_size,
        repetition_penalty=repetition_penalty,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
    )
    b, l = input_ids.shape
    fill = 0 if eos_token_id is None else eos_token_id
    result = input_ids.new_full((b, l + max_new_tokens), fill)
    ends = torch.tensor([l] * b if lengths is None else lengths, device=input_ids.device)
    in_prompt = torch.arange(l, device=input_ids.device) < ends[:, None]
    result[:, :l] = torch.where(in_prompt, input_ids, fill)
    if max_new_tokens == 0:
        return result
    ended = torch.zeros(b, dtype=torch.bool, device=input_ids.device)
    rows = torch.arange(b, device=input_ids.device)
    stream = TokenStream(model, input_ids, filters, generator, lengths, compiled=compiled)
    for count, ids in zip(range(max_new_tokens), stream):
        if eos_token_id is not None:
            ids = torch.where(ended, eos_token_id, ids)
            ended |= ids == eos_token_id
        result[rows, ends + count] = ids
        if eos_token_id is not None and ended.all():
            break
    return result


class TextStream:
    """Turns ids into text piece by piece, never splitting a character, until a stop string or the end of text."""

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = ()):
        self.tokenizer, self.stop = tokenizer, tuple(s for s in stop if s)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""  # may be the beginning of a stop string
        self.ended = False

    def push(self, token_id: int) -> str:
        """The text that can be shown now, "" after the end. Sets `ended` at the end of text or at a stop string, which
        is not shown."""
        if self.ended or token_id == self.tokenizer.eot_id:
            return self.finish()
        text = self._held + self._decoder.decode(self.tokenizer.decode_bytes([token_id]))
        found = [at for s in self.stop if (at := text.find(s)) >= 0]
        if found:
            self.ended = True
            return text[: min(found)]
        keep = max((k for s in self.stop for k in range(1, len(s)) if text.endswith(s[:k])), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """The text still held back, when no more ids will come. An incomplete character becomes U+FFFD."""
        if self.ended:
            return ""
        self.ended = True
        return self._held + self._decoder.decode(b"", final=True)


# ------------------------------------------------------------------------------------------------------ command line


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="model folder of any layout that is read, or OWNER/MODEL on the hub")
    parser.add_argument("prompt", nargs="?", help="text to continue; standard input when left out")
    parser.add_argument("--interactive", action="store_true", help="read prompts line by line; the state is carried on")
    parser.add_argument("--max-new-tokens", type=int, default=200, help="of each continuation [200]")
    parser.add_argument("--greedy", action="store_true", help="the most likely token each time: --temperature 0")
    parser.add_argument("--temperature", type=float, default=1.0, help="0: the most likely token each time [1]")
    parser.add_argument("--top-k", type=int, default=0, help="only the k most likely tokens; 0: all")
    parser.add_argument("--top-p", type=float, default=1.0, help="the fewest tokens whose probabilities sum to p")
    parser.add_argument("--min-p", type=float, default=0.0, help="only tokens p times as likely as the most likely")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1: against tokens seen before")
    parser.add_argument("--seed", type=int, default=None, help="draw the same text again; a new one when left out")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before TEXT; may be repeated")
    parser.add_argument("--samples", type=int, default=1, help="continuations, computed side by side")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights")
    what = "on a processor: compile first, a quarter of a minute, then write half as fast again"
    parser.add_argument("--compile", action="store_true", help=what)
    parser.add_argument("--device", default="auto", help="auto (the GPU that is there), cpu, cuda, mps or xpu [auto]")
    parser.add_argument("--tokenizer", default=None, help="name or tokenizer.json, for a model that carries none")
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.samples < 1 or args.max_new_tokens < 0:
        raise ValueError("--samples must be at least 1 and --max-new-tokens at least 0")
    if args.interactive and args.samples > 1:
        raise ValueError("--interactive carries one text on: --samples must be 1")
    keep_freed_memory()
    device = choose_device(args.device)
    folder = fetch(args.model)
    tokenizer = get_tokenizer(args.tokenizer) if args.tokenizer else load_tokenizer(folder)
    model = Mamba2LM.from_pretrained(folder, device, getattr(torch, args.dtype), finite=True).eval()
    sampling = Sampling(
        repetition_penalty=args.repetition_penalty,
        temperature=0.0 if args.greedy else args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        vocab_size=min(tokenizer.vocab_size, model.config.vocab_size),
    )
    generator = torch.Generator(device)
    if args.seed is None:
        generator.seed()
    else:
        generator.manual_seed(args.seed)
    if args.interactive:
        interact(model, tokenizer, sampling, generator, args)
        return
    prompt = sys.stdin.read() if args.prompt is None else args.prompt
    ids = torch.tensor([tokenizer.encode(prompt) or [tokenizer.eot_id]], device=device)
    stream = TokenStream(model, ids, sampling, generator, samples=args.samples, compiled=args.compile)
    if args.samples == 1:
        print_continuation(stream, tokenizer, prompt, args)
    else:
        for i, pieces in enumerate(zip(*text_pieces(stream, tokenizer, args.samples, args.max_new_tokens, args.stop))):
            print(f"--- sample {i + 1}\n{prompt}{''.join(pieces)}")


def text_pieces(
    stream: TokenStream, tokenizer: Tokenizer, rows: int, max_new_tokens: int, stop: tuple[str, ...]
) -> Iterator[list[str]]:
    """The text that each step adds to every row, up to `max_new_tokens` or until all rows have ended."""
    texts = [TextStream(tokenizer, stop) for _ in range(rows)]
    for _, drawn in zip(range(max_new_tokens), stream):
        yield [text.push(token_id) for text, token_id in zip(texts, drawn.tolist())]
        if all(text.ended for text in texts):
            break
    yield [text.finish() for text in texts]


def print_continuation(stream: TokenStream, tokenizer: Tokenizer, shown: str, args: argparse.Namespace) -> None:
    """Print `shown` and the text of a single row as it is drawn."""
    print(shown, end="", flush=True)
    for (piece,) in text_pieces(stream, tokenizer, args.samples, args.max_new_tokens, args.stop):
        print(piece, end="", flush=True)
    print(flush=True)


def interact(
    model: Mamba2LM, tokenizer: Tokenizer, sampling: Sampling, generator: torch.Generator, args: argparse.Namespace
) -> None:
    """Continue each line of the input, from the state after the text before it."""
    state, unread = None, [tokenizer.eot_id]
    print("a line of text to continue, /reset to forget all, end of input to leave", file=sys.stderr)
    while True:
        print("> ", end="", flush=True, file=sys.stderr)
        line = sys.stdin.readline()
        if not line:
            return
        line = line.rstrip("\n")
        if line == "/reset":
            state, unread = None, [tokenizer.eot_id]
            continue
        ids = torch.tensor([unread + tokenizer.encode(line)], device=model.lm_head.weight.device)
        stream = TokenStream(model, ids, sampling, generator, state=state, compiled=args.compile)
        print_continuation(stream, tokenizer, "", args)
        state, unread = stream.state(), [] if stream.last is None else stream.last.tolist()
        unread += tokenizer.encode("\n")


if __name__ == "__main__":
    run(main)
