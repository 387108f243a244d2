"""State as a value: prefill and step give what one forward pass gives, whatever the options, lengths and pieces."""

import contextlib
import gc
import os
import subprocess
import sys
import weakref
from unittest import mock

import pytest
import torch
from torch._inductor import config
from torch._inductor.utils import run_and_get_code

from benchmarks.gpu.stand_in import pretend_gpu
from mamba2.decoding import GraphDecoder, PlainDecoder, make_decoder
from mamba2.decoding.compiled import CompiledDecoder
from mamba2.model import Mamba2LM
from tests.ops.kernel_checks import DEVICE
from tests.test_model import relative_error, small_config

OPTIONS = [
    {},
    *({"n_groups": groups} for groups in (1, 8)),
    *({"conv_kernel": kernel} for kernel in (1, 2, 7)),
    *({key: True} for key in ("tie_word_embeddings", "use_bias")),
    *({key: False} for key in ("use_conv_bias", "residual_in_fp32")),
    {"time_step_limit": (0.01, 0.05)},
    {"expand": 3, "num_heads": 4, "head_dim": 24},
    {"chunk_size": 5, "layer_norm_epsilon": 0.1},
    {"state_size": 1, "vocab_size": 67},
]


def make_model(seed: int = 1, **changes) -> Mamba2LM:
    """A model whose every parameter matters: D, norms and biases are drawn too."""
    model = Mamba2LM(small_config(**changes), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and "A_log" not in name:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def random_ids(model: Mamba2LM, *shape: int) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(3))


def full_pass(model: Mamba2LM, *shape: int) -> tuple[torch.Tensor, torch.Tensor, list]:
    """Random ids, their logits by one forward pass, and the state after it."""
    ids = random_ids(model, *shape)
    with torch.no_grad():
        return ids, *model(ids, return_state=True)


def copy(state: list) -> list:
    return [s.rows(slice(None)) for s in state]


def assert_same_state(actual: list, expected: list) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert a.shape == b.shape and (b.numel() == 0 or relative_error(a, b) < 1e-5)


def as_written(model: Mamba2LM, state: list) -> CompiledDecoder:
    """The step that would be compiled, not compiled."""
    with mock.patch("mamba2.decoding.compiled._compile", lambda decoder: CompiledDecoder._step):
        return CompiledDecoder(model, state)


@pytest.mark.parametrize("make", [PlainDecoder, as_written])
@pytest.mark.parametrize("changes", OPTIONS, ids=str)
def test_steps_after_a_prefill_equal_the_full_forward(changes, make):
    model = make_model(**changes)
    ids, expected, last = full_pass(model, 2, 28)
    for start in (1, 2, 17):
        logits, state = model.prefill(ids[:, :start])
        assert relative_error(logits, expected[:, start - 1]) < 1e-5
        decoder = make(model, state)
        for t in range(start, 28):
            assert relative_error(decoder.step(ids[:, t]), expected[:, t]) < 1e-5, t
        assert_same_state(decoder.state(), last)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_decode_too(dtype, batch):
    model = make_model().to(dtype)
    ids, expected, _ = full_pass(model, batch, 20)
    decoder = make_decoder(model, model.prefill(ids[:, :10])[1])
    tolerance = 1e-12 if dtype == torch.float64 else 2e-2
    for t in range(10, 20):
        logits = decoder.step(ids[:, t])
        assert logits.dtype == dtype and relative_error(logits, expected[:, t]) < tolerance
    assert decoder.state()[0].ssm.dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("batches", "changes"),
    [
        ([1, 3], {"n_groups": 8, "use_bias": True, "use_conv_bias": False, "tie_word_embeddings": True}),
        ([3], {"residual_in_fp32": False, "conv_kernel": 1, "state_size": 5, "time_step_limit": (0.01, 0.05)}),
    ],
    ids=str,
)
def test_compiled_steps_equal_the_full_forward(batches, changes):
    model = make_model(num_hidden_layers=2, vocab_size=67, **changes)
    for batch in batches:
        ids, expected, last = full_pass(model, batch, 20)
        _, state = model.prefill(ids[:, :9])
        before = copy(state)
        decoder = make_decoder(model, state, compiled=True)
        for t in range(9, 20):
            assert relative_error(decoder.step(ids[:, t]), expected[:, t]) < 1e-5, t
        assert_same_state(decoder.state(), last)
        assert_same_state(state, before)


