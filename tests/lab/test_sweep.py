"""Sweeps before they start: what a command expands to, what is drawn, and what is refused."""

import csv
import json
import math
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from llama_lab.config.compose import compose
from llama_lab.config.errors import ConfigError
from llama_lab.config.identity import former_run_id, run_folder
from llama_lab.config.schema import Direction
from llama_lab.lab import sweep as sweeps
from llama_lab.lab.sweep import Sweep, describe, load_sweep
from llama_lab.lab.sweep.frozen import freeze
from llama_lab.lab.sweep.halving import Candidate, Halving, falls_behind, rung_updates
from llama_lab.lab.sweep.jobs import Outcome, place
from llama_lab.lab.sweep.local import choose_gpus
from llama_lab.lab.sweep.search import base_of, changed
from llama_lab.lab.sweep.show import Board, print_results, write_summary
from llama_lab.lab.sweep.space import Axis, axis_problems, draw_points, read_axis
from llama_lab.training.run_folder import relative

SMOKE = ["experiment=smoke", "wandb=null", "hardware=cpu"]
TEXTS = ["hardware=cpu", "data=text"]


def expand(overrides: list[str], *, multirun: bool = True, config_dir: Path | None = None) -> Sweep:
    found = sweeps.expand(overrides, multirun=multirun, config_dir=config_dir)
    assert found is not None
    return found


