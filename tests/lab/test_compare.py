"""Comparisons of runs: which form an arm, what is refused and why, and what is said."""

import csv
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llama_lab.cli import main
from llama_lab.config.errors import ConfigError
from llama_lab.config.identity import load_config, plain_config, shapes
from llama_lab.config.schema import ConstantConfig, CosineConfig, LinearConfig, RunConfig, TextConfig
from llama_lab.lab.compare.arms import group_arms
from llama_lab.lab.compare.curves import crossing, value_at
from llama_lab.lab.compare.diff import differences
from llama_lab.lab.compare.metric_names import is_higher_better
from llama_lab.lab.compare.noise import family, measure, store
from llama_lab.lab.compare.pairs import choose_seeds
from llama_lab.lab.compare.records import flat, load_record, load_records
from llama_lab.lab.compare.statistics import Design, estimate_difference
from llama_lab.lab.compare.study import Question, Study, compare_arms, time_to_loss
from llama_lab.lab.compare.verdicts import multiplier, sentence
from llama_lab.model.count import flops_per_token
from llama_lab.training.run_folder import relative

from .written_runs import TOKENS, UPDATES, Make, write_run

Output = pytest.CaptureFixture[str]
NOISE = np.random.default_rng(5).normal(0, 0.01, 10)


def study(make: Make, gain: float, seeds: int = 5, **question: object) -> Study:
    """Two arms of so many seeds, the second better by `gain`; half of the noise is the seed's."""
    for seed in range(seeds):
        make(seed, 2 + NOISE[seed])
        make(seed, 2 + NOISE[seed] + 0.3 * NOISE[seed + 5] - gain, lr=2e-3)
    (folder,) = {path.parent for path in runs(make(99, 1.0, name="else").parent.parent / "tiny")}
    return compare_arms(group_arms(load_records([str(folder)])), Question(**question))  # pyright: ignore[reportArgumentType]


def runs(folder: Path) -> list[Path]:
    return sorted(config.parent for config in folder.glob("*/config.yaml"))


def refusal(*words: str, **question: object) -> str:
    with pytest.raises(ConfigError) as caught:
        compare_arms(group_arms(load_records(words)), Question(**question))  # pyright: ignore[reportArgumentType]
    return str(caught.value)


def test_runs_that_differ_only_in_seed_are_an_arm_and_pairs_share_a_seed(make: Make):
    found = study(make, gain=0.05)
    assert [(arm.label, len(arm.runs)) for arm in found.arms] == [("max_lr=0.001", 5), ("max_lr=0.002", 5)]
    assert [arm.seeds for arm in found.arms] == [[(seed, seed) for seed in range(5)]] * 2
    (one,) = found.comparisons
    assert one.estimate is not None and one.estimate.design.paired
    assert one.verdict == "better" and one.need is None
    assert one.estimate.low < one.difference < one.estimate.high < 0
    said = sentence(found, one)
    assert said.startswith("max_lr=0.002 is better than max_lr=0.001: val/loss 0.0")
    assert "5 pairs of equal seeds" in said and "95 %" in said


def test_options_that_have_the_same_fields_are_arms_of_their_own(make: Make):
    for seed in range(2):
        for number, kind in enumerate((CosineConfig, LinearConfig, ConstantConfig)):
            folder = make(seed, 2 + number + NOISE[seed], schedule=kind(warmup_updates=2, min_lr=0.0))
    arms = group_arms(load_records([str(folder.parent)]))
    assert [(arm.label, len(arm.runs)) for arm in arms] == [(f"schedule={name}", 2) for name in ("constant", "cosine", "linear")]
    for record in load_records([str(folder.parent)]):
        kept = load_config(folder.parent / Path(record.name).name / "config.yaml")
        assert (record.run, record.run.seed) == (kept, kept.seed)


def test_undecided_says_how_many_seeds_would_decide(make: Make):
    found = study(make, gain=0.003)
    (one,) = found.comparisons
    assert one.verdict == "undecided" and one.need is not None and one.need.seeds is not None
    said = sentence(found, one)
    assert f"{one.need.seeds - 5} more seed" in said and "if the difference is what it looks like" in said


def test_arms_that_end_alike_to_the_last_digit_are_said_to(make: Make):
    folders = [make(seed, 2 + NOISE[seed], lr=lr) for seed in range(3) for lr in (1e-3, 2e-3)]
    found = compare_arms(group_arms(load_records([str(folders[0].parent)])), Question())
    said = sentence(found, found.comparisons[0])
    assert said.endswith("3 pairs of equal seeds. Every pair ended with the same value: what differs changed nothing in these runs")


def test_a_difference_that_is_not_worth_having_is_called_that(make: Make):
    found = study(make, gain=0.003, worth=0.05)
    assert found.comparisons[0].verdict == "no difference worth having"
    assert "lies within 0.05 of 0" in sentence(found, found.comparisons[0])
    undecided = compare_arms(found.arms, Question(worth=0.001))
    assert undecided.comparisons[0].need_for_worth is not None
    assert "A difference of 0.001 takes" in sentence(undecided, undecided.comparisons[0])


def test_several_arms_are_corrected_and_the_chosen_baseline_comes_first(make: Make, capsys: Output):
    folders = [make(seed, 2 + NOISE[seed] - 0.02 * arm, lr=1e-3 * 2**arm) for arm in range(3) for seed in range(5)]
    assert main(["compare", str(folders[0].parent), "--baseline", "max_lr=0.002"]) == 0
    out = capsys.readouterr().out
    assert "Against max_lr=0.002" in out
    assert "corrected for 2 comparisons (the same uncorrected)" in out
    assert out.index("max_lr=0.002") < out.index("max_lr=0.001")
    assert "that at least 80 of 100 such comparisons would see, corrected for 2, if noise is about normal" in out
    for words, rule in ((["--baseline", "max_lr"], "names 3 arms"), (["--baseline", "cosine"], "is in the name of no arm")):
        assert main(["compare", str(folders[0].parent), *words]) == 2
        assert rule in capsys.readouterr().err


