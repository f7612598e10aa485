"""A Hugging Face folder of a model: config.json, weights, tokenizer, written from one of ours and read into one.

model.safetensors        the weights, under the names that LlamaForCausalLM has for them
config.json              the shape
tokenizer.json           the tokenizer, byte for byte
tokenizer_config.json    which tokens are special, and that text is never taken for one
generation_config.json   where generation ends
"""

import hashlib
import json
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from llama_lab.config.errors import ConfigError
from llama_lab.config.schema import ModelConfig, Problem
from llama_lab.data.tokenizer import Tokenizer
from llama_lab.formats.hf_config import SpecialIds, hf_config, model_of
from llama_lab.formats.names import weight_names
from llama_lab.model.llama import Llama
from llama_lab.training.tensor_file import write_tensors

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Files that hold all weights; with `.index.json` behind its name, one that says which file holds which."""
PAD_NAMES = ("<PAD>", "<pad>", "[PAD]")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
COMPUTED = (".rotary_emb.inv_freq", ".attention.masked_bias", ".attention.bias")
"""Ends of names under which old files keep what is computed from the config."""


@dataclass(frozen=True, slots=True)
class ForeignModel:
    """A folder that can be imported.

    Attributes:
        path: the folder.
        model: its shape.
        max_seq_len: positions that it was trained with.
        rows: of its embedding.
        files: those that hold weights.
    """

    path: Path
    model: ModelConfig
    max_seq_len: int
    rows: int
    files: tuple[Path, ...]

    @property
    def tokenizer(self) -> Path:
        """Its tokenizer.json, which need not exist."""
        return self.path / "tokenizer.json"

    def hash(self) -> str:
        """SHA-256 over the config and every weight, as they lie on disk."""
        digest = hashlib.sha256((self.path / "config.json").read_bytes())
        for file in self.files:
            with file.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
        return digest.hexdigest()


def special_ids(tokenizer: Tokenizer) -> SpecialIds:
    """Which ids of a tokenizer mean something to a generator.

    What the tokenizer itself puts before a text is its beginning; if it puts nothing, as those trained here, that is the token
    which ends the document before.
    """
    parsed = json.loads(tokenizer.content)
    first = next(_template_beginnings(parsed.get("post_processor")), None)
    bos = tokenizers.Tokenizer.from_str(tokenizer.content).token_to_id(first) if first is not None else None
    pad = next((tokenizer.special_ids[name] for name in PAD_NAMES if name in tokenizer.special_ids), None)
    return SpecialIds(tokenizer.eos_id if bos is None else bos, tokenizer.eos_id, pad)


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


def open_folder(path: Path) -> ForeignModel:
    """Look at a folder without reading its weights.

    Raises:
        ConfigError: it is no folder of a model, or of one that is not computed here: everything about it that is not supported.
    """
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        assert isinstance(config, dict)
    except FileNotFoundError:
        what = "holds no config.json" if path.is_dir() else "is no folder"
        rule = f"{what}; name a folder of a Hugging Face model (huggingface-cli download NAME --local-dir FOLDER makes one)"
        raise _refused([(str(path), rule)]) from None
    except (OSError, ValueError, AssertionError) as error:
        raise _refused([(str(path / "config.json"), f"cannot be read: {error}")]) from None
    found: list[Problem] = []
    model = model_of(config, found)
    files = _weight_files(path, found)
    if found or model is None:
        raise _refused(found, path)
    return ForeignModel(path, model, int(config.get("max_position_embeddings", 2048)), config["vocab_size"], files)


def read_weights(foreign: ForeignModel, vocab_size: int) -> tuple[dict[str, Tensor], int]:
    """The weights by our names, in float32, which holds every float16 and bfloat16 exactly.

    Args:
        vocab_size: rows of the embedding that the tokenizer has tokens for; rows behind them, which pad it, are left out.

    Returns:
        The weights, and how many rows were left out.

    Raises:
        ConfigError: a file cannot be read, a weight is missing, unknown, quantised or of another shape, or there are too few rows.
    """
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
        shown = problems[:8] + ([(f"{len(problems) - 8} more", "are wrong")] if len(problems) > 8 else [])
        raise _refused(shown, foreign.path)
    weights = {ours: found[name].to(torch.float32) for name, ours in names.items()}
    for name in ("embedding.weight", "output.weight"):
        if name in weights:
            weights[name] = weights[name][:vocab_size].clone()
    return weights, foreign.rows - vocab_size


def _weight_files(path: Path, found: list[Problem]) -> tuple[Path, ...]:
    for name in WEIGHTS:
        if (path / name).is_file():
            return (path / name,)
        index = path / f"{name}.index.json"
        if index.is_file():
            try:
                parts = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            except (ValueError, LookupError, AttributeError):
                found.append((str(index), "is no index of weights; copy the folder again"))
                return ()
            found += [(str(path / part), "is missing; copy the folder again") for part in parts if not (path / part).is_file()]
            return tuple(path / part for part in parts)
    found.append((str(path), f"holds no weights; looked for {', '.join(WEIGHTS)}, and the same with .index.json"))
    return ()


def _tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        if file.suffix == ".bin":
            # Tensors only: what would run code is refused by torch.
            yield from torch.load(file, map_location="cpu", weights_only=True, mmap=True).items()
        else:
            yield from load_file(file).items()
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, OSError) as error:
        raise _refused([(str(file), f"cannot be read: {str(error).splitlines()[0]}")]) from None


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


def _template_beginnings(processor: Any) -> Iterator[str]:
    """Special tokens that a post-processor puts before a text."""
    match processor:
        case {"type": "Sequence", "processors": list(parts)}:
            for part in parts:
                yield from _template_beginnings(part)
        case {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": str(name)}}, *_]}:
            yield name


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _refused(found: list[Problem], path: Path | None = None) -> ConfigError:
    return ConfigError(found, scope=f"importing {path}" if path else "this import")