def problems(*overrides: str, multirun: bool = True, config_dir: Path | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        expand(list(overrides), multirun=multirun, config_dir=config_dir)
    return str(caught.value).splitlines()


def test_every_combination_is_a_job_with_its_own_folder():
    sweep = expand([*SMOKE, "optim.max_lr=1e-3,2e-3", "seed.init=range(0,3)"])
    assert [(job.values["optim.max_lr"], job.values["seed.init"]) for job in sweep.jobs] == [
        (rate, seed) for rate in ("0.001", "0.002") for seed in ("0", "1", "2")
    ]
    assert [job.run.optim.max_lr for job in sweep.jobs] == [1e-3] * 3 + [2e-3] * 3
    assert [job.run.seed.init for job in sweep.jobs] == [0, 1, 2] * 2
    assert len({job.folder for job in sweep.jobs}) == 6
    assert {job.point for job in sweep.jobs} == {"optim.max_lr=0.001", "optim.max_lr=0.002"}


def test_lists_are_read_as_hydra_reads_them():
    assert [job.run.model.tie_embeddings for job in expand([*SMOKE, "model.tie_embeddings=choice(true,false)"]).jobs] == [
        True,
        False,
    ]
    schedules = [job.values["schedule"] for job in expand(["hardware=cpu", "schedule=glob(*)"]).jobs]
    assert schedules == ["constant", "cosine", "linear", "wsd"]
    # A list of one value is no sweep, and a quoted comma is text.
    sweep = expand([*SMOKE, "seed.init=0,1", "sample.prompts=['a, b','c']"])
    assert sweep.jobs[1].run.sample is not None
    assert sweep.jobs[1].run.sample.prompts == ["a, b", "c"]


def test_the_last_of_two_overrides_of_one_key_counts():
    assert len(expand([*SMOKE, "seed.init=0,1,2", "seed.init=3,4"]).jobs) == 2


def test_what_is_no_science_joins_the_folder_name():
    folders = [job.folder.name for job in expand([*SMOKE, "hardware.micro_batch=1,2"]).jobs]
    assert len(set(folders)) == 2
    alone = {expand([*SMOKE, "hardware.micro_batch=1,2", "seed.init=0,1"]).jobs[0].folder.name}
    assert alone == {folders[0]}, "another swept key must not rename a run"


def test_the_sweep_s_folder_follows_from_the_jobs():
    one = expand([*SMOKE, "optim.max_lr=1e-3,2e-3"]).folder
    assert one.parent.name == "sweeps"
    assert one.name.startswith("max_lr-")
    assert expand([*SMOKE, "optim.max_lr=2e-3,1e-3"]).folder == one
    assert expand([*SMOKE, "optim.max_lr=2e-3,3e-3"]).folder != one


def test_a_job_is_typed_alone_without_what_starts_sweeps():
    job = expand([*SMOKE, "seed.init=0,1", "sweep.at_once=1"]).jobs[1]
    assert job.overrides == [*SMOKE, "seed.init=1"]
    assert job.run.sweep is None
    compose(job.overrides)


def test_members_of_a_sweep_are_one_group_at_wandb():
    sweep = expand(["hardware=cpu", "wandb.tags=[mine]", "seed.init=0,1", "name=study"])
    (node, other) = (job.run.wandb for job in sweep.jobs)
    assert node is not None
    assert node == other
    assert (node.group, node.job_type, node.tags) == (f"study-{sweep.folder.name}", "sweep", ["mine", "study"])
    typed = expand(["hardware=cpu", "wandb.group=ours", "wandb.job_type=ablation", "seed.init=0,1"]).jobs[0].run.wandb
    assert typed is not None
    assert (typed.group, typed.job_type) == ("ours", "ablation")


def test_all_jobs_are_checked_before_the_first_starts(outputs: Path):
    heading, *lines = problems(*SMOKE, "model.n_heads=2,3,4,5", "schedule.warmup_updates=-1")
    assert "of 4 jobs; none was started" in heading
    assert any("schedule.warmup_updates=-1" in line and "job" not in line for line in lines), "a problem of all jobs is said once"
    assert sum("schedule.warmup_updates" in line for line in lines) == 1
    assert any("model.n_heads=3" in line and line.endswith("(job 2)") for line in lines)
    assert not any("(job 1)" in line for line in lines)
    assert not outputs.exists()


@pytest.mark.parametrize(
    ("line", "draws", "said"),
    [
        ("optim.weight_decay=glob(*)", False, "gives no values"),
        ("schedule=glob(x*)", False, "gives no values; there are constant, cosine, linear, wsd"),
        ("optim.max_lr=interval(0,1)", False, "or add sweep.search=random sweep.trials=20 to draw from it"),
        ("optim.max_lr=interval(1,0)", True, "is no interval from a lower to a higher number"),
        ("optim.max_lr=tag(log,interval(0,1))", True, "has no logarithm at its lower end"),
        ("model.n_layers=interval(1.2,1.8)", True, "holds no whole number"),
        ("seed.init=interval(0,9)", True, "type them: seed.init=0,1,2"),
    ],
)
def test_values_that_cannot_be_tried_are_refused(line: str, draws: bool, said: str):
    ((subject, rule),) = axis_problems(read_axis(OverridesParser.create().parse_override(line)), draws=draws)
    assert (subject, said in rule) == (line, True), rule


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["optim.max_lr=1e-3,0.001"], "is the same run as optim.max_lr=0.001 (jobs 1 and 2)"),
        (["seed.init=1"], "needs a key with several values"),
        (["optim.max_lr=range(0,"], "optim.max_lr=range(0,"),
        (["optim.max_rl=1e-3,2e-3"], "optim.max_rl=1e-3,2e-3 is no field; did you mean optim.max_lr?"),
        (["seed=0,1,2"], "seed=0,1,2 holds several values; type seed.init=0,1,2"),
        (["seeds=0,1"], "seeds=0,1 is no field; did you mean seed.init or seed.data or seed.sampling?"),
        (["seed.init=0,1", "sweep.search=random", "sweep.trials=4"], "leaves sweep.search=random nothing to choose"),
        (["seed.init=0,1", "sweep.trials=4"], "sweep.trials=4 counts nothing in a grid"),
        (["optim.max_lr=interval(1,2)", "sweep.search=random"], "does not say how many points"),
        (["seed.init=0,1", "sweep.trials=3,4"], "is about the sweep as a whole"),
        (["seed.init=0,1", "sweep.objective=val/los"], "did you mean sweep.objective=val/loss?"),
        (["seed.init=0,1", "eval=null"], "leaves no sweep.objective=val/loss to compare"),
        (["seed.init=0,1", "sweep.halvings=2"], "makes none there; try eval.every_updates=5"),
        (["seed.init=0,1", "sweep.halvings=1", "sweep.objective=train/loss"], "compares validations"),
        (["seed.init=0,1", "sweep.launcher=slurm"], "cannot be found out here for Slurm's nodes"),
    ],
)
def test_what_is_no_sweep_is_refused(overrides: list[str], said: str):
    assert said in "\n".join(problems(*SMOKE, *overrides))


