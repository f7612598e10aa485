"""How many parameters and FLOPs a model has, from its config alone. Needs no torch; tests hold it to the real model."""

from llama_lab.config.schema import ModelConfig


def ffn_dim(config: ModelConfig) -> int:
    """Width of the SwiGLU: as configured, else 8/3 of `dim` rounded up to `multiple_of`.

    8/3 keeps three matrices at the size of the two of an ordinary feed-forward layer of width 4 dim.

    Source: GLU Variants Improve Transformer, arXiv:2002.05202, section 2; the rounding is that of Meta's Llama code.
    """
    if config.ffn_dim is not None:
        return config.ffn_dim
    return -(-int(8 * config.dim / 3) // config.multiple_of) * config.multiple_of


def parameters(config: ModelConfig, vocab_size: int) -> int:
    """Trained numbers in the model; a tied embedding counts once."""
    return _without_input_embedding(config, vocab_size) + (0 if config.tie_embeddings else vocab_size * config.dim)


def flops_per_token(config: ModelConfig, vocab_size: int, max_seq_len: int) -> int:
    """Floating-point operations to train on one token: forward and backward, without recomputation.

    6 N + 12 L d T: two for each weight and each of the three products (forward, gradient of the input, gradient of the weight),
    and as much again for scores and weighted values. Attention counts in full, although half of its scores are masked, as is
    customary; looking up the input embedding is free.

    Source: PaLM, arXiv:2204.02311, appendix B.
    """
    return 6 * _without_input_embedding(config, vocab_size) + 12 * config.n_layers * config.dim * max_seq_len


def _without_input_embedding(config: ModelConfig, vocab_size: int) -> int:
    head_dim = config.dim // config.n_heads
    kv_dim = head_dim * config.kv_heads
    attention = 2 * config.dim * config.dim + 2 * config.dim * kv_dim + (2 * head_dim if config.qk_norm else 0)
    block = attention + 3 * config.dim * ffn_dim(config) + 2 * config.dim
    return config.n_layers * block + config.dim + vocab_size * config.dim
