"""A run's state on disk: written whole or not at all, named by the tokens trained on.

A checkpoint is a folder:

    model.safetensors   the weights by name
    state.safetensors   the tensors of everything else that the next update depends on
    config.yaml         the run's config, as in the run's folder
    manifest.json       update, tokens, position in the data, versions, fingerprints, the plain part of the state, and a SHA-256 of
                        every file and of itself

Everything is written into a draft beside its place, the manifest last, waited for until it has reached the disk, and moved there in
one step; so what is there is whole, and what is not whole is no checkpoint. Nothing in it is code: there is no pickle to load.
"""

import hashlib
import json
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from llama_lab.training.saving.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    MODEL,
    STATE,
    WEIGHTS,
    Checkpoint,
    DamagedCheckpoint,
    own_sha256,
    read_manifest,
    remove,
    retire,
    verify_checkpoint,
)
from llama_lab.training.saving.tensor_file import write_tensors

TENSOR, ITEMS, TUPLE = "$tensor", "$items", "$tuple"


def save_checkpoint(
    folder: Path,
    *,
    update: int,
    tokens: int,
    model: dict[str, Tensor],
    state: dict[str, Any],
    facts: dict[str, Any] | None = None,
    config: str = "",
) -> Checkpoint:
    """Write one checkpoint.

    Args:
        folder: where the run's checkpoints lie.
        update, tokens: what training has done so far.
        model: weights by name, of the bare module (no wrapper's prefix), on the CPU.
        state: everything else that the next update depends on: tensors on the CPU and plain types, nested in any way.
        facts: what a reader wants to know of its origin, as JSON has it.
        config: the run's config.yaml.

    Raises:
        OSError: the disk is full or not writable; older checkpoints are untouched.
    """
    target = folder / f"tokens-{tokens:015d}"
    draft = folder / f".draft-{target.name}"
    remove(draft)
    draft.mkdir(parents=True)
    try:
        plain, tensors = _split(state)
        files = {MODEL: write_tensors(draft / MODEL, model), STATE: write_tensors(draft / STATE, tensors)}
        files["config.yaml"] = _write_text(draft / "config.yaml", config)
        sizes = {name: {"bytes": (draft / name).stat().st_size, "sha256": sha256} for name, sha256 in files.items()}
        manifest = {"format_version": FORMAT_VERSION, "update": update, "tokens": tokens, **(facts or {})}
        manifest |= {"state": plain, "files": sizes}
        _write_text(draft / MANIFEST, json.dumps(manifest | {"sha256": own_sha256(manifest)}, indent=1) + "\n")
        _sync(draft)
        retire(target)
        os.replace(draft, target)
        _sync(folder)
    except OSError:
        # On a full disk half a checkpoint is in the way of everything else.
        remove(draft)
        raise
    return Checkpoint(target, update, tokens)


def load_checkpoint(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint back, on the CPU: (weights by name, state), as they were given to `save_checkpoint`.

    Raises:
        DamagedCheckpoint: a file is missing, cut or altered.
        ConfigError: the format is newer than this code.
    """
    verify_checkpoint(checkpoint)
    manifest = read_manifest(checkpoint.path)
    model = _load_tensors(checkpoint.path / MODEL)
    if manifest["format_version"] == 1:
        return model, _load_pickle(checkpoint.path / "state.pt")
    return model, _joined(manifest["state"], _load_tensors(checkpoint.path / STATE))


def load_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The weights alone, by name, on the CPU, whatever became of the rest. Raises like `load_checkpoint`."""
    verify_checkpoint(checkpoint, WEIGHTS)
    return _load_tensors(checkpoint.path / MODEL)


def _split(state: dict[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    """The state as JSON has it, with a name in place of each tensor; and the tensors by these names."""
    tensors: dict[str, Tensor] = {}

    def plain(value: Any, at: str) -> Any:
        match value:
            case Tensor():
                tensors[at] = value
                return {TENSOR: at}
            case dict() if all(isinstance(key, str) and not key.startswith("$") for key in value):
                return {key: plain(item, f"{at}.{key}") for key, item in value.items()}
            case dict():  # JSON would turn the numbers that optimizers use as keys into text
                return {ITEMS: [[plain(key, f"{at}.key"), plain(item, f"{at}.{key}")] for key, item in value.items()]}
            case tuple():
                return {TUPLE: [plain(item, f"{at}.{number}") for number, item in enumerate(value)]}
            case list():
                return [plain(item, f"{at}.{number}") for number, item in enumerate(value)]
            case None | bool() | int() | float() | str():
                return value
        raise TypeError(f"{at} is a {type(value).__name__}; a checkpoint takes tensors and plain types only")

    return plain(state, "state"), tensors


def _joined(plain: Any, tensors: dict[str, Tensor]) -> Any:
    """What `_split` was given."""
    if isinstance(plain, list):
        return [_joined(item, tensors) for item in plain]
    if not isinstance(plain, dict):
        return plain
    if TENSOR in plain:
        return tensors[plain[TENSOR]]
    if ITEMS in plain:
        return {_joined(key, tensors): _joined(item, tensors) for key, item in plain[ITEMS]}
    if TUPLE in plain:
        return tuple(_joined(item, tensors) for item in plain[TUPLE])
    return {key: _joined(item, tensors) for key, item in plain.items()}


def _load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise DamagedCheckpoint(path, f"is no safetensors file ({error})") from None


def _load_pickle(path: Path) -> dict[str, Any]:
    """Tensors and plain types of a pickle; one that holds anything else is refused before it runs."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise DamagedCheckpoint(path, f"is no plain state ({str(error).splitlines()[0]})") from None


def _write_text(path: Path, text: str) -> str:
    """Write a small file through to the disk; returns its SHA-256."""
    content = text.encode()
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(content).hexdigest()


def _sync(path: Path) -> None:
    """Wait until a folder has reached the disk. Windows cannot open folders; its rename is journalled."""
    if os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
