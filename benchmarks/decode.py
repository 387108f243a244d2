"""What a token costs when text is generated with the study's model, beside transformers' `generate`.

    python -m benchmarks.decode            # the table: some minutes on two cores
    python -m benchmarks.decode --quick    # fewer tokens, positions up to 4096

Greedy, one sequence, random ids. A token cannot take less time than reading all weights but the embedding table once:
"bound" is that, at the best bandwidth of sums over 400 MB, taken around every row, because on a shared machine
one sample may have had one core where a row had two. A row above its bound shows that all samples were disturbed, and
ends the program. Decoding is the best of some runs of 20 tokens after a prompt, without the prompt; transformers' (with
its cache, the default) is the difference between two calls of `generate`. Prefill is the best of three; both
keep the state and compute the logits of the last token alone. Each row runs in a process of its own, whose largest
resident memory is shown.
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
from mamba2.decoder import Decoder
from mamba2.host_memory import keep_freed_memory
from mamba2.model import Mamba2LM

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


def measure_bandwidth() -> dict:
    """Bytes read per second."""
    numbers = torch.ones(100_000_000)
    return {"bandwidth": numbers.nbytes / best(numbers.sum, 20)}


def measure_ours(dtype: str, position: int, runs: int) -> dict:
    """Read `position` tokens, then decode."""
    keep_freed_memory()  # as mamba2.generate does
    torch.manual_seed(0)
    model = Mamba2LM(Mamba2Config.from_json(CONFIG)).to(getattr(torch, dtype))
    ids = torch.randint(model.config.vocab_size, (1, position))
    _, state = model.prefill(ids)
    seconds = best(lambda: model.prefill(ids), 3)
    decoder, drawn = Decoder(model, state), ids[:, -1]

    def run() -> None:
        nonlocal drawn
        for _ in range(RUN):
            drawn = decoder.step(drawn).argmax(dim=-1)

    run()
    before = memory()
    token = best(run, runs) / RUN
    state_bytes = sum(tensor.nbytes for layer in state for tensor in layer)
    grown = memory() - before
    return {"token": token, "prefill": seconds, "memory": memory(), "grown": grown, "state": state_bytes}


def measure_transformers(tokens: int) -> dict:
    """`generate` after a short prompt, and one pass over a long one."""
    from transformers import Mamba2Config as TheirConfig
    from transformers import Mamba2ForCausalLM

    torch.manual_seed(0)
    model = Mamba2ForCausalLM(TheirConfig.from_pretrained(CONFIG)).eval()
    ids = torch.randint(model.config.vocab_size, (1, PROMPT))
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        few, many = (
            best(lambda n=n: model.generate(ids[:, :8], max_new_tokens=n, **options), 2) for n in (2, 2 + tokens)
        )
        prefill = best(lambda: model(ids, use_cache=True, logits_to_keep=1), 3)
    return {"token": (many - few) / tokens, "prefill": prefill, "memory": memory()}


WORKERS = {"bandwidth": measure_bandwidth, "ours": measure_ours, "transformers": measure_transformers}


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
    read = config.num_parameters() - config.vocab_size * config.hidden_size
    positions = (64, PROMPT, 4096) if args.quick else (64, PROMPT, 4096, 16384)
    bandwidth = in_a_process("bandwidth")["bandwidth"]
    rows = []
    for title, dtype, worker, position, arguments in [
        ("transformers, float32", "float32", "transformers", 8, (8 if args.quick else 24,)),
        *(
            (f"mamba2, {dtype}", dtype, "ours", position, (dtype, position, 10 if args.quick else 50))
            for dtype in ("float32", "bfloat16")
            for position in positions
        ),
    ]:
        rows.append((title, dtype, position, in_a_process(worker, *arguments)))
        bandwidth = max(bandwidth, in_a_process("bandwidth")["bandwidth"])

    print(machine(torch.device("cpu")))
    print(f"reading memory: {bandwidth / 1e9:.1f} GB/s; {read:,} weights read per token\n")
    columns = f"{'position':>9}{'tokens/s':>10}{'ratio':>8}{'of bound':>10}{'prefill tokens/s':>18}{'ratio':>8}"
    print(f"{'':24}{columns}{'memory':>10}{'grown':>9}")
    theirs = rows[0][3]
    for title, dtype, position, result in rows:
        share = read * getattr(torch, dtype).itemsize / bandwidth / result["token"]
        if share > 1:
            sys.exit(
                f"{title} at {position}: {share:.0%} of the bound, so the bandwidth was measured beside other work"
            )
        prompt = PROMPT if "grown" not in result else position
        compared = f"{theirs['prefill'] / result['prefill']:.1f}x" if prompt == PROMPT else ""
        grown = f"{result['grown'] / 1e6:6.1f} MB" if "grown" in result else ""
        print(
            f"{title:24}{position:9}{1 / result['token']:10.1f}{theirs['token'] / result['token']:7.1f}x{share:10.0%}"
            f"{prompt / result['prefill']:18,.0f}{compared:>8}{result['memory'] / 1e9:7.2f} GB{grown}"
        )
    print(f"\nstate of one sequence: {rows[-1][3]['state']:,} bytes, at any position; grown: while decoding")


if __name__ == "__main__":
    main()
