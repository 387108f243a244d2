"""A model of lm-evaluation-harness: every folder that `Mamba2LM.from_pretrained` opens, on the harness' tasks.

    python -m mamba2.evaluation --model mamba2 --model_args pretrained=FOLDER --tasks hellaswag --batch_size 16

is the harness' own command, which knows the model `mamba2` then; in Python pass `HarnessLM(FOLDER)` to its
`simple_evaluate`. Results are those of its model `hf` on the same folder, but a context is read once for all its
continuations, and the state goes on from there.
"""

import json
import sys
from typing import Any

import torch
import torch.nn.functional as F
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from mamba2.checkpoint.hub import fetch
from mamba2.decoding.sampling import Sampling
from mamba2.device import choose_device
from mamba2.evaluation.perplexity import cut, token_nats
from mamba2.generate import TokenStream, text_pieces
from mamba2.model import Mamba2LM
from mamba2.tokenizer import get_tokenizer, load_tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
LIMITS = ("max_gen_toks", "max_new_tokens")  # two names that tasks use for the same


class HarnessLM(TemplateLM):
    """Log-likelihoods and text of a Mamba2LM for the requests of lm-evaluation-harness."""

    def __init__(
        self,
        pretrained: str | None = None,
        tokenizer: str | None = None,
        dtype: str = "float32",
        device: str = "auto",
        batch_size: int | str = 1,
        max_length: int | str = 2048,
        max_gen_toks: int | str = 256,
        **unknown: object,
    ):
        """The arguments are those of `--model_args`.

        Arguments:
            pretrained: model folder, or OWNER/MODEL on the hub.
            tokenizer: name or tokenizer.json, for a folder that carries none.
            dtype: of the weights, float32 or bfloat16; device: see `choose_device`.
            batch_size: rows at a time, which changes results only by rounding.
            max_length: tokens of a window; what is longer loses its beginning, or under loglikelihood_rolling is cut
                into windows. 2048 as for `hf`, whose config of Mamba-2 names no length.
            max_gen_toks: tokens to generate for tasks that do not say how many.

        Raises ValueError naming what is unknown or out of range, and what loading raises.
        """
        super().__init__()
        if unknown:
            known = "pretrained, tokenizer, dtype, device, batch_size, max_length, max_gen_toks"
            raise ValueError(f"model_args: {', '.join(unknown)} is unknown; choose from {known}")
        if pretrained is None:
            raise ValueError("model_args: pretrained is missing: pretrained=FOLDER, or OWNER/MODEL on the hub")
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be {' or '.join(DTYPES)}, not {dtype}")
        self.rows_at_a_time = _whole("batch_size", batch_size)
        self.max_length = _whole("max_length", max_length)
        self.max_gen_toks = _whole("max_gen_toks", max_gen_toks)
        self._device = choose_device(device)
        folder = fetch(pretrained)
        self.tokenizer = get_tokenizer(tokenizer) if tokenizer else load_tokenizer(folder)
        self.model = Mamba2LM.from_pretrained(folder, self._device, DTYPES[dtype], finite=True).eval()
        if self.tokenizer.vocab_size > self.model.config.vocab_size:
            raise ValueError(
                f"tokenizer {self.tokenizer.name} has {self.tokenizer.vocab_size} ids and the model only "
                f"{self.model.config.vocab_size} rows"
            )

    @property
    def eot_token_id(self) -> int:
        """End-of-text, which also stands for an empty context."""
        return self.tokenizer.eot_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """Ids of a text. No tokenizer of this project puts special tokens around one, whatever is asked for."""
        return self.tokenizer.encode(string)

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **_: object
    ) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether each token is the most likely one) of the continuation of every request,
        (texts, ids of the context, ids of the continuation).

        Raises ValueError for a continuation of no tokens, or of more than max_length.
        """
        numbers: dict[tuple[int, ...], list[int]] = {}  # requests of each context
        shortened = 0
        for number, (texts, context, continuation) in enumerate(requests):
            if not 1 <= len(continuation) <= self.max_length:
                raise ValueError(
                    f"the continuation {texts[1]!r:.60} has {len(continuation)} tokens of its own, and must have "
                    f"from 1 to the max_length of {self.max_length}"
                )
            kept = context[-(self.max_length + 1 - len(continuation)) :]
            shortened += len(kept) < len(context)
            numbers.setdefault(tuple(kept), []).append(number)
        self._warn(shortened, len(requests))
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        with tqdm(total=len(requests), desc="loglikelihood", disable=disable_tqdm) as progress:
            for contexts in self._batches(list(numbers)):
                logits, state = self.model.prefill(self._tensor(contexts), [len(context) for context in contexts])
                places = {number: place for place, context in enumerate(contexts) for number in numbers[context]}
                for rows in self._batches(list(places), key=lambda number: requests[number][2]):
                    own = [places[row] for row in rows]
                    ids = self._tensor([requests[row][2] for row in rows])  # (rows, longest)
                    predicted = logits[own, None]  # (rows, 1, v)
                    if ids.shape[1] > 1:
                        hidden, _ = self.model.backbone(
                            ids[:, :-1], state=[layer.rows(own) for layer in state], return_state=False
                        )
                        predicted = torch.cat([predicted, F.linear(hidden, self.model.lm_head.weight)], dim=1)
                    log_p = predicted.float().log_softmax(dim=-1)  # (rows, longest, v)
                    lengths = torch.tensor([len(requests[row][2]) for row in rows], device=self._device)
                    beyond = torch.arange(ids.shape[1], device=self._device) >= lengths[:, None]
                    sums = log_p.gather(-1, ids[..., None])[..., 0].masked_fill(beyond, 0.0).sum(dim=1)
                    greedy = ((log_p.argmax(dim=-1) == ids) | beyond).all(dim=1)
                    for row, *result in zip(rows, sums.tolist(), greedy.tolist()):
                        results[row] = tuple(result)
                    progress.update(len(rows))
        return results

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood in nats of each whole text, by the protocol `lm_eval` of `mamba2.evaluation.perplexity`."""
        windows = [
            (number, ids, first)
            for number, request in enumerate(requests)
            for ids, first in cut(self.tok_encode(request.args[0]), "lm_eval", self.max_length, self.eot_token_id)
        ]
        results = [0.0] * len(requests)
        losses = token_nats(self.model, [ids for _, ids, _ in windows], self.max_length, self.rows_at_a_time)
        for k, nats in tqdm(losses, total=len(windows), desc="loglikelihood_rolling", disable=disable_tqdm):
            number, _, first = windows[k]
            results[number] -= float(nats[first - 1 :].sum(dtype="float64"))
        return results

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text that continues each context, up to a stop string, the end of text or a number of tokens.

        Understood in a request's generation_kwargs: until, max_gen_toks (or max_new_tokens), do_sample and the options
        of `Sampling`. As in transformers, they draw only if do_sample is true, or is not given and the temperature is
        above 0. Ids that the tokenizer does not know are never drawn. Raises ValueError naming anything else.
        """
        groups: dict[str, list[int]] = {}  # requests of the same options
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        results = [""] * len(requests)
        with tqdm(total=len(requests), desc="generate_until", disable=disable_tqdm) as progress:
            for key, numbers in groups.items():
                stop, new, sampling = self._options(json.loads(key))
                prompts = {n: self.tok_encode(requests[n].args[0]) or [self.eot_token_id] for n in numbers}
                self._warn(sum(len(ids) > self.max_length - new for ids in prompts.values()), len(numbers))
                prompts = {n: ids[new - self.max_length :] for n, ids in prompts.items()}
                for rows in self._batches(numbers, key=prompts.get):
                    lengths = [len(prompts[row]) for row in rows]
                    stream = TokenStream(
                        self.model, self._tensor([prompts[row] for row in rows]), sampling, lengths=lengths
                    )
                    pieces = text_pieces(stream, self.tokenizer, len(rows), new, stop)
                    for row, text in zip(rows, zip(*pieces)):
                        results[row] = "".join(text)
                    progress.update(len(rows))
        return results

    def _options(self, options: dict[str, Any]) -> tuple[tuple[str, ...], int, Sampling]:
        """(stop strings, number of tokens, how to draw) of a request's generation_kwargs."""
        unknown = options.keys() - {"until", "do_sample", *LIMITS, *SAMPLING}
        if unknown:
            known = ", ".join(("until", "do_sample", *LIMITS, *SAMPLING))
            raise ValueError(f"generation_kwargs: {', '.join(sorted(unknown))} is not understood; choose from {known}")
        until = options.get("until") or []
        limits = {_whole(name, options[name]) for name in LIMITS if options.get(name) is not None}
        new = limits.pop() if limits else self.max_gen_toks
        if limits or new >= self.max_length:
            raise ValueError(
                f"max_gen_toks must be one number below the max_length of {self.max_length}, not {new}"
                + "".join(f" and {other}" for other in limits)
            )
        drawn = {name: options[name] for name in SAMPLING if options.get(name) is not None}
        temperature = drawn.pop("temperature", 0.0)
        do_sample = options.get("do_sample")
        if do_sample and temperature == 0:
            raise ValueError("do_sample is true, and there is no temperature above 0 to draw with")
        temperature = 0.0 if do_sample is False else temperature
        sampling = Sampling(temperature=temperature, vocab_size=self.tokenizer.vocab_size, **drawn)
        return ((until,) if isinstance(until, str) else tuple(until)), new, sampling

    def _batches(self, items: list, key=lambda item: item) -> list[list]:
        """`items` by descending length of their key, so that those of similar length are read together."""
        ordered = sorted(items, key=lambda item: -len(key(item)))
        return [ordered[first : first + self.rows_at_a_time] for first in range(0, len(ordered), self.rows_at_a_time)]

    def _tensor(self, rows: list) -> torch.Tensor:
        """(b, longest) int64, filled up with zeros behind, on the model's device."""
        return pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(self._device)

    def _warn(self, shortened: int, total: int) -> None:
        if shortened:
            what = f"{shortened} of {total} contexts lose their beginning, to fit with what follows into max_length"
            print(f"warning: {what} {self.max_length}", file=sys.stderr, flush=True)


def _whole(name: str, value: int | str) -> int:
    """A number from 1 on, which the command line gives as text. Raises ValueError naming anything else."""
    if not str(value).isdecimal() or int(value) < 1:
        raise ValueError(f"{name} must be a whole number from 1 on, not {value}")
    return int(value)
