"""One text's next token on a CPU, written out: the model's forward for a single position, without anything that a batch needs.

Such a step reads every weight once and does little with it. So weights are laid out for reading them in one pass: a row vector
times a matrix is a sum of the matrix's rows, and what reads the same vector lies side by side. What is left is the host's own time
for a call, and here are a third as many calls as in `Llama.forward`. A test holds the two together.

Shapes: c channels, h query heads, g key/value heads, d head_dim, f width of the feed-forward layer.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from llama_lab.model.blocks import RMSNorm
from llama_lab.model.cache import KVCache
from llama_lab.model.llama import Block, Llama


class _Layer(NamedTuple):
    """Weights of a block: (c, (h + 2 g) d), (h d, c), (c, 2 f) and (f, c), and the gains of its norms."""

    attention_norm: Tensor
    qkv: Tensor
    o: Tensor
    ffn_norm: Tensor
    gate_up: Tensor
    down: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None


class PlainStep:
    """A model's next token after one token more, for a single text in float32 on a CPU.

    The model's own weights are laid out anew, in place: values, shapes and names stay, and so does the memory that they take, but
    for the output projection where it is the embedding, which is needed in both layouts.

    Args:
        cache: of one row, where the text lies. How many of its positions are filled is the caller's to say.
    """

    def __init__(self, model: Llama, cache: KVCache) -> None:
        self._layers = [_laid_out(block) for block in model.blocks if isinstance(block, Block)]
        self._keys, self._values = cache.keys.unbind(), cache.values.unbind()
        self._embedding, self._norm = model.embedding.weight.detach(), model.norm.weight.detach()
        self._output = self._embedding.t().contiguous() if model.output is None else _joined([model.output.weight])
        self._cos = torch.cat((model.cos, model.cos), dim=-1)
        self._sin = torch.cat((-model.sin, model.sin), dim=-1)
        config = model.config
        self._eps, self._heads = config.norm_eps, config.n_heads
        self._kv_heads = config.kv_heads
        self._channels, self._head_dim = config.dim, config.dim // config.n_heads

    @staticmethod
    def suits(model: Llama) -> bool:
        """Whether this is how the model computes."""
        weight = model.embedding.weight
        return weight.device.type == "cpu" and weight.dtype == torch.float32

    def __call__(self, token: int, place: int) -> Tensor:
        """Logits after a token at a position, the number of those before it, (1, vocabulary)."""
        # Inference mode leaves out what calls do for a later backward; the clone is a tensor like any other.
        with torch.inference_mode():
            logits = self._logits(token, place)
        return logits.clone()

    def _logits(self, token: int, place: int) -> Tensor:
        cos, sin = self._cos[place], self._sin[place]
        x = self._embedding[token].unsqueeze(0)
        for layer, keys, values in zip(self._layers, self._keys, self._values, strict=True):
            mixed = self._attended(layer, self._normed(x, layer.attention_norm), cos, sin, keys, values, place)
            x = torch.addmm(x, mixed, layer.o)
            gate, up = torch.mm(self._normed(x, layer.ffn_norm), layer.gate_up).chunk(2, dim=1)
            x = torch.addmm(x, functional.silu(gate).mul_(up), layer.down)
        return torch.mm(self._normed(x, self._norm), self._output)

    def _normed(self, x: Tensor, gains: Tensor) -> Tensor:
        length = float(torch.linalg.vector_norm(x))
        return torch.mul(x, gains).mul_(1 / math.sqrt(length * length / self._channels + self._eps))

    def _attended(self, layer: _Layer, x: Tensor, cos: Tensor, sin: Tensor, k_1gsd: Tensor, v_1gsd: Tensor, place: int) -> Tensor:
        """Mixed values, (1, c); the position's own key and value are written to its place first."""
        heads, kv_heads, head_dim = self._heads, self._kv_heads, self._head_dim
        turning, value = torch.mm(x, layer.qkv).view(-1, head_dim).split((heads + kv_heads, kv_heads))
        if layer.q_norm is not None and layer.k_norm is not None:
            parts = zip(turning.split((heads, kv_heads)), (layer.q_norm, layer.k_norm), strict=True)
            turning = torch.cat([functional.rms_norm(part, (head_dim,), gains, self._eps) for part, gains in parts])
        # A pair's other half, turned by the sine: the table has its sign.
        query, key = torch.addcmul(turning * cos, turning.roll(head_dim // 2, 1), sin).split((heads, kv_heads))
        k_1gsd.select(2, place).copy_(key)
        v_1gsd.select(2, place).copy_(value)
        # Heads that share a key stand below each other, as if they were positions.
        q_1grd, seen = query.view(1, kv_heads, -1, head_dim), place + 1
        mixed = functional.scaled_dot_product_attention(q_1grd, k_1gsd.narrow(2, 0, seen), v_1gsd.narrow(2, 0, seen))
        return mixed.view(1, -1)


def _laid_out(block: Block) -> _Layer:
    attention, ffn = block.attention, block.ffn
    return _Layer(
        attention_norm=block.attention_norm.weight.detach(),
        qkv=_joined([attention.q.weight, attention.k.weight, attention.v.weight]),
        o=_joined([attention.o.weight]),
        ffn_norm=block.ffn_norm.weight.detach(),
        gate_up=_joined([ffn.gate.weight, ffn.up.weight]),
        down=_joined([ffn.down.weight]),
        q_norm=_gains(attention.q_norm),
        k_norm=_gains(attention.k_norm),
    )


def _gains(norm: RMSNorm | None) -> Tensor | None:
    return None if norm is None else norm.weight.detach()


def _joined(weights: Sequence[Tensor]) -> Tensor:
    """Weights (out, in) side by side, transposed: (in, sum of out). From now on they are views of it."""
    joined = torch.cat([weight.detach() for weight in weights]).t().contiguous()
    for weight, part in zip(weights, joined.split([len(weight) for weight in weights], dim=1), strict=True):
        weight.data = part.t()
    return joined