def test_a_single_run_has_nothing_that_starts_several():
    assert "add -m and a key with several values" in problems("seed.init=1", "sweep.at_once=2", multirun=False)[1]


def test_refused_where_every_rank_would_start_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "0")
    assert "torchrun" in problems(*SMOKE, "seed.init=0,1")[1]


def test_a_preset_can_be_a_sweep(tmp_path: Path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "rates.yaml").write_text(
        "# @package _global_\n# Which rate?\nhydra:\n  mode: MULTIRUN\n"
        "  sweeper:\n    params:\n      optim.max_lr: 1e-3,2e-3\n      seed.init: range(2)\nsweep:\n  at_once: 3\n",
        encoding="utf-8",
    )
    overrides = ["experiment=rates"]
    found = expand(overrides, multirun=False, config_dir=tmp_path)
    assert (len(found.jobs), found.settings.at_once) == (4, 3)
    # The command line wins over the preset; with everything given it is one run.
    assert len(expand([*overrides, "seed.init=7"], multirun=False, config_dir=tmp_path).jobs) == 2
    assert expand([*overrides, "sweep.at_once=1"], multirun=False, config_dir=tmp_path).settings.at_once == 1
    assert sweeps.expand([*overrides, "seed.init=7", "optim.max_lr=1e-3"], multirun=False, config_dir=tmp_path) is None
    assert sweeps.expand(["experiment=smoke"], multirun=False) is None
    assert sweeps.expand(["seed.init=0"], multirun=False) is None
    assert "is a sweep itself" in problems("experiment=rates,smoke", config_dir=tmp_path)[1]


def test_random_points_are_drawn_from_what_was_typed_and_more_of_them_go_on():
    words = [*SMOKE, "optim.max_lr=tag(log,interval(1e-3,1e-1))", "model.n_layers=interval(1,3)", "optim=muon,adamw"]
    few, more = (expand([*words, "sweep.search=random", f"sweep.trials={count}"]) for count in (2, 8))
    assert [job.folder for job in more.jobs[:2]] == [job.folder for job in few.jobs]
    assert few.folder == more.folder
    rates = [job.run.optim.max_lr for job in more.jobs]
    assert all(1e-3 <= rate <= 1e-1 for rate in rates)
    assert {job.run.model.n_layers for job in more.jobs} == {1, 2, 3}
    assert {job.values["optim"] for job in more.jobs} == {"muon", "adamw"}
    assert expand([*words, "sweep.search=random", "sweep.trials=2", "sweep.seed=1"]).folder != few.folder


def test_each_drawn_point_is_run_with_every_seed():
    jobs = expand([*SMOKE, "optim.max_lr=interval(1e-3,2e-3)", "seed.init=0,1", "sweep.search=random", "sweep.trials=2"]).jobs
    assert len(jobs) == 4
    assert Counter(job.point for job in jobs) == dict.fromkeys({job.point for job in jobs}, 2)
    assert [job.values["seed.init"] for job in jobs] == ["0", "1"] * 2


def test_drawing_covers_the_logarithm_evenly_and_ends_where_there_is_nothing_new():
    axis = Axis("optim.max_lr", "", low=1e-4, high=1e-2, is_log=True)
    values = [float(point["optim.max_lr"]) for point in draw_points([axis], 400, seed=0)]
    assert 160 < sum(value < 1e-3 for value in values) < 240
    assert len(draw_points([Axis("a", "", ("1", "2")), Axis("b", "", ("x", "y"))], 100, seed=0)) == 4


