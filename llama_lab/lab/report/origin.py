"""What the runs of a report took, and what they were made with."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from llama_lab.lab.compare.arms import Arm
from llama_lab.lab.compare.records import RunRecord
from llama_lab.lab.report.blocks import Block, Prose, Table
from llama_lab.lab.report.chart import short
from llama_lab.lab.report.figures import order_of_colours
from llama_lab.lab.report.material import Material
from llama_lab.training.metrics import short_time
from llama_lab.training.run_folder import RunFolder

HASH_CHARACTERS = 12
MOST_ARMS = 12
PARTS = (("code", ("commit", "sha256")), ("versions", None), ("machine", ("processor", "device", "processes", "threads")))
NAMES = {"sha256": "sources (hash)", "commit": "commit"}


def cost_table(material: Material) -> list[Block]:
    """Time, device hours, FLOPs and, with a price of an hour, money: an arm a line, and all together."""
    runs = [run for run in material.runs if run.rows and run.folder is not None]
    if not runs:
        return []
    price = material.question.price
    device = "GPU hours" if all((run.meta.get("machine") or {}).get("device") == "cuda" for run in runs) else "device hours"
    headings = ["arm", "runs", "tokens", "FLOPs", "time", device, *(["price"] if price is not None else [])]
    rows, arms = [], []
    if len(material.arms) <= MOST_ARMS:
        place = {number: line for line, number in enumerate(order_of_colours(material))}
        for number, arm in enumerate(material.arms):
            rows.append([arm.label, *_taken(arm, price)])
            arms.append(place[number])
    rows.append(["together", *_taken(Arm("together", {}, tuple(runs)), price)])
    said = "What the runs took, start-up and what was lost by interruptions not counted"
    blocks: list[Block] = [Table(said, headings, rows, arms=[*arms, None])]
    if price is None:
        blocks.append(Prose(["--price P, of a device for an hour, adds what that comes to."]))
    return [*blocks, *_forecasts(material)]


def environment_table(material: Material) -> list[Block]:
    """Code, versions, machine, data: one value where all runs agree, else each value with its number of runs."""
    runs = [run for run in material.runs if run.meta]
    if not runs:
        return []
    rows = []
    for part, keys in PARTS:
        known = [run.meta.get(part) or {} for run in runs]
        for key in keys or dict.fromkeys(key for one in known for key in one):
            rows.append([NAMES.get(key, key), _values([one.get(key) for one in known])])
    changed = sum(bool((run.meta.get("code") or {}).get("diff")) for run in runs)
    if changed:
        rows.append(["uncommitted changes", f"in {changed} of {len(runs)} runs; llama-lab diff shows them"])
    for name, values in (
        ("training tokens", [(run.meta.get("data") or {}).get("data") for run in runs]),
        ("tokenizer", [(run.meta.get("data") or {}).get("tokenizer") for run in runs]),
        ("validation text", [run.meta.get("validation") for run in runs]),
    ):
        rows.append([f"{name} (hash)", _values(values)])
    return [Table("What the runs were made with", ["what", "value"], [row for row in rows if row[1]], words=(0, 1))]


def _forecasts(material: Material) -> list[Block]:
    """What the runs' forecasts said beside what became true, an arm a line; nothing where nothing was foreseen."""
    rows, arms = [], []
    place = {number: line for line, number in enumerate(order_of_colours(material))}
    for number, arm in enumerate(material.arms[:MOST_ARMS]):
        seconds, memory = [], []
        for run in arm.runs:
            foreseen = run.meta.get("predicted") or {}
            took = RunFolder(run.folder).summary().get("wall_seconds") if run.folder is not None and run.is_finished else None
            if "seconds" in foreseen and took is not None:
                seconds.append((foreseen["seconds"], took))
            peaks = [row["memory/peak_gib"] for row in run.rows if isinstance(row.get("memory/peak_gib"), int | float)]
            if "peak_gib" in foreseen and peaks:
                memory.append((foreseen["peak_gib"], max(peaks)))
        if seconds or memory:
            times = [short_time(sum(side)) for side in zip(*seconds, strict=True)] or ["", ""]
            sizes = [f"{max(side):.2f} GiB" for side in zip(*memory, strict=True)] or ["", ""]
            rows.append([arm.label, str(max(len(seconds), len(memory))), *times, *sizes])
            arms.append(place[number])
    headings = ["arm", "runs", "time foreseen", "time", "memory foreseen", "memory"]
    return [Table("What was foreseen before the start, and what became true", headings, rows, arms=arms)] if rows else []


def _taken(arm: Arm, price: float | None) -> list[str]:
    runs = [run for run in arm.runs if run.rows]
    seconds = [_last(run, "seconds") for run in runs]
    tokens = [_last(run, "tokens") for run in runs]
    hours = sum(one * run.processes for one, run in zip(seconds, runs, strict=True)) / 3600
    flops = sum(count * run.flops_per_token for count, run in zip(tokens, runs, strict=True))
    cells = [str(len(runs)), short(sum(tokens)), "" if flops != flops else f"{flops:.2e}", short_time(sum(seconds)), f"{hours:.3g}"]
    return [*cells, *([f"{hours * price:.2f}"] if price is not None else [])]


def _last(run: RunRecord, key: str) -> float:
    return next((row[key] for row in reversed(run.rows) if isinstance(row.get(key), int | float)), 0.0)


def _values(values: Sequence[Any]) -> str:
    counts = Counter(_short(value) for value in values if value is not None)
    if len(counts) == 1 and sum(counts.values()) == len(values):
        return next(iter(counts))
    counts["not recorded"] = len(values) - sum(counts.values())
    return ", ".join(f"{value} ({count} runs)" for value, count in sorted(counts.items()) if count) if len(counts) > 1 else ""


def _short(value: Any) -> str:
    text = str(value)
    is_hash = len(text) >= 40 and set(text) <= set("0123456789abcdef")
    return text[:HASH_CHARACTERS] if is_hash else text
