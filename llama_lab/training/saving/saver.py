"""Checkpoints written while training goes on: a copy is taken between two updates, and a thread brings it to the disk.

What a save costs the training:

- On a GPU, one wait of the host for the device, for the check that every weight is finite, and the time to enqueue one copy a
  tensor. The copies run on a stream of their own, to page-locked memory, beside the next forward and backward, which only read what
  is copied; the device (not the host) waits for them before the next step changes it. No device memory is taken. Page-locking
  itself takes a good part of a second a gigabyte, once: a thread does it while the first update compiles, and the memory is kept
  from save to save.
- On a CPU, one copy of the state within memory.
- Then a thread: it reads that copy once, for the checksum and the file together. Both leave Python's lock free, so that the loop
  can go on giving work to the device; on a CPU it takes a part of one core.

Host memory holds one copy of the state, not more: a save that is due while another is being written waits for it. So every
checkpoint that is due is made, and how fast the disk is decides nothing but time.
"""

import errno
import json
import os
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llama_lab.config.disk import FULL, remedy, why
from llama_lab.config.schema import RunConfig
from llama_lab.training.run_folder import RunFolder
from llama_lab.training.saving.checkpoint import save_checkpoint
from llama_lab.training.saving.manifest import list_checkpoints, retire
from llama_lab.training.saving.retention import free_bytes, retained, short_bytes

# Page-locked memory comes in powers of two, so it is taken in blocks of one, which tensors then share.
BLOCK_BYTES = 1 << 28
ALIGNMENT = 64
# Waiting for one save before the next is said where it has taken so many seconds, and this share of the time since the first.
TOLD_SECONDS, TOLD_SHARE = 5.0, 0.1
# Beside the tensors: what headers and manifest say of each, the rest of the manifest and the config, and what a file system takes
# for itself. Measured: 265 bytes a tensor in all, where there are 54. The checkpoints before this one are on the disk already.
TENSOR_BYTES = 1 << 9
MARGIN_BYTES = 1 << 16


