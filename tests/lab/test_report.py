"""Reports of runs that nobody trained: what they say, that they are safe, stable and legible, and the page in a real browser."""

import itertools
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama_lab.cli import main
from llama_lab.config.errors import ConfigError
from llama_lab.config.schema import RunConfig
from llama_lab.lab.compare.arms import Arm
from llama_lab.lab.compare.records import load_records
from llama_lab.lab.report.blocks import Table
from llama_lab.lab.report.chart import COLOURS, Scale, short, spread
from llama_lab.lab.report.command import report_sweep, write_report
from llama_lab.lab.report.material import Asked, brief_labels, gather
from llama_lab.lab.report.picture import STYLES
from llama_lab.lab.report.series import Series, arm_series, in_columns, points_of, sound_parts
from llama_lab.training.run_folder import RunFolder

from .long_runs import write_long_run
from .written_runs import Make

Output = pytest.CaptureFixture[str]

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CSS = (Path(__file__).parents[2] / "llama_lab" / "lab" / "report" / "page" / "page.css").read_text(encoding="utf-8")
HOSTILE = "</script><img src=x onerror=\"document.title='taken'\">\x00\ud800\u202e & `'\""
POINTS = 300


@pytest.fixture(scope="module")
def study(untrained: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rates of three seeds, a few hundred rows each; the second is better, and writes what no page should run."""
    folder = tmp_path_factory.mktemp("report") / "outputs" / "study"
    for lr, final in ((1e-3, 2.6), (2e-3, 2.4)):
        for seed in range(3):
            texts = ("plain", HOSTILE if lr == 2e-3 else "text")
            write_long_run(
                untrained, folder / f"lr-{lr}-{seed}", seed=seed, lr=lr, points=POINTS, final=final + 0.01 * seed, texts=texts
            )
    return folder


@pytest.fixture(scope="module")
def page(study: Path) -> str:
    """The report of the study."""
    write_report(gather([str(study)], Asked(is_timed=True), ["llama-lab", "report", "study"]), study.parent / "report")
    return (study.parent / "report" / "report.html").read_text(encoding="utf-8")


def answer(folder: Path, *words: str) -> str:
    """What a report of a folder begins with."""
    out = folder.parent / "out"
    assert main(["report", str(folder), "--out", str(out), *words]) == 0
    text = (out / "report.md").read_text(encoding="utf-8").replace("\\", "")
    assert (out / "report.html").is_file()
    return text.partition("## ")[0]


def test_the_report_says_what_compare_says(study: Path, tmp_path: Path, capsys: Output):
    assert main(["compare", str(study), "--to-loss"]) == 0
    compared = capsys.readouterr().out
    assert main(["report", str(study), "--to-loss", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    sentence = next(line for line in compared.splitlines() if " is better than " in line)
    assert f"{sentence}." in said
    text = (tmp_path / "report.md").read_text(encoding="utf-8").replace("\\", "").replace("&lt;", "<")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    lines = [re.split(r" {2,}", line.strip()) for line in compared.splitlines() if line.startswith("  max_lr=")]
    assert len(lines) == 6
    for line in lines:
        assert line in cells
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_runs_give_the_same_bytes_from_anywhere(study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    found = []
    for number, folder in enumerate((tmp_path, study.parent, study)):
        monkeypatch.chdir(folder)
        moved = Path(os.path.relpath(study, folder)) if number else study
        out = tmp_path / str(number)
        _, written = write_report(gather([str(moved)], Asked(), ["llama-lab", "report", "outputs/study"]), out)
        found.append([path.read_bytes() for path in written])
    assert len(found[0]) == 3
    assert found[0] == found[1] == found[2]
    assert str(study).encode() not in found[0][0]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "a single seed": ({"seeds": 1}, "cannot be said; val/loss is 0.1000 lower, but max_lr=0.001 has a single seed"),
    "unfinished": ({"last": 12}, "is not finished (preempted, update 12 of 20)"),
    "unequal budgets": ({"training_tokens": 20480, "last": 40}, "was trained on 20,480 tokens, "),
    "no finite number": ({"end": None}, "has no finite number as its last val/loss; it cannot be in a mean"),
    "another tokenizer": ({"data": {"data": "d", "tokenizer": "other"}}, "val/bits_per_byte"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_compared_is_said_in_a_sentence(case: str, make: Make):
    more, said = BAD[case]
    more = dict(more)
    for seed in range(more.pop("seeds", 2)):
        folder = make(seed, 2.0, 1e-3)
        make(seed, **{"end": 1.9, "lr": 2e-3, **more})
    text = answer(folder.parent)
    assert said in text
    if case not in ("a single seed", "another tokenizer"):
        assert "No verdict: these runs cannot be compared as they are." in text
        whole = (folder.parent.parent / "out" / "report.md").read_text(encoding="utf-8")
        assert "## Verdicts" not in whole
        assert "## Curves" in whole


def test_runs_without_metrics_are_named_and_have_no_curve(make: Make):
    for seed in range(2):
        make(seed, 2.0, 1e-3)
    empty = make(0, 1.9, 2e-3, status="running")
    (empty / "metrics.jsonl").write_text("", encoding="utf-8")
    text = answer(empty.parent)
    assert f"{empty.parent.name}/{empty.name} is not finished (dead, update 0 of 20)" in text
    whole = (empty.parent.parent / "out" / "report.md").read_text(encoding="utf-8").replace("\\", "")
    assert f"{empty.name}: has no metrics yet, and so no curve." in whole


def test_a_run_whose_metrics_are_gone_is_not_said_to_have_none(make: Make):
    lost = make(0, 2.0)
    (lost / "metrics.jsonl").unlink()
    said = f"{lost.name} is finished, and its metrics.jsonl is missing; put it back from a copy"
    text = answer(lost)
    assert said in text and "train it" not in text.replace("train it anew", "")
    make(1, 2.1)
    text = answer(lost.parent)
    assert said in text and "no finite" not in text


def test_runs_stopped_before_their_validation_have_a_page_all_the_same(make: Make, capsys: Output):
    for lr in (1e-3, 2e-3):
        folder = make(0, lr=lr, last=8)
        text = (folder / "metrics.jsonl").read_text(encoding="utf-8").replace("val/loss", "train/loss")
        (folder / "metrics.jsonl").write_text(text.replace("val/bits_per_byte", "train/bits_per_byte"), encoding="utf-8")
    rule = "val/loss was measured in none of these runs: train them as far as a validation, or --metric train/loss compares by that"
    said = answer(folder.parent)
    assert rule in said and "do not mean the same" not in said
    assert "train/loss as a table" in (folder.parent.parent / "out" / "report.html").read_text(encoding="utf-8")
    assert main(["compare", str(folder.parent), "--at", "tokens"]) == 2
    assert rule in capsys.readouterr().err


def test_one_config_and_one_run_have_nothing_to_be_compared_with(make: Make):
    folder = make(0, 2.0)
    assert "One finished run: val/loss 2.0000. One seed does not say how far another would end." in answer(folder.parent)
    make(1, 2.1)
    assert "One config with 2 finished seeds: val/loss 2.0000 to 2.1000." in answer(folder.parent)
    make(2, 9.0, last=8)
    text = answer(folder.parent)
    assert "One config with 2 finished seeds: val/loss 2.0000 to 2.1000." in text
    assert "is not finished (preempted, update 8 of 20)" in text


def test_tables_begin_with_the_first_validation_and_write_all_seeds_alike(make: Make):
    for lr in (1e-3, 2e-3):
        for seed in range(2):
            folder = make(seed, 2.0, lr, data_seed=0)
    answer(folder.parent)
    whole = (folder.parent.parent / "out" / "report.md").read_text(encoding="utf-8").replace("\\", "")
    assert "| arm | 2,048 | 4,096 | 6,144 | 8,192 | 10,240 |" in whole
    assert "| seed (init/data/sampling) |" in whole
    html = (folder.parent.parent / "out" / "report.html").read_text(encoding="utf-8")
    entire, late = (float(scale.split()[1]) for scale in re.findall(r'data-y="([^"]+)"', html)[:2])
    assert late < 2.4 < entire  # the value before the later half does not stretch the close-up
    rows = [line.split(" | ") for line in whole.partition("## Runs")[2].splitlines() if line.startswith("| tiny/")]
    assert [row[2] for row in rows] == ["0/0/0", "1/0/0"] * 2


def test_every_process_of_a_run_costs(make: Make):
    run = load_records([str(make(0, machine={"processes": 2, "host": "here"}))])
    curve = arm_series(run, [points_of(run[0], "val/loss")], "cost", 7.2)
    # Rows after 2, 4, … 10 seconds, of two devices at 7.2 an hour.
    assert curve is not None and curve.places.tolist() == pytest.approx([0.008, 0.016, 0.024, 0.032, 0.04])


def test_gaps_stay_gaps_and_are_said(make: Make):
    for lr in (1e-3, 2e-3):
        for seed in range(2):
            folder = make(seed, 2.0, lr)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    rows[2]["val/loss"] = None
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    answer(folder.parent)
    whole = (folder.parent.parent / "out" / "report.md").read_text(encoding="utf-8").replace("\\", "")
    assert f"{folder.name}: 1 of 5 values of val/loss are no finite numbers, first after 6,144 tokens: a gap, marked ×." in whole
    html = (folder.parent.parent / "out" / "report.html").read_text(encoding="utf-8")
    line = re.search(r'class="line a1" data-arm="1" d="([^"]+)"', html)
    assert line is not None and line[1].count("M") == 2
    assert 'class="lost a1"' in html


def test_a_run_in_two_places_is_refused(make: Make, tmp_path: Path, capsys: Output):
    folder = make(0)
    shutil.copytree(folder, tmp_path / "elsewhere" / folder.name)
    assert main(["report", str(folder), str(tmp_path / "elsewhere" / folder.name)]) == 2
    assert "one run in two places; name one of them" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert "names no folder or CSV file" in capsys.readouterr().err
    make(5, lr=2e-3)
    for flag, hint in (
        ("--metric=val/los", "did you mean val/loss?"),
        ("--at=cost", "--price 2.5"),
        ("--baseline=zzz", "of no arm"),
    ):
        assert main(["report", str(folder.parent), "--out", str(tmp_path / "none"), flag]) == 2
        assert hint in capsys.readouterr().err
    (tmp_path / "file").touch()
    make(1)
    assert main(["report", str(folder.parent), "--out", str(tmp_path / "file" / "x")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def write_sweep(make: Make, outputs: Path) -> Path:
    """A sweep of six drawn points, of which one failed and one left nothing."""
    folder = outputs / "tiny" / "sweeps" / "lr-abc"
    jobs = []
    for number in range(1, 7):
        lr = 1e-3 * number
        run = make(0, 2.0 - 0.01 * number, lr, **({"last": 8, "status": "failed"} if number == 5 else {}))
        jobs.append({"number": number, "values": {"optim.max_lr": str(lr), "optim": "muon"}, "folder": f"../../{run.name}"})
    shutil.rmtree(outputs / "tiny" / Path(jobs[5]["folder"]).name)
    (folder / "jobs" / "0006").mkdir(parents=True)
    (folder / "jobs" / "0006" / "outcome.json").write_text('{"status": "failed (OutOfMemory)"}', encoding="utf-8")
    axes = [{"key": key, "choices": [], "is_log": False} for key in ("optim.max_lr", "optim")]
    settings = {"objective": "val/loss", "direction": "minimize"}
    (folder / "sweep.json").write_text(json.dumps({"jobs": jobs, "axes": axes, "settings": settings}), encoding="utf-8")
    return folder


def test_a_sweep_is_reported_with_what_failed(make: Make, outputs: Path):
    folder = write_sweep(make, outputs)
    page = report_sweep(folder).read_text(encoding="utf-8")
    assert "job 6 (optim.max_lr=0.006 optim=muon) left no run: failed (OutOfMemory)" in page
    assert "is not finished (failed, update 8 of 20)" in page
    assert "Lowest" not in page and "single seed" in page
    best = re.search(r'<th scope="row">.*?1</th><td>([^<]+)</td>', page.partition("What was tried, by")[2])
    assert best is not None and best[1] == "0.004"
    assert "maximize" not in page


def test_a_job_that_failed_before_its_validation_takes_no_verdict_from_the_others(make: Make, outputs: Path):
    folder = outputs / "tiny" / "sweeps" / "lr-abc"
    runs = [make(seed, 2 + 0.01 * seed - gain, lr=lr) for lr, gain in ((1e-3, 0), (2e-3, 0.3)) for seed in range(3)]
    broken = make(3, lr=2e-3, last=4, status="failed")
    (broken / "metrics.jsonl").write_text('{"update": 1, "tokens": 512, "seconds": 0.1, "train/loss": 5.5}\n', encoding="utf-8")
    jobs = [
        {"number": number, "values": {"seed.init": str(number), "optim.max_lr": "x"}, "folder": os.path.relpath(run, folder)}
        for number, run in enumerate([*runs, broken], start=1)
    ]
    axes = [{"key": key, "choices": ["x"], "is_log": False} for key in ("seed.init", "optim.max_lr")]
    settings = {"objective": "val/loss", "direction": "minimize"}
    folder.mkdir(parents=True)
    (folder / "sweep.json").write_text(json.dumps({"jobs": jobs, "axes": axes, "settings": settings}), encoding="utf-8")
    page = report_sweep(folder).read_text(encoding="utf-8")
    assert "max_lr=0.002 is better than max_lr=0.001" in page and "is not finished (failed" in page


def test_points_that_were_stopped_early_are_averaged_with_nothing(make: Make, outputs: Path):
    folder = outputs / "tiny" / "sweeps" / "lr-abc"
    ends = ((1e-3, 0, 2.0, 20), (1e-3, 1, 2.2, 20), (2e-3, 0, 1.9, 20), (2e-3, 1, 1.0, 8), (3e-3, 0, 1.0, 8), (3e-3, 1, 1.0, 4))
    jobs = []
    for number, (lr, seed, end, last) in enumerate(ends, start=1):
        run = make(seed, end, lr, last=last)
        values = {"optim.max_lr": str(lr), "seed.init": str(seed)}
        jobs.append({"number": number, "values": values, "folder": f"../../{run.name}"})
        (folder / "jobs" / f"{number:04}").mkdir(parents=True)
        status = "finished" if last == 20 else f"stopped early after update {last}"
        (folder / "jobs" / f"{number:04}" / "outcome.json").write_text(json.dumps({"status": status}), encoding="utf-8")
        # The state that was saved is a little further than the last row.
        if last < 20:
            RunFolder(run).write_summary(status="preempted", update=last + 2)
    axes = [{"key": key, "choices": ["x"], "is_log": False} for key in ("optim.max_lr", "seed.init")]
    settings = {"objective": "val/loss", "direction": "minimize", "search": "grid"}
    (folder / "sweep.json").write_text(json.dumps({"jobs": jobs, "axes": axes, "settings": settings}), encoding="utf-8")
    material = gather([str(folder)], Asked(), ["llama-lab", "report"])
    sections, _ = write_report(material, folder)
    table = next(block for section in sections if section.name == "sweep" for block in section.blocks if isinstance(block, Table))
    last = f"{1.0 * (20 / 8) ** 0.2:.4f}"
    assert table.rows == [
        ["1", "0.002", "1", "1.9000", "finished, stopped early"],
        ["2", "0.001", "2", "2.1000", "finished"],
        ["", "0.003", "", last, "stopped early; val/loss after update 8"],
    ]
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "was stopped early, after update 10 of 20" in page
    # The later half, close up, has names of the curves that are in it alone; and what finished is not averaged with what did not.
    late = page.partition("the later half, close up")[2].partition('<div class="along')[0]
    assert "max_lr=0.001 2.1; max_lr=0.002 1.9.</desc>" in late
    assert re.findall(r'class="label [^>]*>([^<]+)<', late) == ["max_lr=0.001", "max_lr=0.002"]
    assert "max_lr=0.002: its curve is without seed 1, which was stopped early." in page


def test_points_of_a_sweep_are_lines(untrained: RunConfig, tmp_path: Path):
    for number in range(5):
        folder = tmp_path / "outputs" / "study" / str(number)
        write_long_run(
            untrained, folder, seed=0, lr=10.0 ** -(2 + number / 2), points=40 + 20 * (number % 2), final=2 + number / 10
        )
    material = gather([str(folder.parent)], Asked(), ["llama-lab", "report"])
    assert material.study is None
    write_report(material, tmp_path, page_only=True)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    figure = page.partition('<figure class="parallel">')[2].partition("</figure>")[0]
    assert figure.count("data-rank=") == 5
    assert "max_lr (log)" in figure and "training_tokens" in figure
    assert "Thick: the lowest val/loss" in figure


def test_columns_hold_every_value_and_never_bridge_a_gap():
    draw = np.random.default_rng(0)
    places = np.sort(draw.random(5000))
    values = draw.normal(size=5000)
    values[1234], values[4321] = 9.0, -9.0
    shown = in_columns(places, Series(places, values, values - 1, values + 1, 2, None), slice(0, 5000), 0.01)
    assert shown.is_thinned and shown.places.size <= 101
    assert (shown.places[0], shown.places[-1]) == (places[0], places[-1])
    assert (shown.low.min(), shown.high.max()) == (-10.0, 10.0)
    counts = np.histogram(places, places[0] + 0.01 * np.arange(102))[0]
    assert shown.middle @ counts[counts > 0] == pytest.approx(values.sum())
    few = Series(places[:3], values[:3], values[:3], values[:3], 1, None)
    assert in_columns(few.places, few, slice(0, 3), 1e-9).middle.tolist() == values[:3].tolist()
    gaps = np.array([np.nan, 1.0, 2.0, np.nan, np.nan, 3.0])
    assert [(part.start, part.stop) for part in sound_parts(gaps)] == [(1, 3), (5, 6)]


def test_labels_stand_apart_and_close_to_their_lines():
    draw = np.random.default_rng(1)
    for count in range(1, 9):
        wanted = sorted((300 * draw.random(count) ** 3).tolist())
        found = spread(wanted, 17.0, 300.0)
        assert all(after - before >= 17.0 - 1e-9 for before, after in itertools.pairwise(found))
        assert min(found) >= 0 and max(found) <= 300
    assert spread([10.0, 200.0], 17.0, 300.0) == [10.0, 200.0]
    assert spread([100.0, 100.0, 100.0], 17.0, 300.0) == [83.0, 100.0, 117.0]
    assert spread([300.0, 300.0], 17.0, 300.0) == [283.0, 300.0]


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ([{"optim": "muon", "optim.max_lr": 0.008}, {"optim": "adamw", "optim.max_lr": 0.001}], ["muon", "adamw"]),
        ([{"optim.max_lr": 0.0080000001}, {"optim.max_lr": 0.01}], ["max_lr=0.008", "max_lr=0.01"]),
        (
            [{"schedule": kind, "optim.max_lr": lr} for kind, lr in (("wsd", 0.008), ("constant", 0.004), ("constant", 0.008))],
            ["wsd", "constant max_lr=0.004", "constant max_lr=0.008"],
        ),
        ([{key: number == place for place, key in enumerate("abc")} for number in range(4)], ["0", "1", "2", "3"]),
    ],
)
def test_a_name_beside_a_curve_says_no_more_than_tells_it_apart(values: list[dict[str, Any]], names: list[str]):
    assert brief_labels([Arm(str(number), own, ()) for number, own in enumerate(values)]) == names


def test_the_picture_shows_the_later_half_beside_the_whole_where_there_is_one(study: Path, make: Make, tmp_path: Path):
    make(last=8)
    widths = []
    for folder in (study, make(last=8, seed=1).parent):
        write_report(gather([str(folder)], Asked(), ["llama-lab", "report"]), tmp_path)
        # Bytes 16 to 20 of a PNG hold its width.
        widths.append(int.from_bytes((tmp_path / "curves.png").read_bytes()[16:20], "big"))
    assert widths == [1440, 780]


def test_ticks_are_round_and_numbers_short():
    assert Scale(2.4, 3.3, False).ticks(5) == pytest.approx([2.4, 2.6, 2.8, 3.0, 3.2])
    assert Scale(1e3, 1e6, True).ticks(4) == pytest.approx([1e3, 1e4, 1e5, 1e6])
    assert Scale(0.001, 0.008, True).ticks(4) == pytest.approx([0.001, 0.002, 0.003, 0.005, 0.007])
    assert [short(value) for value in (0, 0.002, 12.5, 1500, 2_000_000, 3e15, 4e-6)] == [
        "0",
        "0.002",
        "12.5",
        "1.5K",
        "2M",
        "3e15",
        "4e-6",
    ]


def colours(theme: int) -> dict[str, str]:
    """The style sheet's own colours; 0: light, 1: dark."""
    return {name: pair[theme] for name, *pair in re.findall(r"--([\w]+): light-dark\((#\w{6}), (#\w{6})\)", CSS)}


def linear(colour: str) -> np.ndarray:
    channels = np.array([int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)])
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def contrast(one: str, other: str) -> float:
    """Of WCAG 2.2."""
    bright = sorted(float(linear(colour) @ (0.2126, 0.7152, 0.0722)) for colour in (one, other))
    return (bright[1] + 0.05) / (bright[0] + 0.05)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_every_colour_has_the_contrast_that_its_use_asks_for(theme: int):
    known = colours(theme)
    texts = ["ink", "soft", "blue", *(f"a{number}" for number in range(COLOURS))]
    assert all(contrast(known[name], known["paper"]) >= 4.5 for name in texts)
    assert contrast(known["ink"], known["tint"]) >= 4.5
    assert all(contrast(known[name], known["paper"]) >= 3 for name in ("rest", "edge", "good", "wrong"))


