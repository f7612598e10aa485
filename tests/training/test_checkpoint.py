"""Checkpoints are whole or do not count, and nothing in them is ever run."""

import hashlib
import io
import json
import pickle
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from llama_lab.config.errors import ConfigError
from llama_lab.config.schema import Precision
from llama_lab.training.optim import build_optimizer
from llama_lab.training.processes.worker import Place, Worker
from llama_lab.training.run_folder import RunFolder
from llama_lab.training.saving.checkpoint import load_checkpoint, load_weights, save_checkpoint
from llama_lab.training.saving.choice import chosen_update
from llama_lab.training.saving.manifest import (
    DamagedCheckpoint,
    list_checkpoints,
    list_incomplete,
    newest_damage,
    remove_drafts,
    retire,
    set_aside,
)
from llama_lab.training.saving.tensor_file import write_tensors
from llama_lab.training.state import State

from .test_optim import CONFIGS, small_llama

MODEL = {"weight": torch.arange(12.0).view(3, 4)}
STATE = {
    "seconds": 1.5,
    "optimizer": {"state": {0: {"step": torch.tensor(3), "betas": (0.9, 0.95)}, 1: {}}, "groups": [{"lr": 1e-3, "foreach": None}]},
}


def save(folder, update, model=MODEL):
    return save_checkpoint(folder, update=update, tokens=update * 100, model=model, state=STATE, facts={"windows": update * 4})


def test_what_is_saved_comes_back_with_its_types(tmp_path):
    model, state = load_checkpoint(save(tmp_path, 1))
    assert torch.equal(model["weight"], MODEL["weight"])
    step = state["optimizer"]["state"][0].pop("step")
    assert torch.equal(step, torch.tensor(3)) and step.dtype == torch.int64
    assert state == {
        "seconds": 1.5,
        "optimizer": {"state": {0: {"betas": (0.9, 0.95)}, 1: {}}, "groups": [{"lr": 1e-3, "foreach": None}]},
    }


def test_a_checkpoint_holds_neither_code_nor_a_pickle(tmp_path):
    checkpoint = save(tmp_path, 1)
    names = {path.name for path in checkpoint.path.iterdir()}
    assert names == {"model.safetensors", "state.safetensors", "config.yaml", "manifest.json"}
    manifest = json.loads((checkpoint.path / "manifest.json").read_text())
    assert (manifest["format_version"], manifest["update"], manifest["tokens"], manifest["windows"]) == (2, 1, 100, 4)


def test_what_is_no_plain_type_is_refused_when_it_is_saved(tmp_path):
    with pytest.raises(TypeError, match=r"state\.a\.0 is a set; a checkpoint takes tensors and plain types only"):
        save_checkpoint(tmp_path, update=1, tokens=1, model=MODEL, state={"a": [set()]})


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
)
def test_tensors_of_every_kind_are_read_by_the_safetensors_library(tmp_path, dtype):
    tensors = {"matrix": torch.arange(12).view(3, 4), "scalar": torch.tensor(1), "turned": torch.arange(6).view(2, 3).T}
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()} | {
        "none": torch.zeros(0, 2),
        "odd": torch.zeros(3).byte(),
    }
    write_tensors(tmp_path / "all.safetensors", tensors)
    found = load_file(tmp_path / "all.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in tensors.items())


def test_checkpoints_are_listed_in_order_of_training_and_retired_without_a_trace(tmp_path):
    nine, ten, hundred = (save(tmp_path, update) for update in (9, 10, 100))
    assert list_checkpoints(tmp_path) == [nine, ten, hundred]
    retire(ten.path)
    assert list_checkpoints(tmp_path) == [nine, hundred]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokens-000000000000900", "tokens-000000000010000"]


def test_a_folder_without_manifest_is_no_checkpoint_and_drafts_are_removed(tmp_path):
    kept, cut = save(tmp_path, 1), save(tmp_path, 2)
    (cut.path / "manifest.json").unlink()
    for left in (".draft-tokens-000000000000300", ".removed-tokens-000000000000000"):
        shutil.copytree(kept.path, tmp_path / left)
    remove_drafts(tmp_path)
    assert list_checkpoints(tmp_path) == [kept]
    assert [str(error) for error in list_incomplete(tmp_path)] == [f"{cut.path / 'manifest.json'} is missing"]
    assert not [*tmp_path.glob(".draft-*"), *tmp_path.glob(".removed-*")]


def test_a_copy_under_another_name_is_no_checkpoint_and_stays(tmp_path):
    folder = RunFolder(tmp_path)
    first, second = save(folder.checkpoints, 1), save(folder.checkpoints, 2)
    copies = [folder.checkpoints / name for name in (f"{first.path.name}.bak", "tokens-of-mine", "tokens-")]
    for copy in copies:
        shutil.copytree(second.path, copy)
    (copies[0] / "manifest.json").unlink()
    assert folder.saved_tokens == [100, 200]
    assert list_checkpoints(folder.checkpoints) == [first, second]
    assert list_incomplete(folder.checkpoints) == []
    assert newest_damage(folder.checkpoints) is None
    assert [path.name for path in set_aside(folder.checkpoints, after=1)] == [f"damaged-{second.path.name}"]
    assert all(copy.is_dir() for copy in copies)


def test_one_flipped_bit_anywhere_is_noticed(tmp_path):
    draw = random.Random(0)
    checkpoint = save(tmp_path, 1)
    for path in sorted(checkpoint.path.iterdir()):
        whole = path.read_bytes()
        for _ in range(40 if whole else 0):
            content = bytearray(whole)
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            path.write_bytes(content)
            with pytest.raises(DamagedCheckpoint, match=rf"{path.name} is not what was saved \(its checksum differs\)"):
                load_checkpoint(checkpoint)
        path.write_bytes(whole)
    load_checkpoint(checkpoint)


@pytest.mark.parametrize("name", ["model.safetensors", "state.safetensors", "manifest.json"])
def test_a_file_that_is_cut_or_missing_is_named(tmp_path, name):
    checkpoint = save(tmp_path, 1)
    path = checkpoint.path / name
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DamagedCheckpoint, match=rf"{name} is not what was saved"):
        load_checkpoint(checkpoint)
    path.unlink()
    with pytest.raises(DamagedCheckpoint, match=rf"{name} is missing"):
        load_checkpoint(checkpoint)