class Saver:
    """Writes a run's checkpoints, one at a time, and keeps those that are to stay. Only rank 0 is given anything to save.

    As a context it waits, at its end, for what is being written, whatever ended it: nobody else may write in the folder before.

    Args:
        run: resolved.
        folder: held by this process or its parent.
        device: where the state is that will be saved.
        say: prints a line.
    """

    def __init__(self, run: RunConfig, folder: RunFolder, device: torch.device, say: Callable[[str], None]):
        self._run, self._folder, self._say = run, folder, say
        self._copy = HostCopy(device)
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: tuple[int, Future[None]] | None = None
        self._failed: tuple[int, OSError] | None = None
        self._facts: dict[str, Any] | None = None
        self._losses: dict[int, float] = {}
        self._rows_read = 0
        self._written_seconds: list[float] = []
        self._waited, self._first_save, self._told = 0.0, 0.0, False

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown(wait=True)

    def save(self, update: int, model: nn.Module, state: dict[str, Any], *, unless: OSError | None = None) -> None:
        """Begin to save what holds after `update`; the one before is waited for.

        Args:
            model: bare, without a wrapper.
            state: tensors and plain types that the next update depends on besides the weights.
            unless: why the rows of the run could not be written. A state without them is no state to go on from.
        """
        due = time.monotonic()
        self.wait()
        self._tell_of_waiting(due, time.monotonic())
        if unless is not None:
            self._fail(update, unless)
            return
        weights, rest = self._copy.take((model.state_dict(), state))
        self._writing = update, self._pool.submit(self._write, update, weights, rest)

    def reserve(self, size: int) -> None:
        """Have host memory ready for a state of about so many bytes by the time of the first save. Returns at once."""
        self._copy.reserve(size)

    def before_step(self) -> None:
        """Call it before anything changes what may be being copied: on a GPU, the device then finishes the copy first."""
        self._copy.protect()

    def report(self) -> None:
        """Say so if the save under way has failed; never waits."""
        if self._writing is not None and self._writing[1].done():
            self.wait()

    def wait(self) -> None:
        """Wait for the save under way. One that the disk refused is said and training goes on; any other error is raised."""
        if self._writing is None:
            return
        (update, task), self._writing = self._writing, None
        try:
            task.result()
            self._failed = None
        except OSError as error:
            self._fail(update, error)

    def close(self) -> str | None:
        """Wait for the last save, remove what need not stay, and note in summary.json what a save took in the background. Returns
        what is to be said if the last one failed."""
        self.wait()
        if self._written_seconds:
            with suppress(OSError):
                self._folder.write_summary(save_seconds=round(statistics.median(self._written_seconds), 3))
        if self._failed is None:
            self._prune()
            return None
        update, error = self._failed
        return (
            f"the checkpoint after update {update}, the last one, could not be written ({why(error)}); {self._kept()}. "
            f"{_capital(remedy(error))} and type the same command again, which goes on from what is saved"
        )

    def _tell_of_waiting(self, due: float, ready: float) -> None:
        """Say once that saves follow each other faster than they are written."""
        self._first_save = self._first_save or due
        self._waited += ready - due
        whole = ready - self._first_save
        if not self._told and self._written_seconds and self._waited > max(TOLD_SECONDS, TOLD_SHARE * whole):
            self._told = True
            self._say(
                f"Training has waited {self._waited:.0f} of the last {whole:.0f} s for checkpoints to be written, which takes "
                f"{self._written_seconds[-1]:.1f} s each; a larger checkpoint.every_tokens, or auto, trains faster"
            )

    def _fail(self, update: int, error: OSError) -> None:
        self._failed = update, error
        fewer = ", or lower checkpoint.keep" if error.errno in FULL else ""
        self._say(
            f"The checkpoint after update {update} could not be written ({why(error)}). Training goes on; {self._kept()}. "
            f"{_capital(remedy(error))}{fewer}; the next one is tried as planned"
        )

    def _write(self, update: int, weights: dict[str, Tensor], state: dict[str, Any]) -> None:
        """What the thread does."""
        start = time.monotonic()
        self._copy.wait()
        needed = sum(tensor.nbytes + TENSOR_BYTES for tensor in self._copy.tensors) + MARGIN_BYTES
        if (free := free_bytes(self._folder.checkpoints)) < needed:
            # Found out before the disk is full, for then the rows of the metrics would have no room either.
            raise OSError(errno.ENOSPC, f"it takes {short_bytes(needed)}, {short_bytes(free)} are free")
        # A checkpoint that survives a power cut is worth little if the rows before it do not.
        for rows in self._folder.path.glob("*.jsonl"):
            _sync(rows)
        save_checkpoint(
            self._folder.checkpoints,
            update=update,
            tokens=update * self._run.data.tokens_per_update,
            model=weights,
            state=state,
            facts={"windows": update * self._run.windows_per_update, **self._origin()},
            config=(self._folder.path / "config.yaml").read_text(encoding="utf-8"),
        )
        self._prune()
        self._written_seconds.append(time.monotonic() - start)

    def _prune(self) -> None:
        """Remove every checkpoint that neither its age nor its loss nor its number keeps."""
        found = list_checkpoints(self._folder.checkpoints)
        stay = retained(self._run, [checkpoint.update for checkpoint in found], self._validated())
        for checkpoint in found:
            if checkpoint.update not in stay:
                with suppress(OSError):  # it stays, and is tried again after the next save
                    retire(checkpoint.path)

    def _validated(self) -> dict[int, float]:
        """Validation loss by update, from the rows on disk; each is read once."""
        path = self._folder.path / "metrics.jsonl"
        if path.is_file():
            with path.open("rb") as file:
                file.seek(self._rows_read)
                for line in file:
                    if not line.endswith(b"\n"):  # being written just now
                        break
                    self._rows_read += len(line)
                    if b'"val/loss"' in line and (row := json.loads(line))["val/loss"] is not None:
                        self._losses[row["update"]] = row["val/loss"]
        return self._losses

    def _origin(self) -> dict[str, Any]:
        """What the state was made by and from, read once: versions, code, data and tokenizer, the tracker's run, seeds."""
        if self._facts is None:
            meta, seed = self._folder.meta(), self._run.seed
            code = {name: value for name, value in meta["code"].items() if name != "diff"}
            self._facts = {
                "run_id": meta["run_id"],
                "code": code,
                "versions": meta["versions"],
                "data": meta["data"],
                "tracker_id": meta.get("wandb_id"),
                "seeds": {"init": seed.init, "data": seed.data, "sampling": seed.sampling},
            }
        return self._facts

    def _kept(self) -> str:
        found = list_checkpoints(self._folder.checkpoints)
        return f"the one after update {found[-1].update} stays" if found else "there is none before it"


