"""The parts with hand-written derivatives against float64 finite differences and against plain formulas."""

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn import functional

from llama_lab.config.targets import IGNORE
from llama_lab.model import loss
from llama_lab.model.attention import causal_attention
from llama_lab.model.blocks import RMSNorm
from llama_lab.model.loss import summed_cross_entropy
from llama_lab.model.rotary import rotary_tables, rotate


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    """Standard normal numbers that a gradient is taken of."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def test_rms_norm_has_the_right_value_and_derivative():
    norm = RMSNorm(6, eps=0.1).double()
    x, gain = normal(2, 3, 6), normal(6, seed=1)

    def normed(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(norm, {"weight": gain}, (x,))

    torch.testing.assert_close(normed(x, gain), functional.rms_norm(x, (6,), gain, 0.1))
    assert gradcheck(normed, (x, gain))
    with torch.no_grad():
        assert torch.equal(normed(x, gain), normed(x.clone(), gain))
    unchanged = x.detach().clone()
    normed(x, gain).sum().backward()
    assert torch.equal(x.detach(), unchanged)


def test_rotation_depends_on_distance_alone_and_keeps_lengths():
    cos, sin = (table.double() for table in rotary_tables(8, 40, 10_000.0))
    q, k = normal(1, 1, 1, 8), normal(1, 1, 1, 8, seed=1)

    def product(query_at: int, key_at: int) -> torch.Tensor:
        turned_q = rotate(q, cos[query_at : query_at + 1], sin[query_at : query_at + 1])
        turned_k = rotate(k, cos[key_at : key_at + 1], sin[key_at : key_at + 1])
        return (turned_q * turned_k).sum()

    torch.testing.assert_close(product(9, 4), product(36, 31), atol=1e-6, rtol=1e-6)
    assert abs(product(9, 4) - product(9, 5)) > 1e-3
    x = normal(2, 3, 40, 8)
    pairs = [part.unflatten(-1, (2, 4)).norm(dim=-2) for part in (x, rotate(x, cos, sin))]
    torch.testing.assert_close(*pairs, atol=1e-6, rtol=1e-6)


def test_rotation_has_the_right_derivative():
    tables = [table.double() for table in rotary_tables(6, 5, 100.0)]
    assert gradcheck(lambda x: rotate(x, *tables), (normal(2, 2, 5, 6),))
    assert gradcheck(lambda x: rotate(x.transpose(1, 2), *tables), (normal(2, 5, 2, 6),))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_has_the_right_value_and_derivative(kv_heads):
    q, k, v = normal(2, 4, 5, 3), normal(2, kv_heads, 5, 3, seed=1), normal(2, kv_heads, 5, 3, seed=2)
    expected = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(causal_attention(q, k, v), expected)
    assert gradcheck(causal_attention, (q, k, v))


def test_the_loss_has_the_right_value_and_derivative(monkeypatch):
    monkeypatch.setattr(loss, "_CHUNK", 4)  # 11 positions in chunks of 4, 4 and 3
    hidden, weight = normal(11, 5), normal(13, 5, seed=1)
    targets = torch.randint(13, (11,), generator=torch.Generator().manual_seed(0))
    targets[[0, 6, 10]] = IGNORE
    expected = functional.cross_entropy(hidden @ weight.T, targets, reduction="sum", ignore_index=IGNORE)
    torch.testing.assert_close(summed_cross_entropy(hidden, weight, targets), expected)
    assert gradcheck(lambda hidden, weight: summed_cross_entropy(hidden, weight, targets) * 0.3, (hidden, weight))
    with torch.no_grad():
        torch.testing.assert_close(summed_cross_entropy(hidden, weight, targets), expected)


def test_ignored_positions_count_for_nothing():
    hidden, weight = normal(4, 5), normal(7, 5, seed=1)
    nothing = summed_cross_entropy(hidden, weight, torch.full((4,), IGNORE))
    nothing.backward()
    assert nothing.item() == 0.0 and not hidden.grad.any() and not weight.grad.any()


@pytest.mark.parametrize("wrong", [7, -1])
def test_a_target_outside_the_vocabulary_is_no_silent_loss(wrong):
    with pytest.raises((IndexError, RuntimeError)):
        summed_cross_entropy(normal(1, 5), normal(7, 5), torch.tensor([wrong]))


def test_huge_logits_give_a_finite_loss():
    hidden = torch.full((3, 4), 1e4, requires_grad=True)
    weight = torch.tensor([[1.0] * 4, [-1.0] * 4, [0.0] * 4])
    total = summed_cross_entropy(hidden, weight, torch.tensor([0, 0, 2]))
    total.backward()
    assert total.item() == pytest.approx(4e4) and hidden.grad.isfinite().all()
