"""Updates of a run made again on this machine, beside what the run has kept of them."""

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from llama_lab.config.errors import ConfigError
from llama_lab.config.resolve import resolve
from llama_lab.config.schema import Compile, Device, Precision, RunConfig
from llama_lab.data.prepare import PreparedData
from llama_lab.data.shards import TOKENIZER
from llama_lab.data.tokenizer import load_tokenizer
from llama_lab.inference.observers import validate
from llama_lab.lab.repeat.checks import Check
from llama_lab.lab.repeat.rows import SCOPE, Rows, first_update, updates_done
from llama_lab.lab.table import print_table
from llama_lab.model.count import flops_per_token
from llama_lab.training.guard import norms_told, ranked, windows_of
from llama_lab.training.metrics import GUARD_FILE, read_rows
from llama_lab.training.replay import Compared, Replayed, Request, Validations, replay, validate_again
from llama_lab.training.run_data import open_data
from llama_lab.training.run_folder import RunFolder, changes_since, describe_origin, relative
from llama_lab.training.saving.manifest import Checkpoint, is_whole, list_checkpoints

# So many operations take half a minute or less.
CHEAP_FLOPS = {Device.cpu: 2e12, Device.mps: 2e13, Device.cuda: 2e15}


@dataclass(frozen=True, slots=True)
class Noise:
    """How far results may be apart, as a share, because other hardware adds numbers up in another order."""

    loss: float
    norm: float
    weights: float


# Another micro-batch or number of processes on one CPU moves a small model within 20 updates by 1e-7, 1e-7 and 1e-5 in fp32, and by
# 3e-5, 1e-3 and 0.15 in bf16 (Muon turns the smallest differences of a gradient into those of whole steps). Other kernels get more.
NOISE = {
    Precision.fp32: Noise(loss=1e-4, norm=1e-3, weights=0.01),
    Precision.bf16: Noise(loss=1e-2, norm=0.1, weights=0.3),
    Precision.fp8: Noise(loss=1e-2, norm=0.1, weights=0.3),
}


@dataclass(frozen=True, slots=True)
class Here:
    """A run as this machine can make it.

    Attributes:
        run: resolved here.
        other: what is different about the hardware, in words; empty where nothing is known to be.
        repeats: whether results have to be equal bit for bit: on the same hardware, with nothing on it that is free to vary.
        origin: the code, versions and machine here.
    """

    run: RunConfig
    other: str
    repeats: bool
    origin: dict[str, Any]

    @property
    def place(self) -> str:
        """The hardware in a few words."""
        count = self.run.hardware.processes
        words = [self.origin["machine"]["processor"], "1 process" if count == 1 else f"{count} processes"]
        return f"{self.run.hardware.device.value} ({', '.join(word for word in words if word)})"


@dataclass(frozen=True, slots=True)
class Span:
    """Which updates are made again: those after `begin`, or after none, to number `last`."""

    begin: Checkpoint | None
    last: int

    @property
    def first(self) -> int:
        """The update that they start after."""
        return 0 if self.begin is None else self.begin.update


def find_here(run: RunConfig, folder: RunFolder) -> Here:
    """The run on the hardware that it was made on, or on what comes nearest to it here."""
    try:
        here = resolve(run)
    except ConfigError:
        hardware = replace(run.hardware, device=Device.auto, processes=None, micro_batch=None, compile=Compile.auto)
        here = resolve(replace(run, hardware=hardware))
    meta, origin = folder.meta(), describe_origin(here, command=None, data={})
    was, now = meta["machine"], origin["machine"]
    other = [f"{name} {was[name]} then, {now[name]} now" for name in now if name in was and was[name] != now[name]]
    other += [f"one start was on {start['host']}" for start in meta["starts"] if start["host"] != now["host"]][:1]
    is_steady = here.hardware.device is Device.cpu or here.hardware.deterministic
    return Here(here, "; ".join(other), is_steady and not other, origin)


def choose_span(run: RunConfig, folder: RunFolder, rows: Rows, here: Here, *, updates: int | None, least: int) -> Span:
    """The first updates that a run made itself.

    Args:
        updates: how many; None: at least `least`, and up to the first row and checkpoint behind them where that is quick.

    Raises:
        ConfigError: the run has not done so many, or nothing is left to begin at.
    """
    there = list_checkpoints(folder.checkpoints)
    begin, first = None, first_update(folder)
    if folder.meta().get("lineage"):
        begin = next((checkpoint for checkpoint in there if checkpoint.update >= first and is_whole(checkpoint)), None)
        if begin is None:
            rule = f"was {_begun(folder)}, and has no checkpoint left to begin at"
            raise ConfigError([(relative(folder.path), rule)], scope=SCOPE)
        first = begin.update
    done = updates_done(folder, rows) - first
    if done < 1:
        raise ConfigError([(relative(folder.path), "has done no update that could be made again; train it first")], scope=SCOPE)
    if updates is not None and updates > done:
        raise ConfigError([(f"--updates {updates}", f"is more than the run has done; try --updates {done}")], scope=SCOPE)
    if updates is None:
        marks = [row["update"] - first for row in rows.training if row["update"] > first + 1][:1]
        marks += [checkpoint.update - first for checkpoint in there if checkpoint.update > first][:1]
        quick = [mark for mark in marks if mark <= _quick_updates(run, folder, here)]
        updates = min(done, max([least, *quick]))
    return Span(begin, first + updates)


