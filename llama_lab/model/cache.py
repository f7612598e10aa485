"""Memory of the keys and values that a model has computed, so that generating a token costs one token's work."""

import torch
from torch import Tensor

from llama_lab.config.schema import ModelConfig


class KVCache:
    """Keys, already turned, and values of every layer, allocated once for `max_len` positions.

    `length` positions are filled; `Llama.forward(tokens, cache=cache)` appends and moves it.
    """

    def __init__(self, config: ModelConfig, *, batch: int, max_len: int, dtype: torch.dtype, device: torch.device | str) -> None:
        n_kv_heads = config.n_heads if config.n_kv_heads is None else config.n_kv_heads
        shape = (config.n_layers, batch, n_kv_heads, max_len, config.dim // config.n_heads)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.max_len = max_len
        self.length = 0

    def extended(self, layer: int, k_bhtd: Tensor, v_bhtd: Tensor) -> tuple[Tensor, Tensor]:
        """Write one layer's new keys and values after the filled positions; return all of them, new ones included."""
        end = self.length + k_bhtd.shape[2]
        keys, values = self.keys[layer, :, :, :end], self.values[layer, :, :, :end]
        keys[:, :, self.length :] = k_bhtd
        values[:, :, self.length :] = v_bhtd
        return keys, values
