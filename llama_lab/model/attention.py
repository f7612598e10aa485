"""Causal self-attention with grouped key and value heads, rotary positions and an optional cache.

Shapes: b batch, t query positions, s key positions, h query heads, g key/value heads (h / g queries share one), d head_dim,
c = h d channels.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from llama_lab.config.schema import ModelConfig
from llama_lab.model.blocks import Linear, RMSNorm
from llama_lab.model.cache import KVCache
from llama_lab.model.joined import rotated_heads
from llama_lab.model.products import WeightCopy
from llama_lab.model.rotary import rotate

LONGEST_EXPLICIT = 512
"""Positions up to which plain matrix products beat `scaled_dot_product_attention` on a CPU, forward and backward together."""


class Attention(nn.Module):
    """Each position gathers values from itself and from earlier ones, weighted by how well its query fits their keys."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.dim // config.n_heads
        kv_dim = self.head_dim * config.kv_heads
        self.q = Linear(config.dim, config.dim)
        self.k = Linear(config.dim, kv_dim)
        self.v = Linear(config.dim, kv_dim)
        self.o = Linear(config.dim, config.dim)
        self.q_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None
        # Of queries, keys and values together; set by training on a GPU.
        self.joined: WeightCopy | None = None

    def forward(
        self, x_btc: Tensor, cos: Tensor, sin: Tensor, hidden_b1ts: Tensor | None, cache: KVCache | None, layer: int
    ) -> Tensor:
        """Attend within `x_btc` and, with a cache, to what it holds.

        Args:
            x_btc: (batch, time, dim).
            cos, sin: rotary tables of these positions, (time, head_dim / 2), of the dtype of `x_btc`.
            hidden_b1ts: from `hidden_from` where documents must not see each other; None: each position sees all earlier ones.
            cache: earlier keys and values, which this layer's are appended to; None attends within `x_btc` alone.
            layer: which of the cache's layers is this one.

        Returns:
            What is to be added to the residual stream, same shape and dtype as `x_btc`.
        """
        if self.joined is not None and cache is None and x_btc.dtype == self.joined.weight.dtype:
            heads, kv_heads = self.q.out_features // self.head_dim, self.k.out_features // self.head_dim
            q_bhtd, k_bgsd, v_bgsd = rotated_heads(x_btc, self.joined, cos, sin, heads, kv_heads)
            return self._mixed(q_bhtd, k_bgsd, v_bgsd, hidden_b1ts)
        q_bhtd = self._heads(self.q(x_btc), self.q_norm)
        k_bgtd = self._heads(self.k(x_btc), self.k_norm)
        v_bgsd = self._heads(self.v(x_btc), None)
        q_bhtd, k_bgsd = rotate(q_bhtd, cos, sin), rotate(k_bgtd, cos, sin)
        if cache is not None:
            k_bgsd, v_bgsd = cache.extended(layer, k_bgsd, v_bgsd)
        return self._mixed(q_bhtd, k_bgsd, v_bgsd, hidden_b1ts)

    def _mixed(self, q_bhtd: Tensor, k_bgsd: Tensor, v_bgsd: Tensor, hidden_b1ts: Tensor | None) -> Tensor:
        mixed_bhtd = causal_attention(q_bhtd, k_bgsd, v_bgsd, hidden_b1ts)
        return self.o(mixed_bhtd.transpose(1, 2).flatten(2))

    def _heads(self, x_btc: Tensor, norm: RMSNorm | None) -> Tensor:
        """Channels split into heads, (batch, heads, time, head_dim), each vector normalised if asked."""
        x_bthd = x_btc.unflatten(-1, (-1, self.head_dim))
        return (x_bthd if norm is None else norm(x_bthd)).transpose(1, 2)