def test_what_is_damaged_is_put_aside_and_does_not_count(tmp_path):
    good, bad, torn = (save(tmp_path, update) for update in (1, 2, 3))
    (torn.path / "manifest.json").write_text("{")
    moved = set_aside(tmp_path, after=1)
    assert [path.name for path in moved] == [f"damaged-{bad.path.name}", f"damaged-{torn.path.name}"]
    assert list_checkpoints(tmp_path) == [good]
    assert list_incomplete(tmp_path) == []


def test_the_best_is_the_first_of_the_lowest_that_have_a_checkpoint(tmp_path):
    rows = [(1, 1.0), (2, 3.0), (3, 2.0), (4, 2.0), (5, None)]
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps({"update": update, "val/loss": loss}) + "\n" for update, loss in rows)
    )
    run = RunFolder(tmp_path)
    assert chosen_update(run, [2, 3, 4, 5], "best", scope="this request") == 3
    assert chosen_update(run, [2, 3, 4, 5], None, scope="this request") == 5
    with pytest.raises(ConfigError, match="no checkpoint was validated; the only one is 5"):
        chosen_update(run, [5], "best", scope="this request")


def test_saving_the_same_update_again_replaces_it(tmp_path):
    save(tmp_path, 1)
    again = save(tmp_path, 1, model={"weight": torch.zeros(3, 4)})
    assert load_checkpoint(again)[0]["weight"].sum() == 0
    assert len(list_checkpoints(tmp_path)) == 1


def test_a_save_that_fails_leaves_the_one_before_and_no_draft(tmp_path):
    kept = save(tmp_path, 1)
    blocked = tmp_path / ".draft-tokens-000000000000200"
    blocked.write_text("a file where the draft should be")
    with pytest.raises(FileExistsError):
        save(tmp_path, 2)
    assert list_checkpoints(tmp_path) == [kept]
    load_checkpoint(kept)


def test_a_newer_format_is_refused_rather_than_passed_over(tmp_path, monkeypatch):
    checkpoint = save(tmp_path, 1)
    monkeypatch.setattr("llama_lab.training.saving.manifest.FORMAT_VERSION", 1)
    with pytest.raises(ConfigError, match="has format 2; this version of llama_lab reads up to 1: install the newer"):
        load_checkpoint(checkpoint)