def test_a_sweep_typed_twice_has_its_jobs_once_however_the_outputs_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("LLAMA_LAB_OUTPUTS", "../out2")
    words = [*SMOKE, "seed.init=0,1"]
    first = expand(words)
    freeze(first)
    again = expand(words)
    freeze(again)
    assert [job.folder for job in again.jobs] == [job.folder for job in first.jobs]
    assert len(load_sweep(first.folder).jobs) == 2
    assert first.folder.is_relative_to(tmp_path / "out2")


def test_a_sweep_that_was_frozen_when_runs_had_other_names_goes_on():
    words = [*TEXTS, f"data.path={'a' * 90}.txt", "seed.init=0,1,2"]
    sweep = expand(words)
    freeze(sweep)
    former = [former_run_id(job.run, job.slug) for job in sweep.jobs]
    path = sweep.folder / "sweep.json"
    known = json.loads(path.read_text(encoding="utf-8"))
    for entry, name in zip(known["jobs"], former, strict=True):
        entry["folder"] = f"../../{name}"
    path.write_text(json.dumps(known), encoding="utf-8")
    study = sweep.folder.parents[1]
    (study / former[0]).mkdir()
    # What has begun keeps its name, what has not gets the one under which it will be trained.
    meant = [study / former[0], *(job.folder for job in sweep.jobs[1:])]
    assert [job.folder for job in load_sweep(sweep.folder).jobs] == meant
    again = expand(words)
    assert (again.folder, [job.folder for job in again.jobs]) == (sweep.folder, meant)


def test_a_long_value_outside_the_science_makes_a_folder_that_can_be_made():
    groups = ",".join(f"'{'Größe ' * 60}{end}'" for end in "ab")
    sweep = expand(["hardware=cpu", f"wandb.group={groups}", "hardware.micro_batch=1,2"])
    for job in sweep.jobs:
        job.folder.mkdir(parents=True)
        assert job.folder == run_folder(job.run, job.slug)
    assert len({job.folder for job in sweep.jobs}) == 4


def test_a_frozen_run_with_changed_fields_is_the_run_that_would_be_composed():
    sweep = expand([*SMOKE, "optim=muon,adamw", "optim.max_lr=interval(1e-3,2e-2)", "sweep.search=optuna", "sweep.trials=6"])
    assert len(sweep.jobs) == 2
    assert sweep.to_come == 4
    assert [base.values["optim"] for base in sweep.bases] == ["muon", "adamw"]
    point = {"optim": "adamw", "optim.max_lr": "0.01234"}
    base = sweep.bases[1].run
    assert base.sample is not None
    sweep.bases[1].run = replace(base, sample=replace(base.sample, prompts=["echo ${HOME}"]))
    made = changed(sweep.bases[1].run, point)
    composed = expand([*SMOKE, "optim=muon,adamw", "optim.max_lr=0.01234,0.02"]).jobs[2]
    assert composed.values == point
    assert place(made, point)[1] == composed.folder
    assert made.optim == composed.run.optim
    assert made.sample == sweep.bases[1].run.sample
    with pytest.raises(ConfigError, match="is not above 0"):
        changed(sweep.bases[1].run, point | {"optim.max_lr": "-1.0"})