def test_what_is_visible_and_what_would_decide_take_the_correction_into_account(make: Make):
    ends = np.random.default_rng(6).normal([[0], [0.002], [0.03]], 0.01, (3, 3))
    folders = [make(seed, 2 + ends[arm, seed], lr=1e-3 * 2**arm) for arm in range(3) for seed in range(3)]
    arms = group_arms(load_records([str(folders[0].parent)]))
    alone, among = (compare_arms(some, Question(worth=0.01)).comparisons[0] for some in (arms[:2], arms))
    assert alone.estimate == among.estimate and (alone.verdict, among.verdict) == ("undecided", "undecided")
    assert (among.visible or 0) > 1.1 * (alone.visible or 1)
    assert (among.need_for_worth or 0) > (alone.need_for_worth or 1000)
    assert among.need is not None and alone.need is not None
    assert (among.need.fewest or 0) > (alone.need.fewest or 1000)


def test_seeds_without_a_partner_are_left_out_and_named(make: Make, capsys: Output):
    for seed in range(4):
        make(seed, 2 + NOISE[seed])
    extra = make(7, 2.0)
    for seed in range(4):
        make(seed, 1.9 + NOISE[seed], lr=2e-3)
    assert main(["compare", str(extra.parent)]) == 0
    out = capsys.readouterr().out
    assert "4 pairs" in out and f"left out: {extra}" in out
    other = make(8, 1.9, lr=2e-3)
    assert main(["compare", str(extra.parent)]) == 0
    assert f"left out: {extra}, {other}" in capsys.readouterr().out


def test_pairs_are_made_where_they_are_half_of_the_larger_arm(make: Make, capsys: Output):
    for seed in range(3):
        folder = make(seed, 2 + NOISE[seed])
    for seed in range(6):
        make(seed, 1.9 + NOISE[seed], lr=2e-3)
    assert main(["compare", str(folder.parent)]) == 0
    assert "3 pairs of equal seeds" in capsys.readouterr().out
    make(6, 1.9, lr=2e-3)
    assert main(["compare", str(folder.parent)]) == 0
    assert "7 against 3 runs, taken as independent" in capsys.readouterr().out


def test_other_seeds_are_compared_unpaired(make: Make, capsys: Output):
    for seed in range(4):
        make(seed, 2 + NOISE[seed])
        folder = make(seed + 10, 1.9 + NOISE[seed + 4], lr=2e-3)
    assert main(["compare", str(folder.parent)]) == 0
    assert "4 against 4 runs, taken as independent" in capsys.readouterr().out


def test_equal_places_are_compared_along_every_axis(make: Make, capsys: Output):
    for seed in range(4):
        make(seed, 2 + NOISE[seed])
        folder = make(seed, 1.9 + NOISE[seed], lr=2e-3, last=2 * UPDATES, training_tokens=2 * UPDATES * TOKENS)
    words = [str(folder.parent)]
    assert "was trained on 20,480 tokens" in refusal(*words) and "--at tokens" in refusal(*words)
    arms = group_arms(load_records(words))
    found = compare_arms(arms, Question(at="tokens"))
    assert found.place == UPDATES * TOKENS
    assert np.mean(found.of(found.arms[1])) == pytest.approx(1.9 + NOISE[:4].mean())
    early = "before its end, with a learning rate that has yet to fall, is looked at: training_tokens=20480 max_lr=0.002"
    assert found.notes == (early,)
    steady = [
        make(0, lr=lr, last=last, training_tokens=last * TOKENS, schedule=ConstantConfig(warmup_updates=2, min_lr=0.0))
        for lr, last in ((3e-3, UPDATES), (4e-3, 2 * UPDATES))
    ]
    of_constant_rate = compare_arms(group_arms(load_records(map(str, steady))), Question(at="tokens"))
    assert of_constant_rate.notes == ("before its end is looked at: training_tokens=20480 max_lr=0.004",)
    between = compare_arms(arms, Question(at="tokens", place=14 * TOKENS))
    assert 2.05 < np.mean(between.of(between.arms[0])) < 2.2
    flops = compare_arms(arms, Question(at="flops"))
    assert flops.place == UPDATES * TOKENS * flops_per_token(arms[0].runs[0].run.model, 257, 32)  # pyright: ignore[reportOptionalMemberAccess]
    assert compare_arms(arms, Question(at="cost", price=7.2)).place == pytest.approx(0.02)
    assert "needs the price" in refusal(*words, at="cost")
    rule = "--at tokens=100 is not where all runs were measured; that is from 2048 to 10240, and --at tokens takes the last"
    assert refusal(*words, at="tokens", place=100).splitlines()[1:] == [f"  {rule}"]
    assert f"--at tokens=1e+06 {rule.partition(' ')[2].partition(' ')[2]}" in refusal(*words, at="tokens", place=1e6)
    assert main(["compare", *words, "--worth", "-1"]) == 2
    assert "--worth -1 is not above 0" in capsys.readouterr().err
    for price in ("-2", "nan", "0"):
        assert main(["compare", *words, "--at", "cost", "--price", price]) == 2
        assert f"--price {price} is no price above 0" in capsys.readouterr().err
    assert main(["compare", *words, "--at", "watts"]) == 2
    assert "there are tokens, flops, seconds, cost" in capsys.readouterr().err


def crossed(make: Make, weights: int, orders: int) -> Path:
    """Two arms over every combination of seeds, one better; what a seed does to their difference is shared by all that have it."""
    draw = np.random.default_rng(1)
    by_weights, by_order = draw.normal(0, 0.01, weights), draw.normal(0, 0.01, orders)
    folder = Path()
    for init in range(weights):
        for data in range(orders):
            make(init, 2.0, data_seed=data)
            folder = make(init, 1.96 + by_weights[init] + by_order[data] + draw.normal(0, 1e-3), lr=2e-3, data_seed=data)
    return folder.parent


def test_pairs_that_share_a_seed_are_not_counted_as_independent(make: Make, capsys: Output):
    folder = crossed(make, 4, 2)
    study = compare_arms(group_arms(load_records([str(folder)])), Question())
    (one,) = study.comparisons
    assert one.estimate is not None and one.estimate.design == Design(8, 8, True, (4, 2))
    assert one.verdict == "undecided" and one.need is None and one.sharing == ()
    differences = np.array([study.values[run.name] for run in study.arms[1].runs]) - 2
    assert estimate_difference(np.zeros(8), differences, paired=True).p < 0.05
    assert main(["compare", str(folder)]) == 0
    out = capsys.readouterr().out
    said = "8 pairs of equal seeds, 4 x 2 seeds crossed: pairs that share one are not independent"
    assert f"{said}, which leaves 1 degree of freedom. Pairs that share no seed say more: -m seed.init=0,1,2,3,4 " in out
    assert " 'seed.data=${seed.init}' makes such runs\n" in out
    assert "Note" not in out


