"""Packed documents: each is predicted as it would be alone, in training and in generation alike."""

import pytest
import torch
from torch import Tensor

from llama_lab.config.targets import IGNORE
from llama_lab.model import attention
from llama_lab.model.cache import KVCache
from llama_lab.model.llama import Llama
from llama_lab.model.rotary import rotary_tables

LENGTHS = ([5, 1, 9, 6], [24], [3, 18])
"""Positions of the documents in three windows of 24; what is left is padding."""
VARIANTS = {"mha": {}, "gqa": {"n_kv_heads": 2}, "qk_norm": {"qk_norm": True, "n_kv_heads": 1}}


@pytest.fixture(params=["explicit", "fused"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways in which a CPU computes attention."""
    if request.param == "fused":
        monkeypatch.setattr(attention, "LONGEST_EXPLICIT", 0)
    return request.param


def exact(model: Llama) -> Llama:
    """The model in float64; its rotary tables anew, because rounded ones say distances to seven digits only."""
    model = model.double()
    frequencies = 10_000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    angles = torch.outer(torch.arange(24, dtype=torch.float64), frequencies)
    assert torch.allclose(model.cos, rotary_tables(8, 24, 10_000.0)[0].double())
    model.cos, model.sin = angles.cos(), angles.sin()
    return model


def packed(model: Llama) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, targets and document numbers of the windows."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(model.vocab_size, (3, 24), generator=generator)
    targets = torch.randint(model.vocab_size, (3, 24), generator=generator)
    documents = torch.zeros(3, 24, dtype=torch.int32)
    for row, lengths in enumerate(LENGTHS):
        numbers = torch.repeat_interleave(torch.arange(len(lengths) + 1), torch.tensor([*lengths, 24 - sum(lengths)]))
        documents[row] = numbers
        tokens[row, sum(lengths) :], targets[row, sum(lengths) :] = 0, IGNORE
    return tokens, targets, documents


def alone(lengths: list[int]) -> list[slice]:
    """Where each document of a window stands."""
    ends = torch.tensor(lengths).cumsum(0).tolist()
    return [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_logits_and_gradients_are_those_of_each_document_alone(llama, changes, kernel):
    model = exact(llama(**changes))
    tokens, targets, documents = packed(model)
    logits = model(tokens, documents=documents)
    loss = model(tokens, targets, documents=documents)
    loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    summed = torch.zeros((), dtype=torch.float64)
    for row, lengths in enumerate(LENGTHS):
        for place in alone(lengths):
            torch.testing.assert_close(logits[row, place], model(tokens[row : row + 1, place])[0], atol=1e-12, rtol=1e-12)
            summed = summed + model(tokens[row : row + 1, place], targets[row : row + 1, place])
    summed.backward()
    torch.testing.assert_close(loss, summed, atol=1e-11, rtol=1e-12)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-11, rtol=1e-11)
    # What is tested would show: without the numbers the second document sees the first.
    assert not torch.allclose(logits[0, 6:15], model(tokens)[0, 6:15], atol=1e-3)


def test_generation_sees_what_training_saw(llama, kernel):
    model = exact(llama(n_kv_heads=2))
    tokens, _, documents = packed(model)
    with torch.no_grad():
        logits = model(tokens, documents=documents)
        for row, lengths in enumerate(LENGTHS):
            for place in alone(lengths):
                cache = KVCache(model.config, batch=1, max_len=24, dtype=torch.float64, device="cpu")
                one_by_one = [model(token.view(1, 1), cache=cache)[0] for token in tokens[row, place]]
                torch.testing.assert_close(torch.cat(one_by_one), logits[row, place], atol=1e-12, rtol=1e-12)


def test_no_position_is_undefined_and_padding_learns_nothing(llama, kernel):
    model = llama()
    tokens, targets, documents = packed(model)
    model(tokens, targets, documents=documents).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    changed = tokens.clone()
    changed[0, 21:] = 7
    assert model(changed, targets, documents=documents).item() == model(tokens, targets, documents=documents).item()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_packed_training_step_compiles_without_graph_breaks(llama, precision, kernel):
    model = llama(n_kv_heads=2)
    tokens, targets, documents = packed(model)

    def gradients(step) -> list[Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            step(tokens, targets, documents=documents).backward()
        return [parameter.grad for parameter in model.parameters()]

    plain = gradients(model)
    torch._dynamo.reset()
    compiled = gradients(torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager"))
    for one, other in zip(plain, compiled, strict=True):
        assert (one - other).norm() / one.norm() < (1e-5 if precision == "fp32" else 0.05)
