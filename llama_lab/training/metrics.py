"""What a run measures: rows of metrics.jsonl, the printed line, and the tracker beside them.

The local file comes first and is complete; the tracker (W&B) is a copy that may fail. Keys are `group/name`; every row has the
three x-axes `update`, `tokens` and `seconds`. docs/metrics.md says what each means.
"""

import json
import math
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llama_lab.training.console import Console
from llama_lab.training.rows import RowFile
from llama_lab.training.run_folder import RunFolder
from llama_lab.training.tracking.tracker import Tracker

FILES = ("metrics.jsonl", "samples.jsonl", "batches.jsonl")
GUARD_FILE = "guard.jsonl"


@dataclass(frozen=True, slots=True)
class Sample:
    """A generated text.

    Attributes:
        text: the continuation of `prompt`.
        set: name of the set that the prompt was drawn from; None for a prompt of the config.
    """

    prompt: str
    text: str
    set: str | None = None


class Metrics:
    """Rows, printed lines and summary of one run, on rank 0.

    Args:
        folder: where metrics.jsonl, samples.jsonl and summary.json are written.
        console: where lines are printed.
        tracker: what reads the files and sends a copy; it is asked with every row whether it still does.
        vocab_size: its logarithm is printed beside the first loss.
        total_tokens: tokens of the whole run, for the progress shown.
        start_tokens: tokens trained on before this start.
    """

    def __init__(
        self, folder: RunFolder, console: Console, tracker: Tracker, *, vocab_size: int, total_tokens: int, start_tokens: int
    ):
        self._folder, self._console, self._tracker = folder, console, tracker
        self._total_tokens, self._start_tokens = total_tokens, start_tokens
        self._vocab_size = vocab_size
        self._previous_line = time.perf_counter()
        self._fed: list[dict[str, Any]] = []
        self._files = {name: RowFile(folder.path / name, lambda text: console.say(text, style="yellow")) for name in FILES}

    def fed(self, update: int, fingerprint: int) -> None:
        """Note the 64 bits that say what an update was fed; `flush` writes them."""
        self._fed.append({"update": update, "hash": f"{fingerprint:016x}"})

    def flush(self) -> OSError | None:
        """Write what was noted into batches.jsonl, and rows that still wait for room on the disk.

        Called before a state is saved, so that no file ends before it.

        Returns:
            Why rows have to wait, if any have.
        """
        self._append("batches.jsonl", *self._fed)
        self._fed.clear()
        return next((error for file in self._files.values() if (error := file.append()) is not None), None)

    def train(
        self,
        axes: dict[str, Any],
        *,
        loss: float,
        lr: float,
        grad_norm: float,
        tokens_per_second: float,
        data_wait: float,
        peak_gib: float,
        more: dict[str, float],
    ) -> None:
        """Record and print one training row.

        Args:
            loss: in nats a token, the mean since the row before.
            data_wait: share of the time since the row before that was spent waiting for data.
            more: what is not known of every run, by metric key.
        """
        row = {
            "train/loss": loss,
            "train/perplexity": perplexity(loss),
            "train/lr": lr,
            "train/grad_norm": grad_norm,
            "speed/tokens_per_second": tokens_per_second,
            "speed/data_wait": data_wait,
            "memory/peak_gib": peak_gib,
            **more,
        }
        self.flush()
        self._record(axes, row)
        now = time.perf_counter()
        tokens = axes["tokens"]
        utilised = f" (MFU {100 * more['speed/mfu']:.1f}%)" if "speed/mfu" in more else ""
        self._console.say(
            f"Step: {axes['update']} | Training Progress: {100 * tokens / self._total_tokens:.2f}% | Training Loss: {loss:.4f} | "
            f"Perplexity: {row['train/perplexity']:.2f} | Learning Rate: {lr:.5f} | Norm: {grad_norm:.4f} | "
            f"Tokens Processed: {short_count(tokens - self._start_tokens)} ({short_count(tokens)}) | "
            f"tok/s: {tokens_per_second:.0f}{utilised} | Time: {short_time(now - self._previous_line)}"
        )
        if axes["update"] == 1:
            knowing_nothing = math.log(self._vocab_size)
            self._console.say(
                f"First loss {loss:.4f} beside ln({self._vocab_size}) = {knowing_nothing:.4f}, that of a model that knows nothing"
            )
        self._previous_line = now

    def validation(
        self, axes: dict[str, Any], *, loss: float, bits_per_byte: float, sources: dict[str, tuple[float, float]]
    ) -> None:
        """Record and print one validation.

        Args:
            loss: in nats a token.
            bits_per_byte: infinite where no bytes are known.
            sources: the same two of each source of a mixture, by its name.
        """
        row = validation_row(loss, bits_per_byte, sources)
        said = f"Validation after {axes['update']} updates: loss {loss:.4f}, perplexity {row['val/perplexity']:.2f}"
        if math.isfinite(bits_per_byte):
            said += f", {bits_per_byte:.4f} bits per byte"
        for name, (own_loss, own_bits) in sources.items():
            said += f"; {name} {own_loss:.4f}"
            if math.isfinite(own_bits):
                said += f" ({own_bits:.4f} bits per byte)"
        best = self._folder.summary().get("best/val/loss", math.inf)
        self._record(axes, row)
        if loss < best:
            self._summarise(**{"best/val/loss": loss})
        self._console.say(said, style="bold")

    def samples(self, axes: dict[str, Any], samples: Sequence[Sample], *, seed: int) -> None:
        """Record and print generated texts. Of a few-shot prompt the query alone is printed."""
        for sample in samples:
            self._append("samples.jsonl", axes | {"seed": seed} | asdict(sample))
            query = sample.prompt.rpartition("\n\n")[2]
            prompt = sample.prompt if sample.set is None else f"{sample.set}: …{query}"
            self._console.say(f"  | {_one_line(prompt)}", style="dim")
            self._console.say(f"  > {_one_line(sample.text)}", style="italic")

    def scores(self, axes: dict[str, Any], scores: dict[str, dict[str, float]]) -> None:
        """Record and print what tasks came to: values by name for each task, by its name."""
        self._record(axes, {f"task/{task}/{name}": value for task, values in scores.items() for name, value in values.items()})
        for task, values in scores.items():
            said = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in values.items())
            self._console.say(f"Task {task} after {axes['update']} updates: {said}", style="bold")

    def stopped(self, update: int, tokens: int) -> None:
        """Note how far a run has come that stops between two rows."""
        self._summarise(update=update, tokens=tokens)

    def _record(self, axes: dict[str, Any], row: dict[str, float]) -> None:
        # JSON has no infinity or NaN; null says as much and every reader takes it.
        finite = {key: value if math.isfinite(value) else None for key, value in row.items()}
        self._append("metrics.jsonl", axes | finite)
        self._summarise(**axes, **finite)
        self._tracker.listen()

    def _append(self, name: str, *rows: dict[str, Any]) -> None:
        self._files[name].append(*rows)

    def _summarise(self, **changes: Any) -> None:
        with suppress(OSError):  # on a full disk; the next row brings it up to date
            self._folder.write_summary(**changes)