def test_of_seeds_that_are_crossed_in_part_those_count_that_share_none(make: Make, capsys: Output):
    pairs = [(0, 0), (1, 1), (2, 2), (1, 0), (2, 0), (0, 1), (0, 2)]
    for init, data in pairs:
        make(init, 2 + NOISE[init + data], data_seed=data)
        folder = make(init, 1.9 + NOISE[init + data] + 0.1 * NOISE[init], lr=2e-3, data_seed=data)
    assert main(["compare", str(folder.parent)]) == 0
    out = capsys.readouterr().out
    assert "3 pairs of equal seeds\n" in out
    assert "8 runs left out, since they share a seed with a run that counts and so are not independent of it: " in out
    assert main(["compare", str(folder.parent), "--unpaired"]) == 0
    assert "3 against 3 runs, taken as independent" in capsys.readouterr().out


def test_seeds_that_count_share_none_or_are_crossed():
    diagonal = [(seed, seed) for seed in range(4)]
    assert choose_seeds(diagonal) == (diagonal, None)
    one_order = [(seed, 0) for seed in range(4)]
    assert choose_seeds(one_order) == (one_order, None)
    assert choose_seeds([(seed,) for seed in range(3)]) == ([(0,), (1,), (2,)], None)
    grid = [(init, data) for init in range(5) for data in range(3)]
    assert choose_seeds(grid) == (grid, (5, 3))
    # Without the last run, its weights are left out; of a square the pairs that share nothing are more.
    assert choose_seeds(grid[:-1]) == (grid[:-3], (4, 3))
    square = [(init, data) for init in range(3) for data in range(3)]
    assert choose_seeds(square[:-1]) == ([(0, 2), (1, 1), (2, 0)], None)
    assert choose_seeds([(0, 0), (0, 1), (1, 0)]) == ([(0, 1), (1, 0)], None)


def test_a_seed_that_all_runs_have_is_said_once(make: Make, capsys: Output):
    for seed in range(3):
        make(seed, 2 + NOISE[seed], data_seed=7)
        folder = make(seed, 1.9 + NOISE[seed], lr=2e-3, data_seed=7)
    assert main(["compare", str(folder.parent)]) == 0
    rule = "Note: every run has seed.data=7: what is said holds for this one order of the data, others may differ\n"
    assert capsys.readouterr().out.count(rule) == 1
    others = [make(init, 2 + NOISE[seed], lr=init * 1e-3, data_seed=seed) for init in (3, 4) for seed in range(3)]
    assert main(["compare", *map(str, others)]) == 0
    assert "Note: every arm has one seed.init alone, and not the same: that one draw" in capsys.readouterr().out


def test_seeds_are_said_so_that_each_is_known(make: Make, capsys: Output):
    for lr, seeds in ((1e-3, [(0, 0), (1, 0)]), (2e-3, [(0, 0), (1, 1)]), (3e-3, [(0, 0), (1, 1), (1, 0)])):
        for init, data in seeds:
            folder = make(init, data_seed=data, lr=lr)
    assert main(["compare", str(folder.parent)]) == 0
    lines = capsys.readouterr().out.partition("Against")[0].rstrip().splitlines()[2:]
    assert [re.split(r" {2,}", line)[-1] for line in lines] == ["init 0 1, data 0", "0 1", "0/0 1/0 1/1 (init/data)"]


def test_pairs_that_all_differ_by_the_same_show_no_rounding(make: Make, capsys: Output):
    for seed in range(5):
        make(seed, 3 + 0.7 * seed)
        folder = make(seed, 2.9 + 0.7 * seed, lr=2e-3)
    assert main(["compare", str(folder.parent)]) == 0
    said = capsys.readouterr().out
    assert "max_lr=0.002  -0.10       -0.10 to -0.10  < 0.0001  0.00" in said
    assert "val/loss 0.10 lower (95 %: 0.10 to 0.10)" in said


def test_a_column_that_is_no_metric_by_its_name_is_one_when_asked_for(tmp_path: Path, capsys: Output):
    lines = [f"run,finished,{lr},{seed},{2.5 - 100 * lr + 0.01 * seed}" for lr in (1e-3, 2e-3) for seed in range(3)]
    table = tmp_path / "wandb.csv"
    table.write_text("\n".join(["Name,State,learning_rate,seed,loss", *lines]), encoding="utf-8")
    assert main(["compare", str(table), "--metric", "loss"]) == 0
    assert "learning_rate=0.002 is better than learning_rate=0.001: loss 0.1" in capsys.readouterr().out
    assert "val/loss is no column of this table; --metric loss compares by that" in refusal(str(table))
    both = exported(tmp_path / "both.csv", (*HEADING, "val_loss"), val_loss=lambda arm, seed: 2 - arm + NOISE[seed + arm])
    assert "--metric val_loss compares by that" in refusal(both)
    table.write_text(table.read_text(encoding="utf-8").replace(",loss", ",quality"), encoding="utf-8")
    assert main(["compare", str(table), "--metric", "quality"]) == 0
    assert "quality at the end; lower is better, as its name does not say (else --higher)" in capsys.readouterr().out
    assert "val/loss is no column of this table; its metrics are the columns with a / in their names" in refusal(str(table))


HEADING = ("Name", "State", "Hostname", "Runtime", "seed", "lr", "train_loss", "eval/accuracy", "_step")


