"""Texts that the arms wrote, side by side, after the same update."""

from collections.abc import Sequence
from typing import Any

from llama_lab.lab.compare.records import RunRecord
from llama_lab.lab.report.blocks import Block, Fold, Prose, Texts
from llama_lab.lab.report.figures import order_of_colours
from llama_lab.lab.report.material import Material, brief_labels
from llama_lab.training.metrics import read_rows

MOST_ARMS, MOST_PROMPTS, MOST_CHARACTERS = 4, 5, 1000

Rows = list[dict[str, Any]]


def sample_blocks(material: Material) -> list[Block]:
    """Samples of a run of each arm, of the same seed where there is one; the last update that all have, and the first and a
    middle one behind a fold."""
    brief = brief_labels(material.arms)
    arms = [(place, material.arms[number], brief[number]) for place, number in enumerate(order_of_colours(material))]
    seed = next((run.seed for run in arms[0][1].runs if all(run.seed in arm.seeds for _, arm, _ in arms)), None)
    chosen: list[tuple[int, str, RunRecord, Rows]] = []
    for place, arm, label in arms:
        run = next((run for run in arm.runs if run.seed == seed), arm.runs[0])
        rows = [] if run.folder is None else read_rows(run.folder / "samples.jsonl")
        if rows and len(chosen) < MOST_ARMS:
            chosen.append((place, label, run, rows))
    if not chosen:
        return []
    updates = sorted(set.intersection(*({row["update"] for row in rows} for *_, rows in chosen)))
    if not updates:
        return [Prose(["The arms wrote no samples after the same update, so none stand side by side."], "note")]
    of = f"{len(chosen)} of the {len(arms)} arms" if len(chosen) < len(arms) else "each arm"
    said = f"From a run of {of}, {'with the same seed' if seed is not None else 'of different seeds'}."
    earlier = list(dict.fromkeys((updates[0], updates[len(updates) // 2])))
    blocks: list[Block] = [Prose([f"After update {updates[-1]:,}. {said}"]), *_side_by_side(chosen, updates[-1])]
    return blocks + [
        Fold(f"After update {update:,}", _side_by_side(chosen, update)) for update in reversed(earlier) if update != updates[-1]
    ]


def _side_by_side(chosen: Sequence[tuple[int, str, RunRecord, Rows]], update: int) -> list[Block]:
    by_prompt = [{_prompt(row): row["text"] for row in rows if row["update"] == update} for *_, rows in chosen]
    common = [prompt for prompt in by_prompt[0] if all(prompt in texts for texts in by_prompt)][:MOST_PROMPTS]
    if not common:
        return [Prose(["The arms were given no prompt in common."], "note")]
    return [
        Texts(
            prompt, [(label, place, _bounded(texts[prompt])) for (place, label, _, _), texts in zip(chosen, by_prompt, strict=True)]
        )
        for prompt in common
    ]


def _prompt(row: dict[str, Any]) -> str:
    """A prompt as it is told apart; of a few-shot prompt the query, with the name of its set."""
    prompt = str(row["prompt"])
    return _bounded(prompt) if row.get("set") is None else f"{row['set']}: …{_bounded(prompt.rpartition(chr(10) * 2)[2])}"


def _bounded(text: str) -> str:
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}…"