def test_models_and_numbers_of_rows_that_take_turns_each_have_their_own_compiled_step():
    """What torch.compile would check at each call, and here does not, must not lead to another model's function."""
    kinds = [
        ({}, 1, torch.float32),
        ({}, 2, torch.float32),
        ({}, 1, torch.bfloat16),
        ({"use_bias": True}, 1, torch.float32),
    ]
    decoders = []
    for seed, (changes, batch, dtype) in enumerate([*kinds, kinds[0]]):
        model = make_model(seed=seed, num_hidden_layers=1, **changes).to(dtype)
        ids, expected, _ = full_pass(model, batch, 12)
        decoders.append((make_decoder(model, model.prefill(ids[:, :4])[1], compiled=True), ids, expected))
    for t in range(4, 12):
        for decoder, ids, expected in decoders:
            logits = decoder.step(ids[:, t])
            tolerance = 2e-2 if expected.dtype == torch.bfloat16 else 1e-5
            assert logits.dtype == torch.float32 and relative_error(logits, expected[:, t]) < tolerance


def test_a_compiled_step_of_one_row_is_one_function_without_calls():
    """Neither a matrix product nor a second kernel: what makes it worth compiling."""
    model = make_model(num_hidden_layers=2)
    ids, expected, _ = full_pass(model, 1, 20)
    decoder, (source,) = run_and_get_code(CompiledDecoder, model, model.prefill(ids[:, :4])[1])
    assert source.count("async_compile.cpp_pybinding(") == 1 and source.count("#pragma omp parallel") <= 1
    called = source[source.index("def call(") :]
    assert "extern_kernels." not in called and "torch.ops." not in called
    assert all(relative_error(decoder.step(ids[:, t]), expected[:, t]) < 1e-5 for t in range(4, 20))


def test_a_compiled_step_does_not_hold_on_to_its_model():
    model = make_model(num_hidden_layers=1)
    decoder = make_decoder(model, model.prefill(random_ids(model, 1, 4))[1], compiled=True)
    decoder.step(torch.tensor([3]))
    weight, state = weakref.ref(model.lm_head.weight), weakref.ref(decoder.layers[0].ssm)
    del model, decoder
    gc.collect()
    assert weight() is None and state() is None


@pytest.mark.parametrize("wrong", [torch.tensor([1, 2]), torch.tensor(1), torch.tensor([1.0])], ids=str)
def test_ids_that_a_compiled_step_was_not_made_for_are_refused(wrong):
    model = make_model(num_hidden_layers=1)
    decoder = as_written(model, model.prefill(random_ids(model, 1, 4))[1])
    with pytest.raises(ValueError, match=r"input_ids must be \(1,\) int64"):
        decoder.step(wrong)


def test_a_compiled_step_is_refused_where_another_form_has_to_serve(monkeypatch):
    model = make_model()
    _, state = model.prefill(random_ids(model, 1, 4))
    monkeypatch.setenv("MAMBA2_BACKEND", "reference")
    with pytest.raises(ValueError, match="on a processor, backend torch; here: backend reference"):
        make_decoder(model, state, compiled=True)
    monkeypatch.delenv("MAMBA2_BACKEND")
    for context, message in (
        (torch.autocast("cpu", torch.bfloat16), "here: autocast"),
        (config.patch({"cpp.cxx": (None, "no-such-compiler")}), r"needs a C\+\+ compiler"),
    ):
        with context, pytest.raises(ValueError, match=message):
            make_decoder(model, state, compiled=True)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_the_form_that_is_asked_for_serves(monkeypatch, backend):
    model = make_model(num_hidden_layers=2)
    ids, expected, _ = full_pass(model, 1, 8)
    _, state = model.prefill(ids[:, :6])
    monkeypatch.setenv("MAMBA2_BACKEND", backend)
    decoder = make_decoder(model, state)
    assert type(decoder) is PlainDecoder
    assert all(relative_error(decoder.step(ids[:, t]), expected[:, t]) < 1e-5 for t in range(6, 8))


