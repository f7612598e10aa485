"""Which parameter is updated how, and that a saved optimizer goes on as if it had never stopped."""

import io
from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from llama_lab.config.errors import ConfigError
from llama_lab.config.schema import AdamWConfig, ModelConfig, MuonConfig, OptimConfig, Precision, StateDtype
from llama_lab.model.llama import Llama
from llama_lab.training.moments import NarrowAdamW
from llama_lab.training.muon import StackedMuon
from llama_lab.training.optim import AdamW, Optimizers, build_optimizer

ADAMW: dict[str, Any] = {"max_lr": 0.01, "weight_decay": 0.1, "max_grad_norm": 1.0, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8}
CONFIGS = {"adamw": AdamWConfig(**ADAMW), "muon": MuonConfig(**ADAMW, momentum=0.9, adamw_max_lr=0.003)}
NARROW = {f"{name} bf16": replace(config, state_dtype=StateDtype.bf16) for name, config in CONFIGS.items()}


def small_llama(seed: int = 0) -> Llama:
    config = ModelConfig(
        dim=16,
        n_layers=2,
        n_heads=2,
        n_kv_heads=1,
        ffn_dim=24,
        multiple_of=8,
        rope_theta=10_000.0,
        norm_eps=1e-5,
        tie_embeddings=False,
        qk_norm=True,
        zero_init_outputs=False,
        dropout=0.0,
    )
    model = Llama(config, vocab_size=31, max_seq_len=8)
    model.initialise(torch.Generator().manual_seed(seed))
    return model


def backward(model: Llama, step: int) -> None:
    tokens = torch.randint(31, (2, 8), generator=torch.Generator().manual_seed(step)).to(model.embedding.weight.device)
    (model(tokens, tokens.roll(-1, 1)) / tokens.numel()).backward()


def train(model: Llama, optimizer, steps: range) -> None:
    for step in steps:
        backward(model, step)
        optimizer.set_lr_factor(1 / (1 + step))
        optimizer.step()
        optimizer.zero_grad()


