"""What can be checked of a run without training: that its files are whole, fit together, and were made by this code from this data.

Each function answers with one line of a table. Nothing is written.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from llama_lab.config.errors import ConfigError
from llama_lab.config.identity import run_hash
from llama_lab.config.schema import RunConfig
from llama_lab.data.prepare import PreparedData
from llama_lab.data.shards import MANIFEST, TOKENIZER, verify_shards
from llama_lab.data.stream import batch_hash, training_stream
from llama_lab.data.tokenizer import load_tokenizer
from llama_lab.lab.repeat.rows import Rows, first_update
from llama_lab.training.due import validation_due
from llama_lab.training.metrics import perplexity
from llama_lab.training.run_folder import RunFolder, changes_since, relative
from llama_lab.training.saving.manifest import DamagedCheckpoint, list_checkpoints, list_incomplete, verify_checkpoint
from llama_lab.training.schedule import lr_factor

SHOWN = 3
# Windows are hashed in so many tokens at once, and without being asked for only where they are few.
HASHED_TOKENS = 1 << 20
FEW_TOKENS = 20_000_000
SAME_BEST = 1e-2


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the answer.

    Attributes:
        passed: None where there was nothing to compare.
        said: what was found.
        is_exact: false where what passed is not equal bit for bit.
        reproduces: whether something that was trained again was compared.
    """

    name: str
    passed: bool | None
    said: str
    is_exact: bool = True
    reproduces: bool = False


def check_identity(run: RunConfig, folder: RunFolder) -> Check:
    """Whether config.yaml is the one that gave the run its name."""
    known = folder.meta().get("run_id", "")
    found = run_hash(run)
    # A fork's name ends with what tells it from a run from scratch, in front of its own hash.
    if known.endswith(found):
        return Check("config.yaml", True, f"gives the run's id, …{found}")
    return Check("config.yaml", False, f"was changed: it gives an id that ends with {found}, meta.json says {known or 'none'}")


def check_code(folder: RunFolder, origin: dict[str, Any]) -> Check:
    """Whether this code and these libraries are those that the run was made with."""
    changed = changes_since(folder.meta(), origin)
    if not changed:
        versions = ", ".join(f"{name} {version}" for name, version in origin["versions"].items() if version is not None)
        return Check("code, versions", True, f"as they were: {versions}")
    return Check("code, versions", False, "; ".join(f"{name} was {before}, is {now}" for name, before, now in changed))


def check_rows(run: RunConfig, folder: RunFolder, rows: Rows) -> Check:
    """Whether the lines of metrics.jsonl and batches.jsonl are whole, in order, complete, and agree with each other."""
    wrong = [*rows.broken, *_order(rows), *_contradictions(run, folder, rows), *_gaps(run, folder, rows), *_summary(folder, rows)]
    if wrong:
        more = f" (and {len(wrong) - SHOWN} more)" if len(wrong) > SHOWN else ""
        return Check("rows", False, "; ".join(wrong[:SHOWN]) + more)
    return Check(
        "rows", True, f"{len(rows.metrics)} of metrics, {len(rows.batches)} of batches, to update {rows.done} of {run.updates}"
    )


def check_checkpoints(folder: RunFolder) -> Check:
    """Whether every checkpoint is what was written, read in full."""
    wrong = [str(damage) for damage in list_incomplete(folder.checkpoints)]
    found = list_checkpoints(folder.checkpoints)
    for checkpoint in found:
        try:
            verify_checkpoint(checkpoint)
        except DamagedCheckpoint as error:
            if checkpoint.path.exists():  # else a run that is being trained has removed it
                wrong.append(str(error))
    if wrong:
        return Check("checkpoints", False, "; ".join(wrong))
    if not found:
        return Check("checkpoints", None, "there is none yet")
    updates = ", ".join(str(checkpoint.update) for checkpoint in found)
    return Check("checkpoints", True, f"every checksum of {len(found)} is right (after update {updates})")


def check_data(data: PreparedData, folder: RunFolder, *, read_all: bool) -> Check:
    """Whether the tokens and the tokenizer are those that the run was trained on.

    Args:
        read_all: compare every file with its checksum, not only what is newer than its manifest, and the sizes.
    """
    known = folder.meta().get("data", {})
    wrong = []
    if known.get("data") != data.fingerprint:
        wrong.append(f"the tokens are others: {str(known.get('data'))[:12]} then, {data.fingerprint[:12]} now")
    try:
        own = load_tokenizer(folder.path / TOKENIZER).hash
    except (ConfigError, OSError) as error:
        wrong.append(f"the run's {TOKENIZER} cannot be read ({str(error).splitlines()[-1].strip()})")
    else:
        names = ((f"the run's {TOKENIZER}", own), ("the data's tokenizer", data.tokenizer.hash))
        wrong += [f"{name} is another" for name, found in names if found != known.get("tokenizer")]
    files = "sizes"
    if read_all:
        prepared = [source.folder for source in data.sources if (source.folder / MANIFEST).is_file()]
        wrong += [f"{subject} {rule}" for one in prepared for subject, rule in verify_shards(one, relative(one))]
        files = "every checksum" if len(prepared) == len(data.sources) else "the files (those of others bring no checksums)"
    if wrong:
        return Check("data", False, "; ".join(wrong))
    more = "" if read_all else "; --data reads them all"
    return Check("data", True, f"the run's {data.train_tokens:,} training tokens and its tokenizer, {files} checked{more}")