@pytest.mark.parametrize("segment", [1, 2, 7, 64])
def test_a_prefill_in_pieces_equals_one_in_one_piece(segment):
    model = make_model()
    ids = random_ids(model, 2, 33)
    logits, state = model.prefill(ids)
    pieces, end = model.prefill(ids, segment=segment)
    assert relative_error(pieces, logits) < 1e-5
    assert_same_state(end, state)
    first = model.prefill(ids[:, :20])[1]
    before = copy(first)
    pieces, end = model.prefill(ids[:, 20:], state=first, segment=segment)
    assert relative_error(pieces, logits) < 1e-5
    assert_same_state(end, state)
    assert all(torch.equal(a, b) for s, t in zip(first, before) for a, b in zip(s, t))  # left as it was


def test_prompts_of_different_lengths_equal_each_by_itself():
    model = make_model()
    lengths = [5, 1, 12, 5, 2]
    ids, more = random_ids(model, 5, 12), random_ids(model, 5, 6)
    for row, length in enumerate(lengths):
        ids[row, length:] = 10**9  # is never looked at
    logits, state = model.prefill(ids, lengths)
    decoder = PlainDecoder(model, state)
    steps = torch.stack([logits, *(decoder.step(more[:, t]) for t in range(6))], dim=1)
    for row, length in enumerate(lengths):
        with torch.no_grad():
            expected = model(torch.cat([ids[row, :length], more[row]])[None])[0, length - 1 :]
        assert relative_error(steps[row], expected) < 1e-5


def test_rows_do_not_touch_each_other():
    """The same bits in row 0, whatever the other rows hold."""
    model = make_model()
    ids = random_ids(model, 3, 30)
    other = ids.clone()
    other[1:] = other[1:].flip(1)
    results = []
    for tokens in (ids, other):
        decoder = PlainDecoder(model, model.prefill(tokens[:, :10])[1])
        results.append(torch.stack([decoder.step(tokens[:, t])[0].clone() for t in range(10, 30)]))
    assert torch.equal(*results)


@pytest.mark.parametrize("length", [1000, pytest.param(10_300, marks=pytest.mark.slow)])
def test_ten_thousand_tokens_later_a_step_still_equals_the_forward(length):
    model = make_model(num_hidden_layers=1 if length == 1000 else 2)
    ids, expected, last = full_pass(model, 1, length)
    decoder = PlainDecoder(model, model.prefill(ids[:, :50])[1])
    assert max(relative_error(decoder.step(ids[:, t]), expected[:, t]) for t in range(50, length)) < 1e-5
    assert_same_state(decoder.state(), last)


def test_a_step_advances_the_state_it_is_given_and_a_decoder_its_own():
    model = make_model()
    ids = random_ids(model, 2, 5)
    _, state = model.prefill(ids[:, :4])
    before = copy(state)
    PlainDecoder(model, state).step(ids[:, 4])
    assert_same_state(state, before)
    _, same = model.step(ids[:, 4], state)
    assert same is state and not torch.equal(state[0].ssm, before[0].ssm)


