"""A model as one GGUF file, which llama.cpp and what is built on it read. Writing goes through the `gguf` package, an extra.

llama.cpp's Llama turns neighbouring channels (2i, 2i+1) where ours turns (i, i + head_dim/2), so rows of queries and keys are put
in its order; its Qwen3 turns as ours does. Stretched wavelengths travel as a tensor of factors.
"""

import importlib.util
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llama_lab.config.errors import ConfigError
from llama_lab.config.schema import ModelConfig, RopeScaling
from llama_lab.data.tokenizer import Tokenizer
from llama_lab.formats.gguf_vocabulary import Vocabulary, gguf_vocabulary
from llama_lab.formats.hf_folder import special_ids
from llama_lab.formats.names import weight_names
from llama_lab.model.count import ffn_dim
from llama_lab.model.rotary import scaled_frequencies


def check_gguf() -> None:
    """Raise ConfigError if the package that writes GGUF is not installed."""
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError([("--to gguf", "needs the gguf package: pip install 'llama_lab[gguf]'")], scope="this export")


def write_gguf(
    path: Path,
    weights: Mapping[str, Tensor],
    model: ModelConfig,
    tokenizer: Tokenizer,
    *,
    name: str,
    max_seq_len: int,
    dtype: str,
) -> None:
    """Write a GGUF file.

    Args:
        path: the file to make.
        weights: by our names, on the CPU.
        name: what the model calls itself.
        dtype: of the matrices, `fp32` or `bf16`; vectors stay fp32.

    Raises:
        ConfigError: llama.cpp has no words for the tokenizer, or the package is missing.
        OSError: the disk is full or cannot be written.
    """
    check_gguf()
    vocabulary = gguf_vocabulary(tokenizer)

    import gguf

    writer = gguf.GGUFWriter(path, "qwen3" if model.qk_norm else "llama")
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16 if dtype == "bf16" else gguf.LlamaFileType.ALL_F32)
    _describe_model(writer, model, vocab_size=tokenizer.vocab_size, max_seq_len=max_seq_len)
    _describe_tokenizer(writer, tokenizer, vocabulary)
    for names in weight_names(model):
        tensor = _in_gguf_order(names.ours, weights[names.ours].float(), model).contiguous().numpy()
        if dtype == "bf16" and tensor.ndim > 1:
            kind = gguf.GGMLQuantizationType.BF16
            writer.add_tensor(names.gguf, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
        else:
            writer.add_tensor(names.gguf, tensor)
    if model.rope_scaling is RopeScaling.llama3:
        writer.add_tensor("rope_freqs.weight", _wavelength_factors(model))
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _describe_model(writer, model: ModelConfig, *, vocab_size: int, max_seq_len: int) -> None:
    """Every number that the architecture's key names ask for."""
    import gguf

    head_dim = model.dim // model.n_heads
    writer.add_context_length(max_seq_len)
    writer.add_embedding_length(model.dim)
    writer.add_block_count(model.n_layers)
    writer.add_feed_forward_length(ffn_dim(model))
    writer.add_head_count(model.n_heads)
    writer.add_head_count_kv(model.kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(model.norm_eps)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(model.rope_theta)
    writer.add_vocab_size(vocab_size)
    if model.rope_scaling is RopeScaling.linear:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(model.rope_factor)


def _describe_tokenizer(writer, tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    ids = special_ids(tokenizer)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.rule)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    writer.add_token_merges(vocabulary.merges)
    writer.add_bos_token_id(ids.bos)
    writer.add_eos_token_id(ids.eos)
    if ids.pad is not None:
        writer.add_pad_token_id(ids.pad)
    # A prompt is the beginning of a document, as in our own `generate`.
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)


def _in_gguf_order(name: str, weight: Tensor, model: ModelConfig) -> Tensor:
    """Rows of query and key projections with each pair of channels side by side, where llama.cpp turns them so."""
    if model.qk_norm or not name.endswith((".q.weight", ".k.weight")):
        return weight
    half = model.dim // model.n_heads // 2
    return weight.unflatten(0, (-1, 2, half)).transpose(1, 2).flatten(0, 2)


def _wavelength_factors(model: ModelConfig) -> np.ndarray:
    """How many times as long each wavelength is, (head_dim / 2,), float32."""
    head_dim = model.dim // model.n_heads
    frequencies = 1.0 / model.rope_theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    return (frequencies / scaled_frequencies(frequencies, model)).numpy()
