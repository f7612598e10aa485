"""Checkpoints are whole or do not count."""

import pickle

import pytest
import torch

from llama_lab.training.checkpoint import DamagedCheckpoint, list_checkpoints, load_checkpoint, remove_drafts, save_checkpoint

MODEL = {"weight": torch.arange(12.0).view(3, 4)}
STATE = {"seconds": 1.5, "optimizer": {"step": torch.tensor(3)}}


def save(folder, update, keep=10):
    return save_checkpoint(folder, update=update, tokens=update * 100, model=MODEL, state=STATE, keep=keep)


def test_what_is_saved_comes_back(tmp_path):
    model, state = load_checkpoint(save(tmp_path, 1))
    assert torch.equal(model["weight"], MODEL["weight"])
    assert state["seconds"] == 1.5
    assert state["optimizer"]["step"] == 3


def test_only_the_newest_are_kept_in_order_of_training(tmp_path):
    for update in (9, 10, 100):
        save(tmp_path, update, keep=2)
    assert [checkpoint.update for checkpoint in list_checkpoints(tmp_path)] == [10, 100]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokens-000000000001000", "tokens-000000000010000"]


def test_a_folder_without_manifest_is_no_checkpoint_and_drafts_are_removed(tmp_path):
    kept, cut = save(tmp_path, 1), save(tmp_path, 2)
    (cut.path / "manifest.json").unlink()
    (tmp_path / ".draft-tokens-000000000000300").mkdir()
    remove_drafts(tmp_path)
    assert list_checkpoints(tmp_path) == [kept]
    assert not list(tmp_path.glob(".draft-*"))


@pytest.mark.parametrize("name", ["model.safetensors", "state.pt"])
def test_one_flipped_bit_is_noticed(tmp_path, name):
    checkpoint = save(tmp_path, 1)
    content = bytearray((checkpoint.path / name).read_bytes())
    content[len(content) // 2] ^= 1
    (checkpoint.path / name).write_bytes(content)
    with pytest.raises(DamagedCheckpoint, match=name):
        load_checkpoint(checkpoint)


def test_a_missing_file_is_named(tmp_path):
    checkpoint = save(tmp_path, 1)
    (checkpoint.path / "state.pt").unlink()
    with pytest.raises(DamagedCheckpoint, match=r"state\.pt is missing"):
        load_checkpoint(checkpoint)


def test_saving_the_same_update_again_replaces_it(tmp_path):
    save(tmp_path, 1)
    again = save_checkpoint(tmp_path, update=1, tokens=100, model={"weight": torch.zeros(3, 4)}, state=STATE, keep=2)
    assert load_checkpoint(again)[0]["weight"].sum() == 0
    assert len(list_checkpoints(tmp_path)) == 1


class Boom:
    """A pickle that would create a file if it were loaded as code."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_pickle_with_code_is_refused_and_executes_nothing(tmp_path):
    checkpoint = save_checkpoint(tmp_path, update=1, tokens=1, model=MODEL, state={"trap": Boom(tmp_path / "trap")}, keep=1)
    with pytest.raises(pickle.UnpicklingError):
        load_checkpoint(checkpoint)
    assert not (tmp_path / "trap").exists()