def exported(path: Path, heading: Sequence[str] = HEADING, delimiter: str = ",", **cells: Callable[[int, int], object]) -> str:
    """Write a table of runs as W&B exports it: two learning rates, four seeds; `cells` of the arm and the seed."""
    lines = []
    for arm in range(2):
        for seed in range(4):
            noise = NOISE[2 * seed + arm]
            known = {"Name": f"run-{arm}-{seed}", "State": "finished", "Hostname": f"node{seed}", "Runtime": seed, "seed": seed}
            known |= {
                "lr": 0.1 * (arm + 1),
                "train_loss": 2 - 0.3 * arm + noise,
                "eval/accuracy": 0.3 + 0.3 * arm + noise,
                "_step": 90,
            }
            known |= {column: make(arm, seed) for column, make in cells.items()}
            decimal = "," if delimiter == ";" else "."
            values = [known[column] for column in heading]
            lines.append([str(value).replace(".", decimal) if isinstance(value, float) else value for value in values])
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows([heading, *lines])
    return str(path)


def test_columns_of_a_table_that_are_no_config_make_no_arms(tmp_path: Path, capsys: Output):
    table = exported(tmp_path / "runs.csv")
    assert main(["compare", table, "--metric", "eval/accuracy"]) == 0
    out = capsys.readouterr().out
    assert "lr=0.2 is better than lr=0.1: eval/accuracy 0." in out and "4 pairs of equal seeds" in out
    assert "eval/accuracy at the end; higher is better by its name (else --lower)" in out
    assert main(["compare", table, "--metric", "eval/accuracy", "--lower"]) == 0
    out = capsys.readouterr().out
    assert "lr=0.2 is worse than lr=0.1" in out and "eval/accuracy at the end; lower is better\n" in out
    assert main(["compare", table, "--metric", "train_loss"]) == 0
    assert "train_loss at the end; lower is better\n" in capsys.readouterr().out
    named = load_records([exported(tmp_path / "named.csv", (*HEADING, "name"), name=lambda arm, seed: "study")])
    assert [run.name for run in named] == [f"run-{arm}-{seed}" for arm in range(2) for seed in range(4)]
    assert main(["compare", table, "--lower", "--higher"]) == 2
    capsys.readouterr()
    # The weight of a loss is config: it is the same for many runs.
    weighed = exported(tmp_path / "weighed.csv", (*HEADING, "z_loss"), z_loss=lambda arm, seed: 0.1 * arm, lr=lambda arm, seed: 0.3)
    assert main(["compare", weighed, "--metric", "eval/accuracy"]) == 0
    assert "z_loss=0.1 is better than z_loss=0.0" in capsys.readouterr().out
    apart = exported(tmp_path / "apart.csv", (*HEADING, "output_dir"), output_dir=lambda arm, seed: f"out/{arm}{seed}")
    assert main(["compare", apart, "--metric", "train_loss"]) == 0
    out = capsys.readouterr().out
    assert "every run has another output_dir, so that none of them form an arm; --ignore output_dir if" in out
    assert "llama-lab noise" not in out
    assert main(["compare", apart, "--metric", "train_loss", "--ignore", "output_dir"]) == 0
    assert "4 pairs of equal seeds" in capsys.readouterr().out


def test_tables_of_spreadsheets_are_read_with_their_semicolons(tmp_path: Path):
    plain, semicolons = (tmp_path / name for name in ("plain.csv", "semicolons.csv"))
    read = [load_records([exported(plain)]), load_records([exported(semicolons, delimiter=";")])]
    assert "0,1;" in semicolons.read_text(encoding="utf-8")
    assert [(run.values, run.rows, run.seeds) for run in read[0]] == [(run.values, run.rows, run.seeds) for run in read[1]]


def test_seeds_of_a_table_that_a_library_wrote_as_fractions_are_seeds(tmp_path: Path):
    heading = (*HEADING, "seed.init", "seed.data", "seed.sampling")
    seeds = {"seed.init": lambda arm, seed: f"{seed}.0", "seed.data": lambda arm, seed: f"{seed}.0", "seed.sampling": lambda *_: 0}
    found = compare_arms(
        group_arms(load_records([exported(tmp_path / "runs.csv", heading, **seeds)])), Question(metric="train_loss")
    )
    assert found.arms[0].seeds == [(seed, seed) for seed in range(4)]
    assert (estimate := found.comparisons[0].estimate) is not None and estimate.design.paired


def test_the_seed_of_samples_is_no_seed_of_a_run_whose_others_are_not_known(tmp_path: Path):
    lines = ["Name,optim.max_lr,seed.init,seed.data,seed.sampling,val/loss"]
    lines += [f"run-{lr}-{seed},{lr},{seed},{seed},0,{2 + lr + NOISE[seed]}" for lr in (0.1, 0.2) for seed in (1, 2, 3)]
    lines += [f"lost-{number},0.1,,,0,{2.1 + NOISE[number]}" for number in range(2)]
    (tmp_path / "runs.csv").write_text("\n".join(lines), encoding="utf-8")
    found = compare_arms(group_arms(load_records([str(tmp_path / "runs.csv")])), Question())
    assert sorted(found.arms[0].seeds) == [(), (), (1, 1), (2, 2), (3, 3)]
    assert [run.name for run in found.comparisons[0].left_out] == ["lost-0", "lost-1"]


def tabled(folders: Sequence[Path], path: Path, **cells: str) -> str:
    """Write runs as W&B's table has them: nested configs by key path, off as nothing, whole numbers without a fraction."""
    lines = []
    for folder in folders:
        run = load_config(folder / "config.yaml")
        tree = plain_config(run)
        for group, shape in shapes(run).items():
            tree[group]["type"] = shape
        words = {key: json.dumps(value).strip('"') for key, value in flat(tree).items() if value is not None}
        words = {key: re.sub(r"^(\d+)\.0$", r"\1", word) for key, word in words.items()}
        last = load_record(folder).rows[-1]
        lines.append(
            {"Name": folder.name, "State": "finished", **words, **{key: str(last[key]) for key in ("tokens", "val/loss")}, **cells}
        )
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for line in lines for key in line)), restval="")
        writer.writeheader()
        writer.writerows(lines)
    return str(path)