# Machado, Oliveira and Fernandes, A Physiologically-based Model for Simulation of Color Vision Deficiency (2009), severity 1.
BLIND = {
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def oklab(rgb: np.ndarray) -> np.ndarray:
    to_lms = [[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566]]
    to_lms += [[0.0883024619, 0.2817188376, 0.6299787005]]
    to_lab = [[0.2104542553, 0.793617785, -0.0040720468], [1.9779984951, -2.428592205, 0.4505937099]]
    to_lab += [[0.0259040371, 0.7827717662, -0.808675766]]
    return np.array(to_lab) @ np.cbrt(np.array(to_lms) @ np.clip(rgb, 0, 1))


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_arms_are_told_apart_without_colour_and_with_any_colour_vision(theme: int):
    dashes = re.findall(r"\.line\.a\d \{ stroke: var\(--a\d\);(?: stroke-dasharray: ([\d ]+);)?", CSS)
    assert len(dashes) == len(set(dashes)) == COLOURS
    first = [linear(colours(theme)[f"a{number}"]) for number in range(3)]
    for matrix in BLIND.values():
        seen = [oklab(np.array(matrix) @ colour) for colour in first]
        assert all(math.dist(a, b) > 0.06 for a, b in itertools.combinations(seen, 2))
    assert [colour for colour, _ in STYLES] == [colours(0)[f"a{number}"] for number in range(COLOURS)]


class Outline(HTMLParser):
    """What the rules of accessibility ask about."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.faults: list[str] = []
        self.tags: list[str] = []
        self.names: list[str] = []
        self.levels: list[int] = []
        self.pointed: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.tags.append(tag)
        self.ids += [found["id"]] if "id" in found else []
        self.pointed += f"{found.get('aria-labelledby', '')} {found.get('aria-describedby', '')}".split()
        if re.fullmatch(r"h\d", tag):
            self.levels.append(int(tag[1]))
        if tag == "th" and found.get("scope") not in ("col", "row"):
            self.faults.append("th without scope")
        if tag == "svg" and found.get("role") != "img" and found.get("aria-hidden") != "true":
            self.faults.append("svg that says nothing")
        if found.get("role") == "region":
            self.names.append(found["aria-label"])
            self.faults += [] if found.get("tabindex") == "0" else ["a box that scrolls and the keyboard does not reach"]
        self.faults += [f"{name} on {tag}" for name in found if name.startswith("on")]
        if tag in ("link", "img", "script") and (found.get("src") or found.get("href", "data:,")) != "data:,":
            self.faults.append(f"{tag} fetches something")


def test_the_page_has_the_structure_that_readers_and_keyboards_need(page: str):
    outline = Outline()
    outline.feed(page)
    assert outline.faults == []
    assert len(outline.ids) == len(set(outline.ids))
    assert set(outline.pointed) <= set(outline.ids)
    assert len(outline.names) == len(set(outline.names)) > 5
    assert outline.tags.count("table") == outline.tags.count("caption") > 5
    assert outline.levels[0] == 1 and all(after - before <= 1 for before, after in itertools.pairwise(outline.levels))
    assert {"html", "main", "nav", "header", "figure", "desc", "fieldset", "legend"} <= set(outline.tags)
    assert '<html lang="en">' in page
    assert outline.tags.count("img") == 0


def test_what_runs_wrote_stays_text(page: str, study: Path):
    assert "&lt;/script&gt;&lt;img src=x onerror=" in page
    assert page.count("<script") == page.count("</script>") == 2
    assert "\x00" not in page
    text = (study.parent / "report" / "report.md").read_text(encoding="utf-8")
    assert "<img" not in re.sub(r"(`{3,})text\n.*?\n\1", "", text, flags=re.DOTALL)


def test_a_report_of_several_hundred_points_is_small(page: str):
    assert len(page.encode()) < 400_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        pytest.skip("no Chromium is installed")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        # Containers seldom allow what Chromium's own sandbox needs; the page is ours.
        opened = driver.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield opened
        opened.close()


def test_the_page_in_a_browser(browser: Any, page: str, study: Path):
    complaints: list[str] = []
    seen = browser.new_page(viewport={"width": 360, "height": 740})
    seen.on("console", lambda message: complaints.append(message.text))
    seen.on("pageerror", lambda error: complaints.append(str(error)))
    seen.goto((study.parent / "report" / "report.html").as_uri())
    assert seen.evaluate("document.documentElement.scrollWidth") == 360
    # Nor with a number at the very end of the differences' scale.
    seen.locator(".scale span").last.evaluate("tick => { tick.style.left = '100%'; tick.textContent = '+0.025' }")
    assert seen.evaluate("document.documentElement.scrollWidth") == 360
    assert seen.title() == "tiny"
    # Where there is no room beside the close-up, its lines are named above it.
    legend = seen.locator("figure.chart").first.locator(".along-tokens .ends")
    assert legend.is_visible() and legend.locator("span").all_text_contents() == ["max_lr=0.001", "max_lr=0.002"]
    whole = seen.locator("figure.chart").first
    assert whole.locator(".along-tokens").is_visible() and not whole.locator(".along-seconds").is_visible()
    seen.get_by_label("tokens", exact=True).focus()
    seen.keyboard.press("ArrowRight")
    seen.keyboard.press("ArrowRight")
    assert whole.locator(".along-seconds").is_visible() and not whole.locator(".along-tokens").is_visible()
    plot = whole.locator(".along-seconds .plot").first
    plot.focus()
    seen.keyboard.press("End")
    seen.keyboard.press("ArrowLeft")
    read = whole.locator(".readout").text_content()
    assert re.fullmatch(r"6\d\.?\d* seconds:  max_lr=0.001 2\.7\d+  ·  max_lr=0.002 2\.5\d+", read), read
    seen.get_by_role("checkbox", name="max_lr=0.002").uncheck()
    assert plot.locator(".line.a1").evaluate("path => getComputedStyle(path).visibility") == "hidden"
    plot.hover()
    assert "max_lr=0.002" not in whole.locator(".readout").text_content()
    seen.set_viewport_size({"width": 1280, "height": 800})
    assert seen.evaluate("document.documentElement.scrollWidth") == 1280
    labels = [box.bounding_box() for box in whole.locator(".along-seconds .label").all()]
    assert len(labels) == 2
    assert not legend.is_visible()
    assert all(box["x"] + box["width"] <= 1280 for box in labels)
    assert complaints == []


def test_without_a_script_the_page_still_switches(browser: Any, page: str, study: Path):
    context = browser.new_context(java_script_enabled=False)
    seen = context.new_page()
    seen.goto((study.parent / "report" / "report.html").as_uri())
    seen.get_by_role("radio", name="FLOPs").check()
    assert seen.locator("figure.chart .along-flops").first.is_visible()
    assert not seen.locator("figure.chart .along-tokens").first.is_visible()
    context.close()


def test_a_title_and_a_baseline_are_taken(study: Path, tmp_path: Path, capsys: Output):
    words = ["report", str(study), "--out", str(tmp_path), "--title", "Which <rate>?", "--baseline", "max_lr=0.002", "--price", "2"]
    assert main(words) == 0
    assert "max_lr=0.001 is worse than max_lr=0.002" in capsys.readouterr().out
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<title>Which &lt;rate&gt;?</title>" in page
    assert 'id="axis-cost"' in page
    with pytest.raises(ConfigError, match="names no folder"):
        gather([str(tmp_path / "none")], Asked(), [])


def test_what_was_foreseen_stands_beside_what_became_true(make: Make, tmp_path: Path):
    for seed, (foreseen, took) in enumerate([(100.0, 110.0), (100.0, 130.0), (50.0, None)]):
        folder = make(seed, predicted={"seconds": foreseen, "seconds_from": "a probe", "peak_gib": 1.5, "peak_from": "a formula"})
        if took is not None:
            RunFolder(folder).write_summary(wall_seconds=took)
    make(0, lr=2e-3)
    assert main(["report", str(folder.parent), "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    _, _, rest = text.partition("What was foreseen before the start, and what became true")
    lines = itertools.takewhile(lambda line: line.startswith("|"), rest.strip("*:. \n").splitlines())
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    # Only runs of which both are known are added up. Nothing was foreseen of the other arm, and no row tells the memory.
    assert [line[1:] for line in cells[2:]] == [["2", "3m 20s", "4m 00s", "", ""]]
