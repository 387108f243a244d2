"""The model against transformers' Mamba2ForCausalLM, and the promises that training and evaluation rest on."""

import itertools
from collections import Counter

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Mamba2Config as TheirConfig
from transformers import Mamba2ForCausalLM

from mamba2 import mixer as mixer_module
from mamba2.config import Mamba2Config
from mamba2.initializers import INITIALIZERS, DtParams, dt_bias_sha256
from mamba2.model import Mamba2LM, num_parameters
from mamba2.ops.ssd import op as ssd_op
from tests.ops import kernel_checks as checks

STUDY = "configs/config.json"
IDS = torch.arange(80).view(2, 40) % 61
NEXT = IDS.roll(-1, dims=1)


class CountedOps(TorchDispatchMode):
    """How often each operation really runs while this is entered; those inside of custom operations do not count."""

    def __init__(self):
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def small_config(**changes) -> Mamba2Config:
    values = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 3, "expand": 2, "head_dim": 8, "num_heads": 8}
    values |= {"n_groups": 2, "state_size": 14, "chunk_size": 16}
    values |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    return Mamba2Config(**{**values, **changes})


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.fixture(scope="module")
def study_pair(tmp_path_factory):
    """Our model of the study, and the same in transformers, read from the folder that ours wrote."""
    folder = tmp_path_factory.mktemp("study")
    ours = Mamba2LM(Mamba2Config.from_json(STUDY), seed=1)
    ours.save_pretrained(folder)
    return ours, Mamba2ForCausalLM.from_pretrained(folder)


def compare_with_transformers(ours, theirs, length: int) -> None:
    ids = torch.randint(0, ours.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(length))
    with torch.no_grad():
        assert relative_error(ours(ids), theirs(ids).logits) < 1e-4
    if length == 1:
        return
    ours.zero_grad()
    theirs.zero_grad()
    loss = ours(ids[:, :-1], ids[:, 1:]) / ids[:, 1:].numel()
    expected = theirs(ids, labels=ids).loss
    assert abs(loss.item() - expected.item()) < 1e-4 * expected.item()
    loss.backward()
    expected.backward()
    gradients = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert relative_error(parameter.grad, gradients[name].grad) < 1e-4, name


@pytest.mark.parametrize("length", [1, 17, pytest.param(257, marks=pytest.mark.slow)])
def test_the_study_model_equals_transformers(study_pair, length):
    """257 tokens are two chunks, the last of one token."""
    compare_with_transformers(*study_pair, length)


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"n_groups": 8}])
def test_a_model_saved_by_transformers_opens_here(tmp_path, changes):
    """Of 8 groups each is normalised by itself: a norm over all channels would differ visibly."""
    small_config(**changes).save(tmp_path)
    theirs = Mamba2ForCausalLM(TheirConfig.from_pretrained(tmp_path))
    theirs.save_pretrained(tmp_path)
    ours = Mamba2LM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert relative_error(ours(IDS), theirs(IDS).logits) < 1e-5


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"use_bias": True}, {"use_conv_bias": False}])
def test_saving_and_loading_changes_no_bit(tmp_path, changes):
    model = Mamba2LM(small_config(**changes), seed=3, initialization="halflife")
    loaded = Mamba2LM.from_pretrained(model.save_pretrained(tmp_path))
    assert loaded.config == model.config
    for (name, expected), (_, actual) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert torch.equal(actual, expected), name
    assert sum(p.numel() for p in loaded.parameters()) == num_parameters(model.config)


def test_dt_bias_survives_a_round_trip_through_transformers(tmp_path):
    model = Mamba2LM(small_config(), seed=3, initialization="linear_decay")
    theirs = Mamba2ForCausalLM.from_pretrained(model.save_pretrained(tmp_path / "ours"))
    theirs.save_pretrained(tmp_path / "theirs")
    back = Mamba2LM.from_pretrained(tmp_path / "theirs")
    assert torch.equal(back.dt_bias(), model.dt_bias())
    assert back.config.dt_bias_init == model.config.dt_bias_init
    assert dt_bias_sha256(back.dt_bias()) == back.config.dt_bias_init["sha256"]


