"""A Hugging Face folder of a model, as it looks before its weights are read. Torch-free.

    model.safetensors        the weights, under the names that LlamaForCausalLM has for them
    config.json              the shape
    tokenizer.json           the tokenizer, byte for byte
    tokenizer_config.json    which tokens are special, and that text is never taken for one
    generation_config.json   where generation ends

`hf_weights.py` writes such a folder and reads the weights of one.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from llama_lab.config.errors import ConfigError
from llama_lab.config.schema import ModelConfig, Problem
from llama_lab.data.tokenizer import Tokenizer
from llama_lab.formats.hf_config import SpecialIds, model_of

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Files that hold all weights; with `.index.json` behind its name, one that says which file holds which."""
PAD_NAMES = ("<PAD>", "<pad>", "[PAD]")


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
    pad = next((tokenizer.special_ids[name] for name in PAD_NAMES if name in tokenizer.special_ids), None)
    return SpecialIds(tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id, tokenizer.eos_id, pad)


def open_folder(path: Path) -> ForeignModel:
    """Look at a folder without reading its weights.

    Raises:
        ConfigError: it is no folder of a model, or of one that is not computed here: everything about it that is not supported.
    """
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        assert isinstance(config, dict)
    except (FileNotFoundError, NotADirectoryError):
        raise _refused([(str(path), _no_folder(path))]) from None
    except (OSError, ValueError, AssertionError) as error:
        raise _refused([(str(path / "config.json"), f"cannot be read: {error}")]) from None
    found: list[Problem] = []
    model = model_of(config, found)
    files = _weight_files(path, found)
    if found or model is None:
        raise _refused(found, path)
    return ForeignModel(path, model, int(config.get("max_position_embeddings", 2048)), config["vocab_size"], files)


def _no_folder(path: Path) -> str:
    """Why a path is no folder of a model, and what to do."""
    if (path / "config.yaml").is_file():
        return "is a run of ours, whose weights are here already: llama-lab fork goes on from it"
    what = "holds no config.json" if path.is_dir() else "is a file" if path.is_file() else "does not exist"
    return f"{what}; name a folder of a Hugging Face model (hf download NAME --local-dir FOLDER makes one)"


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


def _refused(found: list[Problem], path: Path | None = None) -> ConfigError:
    return ConfigError(found, scope=f"importing {path}" if path else "this import")
