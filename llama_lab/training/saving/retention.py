"""Which checkpoints a run writes, which of them stay, and the disk that they take. Torch-free, for plans and early refusals."""

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llama_lab.config.errors import ConfigError
from llama_lab.config.schema import RunConfig
from llama_lab.model.count import parameters
from llama_lab.training.saving.manifest import checkpoint_folders

BYTES_OF_WEIGHTS = 4
"""Weights are fp32 whatever `precision` says."""


@dataclass(frozen=True, slots=True)
class Need:
    """The disk that a run's checkpoints take.

    Attributes:
        each: bytes of one, to about a percent.
        written: how many are written in the whole run.
        newest, best, permanent: how many stay at the end because they are the newest, the best by validation, or one of those
            kept for ever.
    """

    each: int
    written: int
    newest: int
    best: int
    permanent: int

    @property
    def most(self) -> int:
        """How many there are at once at most: a new one is complete before an old one goes."""
        return min(self.written, self.newest + self.best + self.permanent + 1)

    def said(self) -> str:
        """The numbers in words: 42 MB each, at most 4 at once (2 newest, the best, 1 being written), 168 MB."""
        kinds = [f"{self.newest} newest"]
        if self.best:
            kinds.append("the best" if self.best == 1 else f"{self.best} best")
        if self.permanent:
            kinds.append(f"{self.permanent} for good")
        if self.most > self.newest + self.best + self.permanent:
            kinds.append("1 being written")
        at_once = f"at most {self.most} at once ({', '.join(kinds)}), {short_bytes(self.most * self.each)}"
        return f"{short_bytes(self.each)} each, {at_once}"


def need(run: RunConfig, vocab_size: int) -> Need:
    """The disk that a run's checkpoints take, from its config and the size of its vocabulary."""
    node = run.checkpoint
    for_good = _crossings(run, node.keep_every_tokens)
    written = len({*for_good, *_crossings(run, node.every_tokens), run.updates})
    newest = min(node.keep, written)
    permanent = min(len(for_good), written - newest)
    best = min((node.keep_best or 0) if run.eval is not None else 0, written - newest - permanent)
    return Need(checkpoint_bytes(run, vocab_size), written, newest, best, permanent)


def checkpoint_bytes(run: RunConfig, vocab_size: int) -> int:
    """Weights and optimizer states on disk, to about a percent."""
    size = parameters(run.model, vocab_size)
    outside = vocab_size * run.model.dim * (1 if run.model.tie_embeddings else 2)
    return size * BYTES_OF_WEIGHTS + run.optim.state_bytes(size - outside, outside)


def checkpoint_due(run: RunConfig, update: int) -> bool:
    """Whether a checkpoint follows this update because of the tokens trained on: to be gone on from, or to be kept for good."""
    node = run.checkpoint
    return crosses(run, update, node.every_tokens) or crosses(run, update, node.keep_every_tokens)


def crosses(run: RunConfig, update: int, every_tokens: int | None) -> bool:
    """Whether this update passes a multiple of `every_tokens`."""
    size = run.data.tokens_per_update
    return every_tokens is not None and update * size // every_tokens > (update - 1) * size // every_tokens


def retained(run: RunConfig, updates: Sequence[int], losses: Mapping[int, float]) -> set[int]:
    """Which checkpoints stay: the newest, the best by validation, and those kept for good.

    What is kept for good follows from the update's number alone, so a run that was stopped keeps what one that never was keeps.

    Args:
        updates: those that have a checkpoint, in order.
        losses: validation loss by update. A checkpoint without one is never among the best.
    """
    node = run.checkpoint
    newest = updates[-node.keep :]
    for_good = [update for update in updates if crosses(run, update, node.keep_every_tokens)]
    validated = sorted((update for update in updates if update in losses), key=lambda update: (losses[update], update))
    return {*newest, *for_good, *validated[: node.keep_best or 0]}


def check_disk(needed: Need, folder: Path) -> None:
    """Refuse a run that could not save anything.

    Args:
        folder: where its checkpoints will lie; it need not exist yet.

    Raises:
        ConfigError: not even one of them would fit.
    """
    free = free_bytes(folder)
    if free < needed.each:
        rule = f"has {short_bytes(free)} free, a checkpoint of this run takes {short_bytes(needed.each)}; make room on that disk, "
        rule += "or set LLAMA_LAB_OUTPUTS to a folder on a larger one"
        raise ConfigError([(str(folder), rule)])


def beside_free(needed: Need, folder: Path) -> str:
    """What the checkpoints need, in words, beside what is free where they will lie."""
    free = free_bytes(folder)
    if math.isinf(free):
        return needed.said()
    said = f"{needed.said()}; {short_bytes(free)} free"
    there = len(checkpoint_folders(folder))
    if (fits := free // needed.each) < needed.most - there:
        said += f", which is enough for {fits} more: make room, or lower checkpoint.keep"
    return said


def free_bytes(folder: Path) -> float:
    """Bytes that can still be written where `folder` is, or would be made; infinite where the file system does not count them."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    usage = shutil.disk_usage(there)
    return usage.free if usage.total else math.inf


def short_bytes(count: float) -> str:
    """A size in three digits: 512 B, 42 MB, 1.23 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def _crossings(run: RunConfig, every_tokens: int | None) -> set[int]:
    """All updates of the run that pass a multiple of `every_tokens`."""
    size = run.data.tokens_per_update
    if every_tokens is None:
        return set()
    if every_tokens <= size:
        return set(range(1, run.updates + 1))
    return {-(-number * every_tokens // size) for number in range(1, run.updates * size // every_tokens + 1)}