def test_a_table_beside_folders_has_their_arms(make: Make, tmp_path: Path, capsys: Output):
    here = [make(seed, 2 + NOISE[seed], lr=lr, name="here") for seed in range(3) for lr in (1e-3, 2e-3)]
    there = [make(seed, 2 + NOISE[seed], lr=lr, name="there") for seed in range(3, 6) for lr in (1e-3, 3e-3)]
    found = group_arms(load_records([str(here[0].parent), tabled(there, tmp_path / "there.csv")]))
    assert [(arm.label, len(arm.runs)) for arm in found] == [("max_lr=0.001", 6), ("max_lr=0.002", 3), ("max_lr=0.003", 3)]
    assert main(["compare", str(here[0].parent), str(tmp_path / "there.csv")]) == 0
    said = capsys.readouterr().out
    assert "val/loss at the end" in said and "versions of the code" not in said
    both = refusal(str(here[0].parent), tabled(here[:1], tmp_path / "same.csv"))
    assert f"{here[0].name} has the config and the seed (0) of" in both
    other = tabled(there, tmp_path / "other.csv", **{"tokenizer.type": "bpe"})
    assert "has another tokenizer than" in refusal(str(here[0].parent), other, metric="val/loss")


def test_a_table_that_is_named_twice_counts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    table = exported(tmp_path / "runs.csv", [column for column in HEADING if column != "seed"])
    monkeypatch.chdir(tmp_path)
    assert len(load_records([table, "runs.csv"])) == 8
    (arm, _) = group_arms(load_records(["./runs.csv", table]))
    assert [run.name for run in arm.runs] == [f"run-0-{seed}" for seed in range(4)]


def test_runs_of_a_table_with_other_lengths_are_refused(tmp_path: Path, capsys: Output):
    table = exported(tmp_path / "runs.csv", _step=lambda arm, seed: 90 + 10 * arm)
    rule = "run-1-0 (and 3 more) ends at _step=100, run-0-0 at 90; --ignore _step if both had the same budget"
    assert refusal(table, metric="train_loss").splitlines()[1:] == [f"  {rule}"]
    assert main(["compare", table, "--metric", "train_loss", "--ignore", "_step"]) == 0
    assert "is better" in capsys.readouterr().out
    told = exported(
        tmp_path / "told.csv", (*HEADING, "tokens"), _step=lambda arm, seed: 90 + 10 * arm, tokens=lambda arm, seed: 9000
    )
    assert main(["compare", told, "--metric", "train_loss"]) == 0


def test_counts_of_a_table_may_be_written_in_groups_of_three(tmp_path: Path):
    heading = (*HEADING, "tokens", "training_tokens")
    for delimiter, groups in ((",", ("20,480", "1,020,480")), (";", ("20.480", "1.020.480"))):
        budget = {"training_tokens": lambda *_: "20k", "tokens": lambda arm, seed, groups=groups: groups[arm]}
        table = exported(tmp_path / "runs.csv", heading, delimiter, **budget)
        assert "run-1-0 (and 3 more) was trained on 1,020,480 tokens, run-0-0 on 20,480" in refusal(table, metric="train_loss")
    words = exported(tmp_path / "words.csv", (*HEADING, "training_tokens"), training_tokens=lambda *_: "20k")
    assert compare_arms(group_arms(load_records([words])), Question(metric="train_loss")).comparisons


def test_tables_that_would_be_misread_are_refused(tmp_path: Path):
    running = exported(tmp_path / "runs.csv", State=lambda arm, seed: "running" if seed == 2 else "finished")
    said = "run-0-2 (and 1 more) is not finished (running); --finished leaves such runs out"
    assert refusal(running, metric="train_loss").splitlines()[1:] == [f"  {said}"]
    twice = exported(tmp_path / "twice.csv", (*HEADING, "train_loss", "lr"))
    assert f"{twice} has several columns called lr, train_loss; leave one of each" in refusal(twice, metric="train_loss")
    (tmp_path / "chart.csv").write_text("Step,a - val/loss,a - val/loss__MIN,a - val/loss__MAX\n1,2,2,2\n", encoding="utf-8")
    assert "is the CSV of a chart, one step a line; export the table of runs" in refusal(str(tmp_path / "chart.csv"))


@pytest.mark.parametrize(
    ("metric", "higher"),
    [
        *(("eval/accuracy", True), ("val_acc", True), ("hellaswag/acc_norm,none", True), ("speed/tokens_per_second", True)),
        *(("speed/mfu", True), ("F1", True), ("evalScore", True), ("val/loss", False), ("eval/perplexity", False)),
        *(("val/bits_per_byte", False), ("wer", False), ("train/grad_norm", None), ("quality", None), ("lossless", None)),
    ],
)
def test_the_name_of_a_metric_may_say_which_way_is_better(metric: str, higher: bool | None):
    assert is_higher_better(metric) is higher


def test_runs_of_a_table_that_share_a_name_are_two_runs(tmp_path: Path, capsys: Output):
    lines = ["Name,State,optim,seed.init,val/loss", "a,finished,muon,0,2.5", "a,finished,muon,1,2.6"]
    lines += ["a,finished,adamw,0,2.9", "a,finished,adamw,1,2.95"]
    (tmp_path / "runs.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert main(["compare", str(tmp_path / "runs.csv")]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"optim=muon +2 +2.5500 ", shown) and re.search(r"optim=adamw +2 +2.9250 ", shown)


def test_time_to_loss_gives_the_multiplier_that_was_planted(make: Make, capsys: Output):
    for seed in range(5):
        wobble = 1 + 0.2 * NOISE[seed]
        make(seed, 2 * wobble)
        # The same curve with 1.5 times the compute behind it.
        folder = make(seed, 2 * wobble * 1.5**-0.2, lr=2e-3)
    target, (one,), taken = time_to_loss(group_arms(load_records([str(folder.parent)])), Question(), None, "flops")
    assert target == pytest.approx(max(2 * (1 + 0.2 * NOISE[:5])))
    assert len(taken) == 10
    found = multiplier(one)
    assert found is not None and one.verdict == "better"
    assert found[0] == pytest.approx(1.5, rel=0.05)
    assert found[1] <= found[0] <= found[2]
    assert main(["compare", str(folder.parent), "--to-loss", "--price", "2"]) == 0
    out = capsys.readouterr().out
    assert "multiplier" in out and "FLOPs" in out and "of money" in out
    assert main(["compare", str(folder.parent), "--to-loss", "1.2"]) == 2
    said = capsys.readouterr()
    rule = "is no loss that every run was seen to come down to; try one from 2.0046 to 2.5377, or --to-loss alone for the lowest"
    assert said.err.splitlines()[1:] == [f"  --to-loss 1.2 {rule}"]
    assert "max_lr=0.002 is better than max_lr=0.001" in said.out and "multiplier" not in said.out
    assert main(["compare", str(folder.parent), "--to-loss", "9"]) == 2
    assert "--to-loss 9 is no loss that every run was seen to come down to" in capsys.readouterr().err


def test_runs_that_were_validated_once_are_told_what_would_compare_them(make: Make, capsys: Output):
    short = [make(seed, training_tokens=8 * TOKENS, last=8) for seed in range(2)]
    long = [make(seed, 1.9, lr=2e-3) for seed in range(2)]
    for folder in (*short, *long):
        text = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1]
        (folder / "metrics.jsonl").write_text(text + "\n", encoding="utf-8")
    (said,) = refusal(str(short[0].parent)).splitlines()[1:]
    rule = f"was trained on 10,240 tokens, {short[0]} on 4,096; train them to the same training_tokens"
    assert said == f"  {long[0]} (and 1 more) {rule}"
    (said,) = refusal(str(short[0].parent), at="tokens").splitlines()[1:]
    rule = f"finds no place at which all runs were measured: {long[0]} is first at 10240, {short[0]} ends at 4096; "
    assert said == f"  --at tokens {rule}train them to the same training_tokens, or with a smaller eval.every_updates"
    other = make(0, 2.2, lr=4e-3)
    (other / "metrics.jsonl").write_text(
        (other / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1] + "\n", encoding="utf-8"
    )
    assert main(["compare", str(long[0]), str(other), "--to-loss"]) == 0
    rule = f"finds no loss that every run was seen to come down to: {other} reaches 2.2000, and {long[0]} is at 1.9000 when it is "
    out = capsys.readouterr().out
    assert "max_lr=0.004: cannot be said; val/loss is 0.3000 higher" in out
    said = f"What a loss takes cannot be said:\n  --to-loss {rule}first validated; train them with a smaller eval.every_updates\n"
    assert out.endswith(said)