@pytest.mark.parametrize("scheme", ["transformers", "mamba_ssm"])
def test_for_one_seed_only_dt_bias_differs_between_initialisations(scheme):
    config = small_config().with_weight_init(scheme)
    baseline = Mamba2LM(config, seed=5, initialization="log_uniform").state_dict()
    parameters = DtParams(length=64.0, eigenvalue=4.0)
    for name in INITIALIZERS["dt_bias"]:
        for key, tensor in Mamba2LM(config, 5, name, parameters).state_dict().items():
            same = torch.equal(tensor, baseline[key])
            assert same == (not key.endswith("dt_bias") or name == "log_uniform"), (name, key)
    other = Mamba2LM(config, seed=6).state_dict()
    assert not torch.equal(other["lm_head.weight"], baseline["lm_head.weight"])


def test_models_do_not_touch_the_global_generator():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    Mamba2LM(small_config())
    assert torch.equal(torch.rand(1), expected)


def test_weights_follow_the_named_scheme():
    transformers_like = Mamba2LM(Mamba2Config.from_json("configs/tiny.json"), seed=0)
    mixer = transformers_like.backbone.layers[1].mixer
    assert transformers_like.backbone.embeddings.weight.std().item() == pytest.approx(0.1, rel=0.02)
    assert mixer.in_proj.weight.abs().max().item() == pytest.approx(192**-0.5, rel=0.01)
    assert mixer.conv1d.weight.abs().max().item() == pytest.approx(0.5, rel=0.01)
    assert torch.allclose(mixer.A_log.exp(), torch.arange(1.0, 13.0))
    mamba_like = Mamba2LM(transformers_like.config.with_weight_init("mamba_ssm"), seed=0)
    mixer = mamba_like.backbone.layers[1].mixer
    assert mamba_like.backbone.embeddings.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert mixer.out_proj.weight.abs().max().item() == pytest.approx((384 * 4) ** -0.5, rel=0.01)
    assert mixer.A_log.exp().min() >= 1 and mixer.A_log.exp().max() <= 16


@pytest.mark.parametrize("n_groups", [1, 2, 8])
def test_training_and_evaluation_run_the_same_network(n_groups):
    model = Mamba2LM(small_config(n_groups=n_groups))
    with torch.no_grad():
        assert torch.equal(model.train()(IDS), model.eval()(IDS))


@pytest.mark.parametrize("cut", [1, 3, 16, 24])
def test_a_carried_state_continues_the_sequence(cut):
    model = Mamba2LM(small_config()).double()
    with torch.no_grad():
        whole = model(IDS)
        first, state = model(IDS[:, :cut], return_state=True)
        second = model(IDS[:, cut:], state=state)
    # the state and dt are carried in float64 here, so only the order of sums differs
    assert relative_error(torch.cat([first, second], dim=1), whole) < 1e-6


def test_document_resets_equal_documents_run_one_by_one():
    model = Mamba2LM(small_config()).double()
    ids = torch.arange(45).view(1, 45)
    seq_idx = torch.tensor([[0] * 2 + [1] * 20 + [2] * 1 + [0] * 22])
    with torch.no_grad():
        together = model(ids, seq_idx=seq_idx)
        apart = torch.cat([model(part) for part in ids.split([2, 20, 1, 22], dim=1)], dim=1)
    assert relative_error(together, apart) < 1e-6


