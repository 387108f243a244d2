"""Time per generated token of the study's model, beside transformers' `generate`.

    python -m benchmarks.decode            # the table: some minutes on two cores
    python -m benchmarks.decode --quick    # fewer tokens, positions up to 4096

Greedy, one sequence, random ids. A token cannot take less time than reading all weights but the embedding table once:
"bound" is that, at the bandwidth of reading 400 MB (a sum, or a product with a vector, whichever is faster). The
bandwidth of a shared machine changes from minute to minute, so the two are timed in turns, a reading and 20 tokens, and
the best of each is taken. Decoding comes after a prompt, whose time does not count; transformers' (with its cache, the
default) is the difference between two calls of `generate`. Prefill is the best of three; both keep the state and
compute the logits of the last token alone. "compiled" rows decode by `mamba2.decoding.compiled`; the time to compile is
not in the table. Each row runs in a process of its own, whose largest resident memory is shown.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import torch

from benchmarks.train_step import CONFIG, machine
from mamba2.config import Mamba2Config
from mamba2.decoding import CompiledDecoder, PlainDecoder
from mamba2.decoding.sampling import Sampling
from mamba2.host_memory import keep_freed_memory
from mamba2.model import Mamba2LM, num_parameters

RUN = 20  # tokens timed together
PROMPT = 1024  # tokens of the prefill that is compared


def best(function: Callable[[], object], times: int) -> float:
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def memory() -> int:
    """Largest resident memory of this process so far, bytes; getrusage counts in kB on Linux."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Reading:
    """Reads 400 MB and keeps the best time so far."""

    def __init__(self):
        self.rows = torch.ones(torch.get_num_threads(), 100_000_000 // torch.get_num_threads() // 1000, 1000)
        self.vectors = torch.ones(len(self.rows), 1000, 1)
        self.seconds = float("inf")

    def __call__(self) -> None:
        for read in (self.rows.sum, lambda: torch.bmm(self.rows, self.vectors)):
            self.seconds = min(self.seconds, best(read, 1))

    def bandwidth(self) -> float:
        """Bytes per second."""
        return self.rows.nbytes / self.seconds


def measure_ours(dtype: str, position: int, runs: int, compiled: bool) -> dict:
    """Read `position` tokens, then decode."""
    keep_freed_memory()  # as mamba2.generate does
    torch.manual_seed(0)
    model = Mamba2LM(Mamba2Config.from_json(CONFIG)).to(getattr(torch, dtype))
    ids = torch.randint(model.config.vocab_size, (1, position))
    _, state = model.prefill(ids)
    seconds = best(lambda: model.prefill(ids), 3)
    decoder, drawn = (CompiledDecoder if compiled else PlainDecoder)(model, state), ids[:, -1]
    greedy = Sampling(temperature=0)

    def run() -> None:
        nonlocal drawn
        for _ in range(RUN):
            drawn = greedy.draw(decoder.step(drawn))

    run()
    before = memory()
    best(run, runs)
    largest, reading, token = memory(), Reading(), float("inf")
    for _ in range(runs):
        reading()
        token = min(token, best(run, 1) / RUN)
    return {
        "token": token,
        "bandwidth": reading.bandwidth(),
        "prefill": seconds,
        "memory": largest,
        "grown": largest - before,
        "state": sum(tensor.nbytes for layer in state for tensor in layer),
    }


def measure_transformers(tokens: int) -> dict:
    """`generate` after a short prompt, and one pass over a long one."""
    from transformers import Mamba2Config as TheirConfig
    from transformers import Mamba2ForCausalLM

    torch.manual_seed(0)
    model = Mamba2ForCausalLM(TheirConfig.from_pretrained(CONFIG)).eval()
    ids = torch.randint(model.config.vocab_size, (1, PROMPT))
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        prefill = best(lambda: model(ids, use_cache=True, logits_to_keep=1), 3)
        few = many = float("inf")
        model.generate(ids[:, :8], max_new_tokens=2, **options)
        largest, reading = memory(), Reading()
        for _ in range(2):
            reading()
            few = min(few, best(lambda: model.generate(ids[:, :8], max_new_tokens=2, **options), 1))
            many = min(many, best(lambda: model.generate(ids[:, :8], max_new_tokens=2 + tokens, **options), 1))
    token = (many - few) / tokens
    return {"token": token, "bandwidth": reading.bandwidth(), "prefill": prefill, "memory": largest}


WORKERS = {"ours": measure_ours, "transformers": measure_transformers}


def in_a_process(name: str, *arguments: object) -> dict:
    command = [sys.executable, "-m", "benchmarks.decode", "--worker", name, json.dumps(arguments)]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer tokens, positions up to 4096")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        name, arguments = args.worker
        print(json.dumps(WORKERS[name](*json.loads(arguments))))
        return

    config = Mamba2Config.from_json(CONFIG)
    read = num_parameters(config) - config.vocab_size * config.hidden_size
    positions = (64, PROMPT, 4096) if args.quick else (64, PROMPT, 4096, 16384)
    rows = []
    for title, dtype, worker, position, arguments in [
        ("transformers, float32", "float32", "transformers", 8, (8 if args.quick else 24,)),
        *(
            (f"mamba2, {dtype}{title}", dtype, "ours", position, (dtype, position, 10 if args.quick else 50, compiled))
            for title, compiled in (("", False), (", compiled", True))
            for dtype in ("float32", "bfloat16")
            for position in positions
        ),
    ]:
        rows.append((title, dtype, position, in_a_process(worker, *arguments)))

    print(machine(torch.device("cpu")))
    print(f"{read:,} weights read per token\n")
    print(
        f"{'':27}{'position':>9}{'tokens/s':>10}{'ratio':>8}{'memory read':>14}{'of bound':>10}"
        f"{'prefill tokens/s':>18}{'ratio':>8}{'memory':>10}{'grown':>9}"
    )
    theirs = rows[0][3]
    for title, dtype, position, result in rows:
        share = read * getattr(torch, dtype).itemsize / result["bandwidth"] / result["token"]
        if share > 1:
            sys.exit(f"{title} at {position}: {share:.0%} of the bound: every reading was disturbed by other work")
        prompt = PROMPT if "grown" not in result else position
        compared = f"{theirs['prefill'] / result['prefill']:.1f}x" if prompt == PROMPT else ""
        grown = f"{result['grown'] / 1e6:6.1f} MB" if "grown" in result else ""
        print(
            f"{title:27}{position:9}{1 / result['token']:10.1f}{theirs['token'] / result['token']:7.1f}x"
            f"{result['bandwidth'] / 1e9:9.1f} GB/s{share:10.0%}"
            f"{prompt / result['prefill']:18,.0f}{compared:>8}{result['memory'] / 1e9:7.2f} GB{grown}"
        )
    print(f"\nstate of one sequence: {rows[-1][3]['state']:,} bytes, at any position; grown: while decoding")


if __name__ == "__main__":
    main()