def test_curves_are_read_between_their_points():
    curve = [(1.0, 4.0), (10.0, 3.0), (100.0, 2.0)]
    assert value_at(curve, math.sqrt(10)) == pytest.approx(3.5)
    assert crossing(curve, 3.5) == pytest.approx(math.sqrt(10))
    assert crossing(curve, 4.0) == 1.0
    assert value_at([(5.0, 1.0)], 5.0) == 1.0


def test_what_cannot_be_compared_is_refused_with_its_reason(make: Make):
    first = make(0)
    other_text = make(0, lr=2e-3, data={"data": "other", "tokenizer": "t"}, validation="w")
    way_out = "no metric can be compared between them; llama-lab evaluate RUN TEXT measures each on one text"
    same = "(the same files with other content)"
    assert f"was validated on another text {same} than {first} {same}; {way_out}" in refusal(str(first), str(other_text))
    config = (other_text / "config.yaml").read_text(encoding="utf-8")
    (other_text / "config.yaml").write_text(config.replace("corpus.jsonl", "other.jsonl"), encoding="utf-8")
    path = load_config(first / "config.yaml").data.path  # pyright: ignore[reportAttributeAccessIssue]
    rule = f"(data.path={path.replace('corpus', 'other')}) than {first} (data.path={path}); {way_out}"
    assert f"was validated on another text {rule}" in refusal(str(first), str(other_text))
    unknown = make(0, lr=3e-3, data={"data": "other", "tokenizer": "t"}, validation=None)
    assert "it is not recorded that both were validated on the same text" in refusal(str(first), str(unknown))
    tokenizer = make(0, lr=4e-3, data={"data": "other", "tokenizer": "u"})
    assert "has another tokenizer" in refusal(str(first), str(tokenizer), metric="val/loss")
    assert "--metric val/bits_per_byte can be compared" in refusal(str(first), str(tokenizer), metric="val/loss")
    assert compare_arms(group_arms(load_records([str(first), str(tokenizer)])), Question()).metric == "val/bits_per_byte"


def test_bits_per_byte_of_other_parts_of_a_text_are_sent_to_the_whole(make: Make, untrained: RunConfig):
    assert untrained.eval is not None
    tokenizers = {"bytes": {"data": "d", "tokenizer": "t"}, "other": {"data": "e", "tokenizer": "u"}}
    parts = [replace(untrained, eval=replace(untrained.eval, max_tokens=count)) for count in (100, 200)]
    first = write_run(parts[0], data=tokenizers["bytes"])
    longer = write_run(parts[1], lr=2e-3, data=tokenizers["other"])
    as_long = write_run(parts[0], lr=3e-3, data=tokenizers["other"])
    whole = "; llama-lab evaluate RUN measures each on all of it, as eval.max_tokens=null does in training"
    other = f"{longer} was validated on eval.max_tokens=200, {first} on 100: not the same text{whole}"
    assert refusal(str(first), str(longer)).splitlines()[1:] == [f"  {other}"]
    said = f"{longer} has another tokenizer than {first}: a nat a token is not the same for both, and val/bits_per_byte neither"
    assert refusal(str(first), str(longer), metric="val/loss").splitlines()[1:] == [f"  {said}: {other}"]
    rule = f"was validated on eval.max_tokens=100 of another tokenizer than {first}, which is not the same text{whole}"
    assert refusal(str(first), str(as_long)).splitlines()[1:] == [f"  {as_long} {rule}"]
    elsewhere = write_run(parts[1], lr=4e-3, data=tokenizers["other"], validation="w")
    assert "llama-lab evaluate RUN TEXT measures each on one text" in refusal(str(first), str(elsewhere))


def test_data_that_changed_between_runs_of_one_config_makes_arms_of_their_own(make: Make, capsys: Output):
    folders = [make(seed, 2 + NOISE[seed]) for seed in range(3)]
    folders += [make(seed, 1.8 + NOISE[seed], data={"data": "changed" * 4, "tokenizer": "t"}) for seed in range(3, 6)]
    words = [*map(str, folders)]
    arms = group_arms(load_records(words))
    assert [(arm.label, len(arm.runs)) for arm in arms] == [("content=d", 3), ("content=changedc", 3)]
    assert main(["compare", *words]) == 0
    out = capsys.readouterr().out
    assert "Note: data changed between runs of one config: those are arms of their own, told apart by data.content" in out
    assert [len(arm.runs) for arm in group_arms(load_records(words), ["data.content"])] == [6]
    assert family(arms[0].values) == family(arms[1].values)
    assert main(["compare", *words[:3], str(make(0, lr=2e-3))]) == 0
    assert "data.content" not in capsys.readouterr().out


