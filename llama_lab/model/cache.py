"""Memory of the keys and values that a model has computed, so that generating a token costs one token's work.

Shapes: l layers, b texts, g key/value heads, s positions, d head_dim, t new positions.
"""

import math
from typing import Any

import torch
from torch import Tensor

from llama_lab.config.schema import ModelConfig


class KVCache:
    """Keys, already turned, and values of every layer, allocated once for `max_len` positions of `batch` texts.

    `length` positions are filled in each text; `Llama.forward(tokens, cache=cache)` appends and moves it. Texts of different
    lengths are read one at a time through `row`, and then go on together through `Step`.

    Args:
        only_last: whether `forward` gives the logits after the last new position alone, which is all that generating needs.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        batch: int,
        max_len: int,
        dtype: torch.dtype,
        device: torch.device | str,
        only_last: bool = False,
    ) -> None:
        shape = (config.n_layers, batch, config.kv_heads, max_len, config.dim // config.n_heads)
        # Zeros, not whatever was in memory: a position that is hidden has a weight of 0, and 0 times NaN is NaN.
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.max_len, self.length, self.only_last = max_len, 0, only_last

    def row(self, number: int, length: int) -> "KVCache":
        """One of the texts, as a cache of its own on the same memory, taken to hold `length` positions."""
        view = KVCache.__new__(KVCache)
        view.keys, view.values = self.keys[:, number : number + 1], self.values[:, number : number + 1]
        view.max_len, view.length, view.only_last = self.max_len, length, self.only_last
        return view

    def move(self, source: int, target: int) -> None:
        """Let one text take the place of another."""
        self.keys[:, target] = self.keys[:, source]
        self.values[:, target] = self.values[:, source]

    def places(self, count: int) -> Any:
        """Index of the next `count` positions into tables over positions."""
        return slice(self.length, self.length + count)

    def hidden(self, dtype: torch.dtype) -> Tensor | None:
        """What is added to the scores of the new positions; None: each sees all that is there, and itself."""
        return None

    def extended(self, layer: int, k_bgtd: Tensor, v_bgtd: Tensor) -> tuple[Tensor, Tensor]:
        """Write one layer's new keys and values after the filled positions; return all of them, new ones included."""
        end = self.length + k_bgtd.shape[2]
        keys, values = self.keys[layer, :, :, :end], self.values[layer, :, :, :end]
        keys[:, :, self.length :] = k_bgtd
        values[:, :, self.length :] = v_bgtd
        return keys, values

    def advance(self, count: int) -> None:
        """Take `count` new positions for filled."""
        self.length += count


class Step(KVCache):
    """A cache as it takes one new position for each of several texts whose filled positions differ.

    What is new goes where `lengths` says, and is seen by its own text alone; who holds the texts counts them. Shapes depend on
    nothing but the number of texts and `seen`, and values on the device's memory alone, so a step can be recorded as a CUDA graph
    and played again.

    Args:
        cache: where the texts lie.
        lengths: filled positions of each of the first texts, (b,) int64, on the cache's device.
        seen: positions that are looked at, more than any of `lengths`.
    """

    def __init__(self, cache: KVCache, lengths: Tensor, seen: int) -> None:
        count = len(lengths)
        self.keys, self.values = cache.keys[:, :count, :, :seen], cache.values[:, :count, :, :seen]
        self.max_len, self.length, self.only_last = seen, seen - 1, True
        self._lengths, self._rows = lengths, torch.arange(count, device=lengths.device)
        self._is_later = torch.arange(seen, device=lengths.device) > lengths.view(-1, 1, 1, 1)

    def places(self, count: int) -> Tensor:
        """(b, 1, 1) int64; broadcasts to (b, heads, 1, …)."""
        return self._lengths.view(-1, 1, 1)

    def hidden(self, dtype: torch.dtype) -> Tensor:
        """(b, 1, 1, s): minus infinity behind each text's new position, else 0."""
        return torch.zeros(self._is_later.shape, dtype=dtype, device=self._is_later.device).masked_fill(self._is_later, -math.inf)

    def extended(self, layer: int, k_bgtd: Tensor, v_bgtd: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.keys[layer], self.values[layer]
        keys[self._rows, :, self._lengths] = k_bgtd[:, :, 0]
        values[self._rows, :, self._lengths] = v_bgtd[:, :, 0]
        return keys, values

    def advance(self, count: int) -> None:
        """Nothing: the lengths are their holder's."""