class HostCopy:
    """A copy in host memory of tensors that live on a device, taken while the device works on. The memory is used again.

    Attributes:
        tensors: the copies of the last `take`, to be read after `wait`.
    """

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._done: torch.cuda.Event | None = None
        self._unprotected = False
        self._reserving: threading.Thread | None = None
        self._blocks: list[Tensor] = []
        self._used = 0
        self.tensors: list[Tensor] = []

    def reserve(self, size: int) -> None:
        """Page-lock about so many bytes in a thread of its own, which ends with the process if it is not waited for."""
        if self._stream is not None:
            self._reserving = threading.Thread(target=self._lock_pages, args=(size,), daemon=True, name="page-locking")
            self._reserving.start()

    def take(self, tree: Any) -> Any:
        """Copy every tensor in nested dicts, lists and tuples.

        Returns:
            The same tree with copies in place of the tensors. They hold the values of this moment once `wait` returns.
        """
        before, self.tensors = self.tensors, []
        if self._reserving is not None:
            self._reserving.join()
            self._reserving = None
        if self._stream is None:
            return self._copied(tree, before)
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            copied = self._copied(tree, before)
            self._done = torch.cuda.Event()
            self._done.record(self._stream)
        self._unprotected = True
        return copied

    def protect(self) -> None:
        """Have whatever is given to the device from now on wait until the copies are made."""
        if self._unprotected and self._done is not None and self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(self._done)
        self._unprotected = False

    def wait(self) -> None:
        """Wait until the copies are made."""
        if self._done is not None:
            self._done.synchronize()

    def _copied(self, tree: Any, before: list[Tensor]) -> Any:
        match tree:
            case Tensor():
                return self._one(tree.detach(), before)
            case dict():
                return {key: self._copied(item, before) for key, item in tree.items()}
            case list() | tuple():
                return type(tree)(self._copied(item, before) for item in tree)
        return tree

    def _one(self, tensor: Tensor, before: list[Tensor]) -> Tensor:
        place = len(self.tensors)
        copy = before[place] if place < len(before) else None
        if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
            copy = self._room(tensor)
        copy.copy_(tensor, non_blocking=self._stream is not None)
        if self._stream is not None and tensor.is_cuda:
            # Should its owner drop the tensor, its memory is not given to another one before it has been read.
            tensor.record_stream(self._stream)
        self.tensors.append(copy)
        return copy

    def _room(self, tensor: Tensor) -> Tensor:
        """Host memory of a tensor's shape and type: the next stretch of a block where one has so much left."""
        if not self._blocks or tensor.nbytes > BLOCK_BYTES:
            return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._stream is not None)
        if self._used + tensor.nbytes > BLOCK_BYTES:
            self._blocks.pop(0)
            self._used = 0
            return self._room(tensor)
        stretch = self._blocks[0][self._used : self._used + tensor.nbytes]
        self._used += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        return stretch.view(tensor.dtype).view(tensor.shape)

    def _lock_pages(self, size: int) -> None:
        for _ in range(-(-size // BLOCK_BYTES)):
            self._blocks.append(torch.empty(BLOCK_BYTES, dtype=torch.uint8, pin_memory=True))


def _capital(text: str) -> str:
    """Text as the beginning of a sentence."""
    return text[:1].upper() + text[1:]


def _sync(path: Path) -> None:
    """Wait until what others wrote into a file has reached the disk."""
    with path.open("ab") as file:
        os.fsync(file.fileno())