def test_backpropagation_through_a_carried_state_equals_one_long_pass_and_detach_truncates_it():
    model = make_model()
    ids = random_ids(model, 2, 31)

    def gradients(truncate: bool) -> list[torch.Tensor]:
        model.zero_grad()
        state, loss = None, 0.0
        for start in (0, 10, 20):
            piece = slice(start, start + 10)
            more, state = model(ids[:, piece], ids[:, start + 1 : start + 11], state=state, return_state=True)
            loss = loss + more
            if truncate:
                more.backward()
                state = [s.detach() for s in state]
        if not truncate:
            loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    carried, truncated = gradients(False), gradients(True)
    model.zero_grad()
    model(ids[:, :-1], ids[:, 1:]).backward()
    for (name, parameter), a, b in zip(model.named_parameters(), carried, truncated, strict=True):
        assert relative_error(a, parameter.grad) < 1e-4, name
        if "mixer.in_proj" in name:
            assert relative_error(b, parameter.grad) > 1e-3, name


@pytest.mark.parametrize(
    ("ids", "lengths", "message"),
    [
        ([[1, 2, 61]], None, "the id 61 is outside the model's vocabulary of 61"),
        ([[1, -1, 2]], None, "the id -1 is outside"),
        ([[1, 2, 3]], [4], "lengths must be 1 numbers from 1 to 3"),
        ([[1, 2, 3]], [0], "lengths must be"),
        ([[1, 2, 3]], [1, 2], "lengths must be"),
        ([[]], None, "lengths must be"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(ids, lengths, message):
    with pytest.raises(ValueError, match=message):
        make_model().prefill(torch.tensor(ids, dtype=torch.int64), lengths)


ONE_KERNEL_FOR_ALL_STEPS = """
import os
import torch
from benchmarks.compilation import captured, specialize
from mamba2.model import Mamba2LM
from tests.test_model import small_config

os.environ["TRITON_INTERPRET"] = "1"  # after Triton was imported: lets tensors of a processor through, nothing runs
for dtype in (torch.float32, torch.bfloat16):
    model = Mamba2LM(small_config(num_hidden_layers=2)).to(dtype).eval()
    os.environ["MAMBA2_BACKEND"] = "torch"
    state, compiled = model.prefill(torch.ones(3, 1, dtype=torch.long))[1], set()
    os.environ["MAMBA2_BACKEND"] = "triton"
    for position in range(18):
        launches = captured(lambda: model.step(torch.full((3,), position), state))
        assert sum(kernel.fn.__name__ == "_step_kernel" for kernel, *_ in launches) == 2
        for kernel, args, kwargs in launches:
            _, specialization, options = specialize(kernel, args, kwargs, "sm_90")
            key = (kernel.fn.__name__, str(specialization), str(options))
            assert position == 0 or key in compiled, (position, key)
            compiled.add(key)
print(len(compiled), "kernels")
"""


def test_no_step_after_the_first_compiles_a_kernel():
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", ONE_KERNEL_FOR_ALL_STEPS]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "kernels" in result.stdout


@pytest.mark.parametrize("rows", [1, 3])
def test_a_cuda_graph_replays_what_steps_give(rows):
    """Where there is no GPU, a stand-in records what a capture would and runs it again on the same memory."""
    model = make_model().to(DEVICE)
    ids = random_ids(model, rows, 20).to(DEVICE)
    _, state = model.prefill(ids[:, :10])
    before = copy(state)
    with contextlib.nullcontext() if DEVICE == "cuda" else pretend_gpu(), torch.no_grad():
        decoder = GraphDecoder(model, state)
        assert_same_state(state, before)
        expected = copy(state)
        for i in range(10, 20):
            logits, expected = model.step(ids[:, i], expected)
            assert relative_error(decoder.step(ids[:, i]), logits) < 1e-5
        assert_same_state(decoder.state(), expected)


def test_a_step_that_waits_for_the_device_cannot_be_captured(monkeypatch):
    model = make_model()
    _, state = model.prefill(random_ids(model, 1, 5))
    plain = model.step
    monkeypatch.setattr(model, "step", lambda ids, state: ids.sum().item() and plain(ids, state))
    with pretend_gpu(), pytest.raises(RuntimeError, match="waits for the device"):
        GraphDecoder(model, state).step(random_ids(model, 1))