def check_batches(run: RunConfig, data: PreparedData, rows: Rows, *, after: int, last: int, read_all: bool) -> Check:
    """Whether the windows that the run recorded are those that it would be fed now.

    Args:
        after: number of the update that the run itself began after: what came before its parent was fed, perhaps of other data.
        last: number of the last update that is looked at whatever it takes; further ones if they are few, or with `read_all`.
    """
    own = [row for row in rows.batches if row["update"] > after]
    if not own:
        return Check("batches", None, "the run has recorded none")
    few = FEW_TOKENS // run.data.tokens_per_update
    looked_at = [row for row in own if row["update"] <= last or read_all or row["update"] - after <= few]
    stream, windows = training_stream(run, data), run.windows_per_update
    at_once = max(1, HASHED_TOKENS // run.data.max_seq_len)
    for row in looked_at:
        begin, fed = (row["update"] - 1) * windows, 0
        for first in range(begin, begin + windows, at_once):
            count = min(at_once, begin + windows - first)
            fed += batch_hash(stream.batch(first, count), first, count)
        if f"{fed % 2**64:016x}" != row["hash"]:
            said = f"update {row['update']} recorded {row['hash']}, and would be fed {fed % 2**64:016x}"
            return Check("batches", False, said)
    more = "" if len(looked_at) == len(own) else f" of {len(own)}; --data looks at all"
    return Check("batches", True, f"{len(looked_at)} updates are fed the same windows{more}")


def _order(rows: Rows) -> Iterator[str]:
    """Lines that come twice, too early, or not at all though each update has one."""
    kinds = [("metrics.jsonl", "train/loss", rows.training), ("batches.jsonl", "hash", rows.batches)]
    kinds.append(("metrics.jsonl", "val/loss", [row for row in rows.metrics if "val/loss" in row]))
    for name, kind, lines in kinds:
        for before, after in pairwise(lines):
            if after["update"] <= before["update"]:
                yield f"{kind} of update {after['update']} stands behind that of update {before['update']} in {name}"
    updates = [row["update"] for row in rows.batches]
    for before, after in pairwise([0, *updates]):
        if after > before + 1:
            yield f"batches.jsonl lacks update {before + 1}"


def _contradictions(run: RunConfig, folder: RunFolder, rows: Rows) -> Iterator[str]:
    """Values of a row that do not fit each other, or what the config says of every row."""
    begin = first_update(folder)
    for row in rows.metrics:
        update = row["update"]
        if row.get("tokens") != update * run.data.tokens_per_update:
            yield f"tokens of update {update} are not {update * run.data.tokens_per_update:,}"
        for kind in ("train", "val"):
            loss = row.get(f"{kind}/loss")
            if loss is not None and not _same(row.get(f"{kind}/perplexity"), perplexity(loss)):
                yield f"{kind}/loss and {kind}/perplexity of update {update} do not fit"
        # What stands before a fork's beginning was written by its parent, under another schedule perhaps.
        if "train/lr" in row and begin < update <= run.updates:
            lr = lr_factor(run.schedule, run.optim.max_lr, update, run.updates) * run.optim.max_lr
            if not _same(row["train/lr"], lr):
                yield f"train/lr of update {update} is {row['train/lr']}, the schedule says {lr}"


def _gaps(run: RunConfig, folder: RunFolder, rows: Rows) -> Iterator[str]:
    """Rows that should be there by the config. Nothing is missed where starts were typed differently: `log` may have changed."""
    begin, last = first_update(folder), max((row["update"] for row in rows.training), default=0)
    if folder.finished and last < run.updates:
        yield f"metrics.jsonl ends with update {last}, the run has done {run.updates}"
    if rows.batches and rows.batches[-1]["update"] < last:
        yield f"batches.jsonl ends with update {rows.batches[-1]['update']}, metrics.jsonl with {last}"
    if len({str(start["command"]) for start in folder.meta().get("starts", [])}) > 1:
        return
    there = {key: {row["update"] for row in rows.metrics if key in row} for key in ("train/loss", "val/loss")}
    for update in range(begin + 1, last + 1):
        if (update == 1 or update % run.log.every_updates == 0 or update == run.updates) and update not in there["train/loss"]:
            yield f"metrics.jsonl lacks the training row of update {update}"
        # The last one may be under way.
        if (
            there["val/loss"]
            and update < last
            and validation_due(run.eval, update, run.updates)
            and update not in there["val/loss"]
        ):
            yield f"metrics.jsonl lacks the validation of update {update}"


def _summary(folder: RunFolder, rows: Rows) -> Iterator[str]:
    """Last and best values of a finished run that its rows do not have. Of one under way the summary may lag behind."""
    starts = folder.meta().get("starts", [])
    if not folder.finished or len({str(start["command"]) for start in starts}) > 1:
        return
    summary, begin = folder.summary(), first_update(folder)
    last = {key: value for row in rows.metrics if row["update"] > begin for key, value in row.items() if "/" in key}
    for key, value in last.items():
        if summary.get(key) != value:
            yield f"summary.json says that {key} is {summary.get(key)}, the last row that it is {value}"
    losses, best = [row["val/loss"] for row in rows.metrics if row.get("val/loss") is not None], summary.get("best/val/loss")
    # Rows behind the checkpoint that a run went on from were written twice, by other hardware perhaps.
    if losses and not (isinstance(best, int | float) and math.isclose(best, min(losses), rel_tol=SAME_BEST * (len(starts) > 1))):
        yield f"summary.json says that best/val/loss is {best}, the best row that it is {min(losses)}"


def _same(found: float | None, expected: float) -> bool:
    """Whether two numbers are the same but for how systems round exp and cos; null stands for one that is not finite."""
    if found is None or not math.isfinite(expected):
        return found is None and not math.isfinite(expected)
    return math.isclose(found, expected, rel_tol=1e-12)