def cut_back(folder: Path, update: int) -> None:
    """Make the rows those of a run that has just saved its state after `update`.

    Later rows go, a line that a kill left half-written too, and so do validation and samples of this very update: they follow
    the checkpoint and are made again.
    """
    for name in (*FILES, GUARD_FILE):
        path = folder / name
        if not path.is_file():
            continue
        kept = [line for line in path.read_bytes().splitlines(keepends=True) if _belongs(line, update)]
        draft = path.with_name(f".{name}.draft")
        draft.write_bytes(b"".join(kept))
        os.replace(draft, path)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl file, in order; none if there is no file. A last line cut by a kill is left out."""
    if not path.is_file():
        return []
    lines = [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    # As one array they are read in a third of the time.
    return json.loads(b"[" + b",".join(lines) + b"]")


def validation_row(loss: float, bits_per_byte: float, sources: dict[str, tuple[float, float]]) -> dict[str, float]:
    """What a validation's row says, by metric key; the arguments are those of `Metrics.validation`."""
    row = {"val/loss": loss, "val/perplexity": perplexity(loss)}
    for at, found in (("val", bits_per_byte), *((f"val/{name}", own[1]) for name, own in sources.items())):
        if math.isfinite(found):
            row[f"{at}/bits_per_byte"] = found
    return row | {f"val/{name}/loss": own[0] for name, own in sources.items()}


def perplexity(loss: float) -> float:
    """exp of a loss in nats: the number of equally likely tokens that would be as hard to guess. Infinite where it overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def short_count(count: float) -> str:
    """A count in whole units, as the seed's line has it: 950, 1638K, 8M, 50B. A unit starts at five, so that one step shows."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= 5 * size:
            return f"{count / size:.0f}{unit}"
    return f"{count:.0f}"


def short_time(seconds: float) -> str:
    """A duration in the way people say it: 0.4s, 53s, 4m 10s, 2h 05m."""
    if seconds < 10:
        return f"{seconds:.1f}s"
    if seconds < 60:
        return f"{seconds:.0f}s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m {rest:02d}s" if minutes < 60 else f"{minutes // 60}h {minutes % 60:02d}m"


def _belongs(line: bytes, update: int) -> bool:
    if not line.endswith(b"\n"):
        return False
    try:
        row = json.loads(line)
    except ValueError:  # torn by a power cut
        return False
    return row["update"] < update or (row["update"] == update and bool({"train/loss", "hash"} & row.keys()))


def _one_line(text: str) -> str:
    """Text with its line ends shown instead of made, so that a sample stays one line of the log."""
    return "".join("⏎" if letter == "\n" else letter if letter.isprintable() else "·" for letter in text).strip()