def test_tokenizers_are_ranked_by_bits_per_byte_unless_another_measure_was_typed():
    words = ["hardware=cpu", "tokenizer.vocab_size=264,512"]
    sweep = expand([*words, "sweep.halvings=1", "eval.every_updates=100"])
    assert (sweep.settings.objective, sweep.unranked) == ("val/bits_per_byte", None)
    said = "# The jobs are ranked by val/bits_per_byte: their tokenizers differ (tokenizer.vocab_size), and a nat a token is not"
    assert said in describe(sweep)
    (typed,) = problems(*words, "sweep.objective=val/loss")[1:]
    assert typed == (
        "  sweep.objective=val/loss is one a token, and the tokenizers of the jobs differ (tokenizer.vocab_size): a token is not "
        "the same for them; sweep.objective=val/bits_per_byte can be compared"
    )
    assert expand([*words, "sweep.objective=val/bits_per_byte"]).folder == sweep.folder
    # Each option with its own words, and what a search may choose later.
    assert expand(["hardware=cpu", "tokenizer=bytes,bpe"]).settings.objective == "val/bits_per_byte"
    drawn = ["hardware=cpu", "tokenizer.vocab_size=interval(300,400)", "sweep.search=optuna", "sweep.trials=1"]
    assert expand(drawn).settings.objective == "val/bits_per_byte"
    # What says nothing of tokens, and tokenizers that are one, stay as they are.
    assert expand([*words, "sweep.objective=speed/tokens_per_second"]).settings.objective == "speed/tokens_per_second"
    plain = expand([*TEXTS, "data.path=a.txt", "tokenizer=bytes", "data.max_seq_len=128,256"])
    assert (plain.settings.objective, plain.unranked) == ("val/loss", None)
    assert "# The jobs are" not in describe(plain)


@pytest.mark.parametrize(
    ("swept", "which"),
    [
        (["data.path=a.txt,b.txt"], "data.path"),
        (["data.path=a.txt", "data.val_fraction=0.1,0.2"], "data.val_fraction"),
        (["data.path=a.txt", "eval.max_tokens=1000,2000"], "eval.max_tokens"),
        (
            ["data.path=a.txt", "tokenizer.vocab_size=264,512", "eval.max_tokens=1000"],
            "eval.max_tokens=1000 ends elsewhere for each tokenizer; eval.max_tokens=null takes all of it",
        ),
    ],
)
def test_jobs_that_are_validated_on_different_texts_are_not_ranked(swept: list[str], which: str):
    words = [*TEXTS, *swept]
    sweep = expand(words)
    assert sweep.settings.objective == "val/loss"
    assert sweep.unranked == f"they are validated on different texts ({which})"
    how = "RUN measures each on all of its text" if "max_tokens" in which else "RUN TEXT measures each on one text"
    assert f"# The jobs are not ranked: {sweep.unranked}; llama-lab evaluate {how}\n" in describe(sweep)
    (stops,) = problems(*words, "sweep.halvings=1", "eval.every_updates=100")[1:]
    assert f"sweep.halvings=1 stops jobs that are behind by val/loss, which says nothing between them: {sweep.unranked}" in stops
    (chooses,) = problems(*words, "sweep.search=optuna", "sweep.trials=4")[1:]
    assert "sweep.search=random ranks nothing" in chooses
    assert expand([*words, "sweep.search=random", "sweep.trials=2"]).unranked is not None