def test_runs_that_differ_in_seeds_alone_are_read_as_if_each_were_alone(make: Make):
    folders = [make(seed, data_seed=seed + 1) for seed in range(3)]
    for record, folder in zip(load_records(map(str, folders)), folders, strict=True):
        alone = load_config(folder / "config.yaml")
        assert record.run == alone and record.seed == (alone.seed.init, alone.seed.data)


def test_bad_runs_are_each_a_sentence(make: Make, tmp_path: Path):
    first = make(0)
    empty = make(0, lr=2e-3, last=0, status="finished")
    assert "has no metrics yet" in refusal(str(first), str(empty))
    unfinished = make(0, lr=3e-3, last=12)
    again = "the command that started it goes on with it, --finished leaves such runs out"
    assert f"is not finished (preempted, update 12 of 20); {again}" in refusal(str(first), str(unfinished))
    killed = make(0, lr=6e-3, last=12, status="running")
    assert f"is not finished (dead, update 12 of 20); {again}" in refusal(str(first), str(killed))
    diverged = make(0, None, lr=4e-3)
    assert "has no finite number as its last val/loss" in refusal(str(first), str(diverged))
    other = str(make(0, lr=5e-3))
    rule = "--metric accuracy was measured in none of these runs; there are val/bits_per_byte, val/loss"
    assert rule in refusal(str(first), other, metric="accuracy")
    assert "did you mean val/loss?" in refusal(str(first), other, metric="val/los")
    assert f"holds no runs itself; name one of {first.parent}" in refusal(str(first.parent.parent))
    twin = make(0, folder=tmp_path / "elsewhere" / first.name)
    assert "one run in two places" in refusal(str(first), str(twin))
    repeat = make(0, folder=tmp_path / "repeat")
    assert "a seed counts once" in refusal(str(first), str(repeat))
    assert "the runs differ in their seeds alone" in refusal(str(first), str(make(1)))
    for word, rule in (
        ("nowhere", "names no folder or CSV file"),
        (str(tmp_path / "elsewhere" / "*" / "*.yaml"), "but no run among them"),
        (str(first), "is a single run; name runs of another config"),
    ):
        assert rule in refusal(word)
    (first / "metrics.jsonl").write_text('{"update": 4,\n', encoding="utf-8")
    assert "has a file that is damaged" in refusal(str(first))


def test_unfinished_runs_are_left_out_on_request_and_said(make: Make, capsys: Output):
    for seed in range(4):
        make(seed, 2 + NOISE[seed])
        make(seed, 1.9 + NOISE[seed], lr=2e-3)
    late = make(4, lr=2e-3, last=8)
    assert main(["compare", str(late.parent), "--finished"]) == 0
    assert f"left out: {late} is not finished" in capsys.readouterr().out
    assert main(["compare", str(late.parent), "--at", "tokens"]) == 0
    assert "at 4,096 tokens" in capsys.readouterr().out


def test_where_no_run_is_finished_none_is_left(make: Make):
    words = [str(make(0, last=8, lr=lr)) for lr in (1e-3, 2e-3)]
    assert "--finished leaves nothing to compare; the command that started a run goes on" in refusal(*words, finished_only=True)


def test_a_single_seed_says_what_cannot_be_said(make: Make, capsys: Output):
    folder = make(0)
    make(0, 1.9, lr=2e-3)
    assert main(["compare", str(folder.parent)]) == 0
    out = capsys.readouterr().out
    assert "cannot be said; val/loss is 0.1000 lower, but max_lr=0.001 has a single seed" in out
    assert "llama-lab noise measures what one seed hides" in out


def test_a_noise_floor_is_quoted_where_both_arms_are_of_its_family(make: Make, untrained: RunConfig, capsys: Output):
    folders = [make(seed, 2 + NOISE[seed]) for seed in range(4)]
    store(measure(load_records(map(str, folders))), folders[0].parent.parent)
    faster = make(0, 1.9, lr=2e-3)
    assert main(["compare", str(folders[0]), str(faster)]) == 0
    assert "The noise floor of this config lets such runs differ by" in capsys.readouterr().out
    wider = write_run(replace(untrained, model=replace(untrained.model, n_layers=1)), end=1.9)
    for words in ([str(folders[0]), str(wider)], [str(wider), str(folders[0])]):
        assert main(["compare", *words]) == 0
        out = capsys.readouterr().out
        assert "noise floor" not in out and "llama-lab noise measures what one seed hides" in out


def test_a_noise_floor_counts_the_runs_that_a_difference_was_taken_of(make: Make, capsys: Output):
    folders = [make(seed, 2 + NOISE[seed]) for seed in range(4)]
    scatter = store(measure(load_records(map(str, folders))), folders[0].parent.parent)
    assert scatter.is_file()
    single = make(9, 2.5, lr=2e-3)
    said = []
    for crossed in ((), ((0, 1), (1, 0), (2, 0))):
        words = [str(single), *map(str, folders), *(str(make(init, 2.0, data_seed=data)) for init, data in crossed)]
        assert main(["compare", *words]) == 0
        said.append(re.findall(r"lets such runs differ by ([\d.]+)", capsys.readouterr().out))
    assert said[0] == said[1] != []