def check_documents_by_cu_seqlens(config: Mamba2Config, dtype: torch.dtype) -> None:
    """Loss, losses and gradients of documents in one row equal those of each alone, and from the state after each one,
    also after an empty one, decoding goes on as if there had been no other."""
    model = Mamba2LM(config).double()
    ids = torch.randint(61, (1, 105), generator=torch.Generator().manual_seed(0))
    targets, cu_seqlens = ids.roll(-1, dims=1), checks.cu_seqlens(dtype).cpu()
    targets[:, ::5] = -100
    parts = [slice(start, stop) for start, stop in itertools.pairwise(cu_seqlens.tolist())]
    losses = [model(ids[:, part], targets[:, part]) for part in parts if part.start < part.stop]
    gradients = torch.autograd.grad(sum(losses), list(model.parameters()))
    loss = model(ids, targets, cu_seqlens=cu_seqlens)
    with_state, state = model(ids, targets, return_state=True, cu_seqlens=cu_seqlens)
    each, _ = model.token_losses(ids, targets, cu_seqlens=cu_seqlens)
    for value in (loss, with_state):
        assert value.item() == pytest.approx(sum(losses).item(), rel=1e-6)
        for actual, expected in zip(torch.autograd.grad(value, list(model.parameters())), gradients, strict=True):
            assert relative_error(actual, expected) < 1e-6
    assert each[:, parts[2]].sum().item() == pytest.approx(losses[2].item(), rel=1e-6)
    following = torch.arange(len(parts))
    assert {len(layer.conv) for layer in state} == {len(parts)}
    logits, _ = model.step(following, [layer.detach() for layer in state])
    for part, token, actual in zip(parts, following, logits, strict=True):
        assert relative_error(actual, model(torch.cat([ids[:, part], token.view(1, 1)], dim=1))[0, -1]) < 1e-6
    for name, value in (("state", model.new_state(1)), ("seq_idx", torch.zeros_like(ids))):
        with pytest.raises(ValueError, match=f"^{name} does not go with cu_seqlens"):
            model(ids, cu_seqlens=cu_seqlens, **{name: value})


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_documents_by_cu_seqlens_equal_documents_run_one_by_one(dtype):
    check_documents_by_cu_seqlens(small_config(), dtype)


def test_the_loss_is_the_cross_entropy_of_the_logits():
    model = Mamba2LM(small_config()).double()
    targets = NEXT.clone()
    targets[:, ::7] = -100
    logits = model(IDS)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    assert model(IDS, targets).item() == pytest.approx(expected.item(), rel=1e-12)
    losses, _ = model.token_losses(IDS, targets)
    assert losses.sum().item() == pytest.approx(expected.item(), rel=1e-12)
    assert (losses[targets == -100] == 0).all()


def gradients_and_calls(dtype: torch.dtype = torch.float32, every: int = 0, lean: bool = False, **changes):
    """Of one backward pass: the gradients, how often each operation ran, and how often each layer's in_proj did."""
    model, calls = Mamba2LM(small_config(**changes)), []
    model.backbone.checkpoint_every = every
    for layer in model.backbone.layers:
        layer.keep_products_only = lean
        layer.mixer.in_proj.register_forward_hook(lambda *_: calls.append(1))
    with CountedOps() as ops:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(IDS, NEXT)
        loss.backward()
    return [p.grad for p in model.parameters()], ops.counts, len(calls)


@pytest.mark.parametrize("every", [1, 2])
def test_activation_checkpointing_changes_no_gradient_and_recomputes(every):
    (expected, _, once), (gradients, _, calls) = gradients_and_calls(), gradients_and_calls(every=every)
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))
    assert (once, calls) == (3, 3 + len(range(0, 3, every)))


@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keeping_products_only_changes_no_gradient_and_makes_no_product_again(use_bias, dtype):
    (expected, plain, _), (gradients, counts, _) = (
        gradients_and_calls(dtype, lean=lean, use_bias=use_bias) for lean in (False, True)
    )
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))
    again = {name: counts[name] - plain[name] for name in plain if "mm" in name or "mamba2" in name}
    cheap = {f"mamba2.{op}_blocked.default" for op in ("causal_conv1d", "rms_norm", "gated_rms_norm")}
    assert again == {name: 3 * (name in cheap) for name in again}
    assert plain["mamba2.ssd_blocked_forward.default"] == 3 and plain["aten.mm.default"] > 3


def test_autocast_keeps_the_stream_the_state_and_the_loss_in_float32():
    model = Mamba2LM(small_config())
    expected = model(IDS, NEXT)
    with torch.autocast("cpu", torch.bfloat16):
        loss, state = model(IDS, NEXT, return_state=True)
        hidden, _ = model.backbone(IDS)
    assert loss.dtype == torch.float32 and hidden.dtype == torch.bfloat16
    assert all(layer.ssm.dtype == torch.float32 for layer in state)
    assert loss.item() == pytest.approx(expected.item(), rel=0.01)
    loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("return_state", [False, True])