def test_folders_that_hold_one_validation_text_are_ranked(tmp_path: Path):
    def folder(name: str, text: str, tokenizer: str) -> str:
        (tmp_path / name).mkdir()
        manifest = {"tokenizer": {"hash": tokenizer}, "splits": {"val": {"document_bytes": {"sha256": text}}}}
        (tmp_path / name / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        return str(tmp_path / name)

    a, b, c, d = (folder(*each) for each in (("a", "v", "t"), ("b", "v", "t"), ("c", "v", "u"), ("d", "w", "t")))
    words = ["hardware=cpu", "data=shards"]
    assert [expand([*words, f"data.path={a},{other}"]).unranked for other in (b, c)] == [None, None]
    assert [expand([*words, f"data.path={a},{other}"]).settings.objective for other in (b, c)] == ["val/loss", "val/bits_per_byte"]
    assert expand([*words, f"data.path={a},{d}"]).unranked == "they are validated on different texts (data.path)"
    mixed = ["hardware=cpu", "data=mixture", f"data.paths=[{a},{b}]", "data.weights=[1,2],[2,1]"]
    assert expand(mixed).unranked is None, "weights choose what is trained on"
    assert expand([*mixed, "sweep.objective=train/loss"]).unranked is None


def test_every_whole_number_is_drawn_as_often_and_evenly_over_the_logarithm():
    def shares(axis: Axis, count: int) -> list[float]:
        drawn = Counter(int(axis.drawn(random.Random(f"{number}"))) for number in range(count))
        assert min(drawn) == 1 and max(drawn) == 3
        return [drawn[value] / count for value in (1, 2, 3)]

    assert shares(Axis("model.n_layers", "", low=1, high=3, is_whole=True), 6000) == pytest.approx([1 / 3] * 3, abs=0.03)
    assert shares(Axis("model.n_layers", "", low=0.7, high=3.4, is_whole=True), 6000) == pytest.approx([1 / 3] * 3, abs=0.03)
    # Shares of ln(3.5 / 0.5) that lie around each number.
    parts = [math.log((value + 0.5) / (value - 0.5)) / math.log(7) for value in (1, 2, 3)]
    log = Axis("model.n_layers", "", low=1, high=3, is_log=True, is_whole=True)
    assert shares(log, 6000) == pytest.approx(parts, abs=0.03)


def test_a_preset_sweeps_over_texts_beyond_ascii(tmp_path: Path):
    preset = tmp_path / "experiment" / "mine.yaml"
    preset.parent.mkdir()

    def write(values: str) -> None:
        head = "# @package _global_\n# Mine?\nhydra:\n  mode: MULTIRUN\n  sweeper:\n    params:\n"
        preset.write_text(f"{head}      wandb.group: {values}\n", encoding="utf-8")

    write("große Läufe,klein")
    jobs = expand(["experiment=mine", "hardware=cpu"], multirun=False, config_dir=tmp_path).jobs
    assert [job.run.wandb and job.run.wandb.group for job in jobs] == ["große Läufe", "klein"]
    write('"[größe,klein"')
    assert "wandb.group=[größe,klein cannot be read" in problems("experiment=mine", multirun=False, config_dir=tmp_path)[1]


def test_tables_show_values_without_the_quotes_of_the_grammar(capsys):
    sweep = expand(["hardware=cpu", "wandb.group='a, b',c"])
    write_summary(sweep)
    with (sweep.folder / "summary.csv").open(encoding="utf-8", newline="") as file:
        assert [line["wandb.group"] for line in csv.DictReader(file)] == ["a, b", "c"]
    print_results(sweep)
    assert "'" not in capsys.readouterr().out.replace(str(sweep.folder), "")


def test_a_search_follows_seeds_that_follow_each_other_and_refuses_other_values_that_do():
    words = [*SMOKE, "optim.max_lr=interval(1e-3,2e-3)", "seed.init=0,1", "sweep.search=optuna", "sweep.trials=4"]
    sweep = expand([*words, "seed.data=${seed.init}", "optim=muon,adamw"])
    assert [(base.values["optim"], base.run.seed.init, base.run.seed.data) for base in sweep.bases] == [
        (optim, seed, seed) for seed in (0, 1) for optim in ("muon", "adamw")
    ]
    point = sweep.jobs[0].values | {"optim.max_lr": "0.0015", "seed.init": "1"}
    assert changed(base_of(sweep.bases, point), point).seed.data == 1
    (line,) = problems(*words, "optim.adamw_max_lr=${optim.max_lr}")[1:]
    assert line.startswith("  optim.adamw_max_lr takes its value from optim.max_lr, which sweep.search=optuna does not follow;")


@pytest.mark.parametrize("preset", ["lr_sweep", "lr_search", "adamw_vs_muon", "schedule_shapes"])
def test_repeats_of_the_presets_are_independent(preset: str):
    jobs = expand([f"experiment={preset}", "hardware=cpu", "seed.init=0,1"], multirun=False).jobs
    assert {(job.run.seed.init, job.run.seed.data) for job in jobs} == {(0, 0), (1, 1)}


def test_gpus_are_packed_by_how_many_jobs_they_have():
    gpus = ["0", "1", "2", "3"]
    assert choose_gpus(gpus, Counter(), wanted=2, shared_by=1) == ["0", "1"]
    assert choose_gpus(gpus, Counter({"0": 1, "1": 1}), wanted=2, shared_by=1) == ["2", "3"]
    assert choose_gpus(gpus, Counter({"0": 1, "1": 1, "2": 1}), wanted=2, shared_by=1) is None
    assert choose_gpus(gpus, Counter({"0": 1, "1": 2, "2": 1, "3": 1}), wanted=1, shared_by=2) == ["0"]
    assert choose_gpus(gpus, Counter(dict.fromkeys(gpus, 2)), wanted=1, shared_by=2) is None


def test_rungs_are_validations_at_shares_of_the_budget():
    sweep = expand([*SMOKE, "seed.init=0,1", "eval.every_updates=2", "sweep.halvings=3"])
    assert sweep.jobs[0].run.updates == 20
    # An eighth, a quarter and half of 20 updates, each at the next validation.
    assert rung_updates(sweep.jobs[0].run, sweep.settings) == [4, 6, 10]


def test_halving_keeps_its_share_and_what_chance_explains():
    assert falls_behind(5.0, [], 0.5, 0.0) is None, "one job alone is not compared"
    assert falls_behind(5.0, [4.0], 0.5, 0.0) == 4.0
    assert falls_behind(4.0, [5.0], 0.5, 0.0) is None
    assert falls_behind(4.1, [4.0], 0.5, margin=0.2) is None
    assert falls_behind(4.3, [4.0], 0.5, margin=0.2) == 4.2
    assert falls_behind(3.0, [1.0, 2.0, 4.0], 0.5, 0.0) == 2.0
    assert falls_behind(2.0, [1.0, 3.0, 4.0], 0.5, 0.0) is None
    assert falls_behind(float("inf"), [1.0, 3.0], 0.5, 0.1) == 1.1


def halved(folder: Path, values: dict[tuple[int, int], float | None], *words: str) -> tuple[Sweep, list[Candidate]]:
    """A sweep over four learning rates and two seeds that halves once, and what jobs, by place and seed, had after half of it."""
    sweep = expand(
        [*SMOKE, "optim.max_lr=1e-3,2e-3,3e-3,4e-3", "seed.init=0,1", "eval.every_updates=2", "sweep.halvings=1", *words]
    )
    found: list[Candidate] = []
    for job in sweep.jobs:
        place = divmod(job.number - 1, 2)
        own = folder / str(job.number)
        own.mkdir(parents=True)
        rows = [{"update": 2, "val/loss": 9.0}, *([{"update": 10, "val/loss": values[place]}] if place in values else [])]
        (own / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        found.append(Candidate(job.values, job.run, own))
    return sweep, found


def test_a_job_is_compared_with_those_of_its_own_seeds(tmp_path: Path):
    values = {(0, 0): 2.0, (1, 0): 2.1, (2, 0): 2.2, (0, 1): 1.0, (1, 1): 1.1, (2, 1): 1.2}
    sweep, jobs = halved(tmp_path, values, "sweep.noise=0")
    halving = Halving(sweep.settings)
    assert [halving.look(job, jobs) is None for job in jobs] == [True, True, False, False, False, False, True, True]
    assert all(halving.look(job, jobs) is None for job in jobs), "who has passed a rung is not asked again"


def test_what_diverged_is_behind_everything_that_did_not(tmp_path: Path):
    sweep, jobs = halved(tmp_path, {(0, 0): 2.0, (1, 0): 1.0, (2, 0): None, (3, 0): None}, "sweep.noise=0")
    halving = Halving(sweep.settings)
    assert halving.look(jobs[0], jobs) is None, "the second of four"
    verdict = halving.look(jobs[4], jobs)
    assert verdict is not None and (verdict.value, verdict.needed, verdict.update) == (math.inf, 2.0, 10)


def test_a_high_objective_can_be_the_good_one(tmp_path: Path):
    sweep, jobs = halved(tmp_path, {(0, 0): 0.3, (1, 0): 0.9}, "sweep.noise=0.1")
    halving = Halving(replace(sweep.settings, direction=Direction.maximize))
    assert halving.look(jobs[2], jobs) is None
    verdict = halving.look(jobs[0], jobs)
    # Two runs differ by 1.645 sqrt(2) standard deviations of one in 5 of 100 cases.
    assert verdict is not None and (verdict.value, verdict.needed) == (0.3, pytest.approx(0.9 - 1.645 * math.sqrt(2) * 0.1))


def test_noise_is_pooled_over_the_points_that_are_repeated(tmp_path: Path):
    values = {(0, 0): 1.0, (0, 1): 1.2, (1, 0): 2.0, (1, 1): 2.4, (2, 0): 3.0, (2, 1): 3.0, (3, 0): 9.0, (3, 1): None}
    sweep, jobs = halved(tmp_path, values)
    assert Halving(sweep.settings).noise(0, jobs) == pytest.approx(math.sqrt((0.02 + 0.08 + 0.0) / 3))


def test_a_margin_saves_the_best_from_noise():
    """Points whose true losses differ less than their noise: without the margin the best is thrown away far more often."""

    def lost(margin: float) -> float:
        draw, thrown = random.Random(0), 0
        for _ in range(400):
            truth = [0.001 * number for number in range(8)]
            draw.shuffle(truth)
            seen: list[float] = []
            for value in truth:
                noisy = value + draw.gauss(0, 0.01)
                if falls_behind(noisy, seen, 0.5, margin) is not None and value == 0:
                    thrown += 1
                seen.append(noisy)
        return thrown / 400

    assert lost(0.0) > 0.25
    assert lost(1.645 * 2**0.5 * 0.01) < 0.05


def test_the_last_table_says_in_which_order_it_is_and_what_compares_its_points(capsys):
    jobs = expand([*SMOKE, "optim.max_lr=0.01,0.02", "seed.init=0,1"])

    def shown(*outcomes: tuple[str, float | None]) -> list[str]:
        for job, (status, loss) in zip(jobs.jobs, outcomes, strict=True):
            job.outcome = Outcome(status, str(job.folder), summary={} if loss is None else {"val/loss": loss})
        print_results(jobs)
        return capsys.readouterr().out.splitlines()

    done = shown(("finished", 2.3), ("finished", 2.1), ("finished", 2.2), ("finished", 2.4))
    assert done[0] == "4 jobs, the best first"
    assert [line.split()[2] for line in done[2:6]] == ["2.1000", "2.2000", "2.3000", "2.4000"]
    assert done[-1] == f"Whether such a difference is more than chance: llama-lab compare {relative(jobs.folder)}"
    some = shown(("preempted", 2.2), ("finished", 2.3), ("finished", 2.2), ("not started", None))
    assert some[0] == "4 jobs: 2 finished, the best first; then the others"
    assert [line.split()[2] for line in some[2:5]] == ["2.2000", "2.3000", "2.2000"]
    assert shown(*[("preempted", 2.2)] * 4)[0] == "4 jobs, none of them finished"
    assert shown(*[("finished", None)] * 4)[0] == "4 jobs, in their order"


def test_the_last_table_ranks_nothing_where_nothing_is_ranked(capsys):
    sweep = expand([*TEXTS, "data.path=a.txt,b.txt", "seed.init=0,1"])
    for job, loss in zip(sweep.jobs, (2.3, 2.1, 2.2, 2.4), strict=True):
        job.outcome = Outcome("finished", str(job.folder), tokens=1, summary={"val/loss": loss})
    print_results(sweep)
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "4 jobs, not ranked: they are validated on different texts (data.path)"
    assert [line.split()[2] for line in out[2:6]] == ["2.3000", "2.1000", "2.2000", "2.4000"]
    assert "val loss over the seeds, not ranked" in out
    assert [line.split()[0] for line in out[-3:-1]] == ["a.txt", "b.txt"]
    assert out[-1] == "Nothing of this ranks the jobs; llama-lab evaluate RUN TEXT measures each on one text"
    assert "best" not in Board(sweep)._standing()
