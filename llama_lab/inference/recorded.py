"""A step of generation as CUDA graphs: hundreds of small kernels that the host starts as one.

A graph has fixed shapes and addresses. So all rows of the cache take part in each step, whether they hold a text or not, and
positions are looked at up to the next of a few lengths; which of them a text sees is in its mask.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from llama_lab.model.cache import KVCache, Step
from llama_lab.model.llama import Llama

SHORTEST = 256
WARM_UPS = 3
"""Steps before one is recorded, in which libraries allocate what they keep."""


class RecordedStep:
    """Records a step for each length that it is first asked for, and plays it from then on.

    Args:
        cache: of as many texts as take part; it must not be replaced.
    """

    def __init__(self, model: Llama, cache: KVCache):
        self._model, self._cache = model, cache
        device, rows = cache.keys.device, cache.keys.shape[1]
        self._tokens = torch.zeros((rows, 1), dtype=torch.int64, device=device)
        self._lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        # One pool for all of them: they are never played at the same time, and what they give is copied at once.
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def __call__(self, tokens: Sequence[int], lengths: Sequence[int]) -> Tensor:
        """Logits after one more token of each of the first rows, (rows, vocabulary), float32, on the CPU."""
        count = len(tokens)
        # The rows behind write into their first position, which is overwritten when a text is read into them.
        missing = [0] * (len(self._lengths) - count)
        self._tokens.copy_(torch.tensor([*tokens, *missing]).unsqueeze(1))
        self._lengths.copy_(torch.tensor([*lengths, *missing]))
        seen = self._rounded(max(lengths) + 1)
        if seen not in self._graphs:
            with torch.cuda.device(self._tokens.device):
                self._graphs[seen] = self._record(seen)
        graph, logits = self._graphs[seen]
        graph.replay()
        return logits[:count].float().cpu()

    def _rounded(self, positions: int) -> int:
        """The next power of two, at least `SHORTEST` and at most what the cache holds."""
        return min(max(SHORTEST, 1 << (positions - 1).bit_length()), self._cache.max_len)

    def _record(self, seen: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        # Every step before the recorded one writes the same keys to the same places.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                self._forward(seen)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = self._forward(seen)
        return graph, logits

    @torch.no_grad()
    def _forward(self, seen: int) -> Tensor:
        return self._model.forward(self._tokens, cache=Step(self._cache, self._lengths, seen))[:, -1]