def test_only_a_state_that_is_asked_for_is_made(monkeypatch, return_state):
    model, asked = Mamba2LM(small_config()), []

    def watch(op, name):
        return lambda *args, **kwargs: asked.append(kwargs[name]) or op(*args, **kwargs)

    for op, name in (("ssd", "return_final_states"), ("causal_conv1d", "return_final_state")):
        monkeypatch.setattr(mixer_module, op, watch(getattr(mixer_module, op), name))
    result = model(IDS, return_state=return_state)
    assert asked == [return_state] * 2 * len(model.backbone.layers)
    logits = result[0] if return_state else result
    assert torch.equal(logits, model(IDS, return_state=not return_state)[0 if not return_state else ...])


def test_the_record_names_the_range_that_was_used():
    model = Mamba2LM(small_config(), seed=9, initialization="linear_decay", dt_parameters=DtParams(0.01, 0.02))
    assert (model.config.time_step_min, model.config.time_step_max) == (0.01, 0.02)
    record = model.config.dt_bias_init
    assert (record["name"], record["seed"], record["t_min"], record["t_max"]) == ("linear_decay", 9, 0.01, 0.02)
    dt = torch.nn.functional.softplus(model.dt_bias().double())
    assert torch.allclose(dt[0], torch.tensor(0.01).double()) and torch.allclose(dt[-1], torch.tensor(0.02).double())


def test_a_time_step_limit_reaches_the_computation():
    model, free = Mamba2LM(small_config(time_step_limit=(0.02, 0.05))), Mamba2LM(small_config())
    with torch.no_grad():
        assert relative_error(model(IDS), free(IDS)) > 1e-3


def test_a_forward_pass_on_a_gpu_mixes_no_devices_and_waits_for_nothing(monkeypatch):
    """On tensors that only say that they are on one: reading a value raises, and so do operands on two devices."""
    monkeypatch.setattr(ssd_op, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(ssd_op, "target_of", lambda device: "sm_90")
    model = Mamba2LM(small_config())
    with torch.no_grad(), FakeTensorMode():
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(torch.empty(parameter.shape, device="cuda"))
        ids, seq_idx = (torch.zeros(2, 300, dtype=kind, device="cuda") for kind in (torch.int64, torch.int32))
        results = [model(ids), model(ids, ids, seq_idx=seq_idx), model.token_losses(ids, ids, seq_idx)[0]]
        cu_seqlens = torch.zeros(5, dtype=torch.int32, device="cuda")
        results += model(ids.narrow(0, 0, 1), return_state=True, cu_seqlens=cu_seqlens)[1][0]
        assert all(result.device.type == "cuda" for result in results)


@pytest.mark.parametrize("scale", [3e38, 1.2e-38])
def test_no_weight_that_is_not_normal_is_made(scale):
    with pytest.raises(ValueError, match=r"backbone.embeddings.weight would hold .*, and float32 holds numbers from"):
        Mamba2LM(small_config(initializer_range=scale))


def test_an_id_or_target_outside_the_vocabulary_is_named(monkeypatch):
    model = Mamba2LM(small_config())
    good = torch.tensor([[1, 2, 60], [3, -100, 0]])
    _, state = model.prefill(good[:1])
    for wrong in (61, -1, 10**12):
        bad = torch.tensor([[1, 2, wrong], [3, 4, 0]])
        for call in (model, model.prefill, lambda ids: model.token_losses(ids, good)):
            with pytest.raises(ValueError, match=f"the id {wrong} is outside the model's vocabulary of 61"):
                call(bad)
        with pytest.raises(ValueError, match=f"the id {wrong} is outside"):
            model.step(bad[0, 2:], state)
        for backend in ("torch", "reference"):
            monkeypatch.setenv("MAMBA2_BACKEND", backend)
            for function in (model, model.token_losses):
                with pytest.raises(ValueError, match=f"the target {wrong} is outside the vocabulary of 61"):
                    function(good.clamp(0), bad)
                function(good.clamp(0), good)
        monkeypatch.delenv("MAMBA2_BACKEND")
    for ids in (good.clamp(0).double(), good > 1):
        with pytest.raises(ValueError, match="ids must be integers, not torch"):
            model(ids)
        with pytest.raises(ValueError, match="targets must be int64, not torch"):
            model(good.clamp(0), ids)