def test_a_sweep_s_folder_and_its_summary_name_its_runs(make: Make, outputs: Path, tmp_path: Path):
    folders = [make(seed, 2 + NOISE[seed] - 0.1 * arm, lr=1e-3 * (arm + 1)) for arm in range(2) for seed in range(3)]
    sweep = outputs / "tiny" / "sweeps" / "max_lr-1234"
    sweep.mkdir(parents=True)
    with (sweep / "summary.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["optim.max_lr", "status", "folder"], *[["x", "finished", str(folder)] for folder in folders]])
    for word in (sweep, sweep / "summary.csv"):
        assert [record.folder for record in load_records([str(word)])] == folders
    moved = tmp_path / "moved"
    outputs.rename(moved)
    assert len(load_records([str(moved / "tiny" / "sweeps" / "max_lr-1234")])) == 6
    (moved / "tiny" / folders[0].name).rename(tmp_path / "gone")
    assert "1 of its 6 runs are not there" in refusal(str(moved / "tiny" / "sweeps" / "max_lr-1234"))


def write_sweep(folders: list[Path], statuses: list[str], search: str = "grid") -> Path:
    """The folder of a sweep over runs, in their order."""
    sweep = folders[0].parent / "sweeps" / "max_lr-1234"
    jobs = [{"number": number, "folder": f"../../{folder.name}"} for number, folder in enumerate(folders, start=1)]
    for job, status in zip(jobs, statuses, strict=True):
        (sweep / "jobs" / f"{job['number']:04}").mkdir(parents=True)
        (sweep / "jobs" / f"{job['number']:04}" / "outcome.json").write_text(json.dumps({"status": status}), encoding="utf-8")
    (sweep / "sweep.json").write_text(json.dumps({"jobs": jobs, "settings": {"search": search}}), encoding="utf-8")
    with (sweep / "summary.csv").open("w", newline="") as file:
        lines = [[status, str(folder)] for status, folder in zip(statuses, folders, strict=True)]
        csv.writer(file).writerows([["status", "folder"], *lines])
    return sweep


def test_what_a_sweep_stopped_early_is_left_out_and_named(make: Make, capsys: Output):
    done = [make(seed, 2 + NOISE[seed] - 0.1 * arm, lr=1e-3 * (arm + 1)) for arm in range(2) for seed in range(3)]
    early = make(0, 3.0, lr=5e-3, last=8)
    unbegun = early.with_name(early.name.replace("8", "9"))
    statuses = ["finished"] * 6 + ["stopped early after update 8", "stopped early with job 7"]
    sweep = write_sweep([*done, early, unbegun], statuses)
    for words in ([str(sweep)], [str(early.parent)]):
        assert main(["compare", *words]) == 0
        out = capsys.readouterr().out
        assert "max_lr=0.002 is better than max_lr=0.001" in out
        assert f"Note: left out: {relative(early)} was stopped early, after update 8 of 20" in out
    assert "the runs leave the arm max_lr=0.001 alone to compare: the others were stopped early" in refusal(
        str(done[0]), str(early)
    )
    # Trained on alone, it counts; a run that nobody stopped is refused as ever.
    assert compare_arms(group_arms(load_records([str(done[0]), str(early)])), Question(at="tokens")).place == 8 * TOKENS
    other = make(0, 3.0, lr=6e-3, last=8)
    assert "is not finished (preempted, update 8 of 20); the command that started it" in refusal(str(sweep), str(other))
    (early / "summary.json").write_text(json.dumps({"status": "finished", "update": 20}), encoding="utf-8")
    assert load_record(early).is_finished


def test_the_baseline_of_a_grid_is_what_was_typed_first(make: Make):
    folders = [make(0, 2.0, lr=lr) for lr in (3e-3, 1e-3, 2e-3)]
    sweep = write_sweep(folders, ["finished"] * 3)
    assert [arm.label for arm in group_arms(load_records([str(sweep)]))] == ["max_lr=0.003", "max_lr=0.001", "max_lr=0.002"]
    (sweep / "sweep.json").write_text((sweep / "sweep.json").read_text().replace("grid", "random"))
    assert group_arms(load_records([str(sweep / "summary.csv")]))[0].label == "max_lr=0.001", "drawn points have no such order"


def test_one_text_under_two_paths_is_one_arm(make: Make, untrained: RunConfig):
    assert isinstance(untrained.data, TextConfig)
    elsewhere = replace(untrained, data=replace(untrained.data, path="/elsewhere/corpus.jsonl"))
    folders = [make(0), make(1), write_run(elsewhere, 2), write_run(elsewhere, 3, lr=2e-3)]
    assert [len(arm.runs) for arm in group_arms(load_records(map(str, folders)))] == [3, 1]
    found = differences(*(load_record(folder) for folder in (folders[0], folders[2])))
    assert ("data.path", False) in [(one.what, one.matters) for one in found]


def test_runs_moved_aside_do_not_count_in_their_folder(make: Make):
    first = make(0)
    make(0, folder=first.with_name(f"{first.name}.1"))
    assert [record.folder for record in load_records([str(first.parent)])] == [first]


def test_the_table_that_wandb_exports_is_read(tmp_path: Path, capsys: Output):
    path = tmp_path / "wandb_export.csv"
    heading = [
        "Name",
        "State",
        "Notes",
        "Runtime",
        "seed.init",
        "seed.data",
        "optim.max_lr",
        "data.path",
        "hardware.micro_batch",
        "tokens",
    ]
    rows = [
        [f"run-{lr}-{seed}", "finished", "-", "12", seed, seed, lr, "a", seed % 2, 1000] for lr in (0.1, 0.2) for seed in range(4)
    ]
    losses = [2 + NOISE[seed] + 0.1 * arm for arm in range(2) for seed in range(4)]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(
            [[*heading, "val/loss", "_step"], *[[*row, loss, 9] for row, loss in zip(rows, losses, strict=True)]]
        )
    assert main(["compare", str(path)]) == 0
    out = capsys.readouterr().out
    assert "max_lr=0.2 is worse than max_lr=0.1" in out and "4 pairs of equal seeds" in out
    assert "a CSV does not say what its runs were validated on" in out
    assert "comes from a CSV, which has last values only" in refusal(str(path), at="tokens")
    text = path.read_text().replace("0.2,a", "0.2,b")
    path.write_text(text)
    assert "has another data.path than run-0.1-0" in refusal(str(path))
    assert main(["compare", str(path), "--ignore", "data.path"]) == 0
    assert main(["compare", str(path), "--ignore", "data.paht"]) == 2
    assert "is in no config of these runs" in capsys.readouterr().err
    path.write_text(text.replace(f"{losses[0]}", "NaN").replace("run-0.2-0,finished", "run-0.2-0,crashed"))
    assert "is not finished (crashed" in refusal(str(path), metric="val/loss")
    path.write_text("Name,State\n")
    assert "has no line below its heading" in refusal(str(path))
    path.write_text("Name,State\na,finished,x\n")
    assert "more or fewer cells than its heading" in refusal(str(path))