def _begun(folder: RunFolder) -> str:
    """Where a run that has a lineage comes from."""
    return f"forked after update {first}" if (first := first_update(folder)) else "imported"


def _quick_updates(run: RunConfig, folder: RunFolder, here: Here) -> float:
    """How many updates are made in half a minute or less."""
    try:
        vocab_size = load_tokenizer(folder.path / TOKENIZER).vocab_size
    except ConfigError:  # which is said where the data is looked at
        return 0
    return _quick_tokens(run, vocab_size, here) / run.data.tokens_per_update


def _quick_tokens(run: RunConfig, vocab_size: int, here: Here) -> float:
    """How many tokens are trained on in half a minute or less."""
    return CHEAP_FLOPS[here.run.hardware.device] / flops_per_token(run.model, vocab_size, run.data.max_seq_len)


def compare(folder: RunFolder, data: PreparedData, rows: Rows, here: Here, span: Span) -> Iterator[Check]:
    """Make updates again, and compare their rows and weights with those that the run has kept."""
    kept = {row["update"]: row for row in rows.training if span.first < row["update"] <= span.last}
    there = [found for found in list_checkpoints(folder.checkpoints) if span.first < found.update <= span.last]
    print(f"Making updates {span.first + 1} to {span.last} again on {here.place}", flush=True)
    made = replay(Request(here.run, data, span.begin, span.last, set(kept), there))
    yield _compared_rows(made, kept, here)
    weights = [row.weights for row in made if row.weights is not None]
    if not weights:
        yield Check("weights", None, f"no checkpoint lies within updates {span.first + 1} to {span.last}; --updates N goes further")
    for compared in weights:
        yield _compared_weights(compared, here)


def compare_validations(folder: RunFolder, data: PreparedData, rows: Rows, here: Here, *, every: bool) -> Check:
    """Validate checkpoints again, and compare with the rows that the run has written after the same updates.

    Args:
        every: all of them; else the newest ones, as many as take half a minute.
    """
    run, begin = here.run, first_update(folder)
    kept = {row["update"]: row for row in rows.metrics if "val/loss" in row and row["update"] > begin}
    there = [one for one in reversed(list_checkpoints(folder.checkpoints)) if one.update in kept and is_whole(one)]
    if run.eval is None or not there:
        return Check("validation", None, "no checkpoint lies where the run has validated")
    limit = run.eval.max_tokens or sys.maxsize
    tokens = sum(min(limit, source.val.tokens) for source in data.sources if source.val is not None)
    # What comes back through the layers costs twice as much as the way there.
    few = len(there) if every else int(3 * _quick_tokens(run, data.tokenizer.vocab_size, here) / max(1, tokens))
    if few < 1:
        return Check("validation", None, f"{tokens:,} tokens would take long here; --validation takes them all the same")
    chosen = there[:few]
    print(f"Validating after update {', '.join(str(one.update) for one in chosen)} again", flush=True)
    found = validate_again(Validations(run, data, chosen, validate))
    return _compared_validations({one.update: values for one, values in zip(chosen, found, strict=True)}, kept, folder, here)


def _compared_validations(
    found: dict[int, dict[str, float]], kept: dict[int, dict[str, Any]], folder: RunFolder, here: Here
) -> Check:
    most, noise = 0.0, 0.0 if here.repeats else NOISE[here.run.precision].loss
    for update, values in found.items():
        for key, value in values.items():
            before = kept[update].get(key)
            if (distance := apart(value, before)) > noise:
                said = f"{key} of update {update} was {before}, is {value}"
                if len({str(start["command"]) for start in folder.meta().get("starts", [])}) > 1:
                    return Check("validation", None, f"{said}; the run was started by several commands, perhaps with other `eval`")
                return Check("validation", False, said + _demand(here))
            most = max(most, distance)
    which = f"loss of update {', '.join(map(str, found))}"
    if not most:
        return Check("validation", True, f"{which} is equal bit for bit", reproduces=True)
    said = f"{which} differs by {_share(most)} of it at most, which is float noise"
    return Check("validation", True, said, is_exact=False, reproduces=True)