def hidden_from(documents_bt: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to the scores of packed documents, (b, 1, t, t): 0 where a query sees a key, else minus infinity.

    A query sees itself and what is before it in its own document. Built once a forward pass, for all layers.

    Args:
        documents_bt: number of each position's document.
        dtype: of the scores.
    """
    length = documents_bt.shape[1]
    same = documents_bt.unsqueeze(2) == documents_bt.unsqueeze(1)
    hidden = torch.zeros(same.shape, dtype=dtype, device=same.device).masked_fill(~same.tril(), -math.inf)
    return hidden.view(-1, 1, length, length)


def causal_attention(q_bhtd: Tensor, k_bgsd: Tensor, v_bgsd: Tensor, hidden_b1ts: Tensor | None = None) -> Tensor:
    """Weighted values, (b, h, t, d): softmax(q k / sqrt(d)) v, where query i sees the keys up to i + s - t.

    The last query thus sees every key: with a cache the t queries are the newest of s positions. `hidden_b1ts` takes the place of
    this rule where it is given.
    """
    queries, keys = q_bhtd.shape[2], k_bgsd.shape[2]
    if queries == 1:
        return _one_query(q_bhtd, k_bgsd, v_bgsd, hidden_b1ts)
    if q_bhtd.device.type == "cpu" and keys <= LONGEST_EXPLICIT:
        return _explicit(q_bhtd, k_bgsd, v_bgsd, hidden_b1ts)
    grouped = q_bhtd.shape[1] != k_bgsd.shape[1]
    if hidden_b1ts is not None:
        if grouped:
            # CUDA's kernels share keys between heads or take a mask, not both; what would be left keeps every score in memory.
            sharing = q_bhtd.shape[1] // k_bgsd.shape[1]
            k_bgsd, v_bgsd = k_bgsd.repeat_interleave(sharing, dim=1), v_bgsd.repeat_interleave(sharing, dim=1)
        return functional.scaled_dot_product_attention(q_bhtd, k_bgsd, v_bgsd, attn_mask=hidden_b1ts)
    if queries == keys:
        return functional.scaled_dot_product_attention(q_bhtd, k_bgsd, v_bgsd, is_causal=True, enable_gqa=grouped)
    visible = torch.ones(queries, keys, dtype=torch.bool, device=q_bhtd.device).tril(keys - queries)
    return functional.scaled_dot_product_attention(q_bhtd, k_bgsd, v_bgsd, attn_mask=visible, enable_gqa=grouped)


def _one_query(q_bhtd: Tensor, k_bgsd: Tensor, v_bgsd: Tensor, hidden_b1ts: Tensor | None) -> Tensor:
    """The newest position's query of each head; those that share a key head stand below each other, so keys are never repeated."""
    q_bgrd = q_bhtd.reshape(len(q_bhtd), k_bgsd.shape[1], -1, q_bhtd.shape[3])
    return functional.scaled_dot_product_attention(q_bgrd, k_bgsd, v_bgsd, attn_mask=hidden_b1ts).reshape(q_bhtd.shape)


def _explicit(q_bhtd: Tensor, k_bgsd: Tensor, v_bgsd: Tensor, hidden_b1ts: Tensor | None) -> Tensor:
    """Attention as plain batched products; queries that share a key head stand below each other, so keys are never repeated."""
    batch, heads, queries, head_dim = q_bhtd.shape
    kv_heads, keys = k_bgsd.shape[1:3]
    sharing = heads // kv_heads
    q = q_bhtd.reshape(batch * kv_heads, sharing * queries, head_dim)
    k, v = k_bgsd.flatten(0, 1), v_bgsd.flatten(0, 1)
    hidden = hidden_b1ts
    if hidden is None:
        hidden = torch.full((queries, keys), -math.inf, dtype=q.dtype, device=q.device).triu(keys - queries + 1).repeat(sharing, 1)
    if torch.compiler.is_compiling():
        mixed = torch.bmm(_weights(q, k, hidden), v)
    else:
        mixed = _ExplicitAttention.apply(q, k, v, hidden)
    return mixed.view(batch, heads, queries, head_dim)


def _weights(q: Tensor, k: Tensor, hidden: Tensor) -> Tensor:
    """softmax(q k / sqrt(d)), (n, queries, keys); `hidden` is minus infinity where a query must not look, else 0.

    It is (queries, keys) where that is so in every sequence, else (batch, 1, time, keys).
    """
    scale = 1.0 / math.sqrt(q.shape[-1])
    if hidden.ndim == 2:
        return torch.softmax(torch.baddbmm(hidden, q, k.transpose(1, 2), alpha=scale), dim=-1)
    scores_bhts = torch.bmm(q * scale, k.transpose(1, 2)).view(len(hidden), -1, *hidden.shape[2:])
    return torch.softmax(scores_bhts + hidden, dim=-1).view(len(q), q.shape[1], -1)


class _ExplicitAttention(torch.autograd.Function):
    """The same with a backward whose gradients lie in memory as their tensors do; autograd would transpose that of `k`."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
        weights = _weights(q, k, hidden)
        ctx.save_for_backward(q, k, v, weights)
        return torch.bmm(weights, v)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, weights = ctx.saved_tensors
        gradient = gradient.contiguous()
        v_gradient = torch.bmm(weights.transpose(1, 2), gradient)
        weights_gradient = torch.bmm(gradient, v.transpose(1, 2))
        scores_gradient = torch.ops.aten._softmax_backward_data(weights_gradient, weights, -1, weights.dtype)
        scale = 1.0 / math.sqrt(q.shape[-1])
        q_gradient = torch.bmm(scores_gradient, k).mul_(scale)
        return q_gradient, torch.bmm(scores_gradient.transpose(1, 2), q).mul_(scale), v_gradient, None