class Trap:
    """A pickle that creates a file when it is loaded as code."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def trap(path) -> list[bytes]:
    """The same trap as plain pickle and as torch saves it."""
    zipped = io.BytesIO()
    torch.save(Trap(path), zipped)
    return [pickle.dumps(Trap(path)), zipped.getvalue()]


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("name", ["model.safetensors", "state.safetensors"])
def test_a_pickle_with_code_in_place_of_tensors_executes_nothing(tmp_path, name, kind):
    """Even where its checksum is right, as in a checkpoint that somebody made up."""
    checkpoint = save(tmp_path, 1)
    content = trap(tmp_path / "trap")[kind]
    (checkpoint.path / name).write_bytes(content)
    forge(checkpoint.path, name, content)
    with pytest.raises(DamagedCheckpoint, match=rf"{name} is no safetensors file"):
        load_checkpoint(checkpoint)
    if name == "model.safetensors":
        with pytest.raises(DamagedCheckpoint, match="no safetensors file"):
            load_weights(checkpoint)
    assert not (tmp_path / "trap").exists()
    pickle.loads(trap(tmp_path / "trap")[0]).close()
    assert (tmp_path / "trap").exists(), "the trap itself does not work"


def forge(path, name, content):
    """Make the manifest say that `content` is what was saved as `name`."""
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["sha256"]
    manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    own = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps(manifest | {"sha256": own}))


def old(path, state) -> None:
    """A checkpoint of format 1, which kept the state in a pickle."""
    path.mkdir(parents=True)
    write_tensors(path / "model.safetensors", MODEL)
    torch.save(state, path / "state.pt")
    files = {
        name: {"bytes": (path / name).stat().st_size, "sha256": hashlib.sha256((path / name).read_bytes()).hexdigest()}
        for name in ("model.safetensors", "state.pt")
    }
    (path / "manifest.json").write_text(json.dumps({"format_version": 1, "update": 1, "tokens": 100, "files": files}))


def test_a_checkpoint_of_the_first_format_is_still_read(tmp_path):
    old(tmp_path / "tokens-000000000000100", {"seconds": 1.5, "optimizer": {"step": torch.tensor(3)}})
    (checkpoint,) = list_checkpoints(tmp_path)
    model, state = load_checkpoint(checkpoint)
    assert torch.equal(model["weight"], MODEL["weight"])
    assert state == {"seconds": 1.5, "optimizer": {"step": torch.tensor(3)}}


def test_code_in_a_pickle_of_the_first_format_executes_nothing(tmp_path):
    old(tmp_path / "tokens-000000000000100", {"optimizer": Trap(tmp_path / "trap")})
    (checkpoint,) = list_checkpoints(tmp_path)
    with pytest.raises(DamagedCheckpoint, match=r"state\.pt is no plain state"):
        load_checkpoint(checkpoint)
    assert not (tmp_path / "trap").exists()


class WithoutFloat64(TorchDispatchMode):
    """A device that has no float64, as Apple's GPUs have none; "meta" stands for it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.device.type == "meta" and made.dtype == torch.float64:
            raise TypeError("this device has no float64")
        return made


def sums_of(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros((), dtype=torch.float32, device=device), torch.zeros((), dtype=torch.float32, device=device)


def test_a_run_goes_on_on_a_device_without_float64(tmp_path):
    model = small_llama(seed=1)
    optimizer = build_optimizer(model, CONFIGS["adamw"], "cpu", Precision.fp32)
    wide = {"loss_sum": torch.tensor(3.5, dtype=torch.float64), "predicted": torch.tensor(2.0, dtype=torch.float64)}
    saved = wide | {"optimizer": optimizer.state_dict(), "seconds": 1.5, "skipped": 1}
    checkpoint = save_checkpoint(tmp_path, update=4, tokens=400, model=model.state_dict(), state=saved)
    other, state = small_llama(seed=2), State(0, 0.0, *sums_of("meta"), 0)
    with WithoutFloat64():
        state.restore(checkpoint, other, build_optimizer(other, CONFIGS["adamw"], "cpu", Precision.fp32), worker_on("meta"))
    assert (state.update, state.seconds, state.skipped, state.loss_sum.dtype) == (4, 1.5, 1, torch.float32)
    assert torch.equal(other.embedding.weight, model.embedding.weight)
    state = State(0, 0.0, *sums_of("cpu"), 0)
    state.restore(checkpoint, other, build_optimizer(other, CONFIGS["adamw"], "cpu", Precision.fp32), worker_on("cpu"))
    assert (state.loss_sum.item(), state.predicted.item()) == (3.5, 2.0)


def worker_on(device: str) -> Worker:
    return Worker(Place(), torch.device(device))
