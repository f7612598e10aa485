"""Weights of a Hugging Face folder, written and read; the rest of the folder with them."""

import json
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from llama_lab.config.errors import ConfigError
from llama_lab.config.schema import ModelConfig
from llama_lab.data.tokenizer import Tokenizer
from llama_lab.formats.hf_config import SpecialIds, hf_config
from llama_lab.formats.hf_folder import WEIGHTS, ForeignModel, special_ids
from llama_lab.formats.names import weight_names
from llama_lab.model.llama import Llama
from llama_lab.training.saving.tensor_file import write_tensors

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
COMPUTED = (".rotary_emb.inv_freq", ".attention.masked_bias", ".attention.bias")
"""Ends of names under which old files keep what is computed from the config."""
SHOWN = 8


def write_folder(
    folder: Path, weights: Mapping[str, Tensor], model: ModelConfig, tokenizer: Tokenizer, *, max_seq_len: int, dtype: str
) -> None:
    """Write a folder that transformers, vLLM and lm-evaluation-harness load.

    Args:
        folder: exists and is empty.
        weights: by our names, on the CPU.
        dtype: `fp32` or `bf16`; what the weights are rounded to.

    Raises:
        OSError: the disk is full or cannot be written.
    """
    ids = special_ids(tokenizer)
    renamed = {names.huggingface: weights[names.ours].to(DTYPES[dtype]) for names in weight_names(model)}
    write_tensors(folder / WEIGHTS[0], renamed, {"format": "pt"})
    name = str(DTYPES[dtype]).removeprefix("torch.")
    config = hf_config(model, vocab_size=tokenizer.vocab_size, max_seq_len=max_seq_len, ids=ids, dtype=name)
    _write_json(folder / "config.json", config)
    tokenizer.save(folder / "tokenizer.json")
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(tokenizer, ids, max_seq_len))
    generation = {"bos_token_id": ids.bos, "eos_token_id": ids.eos, "pad_token_id": ids.eos if ids.pad is None else ids.pad}
    _write_json(folder / "generation_config.json", generation | {"max_length": max_seq_len})


def read_weights(foreign: ForeignModel, tokenizer: Tokenizer) -> tuple[dict[str, Tensor], int]:
    """The weights by our names, in float32, which holds every float16 and bfloat16 exactly.

    Args:
        tokenizer: rows of the embedding that it has no token for, which pad it, are left out.

    Returns:
        The weights, and how many rows were left out.

    Raises:
        ConfigError: a file cannot be read, a weight is missing, unknown, quantised or of another shape, or there are too few rows.
    """
    _check_rows(foreign, tokenizer)
    found = {name: tensor for file in foreign.files for name, tensor in _tensors(file) if not name.endswith(COMPUTED)}
    if foreign.model.tie_embeddings:
        found.pop("lm_head.weight", None)
    with torch.device("meta"):
        expected = Llama(foreign.model, vocab_size=foreign.rows, max_seq_len=2).state_dict()
    names = {names.huggingface: names.ours for names in weight_names(foreign.model)}
    problems = [(name, "is no weight of this model") for name in found if name not in names]
    problems += [(name, "is missing") for name in names if name not in found]
    for name in names.keys() & found.keys():
        tensor, shape = found[name], tuple(expected[names[name]].shape)
        if tuple(tensor.shape) != shape:
            problems.append((name, f"is {tuple(tensor.shape)}, and config.json makes it {shape}"))
        elif tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            problems.append((name, f"is {tensor.dtype}; float32, float16 and bfloat16 can be imported"))
    if problems:
        shown = problems[:SHOWN] + ([(f"{len(problems) - SHOWN} more", "are wrong")] if len(problems) > SHOWN else [])
        raise ConfigError(shown, scope=f"importing {foreign.path}")
    weights = {ours: found[name].to(torch.float32) for name, ours in names.items()}
    for name in ("embedding.weight", "output.weight"):
        if name in weights:
            weights[name] = weights[name][: tokenizer.vocab_size].clone()
    return weights, foreign.rows - tokenizer.vocab_size


def _check_rows(foreign: ForeignModel, tokenizer: Tokenizer) -> None:
    """Refuse tokens that the embedding has no row for."""
    if tokenizer.vocab_size > foreign.rows:
        beyond = [f"{name} ({number})" for name, number in tokenizer.special_ids.items() if number >= foreign.rows]
        named = f", of them {', '.join(beyond[:SHOWN])}" if beyond else ""
        rule = f"has ids up to {tokenizer.vocab_size - 1}{named}, and the weights have {foreign.rows} rows; take those tokens out "
        rule += "of the file, or give the weights their rows (resize_token_embeddings of transformers)"
        raise ConfigError([("the tokenizer", rule)], scope=f"importing {foreign.path}")


def _tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        if file.suffix == ".bin":
            # Tensors only: what would run code is refused by torch.
            yield from torch.load(file, map_location="cpu", weights_only=True, mmap=True).items()
        else:
            yield from load_file(file).items()
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, OSError) as error:
        raise ConfigError([(str(file), f"cannot be read: {str(error).splitlines()[0]}")], scope="this import") from None


def _tokenizer_config(tokenizer: Tokenizer, ids: SpecialIds, max_seq_len: int) -> dict[str, Any]:
    """What tokenizer.json leaves unsaid."""
    backend = tokenizers.Tokenizer.from_str(tokenizer.content)
    named = {"bos_token": ids.bos, "eos_token": ids.eos, "pad_token": ids.pad, "unk_token": tokenizer.special_ids.get("<UNK>")}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name: backend.id_to_token(number) for name, number in named.items() if number is not None},
        "model_max_length": max_seq_len,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        # As in training: what looks like a special token in a text is text.
        "split_special_tokens": True,
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
