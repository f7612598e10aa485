"""The model: tokens in, logits or a loss out.

    tokens -> embedding -> [ + attention(norm(x)), + swiglu(norm(x)) ] x n_layers -> norm -> output projection -> logits

Its architecture is Llama's, so that the weights load into Hugging Face's LlamaForCausalLM (without `qk_norm`). Reading and
writing weights is not here.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

from llama_lab.config.schema import ModelConfig, Recompute
from llama_lab.model.attention import Attention, hidden_from
from llama_lab.model.blocks import Linear, RMSNorm, SwiGLU
from llama_lab.model.cache import KVCache
from llama_lab.model.count import ffn_dim
from llama_lab.model.initialise import initialise
from llama_lab.model.loss import summed_cross_entropy
from llama_lab.model.products import WeightCopy
from llama_lab.model.rotary import rotary_tables


class Block(nn.Module):
    """One layer: attention between positions, then a SwiGLU at each, both added to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn = SwiGLU(config.dim, ffn_dim(config))
        self.dropout = config.dropout
        self.recompute = Recompute.none

    def forward(
        self, x_btc: Tensor, cos: Tensor, sin: Tensor, hidden_b1ts: Tensor | None, cache: KVCache | None, layer: int
    ) -> Tensor:
        """Map (batch, time, dim) to the same; see `Attention.forward` for the rest."""

        def mixed(x_btc: Tensor) -> Tensor:
            return x_btc + self._dropped(self.attention(self.attention_norm(x_btc), cos, sin, hidden_b1ts, cache, layer))

        def fed(x_btc: Tensor) -> Tensor:
            return self._dropped(self.ffn(self.ffn_norm(x_btc)))

        def both(x_btc: Tensor) -> Tensor:
            x_btc = mixed(x_btc)
            return x_btc + fed(x_btc)

        match self.recompute if torch.is_grad_enabled() else Recompute.none:
            case Recompute.none:
                return both(x_btc)
            case Recompute.selective:
                x_btc = mixed(x_btc)
                # The sum is outside: it is kept, and nothing asks for the last product of `fed` a second time.
                return x_btc + self._twice(fed, x_btc)
            case Recompute.full:
                return self._twice(both, x_btc)

    def _twice(self, function: Callable[[Tensor], Tensor], x_btc: Tensor) -> Tensor:
        """The function's value, of which nothing is kept but `x_btc`: backward computes it again, with the same dropout."""
        # torch before 2.13 lets the compiler keep what autograd functions of our own compute, unless a policy says otherwise.
        context = _keeping_nothing if torch.compiler.is_compiling() else noop_context_fn
        found = checkpoint(function, x_btc, use_reentrant=False, preserve_rng_state=self.dropout > 0, context_fn=context)
        assert isinstance(found, Tensor)
        return found

    def _dropped(self, branch: Tensor) -> Tensor:
        return functional.dropout(branch, self.dropout, self.training) if self.dropout > 0 else branch


def _keeping_nothing() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    return create_selective_checkpoint_contexts(_again)


def _again(context: SelectiveCheckpointContext, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
    return CheckpointPolicy.PREFER_RECOMPUTE


class Llama(nn.Module):
    """A decoder-only transformer. Its weights are NaN until `initialise` is called or a state is loaded.

    Under `torch.autocast` the residual stream itself is in the autocast dtype, which halves its traffic; norms, softmax and loss
    compute in float32 inside, and the weights stay as they are.

    Args:
        config: the shape.
        vocab_size: token ids are 0 to `vocab_size` - 1.
        max_seq_len: positions that the rotary tables reach; a longer input is refused.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig, *, vocab_size: int, max_seq_len: int) -> None:
        super().__init__()
        self.config, self.vocab_size, self.max_seq_len = config, vocab_size, max_seq_len
        self.embedding = nn.Embedding.from_pretrained(torch.full((vocab_size, config.dim), float("nan")), freeze=False)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.tied_copy: WeightCopy | None = None
        self.output = None if config.tie_embeddings else Linear(config.dim, vocab_size)
        cos, sin = rotary_tables(config.dim // config.n_heads, max_seq_len, config.rope_theta, scaled_as=config)
        self.register_buffer("cos", cos.to(self.embedding.weight.device), persistent=False)
        self.register_buffer("sin", sin.to(self.embedding.weight.device), persistent=False)

    def initialise(self, generator: torch.Generator) -> None:
        """Fill the weights with what training starts from, drawn from a CPU generator: same seed, same weights, on any device."""
        initialise(list(self.named_parameters()), self.config, generator)

    def set_recompute(self, recompute: Recompute) -> None:
        """Choose what backward computes anew instead of keeping it."""
        for block in self.blocks:
            assert isinstance(block, Block)
            block.recompute = recompute

    def activation_dtype(self) -> torch.dtype:
        """Dtype of the residual stream: that of autocast where it is on, else that of the weights."""
        weight = self.embedding.weight
        on = torch.is_autocast_enabled(weight.device.type)
        return torch.get_autocast_dtype(weight.device.type) if on else weight.dtype

    @overload
    def forward(
        self, tokens: Tensor, targets: None = None, cache: KVCache | None = None, documents: Tensor | None = None
    ) -> Tensor: ...
    @overload
    def forward(self, tokens: Tensor, targets: Tensor, cache: None = None, documents: Tensor | None = None) -> Tensor: ...

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        cache: KVCache | None = None,
        documents: Tensor | None = None,
    ) -> Tensor:
        """Predict the token after each position.

        Packed documents are predicted as each would be alone: attention stays inside a document. Positions go on counting over
        all of them, which changes nothing, because rotary positions act through distances only.

        Args:
            tokens: (batch, time), int64 in [0, vocab_size), time at most `max_seq_len` with what the cache holds.
            targets: (batch, time), the tokens that do follow, `config.targets.IGNORE` where there is none to predict.
            cache: earlier positions; `tokens` are taken to follow them, and are appended.
            documents: (batch, time), number of each position's document, the same for neighbours in one; None: each sequence is
                one. Not with a cache.

        Returns:
            Without targets logits, (batch, time, vocab_size), in the activations' dtype; of the last position alone if the cache
            says so. With targets their summed cross-entropy in nats, a float32 scalar.

        Raises:
            ValueError: more positions than `max_seq_len`, or than the cache has room for.
        """
        start = 0 if cache is None else cache.length
        end = start + tokens.shape[1]
        longest = self.max_seq_len if cache is None else min(self.max_seq_len, cache.max_len)
        if end > longest:
            raise ValueError(f"{end} positions do not fit a context of {longest}")
        x_btc = self.embedding(tokens).to(self.activation_dtype())
        places = slice(start, end) if cache is None else cache.places(end - start)
        cos, sin = self.cos[places].to(x_btc.dtype), self.sin[places].to(x_btc.dtype)
        hidden_b1ts = None if documents is None else hidden_from(documents, x_btc.dtype)
        if cache is not None:
            hidden_b1ts = cache.hidden(x_btc.dtype)
        for layer, block in enumerate(self.blocks):
            x_btc = block(x_btc, cos, sin, hidden_b1ts, cache, layer)
        if cache is not None:
            cache.advance(end - start)
            x_btc = x_btc[:, -1:] if cache.only_last else x_btc
        x_btc = self.norm(x_btc)
        weight = self.embedding.weight if self.output is None else self.output.weight
        if targets is None:
            return functional.linear(x_btc, weight)
        return summed_cross_entropy(x_btc, weight, targets, self.tied_copy if self.output is None else self.output.copy)