def groups(model: Llama, optim: OptimConfig) -> dict[str, dict[str, Any]]:
    """Parameter name -> its group and the optimizer it belongs to."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {}
    for part, torch_optimizer in build_optimizer(model, optim, "cpu", Precision.fp32).parts.items():
        for group in torch_optimizer.param_groups:
            for parameter in group["params"]:
                assert names[parameter] not in found, "updated twice"
                found[names[parameter]] = {"part": part, "lr": group["lr"], "decay": group["weight_decay"]}
    assert list(found) != [] and found.keys() == set(names.values())
    return found


def test_adamw_decays_matrices_only():
    for name, group in groups(small_llama(), CONFIGS["adamw"]).items():
        assert group == {"part": "adamw", "lr": 0.01, "decay": 0.0 if "norm" in name else 0.1}, name


def test_muon_takes_the_matrices_inside_blocks_and_adamw_the_rest():
    for name, group in groups(small_llama(), CONFIGS["muon"]).items():
        if name.startswith("blocks.") and "norm" not in name:
            assert group == {"part": "muon", "lr": 0.01, "decay": 0.1}, name
        else:
            assert group == {"part": "adamw", "lr": 0.003, "decay": 0.0 if "norm" in name else 0.1}, name


@pytest.mark.parametrize("name", CONFIGS | NARROW)
def test_every_setting_reaches_its_optimizer(name: str):
    """None of these values is what torch takes by itself."""
    odd: dict[str, Any] = {"beta1": 0.7, "beta2": 0.8, "eps": 1e-3, "weight_decay": 0.3}
    odd |= {"momentum": 0.6} if "muon" in name else {}
    parts = build_optimizer(small_llama(), replace((CONFIGS | NARROW)[name], **odd), "cpu", Precision.fp32).parts
    matrices, vectors = parts["adamw"].param_groups
    assert {(group["betas"], group["eps"]) for group in (matrices, vectors)} == {((0.7, 0.8), 1e-3)}
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.3, 0.0)
    if "muon" in name:
        (hidden,) = parts["muon"].param_groups
        assert (hidden["momentum"], hidden["weight_decay"], hidden["nesterov"]) == (0.6, 0.3, True)


@pytest.mark.parametrize("precision", [Precision.bf16, Precision.fp32])
def test_muon_steps_are_those_of_torch_with_the_scale_of_adamw(precision: Precision):
    model, plain = small_llama(), small_llama()
    optimizer = build_optimizer(model, CONFIGS["muon"], "cpu", precision)
    matrices = {
        name: parameter for name, parameter in plain.named_parameters() if name.startswith("blocks.") and parameter.ndim == 2
    }
    reference = torch.optim.Muon(
        list(matrices.values()), lr=0.01, weight_decay=0.1, momentum=0.9, nesterov=True, ns_steps=5, adjust_lr_fn="match_rms_adamw"
    )
    for step in range(3):
        backward(model, step)
        optimizer.step()
        for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            theirs.grad = None if ours.grad is None else ours.grad.clone()
        optimizer.zero_grad()
        reference.step()
    ours = dict(model.named_parameters())
    before = small_llama()
    for name, theirs in matrices.items():
        # torch's iteration is in bf16, where another order of summation shows in the third digit and grows by steps.
        moved = theirs - before.get_parameter(name)
        assert (ours[name] - theirs).norm() < 0.1 * moved.norm(), name
    # A step has the root mean square of one of AdamW, about 0.2 of the learning rate, whatever the matrix's shape.
    for name in ("blocks.0.ffn.gate.weight", "blocks.0.attention.k.weight"):
        change = ours[name] - before.get_parameter(name)
        assert change.square().mean().sqrt().item() == pytest.approx(0.2 * 0.01 * 3, rel=0.5)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_factor_scales_every_peak_without_drift(name):
    optimizer = build_optimizer(small_llama(), CONFIGS[name], "cpu", Precision.fp32)
    peaks = [group["lr"] for part in optimizer.parts.values() for group in part.param_groups]
    for factor in (0.5, 0.1, 1.0, 0.3):
        optimizer.set_lr_factor(factor)
    rates = [group["lr"] for part in optimizer.parts.values() for group in part.param_groups]
    assert rates == [peak * 0.3 for peak in peaks]


@pytest.mark.parametrize("name", CONFIGS | NARROW)
def test_a_saved_optimizer_goes_on_bitwise(name):
    config = (CONFIGS | NARROW)[name]
    straight = small_llama()
    train(straight, build_optimizer(straight, config, "cpu", Precision.fp32), range(6))

    stopped = small_llama()
    optimizer = build_optimizer(stopped, config, "cpu", Precision.fp32)
    train(stopped, optimizer, range(3))
    file = io.BytesIO()
    torch.save({"model": stopped.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = small_llama(seed=1)
    resumed.load_state_dict(saved["model"])
    optimizer = build_optimizer(resumed, config, "cpu", Precision.fp32)
    optimizer.load_state_dict(saved["optimizer"])
    train(resumed, optimizer, range(3, 6))
    for one, other in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
    narrow = torch.bfloat16 if name in NARROW else torch.float32
    assert {dtype for part in optimizer.parts.values() for dtype in moments(part)} == {narrow}


def moments(optimizer: torch.optim.Optimizer) -> set[torch.dtype]:
    """In what an optimizer keeps what has the shape of a parameter."""
    return {value.dtype for state in optimizer.state.values() for name, value in state.items() if name != "step"}


@pytest.mark.parametrize("compiles", [False, pytest.param(True, marks=pytest.mark.gpu)])
def test_adamw_of_our_own_makes_the_steps_of_torch(compiles: bool):
    device = "cuda" if compiles else "cpu"
    model, plain = small_llama().to(device), small_llama().to(device)
    settings: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8}
    groups = [{"params": list(model.parameters()), "weight_decay": 0.1}]
    ours = NarrowAdamW(groups, dtype=torch.float32, compiles=compiles, **settings)
    reference = torch.optim.AdamW(plain.parameters(), weight_decay=0.1, **settings)
    for step in range(5):
        for rate in (*ours.param_groups, *reference.param_groups):
            rate["lr"] = 0.01 / (1 + step)
        backward(model, step)
        for own, other in zip(model.parameters(), plain.parameters(), strict=True):
            other.grad = None if own.grad is None else own.grad.clone()
        ours.step()
        reference.step()
        ours.zero_grad()
        for own, other in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("compiles", [False, pytest.param(True, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", NARROW)
def test_moments_in_bf16_move_weights_almost_as_before(name: str, compiles: bool):
    """And a step that is left out changes nothing at all."""
    device = "cuda" if compiles else "cpu"
    narrow, wide, start = (small_llama().to(device) for _ in range(3))
    optimizers = [
        build_optimizer(narrow, NARROW[name], device, Precision.fp32, compiles=compiles),
        build_optimizer(wide, CONFIGS[name.split()[0]], device, Precision.fp32, compiles=compiles),
    ]
    for step in range(6):
        backward(wide, step)
        for own, other in zip(narrow.parameters(), wide.parameters(), strict=True):
            own.grad = None if other.grad is None else other.grad.clone()
        for optimizer in optimizers:
            optimizer.step(unless=torch.tensor(False, device=device))
            optimizer.zero_grad()
    for (key, own), other, first in zip(narrow.named_parameters(), wide.parameters(), start.parameters(), strict=True):
        assert 0 < (own - other).norm() < 0.05 * (other - first).norm(), key
    before = [parameter.detach().clone() for parameter in narrow.parameters()]
    states = [value.clone() for part in optimizers[0].parts.values() for state in part.state.values() for value in state.values()]
    for parameter in narrow.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    for part in optimizers[0].parts.values():
        assert isinstance(part, NarrowAdamW | StackedMuon)
        part.step(unless=torch.tensor(True, device=device))
    assert all(torch.equal(*pair) for pair in zip(before, narrow.parameters(), strict=True))
    after = [value for part in optimizers[0].parts.values() for state in part.state.values() for value in state.values()]
    assert all(torch.equal(*pair) for pair in zip(states, after, strict=True))


@pytest.mark.parametrize("config", [*CONFIGS.values(), *NARROW.values()], ids=[*CONFIGS, *NARROW])
def test_what_plans_count_is_what_is_kept(config):
    model = small_llama()
    optimizer = build_optimizer(model, config, "cpu", Precision.fp32)
    train(model, optimizer, range(1))
    kept = [value for part in optimizer.parts.values() for state in part.state.values() for value in state.values()]
    found = sum(value.numel() * value.element_size() for value in kept if isinstance(value, torch.Tensor) and value.ndim)
    outside = 2 * model.embedding.weight.numel()
    inside = sum(parameter.numel() for parameter in model.parameters()) - outside
    assert found == pytest.approx(config.state_bytes(inside, outside), rel=0.03)


def test_an_optimizer_of_ones_own_takes_no_dtype_that_it_would_pass_over():
    assert "state_dtype" not in {item.name for item in fields(OptimConfig)}
    assert OptimConfig(max_lr=0.1, weight_decay=0.0, max_grad_norm=None).state_bytes(100, 10) == 880


@pytest.mark.parametrize("narrow", [False, True])
def test_counts_of_steps_are_loaded_to_where_the_weights_are(narrow: bool):
    """Of an optimizer that was not fused torch leaves them on the CPU."""
    saved = torch.nn.Parameter(torch.ones(3, 2))
    saved.grad = torch.ones_like(saved)
    before = torch.optim.AdamW([saved], fused=False)
    before.step()
    there = [torch.nn.Parameter(torch.ones(3, 2, device="meta"))]
    found = NarrowAdamW([{"params": there}], dtype=torch.bfloat16, compiles=False) if narrow else AdamW(there, fused=False)
    found.load_state_dict(before.state_dict())
    assert {state.device.type for state in found.state[there[0]].values()} == {"meta"}


def test_decays_that_bf16_could_not_follow_are_refused():
    slow = replace(NARROW["muon bf16"], beta2=0.999, momentum=0.995)
    assert [subject for subject, _ in slow.problems("optim")] == ["optim.beta2=0.999", "optim.momentum=0.995"]
    assert replace(slow, state_dtype=StateDtype.fp32).problems("optim") == []


def test_a_resumed_run_follows_its_own_config_rather_than_the_saved_one():
    model = small_llama()
    optimizer = build_optimizer(model, CONFIGS["adamw"], "cpu", Precision.fp32)
    train(model, optimizer, range(2))
    changed = build_optimizer(model, replace(CONFIGS["adamw"], max_lr=0.5, weight_decay=0.3), "cpu", Precision.fp32)
    changed.load_state_dict(optimizer.state_dict())
    changed.set_lr_factor(0.5)
    matrices, vectors = changed.parts["adamw"].param_groups
    assert (matrices["lr"], matrices["weight_decay"], vectors["weight_decay"]) == (0.25, 0.3, 0.0)


def test_a_state_of_other_optimizers_is_refused():
    model = small_llama()
    muon, adamw = (build_optimizer(model, CONFIGS[name], "cpu", Precision.fp32) for name in ("muon", "adamw"))
    with pytest.raises(ValueError, match="the state is of"):
        adamw.load_state_dict(muon.state_dict())


def test_an_optimizer_that_nobody_wrote_down_is_refused_with_where_to_do_so():
    common = OptimConfig(max_lr=0.01, weight_decay=0.1, max_grad_norm=1.0)
    with pytest.raises(ConfigError, match=r"OptimConfig is no case of build_optimizer in llama_lab/training/optim\.py"):
        build_optimizer(small_llama(), common, "cpu", Precision.fp32)


def test_any_optimizer_of_torch_can_leave_out_a_step():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizers = Optimizers({"adagrad": torch.optim.Adagrad([weight], lr=0.5)})
    weight.grad = torch.ones(3)
    optimizers.step(unless=torch.tensor(True))
    assert weight.tolist() == [1.0] * 3
    optimizers.step(unless=torch.tensor(False))
    stepped = weight.tolist()
    assert stepped == [0.5] * 3
    optimizers.step()
    assert weight.tolist() < stepped