def show_update(run: RunConfig, folder: RunFolder, update: int) -> bool:
    """Make one update again, from the newest checkpoint before it, and print what is to be known of it.

    Args:
        update: one of the run's.

    Returns:
        Whether it is what the run has kept of it, as far as it has.

    Raises:
        ConfigError: no state before it is left, or its data cannot be opened.
    """
    here, rows = find_here(run, folder), Rows.of(folder)
    before = (found for found in reversed(list_checkpoints(folder.checkpoints)) if found.update < update)
    begin = next((checkpoint for checkpoint in before if is_whole(checkpoint)), None)
    if begin is None and folder.meta().get("lineage"):
        rule = f"has no checkpoint before it that could be read: {relative(folder.path)} was {_begun(folder)}"
        raise ConfigError([(f"--update {update}", rule)], scope=SCOPE)
    for name, then, now in changes_since(folder.meta(), here.origin):
        print(f"Not as it was: {name} was {then}, is {now}")
    span = Span(begin, update)
    data = open_data(run, folder, print)
    start = f"the checkpoint after update {span.first}" if span.first else "the first weights"
    print(f"Making update {update} again on {here.place}, from {start}", flush=True)
    kept = {row["update"]: row for row in rows.training}
    made = replay(Request(here.run, data, begin, update, set(kept)))[-1]
    first, last = windows_of(run, update)
    print(f"Loss {made.loss:.6g} nats a token, gradient norm {made.norm:.6g}, learning rate {made.lr:.6g}")
    print(f"Fed: windows {first:,} to {last:,}, hash {made.hash}")
    norms = ranked(made.norms)
    print(f"Gradients: {norms_told(norms)}")
    print_table(
        "Gradient norms before clipping, the worst first", ("parameter", "norm"), [(n, f"{v:.6g}") for n, v in norms.items()]
    )
    checks = list(_compared_update(folder, made, kept.get(update), rows, here))
    for check in checks:
        print(f"{check.name}: {check.said}")
    if not checks:
        print("The run has kept nothing of this update")
    return all(check.passed for check in checks)


def apart(found: float, kept: float | str | None) -> float:
    """How far a number is from one that was kept, as a share of that. What is no finite number was kept as a word, or as null."""
    if not isinstance(kept, int | float):
        return math.inf if math.isfinite(found) else 0.0
    if found == kept:
        return 0.0
    return abs(found - kept) / abs(kept) if kept and math.isfinite(found) else math.inf


def _compared_update(folder: RunFolder, made: Replayed, row: dict[str, Any] | None, rows: Rows, here: Here) -> Iterator[Check]:
    """What the run has kept of one update: its batch, its row, its line in guard.jsonl."""
    batch = next((found["hash"] for found in rows.batches if found["update"] == made.update), None)
    if batch is not None:
        yield Check("Batch", batch == made.hash, "as recorded" if batch == made.hash else f"recorded was {batch}")
    if row is not None:
        yield _compared_rows([made], {made.update: row}, here)
    guarded = [found for found in read_rows(folder.path / GUARD_FILE) if found["update"] == made.update]
    if guarded:
        limit = 0.0 if here.repeats else NOISE[here.run.precision].norm
        kept = guarded[-1]["grad_norms"] | {"the loss": guarded[-1]["loss"]}
        values = made.norms | {"the loss": made.loss}
        other = [name for name in kept if apart(values[name], kept[name]) > limit]
        said = "bad in the same way" if not other else f"other than recorded: {', '.join(other[:3])}"
        yield Check(GUARD_FILE, not other, said)


def _compared_rows(made: list[Replayed], kept: dict[int, dict[str, Any]], here: Here) -> Check:
    """Loss and gradient norm of each row, beside those that were made again."""
    noise = NOISE[here.run.precision]
    distances: dict[str, float] = {}
    for row in made:
        if row.update in kept and row.row_loss is not None:
            for key, value, limit in (("train/loss", row.row_loss, noise.loss), ("train/grad_norm", row.norm, noise.norm)):
                before = kept[row.update].get(key)
                if (distance := apart(value, before)) > (0.0 if here.repeats else limit):
                    said = f"{key} of update {row.update} was {before}, is {value} ({_share(distance)} of it)"
                    return Check("losses", False, said + _demand(here))
                distances[key] = max(distance, distances.get(key, 0.0))
    if not distances:
        return Check("losses", None, "the run has kept no row of these updates")
    which = f"loss and gradient norm of update {', '.join(map(str, kept))}"
    if not any(distances.values()):
        return Check("losses", True, f"{which} are equal bit for bit", reproduces=True)
    loss, norm = (_share(distances[key]) for key in ("train/loss", "train/grad_norm"))
    said = f"{which} differ by {loss} and {norm} of them at most, which is float noise"
    return Check("losses", True, said, is_exact=False, reproduces=True)


def _compared_weights(compared: Compared, here: Here) -> Check:
    """Weights of a checkpoint, beside those that were come to again."""
    name, differences = f"weights after update {compared.update}", compared.differences
    if not differences:
        return Check(name, True, f"all {compared.tensors} tensors are equal bit for bit", reproduces=True)
    first, most = next(iter(differences)), max(differences, key=lambda name: differences[name])
    said = f"{len(differences)} of {compared.tensors} tensors differ, first {first} by {_share(differences[first])} of it"
    said += f", most {most} by {_share(differences[most])}"
    if here.repeats or not differences[most] <= NOISE[here.run.precision].weights:
        return Check(name, False, said + _demand(here))
    return Check(name, True, f"{said}, which is float noise", is_exact=False, reproduces=True)


def _demand(here: Here) -> str:
    return "; on the hardware that made it, it has to be equal bit for bit" if here.repeats else ", more than float noise"


def _share(distance: float) -> str:
    return "no finite part" if not math.isfinite(distance) else f"{distance:.1e}"
