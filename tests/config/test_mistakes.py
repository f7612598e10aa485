"""Each mistake that a user can make in overrides gets its own line, all at once, and never a traceback."""

import math
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from llama_lab.config.compose import compose, read_request
from llama_lab.config.errors import ConfigError
from llama_lab.config.guesses import MEANT
from llama_lab.config.overrides import any_shape
from llama_lab.config.paths import config_folder, or_meant
from llama_lab.config.schema import MuonConfig, shown
from llama_lab.config.validate import problems as problems_of


def problems(words: list[str], config_dir: Path | None = None) -> list[str]:
    """The lines of the error that these overrides end in."""
    with pytest.raises(ConfigError) as caught:
        compose(words, config_dir=config_dir)
    heading, *lines = str(caught.value).splitlines()
    assert heading == f"{len(lines)} problem{'s' if len(lines) > 1 else ''} in this run"
    return [line.removeprefix("  ") for line in lines]


ONE_LINE = {
    "batch": (
        ["data.max_seq_len=2048", "data.tokens_per_update=500000", "training_tokens=1000000000"],
        "data.tokens_per_update=500000 is not a multiple of data.max_seq_len=2048; nearest: 499712 or 501760",
    ),
    "processes": (
        ["data.tokens_per_update=8192", "hardware.processes=33"],
        "data.tokens_per_update=8192 is 32 windows of 256, too few for 33 processes to have one each; at least 8448, "
        "or hardware.processes=32",
    ),
    "warm-up": (
        ["training_tokens=409600", "schedule.warmup_updates=2000"],
        "schedule.warmup_updates=2000 is not below the run's 100 updates; the run would never leave warm-up; try 10",
    ),
    "cool-down": (
        ["training_tokens=409600", "schedule=wsd", "schedule.warmup_updates=20", "schedule.cooldown_fraction=0.9"],
        "schedule.cooldown_fraction=0.9 leaves no room for schedule.warmup_updates=20 in the run's 100 updates; "
        "at most 0.8, or schedule.warmup_updates=10",
    ),
    "min_lr": (
        ["optim.max_lr=0.01", "schedule.min_lr=0.5"],
        "schedule.min_lr=0.5 is above optim.max_lr=0.01; try 0.001",
    ),
    "budget": (
        ["training_tokens=100", "schedule.warmup_updates=0"],
        "training_tokens=100 is less than one update of data.tokens_per_update=4096; at least 4096",
    ),
    "head size": (
        ["model.dim=252"],
        "model.n_heads=4 does not divide model.dim=252 into heads of an even number of channels, as rotary embeddings need; "
        "one of 2, 3, 6, 7 does, or model.dim=248 or model.dim=256",
    ),
    "number of heads": (
        ["model.n_heads=3"],
        "model.n_heads=3 does not divide model.dim=256 into heads of an even number of channels, as rotary embeddings need; "
        "one of 1, 2, 4, 8 does, or model.dim=252 or model.dim=258",
    ),
    "odd width": (
        ["model.dim=251"],
        "model.n_heads=4 does not divide model.dim=251 into heads of an even number of channels, as rotary embeddings need; "
        "model.dim=248 or model.dim=256 works",
    ),
    "no budget": (["training_tokens=-5"], "training_tokens=-5 is below 1; try 1843200"),
    "no budget in a preset": (["experiment=smoke", "training_tokens=0"], "training_tokens=0 is below 1; try 40960"),
    "grouped heads": (
        ["model.n_kv_heads=3"],
        "model.n_kv_heads=3 does not divide model.n_heads=4; one of 1, 2, 4 does, null is all of them",
    ),
    "vocabulary": (
        ["tokenizer.vocab_size=100"],
        "tokenizer.vocab_size=100 is below 261: 4 special tokens, 256 bytes and one merge; try 2048",
    ),
    "seeds": (["seeds=1"], "seeds=1 is no field; did you mean seed.init or seed.data or seed.sampling?"),
    "several seeds": (["seed=0,1"], "seed=0,1 stands for several runs, and seed holds several values; type -m seed.init=0,1"),
    "seed": (["seed=1"], "seed=1 holds several values; type seed.init=1 seed.data=1 seed.sampling=1"),
    "name": (
        ["name=a/b"],
        "name='a/b' cannot name a folder: letters, digits, '.', '_', '-', at most 100; e.g. name=a_b",
    ),
    "field": (["optim.max_lrr=1"], "optim.max_lrr=1 is no field; did you mean optim.max_lr?"),
    "bare field": (["n_layers=4"], "n_layers=4 is no field; did you mean model.n_layers?"),
    "added field": (["+optim.max_lrr=1"], "+optim.max_lrr=1 is no field; did you mean optim.max_lr?"),
    "added field that exists": (["+optim.max_lr=1"], "+optim.max_lr=1 exists already; type optim.max_lr=1 without the +"),
    "group": (["modle=llama_97m"], "modle=llama_97m is no field; did you mean model?"),
    "field of another option": (
        ["optim=adamw", "optim.momentum=0.9"],
        "optim.momentum=0.9 is no field of optim=adamw; optim=muon has it",
    ),
    "field of another data set": (
        ["data.dataset=a/b"],
        "data.dataset=a/b is no field of data=docs; data=fineweb_edu and data=tinystories have it",
    ),
    "option": (["optim=muno"], "optim=muno is no option; did you mean optim=muon? there are adamw, muon"),
    "added option": (["+experiment=smoke"], "+experiment=smoke exists already; type experiment=smoke without the +"),
    "removed option": (["~optim"], "~optim cannot be left out; there are adamw, muon"),
    "removed node": (["~eval"], "~eval removes nothing here; what can be left out is typed eval=null"),
    "whole number": (["model.n_heads=four"], "model.n_heads=four is not a whole number; e.g. model.n_heads=4"),
    "whole number as float": (
        ["training_tokens=1e9"],
        "training_tokens=1000000000.0 is not written as a whole number; type training_tokens=1000000000",
    ),
    "number": (["model.dropout=none"], "model.dropout=none is not a number; e.g. model.dropout=0.0"),
    "truth": (["model.tie_embeddings=5.5"], "model.tie_embeddings=5.5 is not true or false; e.g. model.tie_embeddings=true"),
    "choice": (["precision=fp16"], "precision=fp16 is none of auto, fp32, bf16, fp8; e.g. precision=auto"),
    "list": (["wandb.tags=first try"], "wandb.tags=first try is no list; e.g. 'wandb.tags=[first try]'"),
    "list of lists": (["wandb.tags=[a,[b]]"], "wandb.tags=[a,[b]] holds a list or a mapping where each item is one value"),
    "null": (["checkpoint=null"], "checkpoint=null cannot be left out"),
    "field of a node that is off": (
        ["eval=null", "eval.every_updates=5"],
        "eval.every_updates=5 cannot be set, because eval is null and so left out of this run",
    ),
    "text path": (["data=text"], "data.path=??? has no value yet; type one, e.g. data.path=book.txt"),
    "tokenizer path": (["tokenizer=file"], "tokenizer.path=??? has no value yet; type one, e.g. tokenizer.path=tokenizer.json"),
    "sweep without -m": (
        ["optim.max_lr=1e-3,1e-2"],
        "optim.max_lr=1e-3,1e-2 stands for several runs; start them with -m, or give one value",
    ),
    "a preset alone": (["smoke"], "smoke has no group; type experiment=smoke"),
    "an option alone": (["muon"], "muon has no group; type optim=muon"),
    "a field alone": (["optim.max_lr"], "optim.max_lr has no value; type one, e.g. optim.max_lr=1e-3"),
    "a mistyped field alone": (["modle.dim"], "modle.dim is no field, and has no value; did you mean model.dim=64?"),
    "a group alone": (
        ["data"],
        "data has no option; type data=OPTION, one of docs, fineweb_edu, mixture, shards, text, tinystories",
    ),
    "a folder alone": (["/"], "/ is a folder; to use its text, type data=text data.path=/"),
    "a value alone": (["64"], "64 has no =; type key=value, such as model.dim=64, or group=option, such as data=text"),
    "a space for the equals sign": (["model.dim", "64"], "model.dim 64 is one value in pieces; type model.dim=64 without spaces"),
    "spaces around it": (["model.dim", "=", "64"], "model.dim = 64 is one value in pieces; type model.dim=64 without spaces"),
    "a space behind it": (["model.dim=", "64"], "model.dim= 64 is one value in pieces; type model.dim=64 without spaces"),
    "a space before it": (["data", "=text"], "data =text is one value in pieces; type data=text without spaces"),
    "millions": (["training_tokens=5M"], "training_tokens=5M is not written as a number; type training_tokens=5000000"),
    "billions": (["training_tokens=1.5b"], "training_tokens=1.5b is not written as a number; type training_tokens=1500000000"),
    "no key": (["=3"], "=3 has no key before the =; type key=value"),
    "no quotes": (
        ["sample.prompts=[Hello, I am (not) sure"],
        "sample.prompts=[Hello, I am (not) sure cannot be read; "
        'each text of the list goes in quotes: \'sample.prompts=["Hello","I am (not) sure"]\'',
    ),
    "interpolation": (
        ["optim.max_lr=${optim.lr}"],
        "optim.max_lr cannot be read: Interpolation key 'optim.lr' not found; "
        "type a value, or the key of another field as '${KEY}'",
    ),
    "interpolation of itself": (
        ["model.dim=${model.dim}"],
        "model.dim cannot be read: Recursive interpolation detected; type a value, or the key of another field as '${KEY}'",
    ),
    "interpolation of an unset variable": (
        ["model.dim=${oc.env:LLAMA_LAB_UNSET}"],
        "model.dim cannot be read: KeyError raised while resolving interpolation: "
        "\"Environment variable 'LLAMA_LAB_UNSET' not found\"; "
        "set LLAMA_LAB_UNSET, or say what to take where it is not set: '${oc.env:LLAMA_LAB_UNSET,VALUE}'",
    ),
    "reference in a text": (
        ["sample.prompts=['echo', 'echo ${HOME}']"],
        r"sample.prompts[1] cannot be read: Interpolation key 'HOME' not found; where ${ is meant as text, type \${",
    ),
    "open reference": (
        ["wandb.group='${HOME'"],
        r"wandb.group=${HOME holds a ${ that names no value, or is not closed; where it is meant as text, type \${",
    ),
    "open reference in a list": (
        ["sample.prompts=['echo ${HOME']"],
        r"sample.prompts=[echo ${HOME] holds a ${ that names no value, or is not closed; where it is meant as text, type \${",
    ),
    "no value in a list": (
        ["sample.prompts=[???]"],
        "sample.prompts[0] cannot be read: Missing mandatory value: sample.prompts[0]",
    ),
    "preset's values": (
        ["experiment=overfit", "data.path=x", "optim=muon"],
        "optim=muon would keep what experiment=overfit sets for optim=adamw: optim.weight_decay=0.0; "
        "type that as well to keep it, or optim.weight_decay=0.8 as optim=muon has it, or start without the preset",
    ),
    "both ways on": (
        ["fresh=true", "accept_changes=true"],
        "accept_changes=true contradicts fresh=true, which starts anew; leave one of them out",
    ),
}


OFF = {
    "wandb": "wandb=null",
    "eval": "eval=null",
    "sample": "sample=null",
    "sweep": "sweep=null",
    "optim.max_grad_norm": "optim.max_grad_norm=null",
    "checkpoint.every_tokens": "checkpoint.every_tokens=null",
    "model.rope_scaling": "model.rope_scaling=null",
    "hardware.micro_batch": "hardware.micro_batch=null",
    "wandb.mode": "wandb=null",
    "sample.first_tokens": "sample=null",
    "experiment": "experiment=null",
}


@pytest.mark.parametrize("key", OFF)
@pytest.mark.parametrize("off", ["false", "none", "no", "off", "disabled", "Off", "None"])
def test_what_can_be_left_out_is_told_how_whatever_word_was_tried(key: str, off: str) -> None:
    (line,) = problems([f"{key}={off}"])
    assert line.startswith(f"{key}={off} is n")
    assert line.endswith(f"type {OFF[key]}")
    compose([OFF[key]])


SWITCHES = {
    "wandb=0": "wandb=0 is no way to leave it out; type wandb=null",
    "wandb=true": "wandb=true need not be typed; only wandb=null leaves it out",
    "wandb.mode=null": "wandb.mode=null is none of auto, online, offline; to leave wandb out, type wandb=null",
    "wandb.mode=disabled": "wandb.mode=disabled is none of auto, online, offline; to leave wandb out, type wandb=null",
    "eval.enabled=false": "eval.enabled=false is no field; eval is on unless eval=null leaves it out",
    "checkpoint=false": "checkpoint=false cannot be left out",
    "seed=0": "seed=0 holds several values; type seed.init=0 seed.data=0 seed.sampling=0",
}


@pytest.mark.parametrize("typed", SWITCHES)
def test_a_switch_is_told_what_null_is(typed: str) -> None:
    assert problems([typed]) == [SWITCHES[typed]]


def test_what_a_preset_leaves_out_cannot_be_switched_on() -> None:
    assert problems(["experiment=smoke", "wandb=true"]) == [
        "wandb=true cannot be set, because wandb is null and so left out of this run"
    ]


COMMAS = {
    "seed.init=0,1": "give one value",
    "optim=adamw,muon": "give one value",
    "model.tie_embeddings=true,false": "give one value",
    "precision=bf16,fp32": "give one value",
    "optim.max_lr=range(1,3)": "give one value",
    "training_tokens=10,000,000": "type training_tokens=10000000 for one number",
    "optim.max_lr=0,004": "type optim.max_lr=0.004 for one number",
    "wandb.tags=a,b c": "type 'wandb.tags=[a,b c]' for one list, or give one value",
    "data.path=../a,b.txt": "type 'data.path=\"../a,b.txt\"' for one text; "
    "several files are named as their folder, or by a pattern such as data.path='books/*.txt'",
}


@pytest.mark.parametrize("typed", COMMAS)
def test_a_comma_is_told_what_the_field_takes(typed: str) -> None:
    kind = ["data=text"] if typed.startswith("data.path") else []
    assert problems([*kind, typed]) == [f"{typed} stands for several runs; start them with -m, or {COMMAS[typed]}"]
    said = re.search(r"type (.*) for one", COMMAS[typed])
    if said is not None:
        compose([*kind, *shlex.split(said[1])])


def test_several_values_of_what_is_no_field() -> None:
    assert problems(["max_lrr=1,2"]) == ["max_lrr=1,2 is no field; did you mean optim.max_lr?"]


@pytest.mark.parametrize("typed", ["10.000.000", "10 000 000", "10'000'000", "10’000’000"])
def test_thousands_set_apart_are_no_number_but_nearly(typed: str) -> None:
    assert problems([f"training_tokens={typed}"]) == [
        f"training_tokens={typed} is not written as a number; type training_tokens=10000000"
    ]


UNREADABLE = {
    "optim.max_lr=range(0.001,0.01": "lacks a closing parenthesis; type -m 'optim.max_lr=range(0.001,0.01)'",
    "optim=choice(adamw,muon": "lacks a closing parenthesis; type -m 'optim=choice(adamw,muon)'",
    "data.path=choice(1.txt": "lacks a closing parenthesis; "
    "type -m 'data.path=choice(1.txt)', or 'data.path=\"choice(1.txt\"' for a text",
    "data.path=choice (1).txt": "cannot be read; in quotes it is taken as it is: 'data.path=\"choice (1).txt\"'",
    "data.path='a.txt": "begins with a quote that is not closed; "
    "type data.path=a.txt, or 'data.path=\"'\"'\"'a.txt\"' where it belongs to it",
    "data.path=ü,b.txt": "cannot be read; a text with a comma in it goes in quotes: 'data.path=\"ü,b.txt\"', "
    'and of several each: -m \'data.path="ü","b.txt"\'',
    "data.path=“a b.txt”": "stands in typographic quotes, which are part of the value; "
    "type 'data.path=a b.txt', or 'data.path=\"“a b.txt”\"' where they belong to it",
    "data.path=“a": "begins with a typographic quote, which holds no words together; straight ones do: 'data.path=two words'",
    "data=“text”": "stands in typographic quotes, which are part of the value; type data=text",
    "optim.max_lr=“0.1”": "stands in typographic quotes, which are part of the value; type optim.max_lr=0.1",
    "optim.max_lr=0.1)": "is not a number; e.g. optim.max_lr=1e-3",
    "model.dim=64ü": "is not a whole number; e.g. model.dim=64",
    "model.tie_embeddings=ü": "is not true or false; e.g. model.tie_embeddings=true",
    "precision=ü": "is none of auto, fp32, bf16, fp8",
    "optim=ü": "is no option; there are adamw, muon",
    "wandb.tags=[“ä”,b]": 'cannot be read; each text of the list goes in quotes: \'wandb.tags=["ä","b"]\'',
    "max_lrr=ü": "is no field; did you mean optim.max_lr?",
}


@pytest.mark.parametrize("typed", UNREADABLE)
def test_what_cannot_be_read_is_told_how_to_type_it(typed: str) -> None:
    assert problems(["data=text", *([] if typed.startswith("data.path") else ["data.path=x"]), typed]) == [
        f"{typed} {UNREADABLE[typed]}"
    ]


def test_several_files_are_told_how_they_are_named() -> None:
    assert problems(["data=text", "data.path=[a.txt,b]"]) == [
        "data.path=[a.txt,b] is a list; several files are named as their folder, or by a pattern such as data.path='books/*.txt'"
    ]
    assert problems(["wandb.group=[a,b]"]) == ["wandb.group=[a,b] is a list; give one text"]


def test_a_path_in_place_of_an_option_is_told_where_it_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my book.txt").touch()
    Path("t.json").touch()
    for typed, works in {
        "data=my book.txt": "data=text 'data.path=my book.txt'",
        "tokenizer=t.json": "tokenizer=file tokenizer.path=t.json",
    }.items():
        assert problems([typed])[0].startswith(f"{typed} is no option; to use what lies there, type {works}; there are ")
        compose(shlex.split(works))
    assert "did you mean experiment=tiny_shakespeare?" in problems(["experiment=tiny"])[0]


def test_a_value_that_is_wrong_is_not_missing_as_well() -> None:
    assert len(problems(["data=text", "data.path=a,b"])) == 1
    assert len(problems(["data=text", "data.path", "=", "a"])) == 1
    assert len(problems(["data=mixture", "data.paths=[a,b]", "data.weights=abc"])) == 1
    assert len(problems(["data=mixture", "data.paths=[a,b"])) == 2


def test_a_swap_under_a_preset_is_told_values_to_copy(tmp_path: Path) -> None:
    line = problems(["experiment=seed_1b_fineweb", "optim=muon"])[0]
    assert line.startswith(
        "optim=muon would keep what experiment=seed_1b_fineweb sets for optim=adamw: optim.max_lr=0.0001; type that"
    )
    assert problems(["experiment=tiny_shakespeare", "data=shards"]) == [
        "data=shards would keep what experiment=tiny_shakespeare sets for data=text: data.val_fraction=0.1; "
        "type that as well to keep it, or data.val_fraction=null as data=shards has it, or start without the preset",
        "data.path=??? has no value yet; type one, e.g. data.path=shards/fineweb",
    ]
    (tmp_path / "experiment").mkdir()
    (tmp_path / "optim").mkdir()
    preset = "# @package _global_\noptim:\n  momentum: 0.9\n  max_lr: 0.01\n"
    (tmp_path / "experiment" / "own.yaml").write_text(preset, encoding="utf-8")
    (tmp_path / "optim" / "high.yaml").write_text("defaults:\n  - muon\n  - _self_\nmax_lr: 0.5\n", encoding="utf-8")
    assert problems(["experiment=own", "optim=adamw"], tmp_path) == [
        "optim=adamw would keep what experiment=own sets for optim=muon: optim.momentum=0.9 optim.max_lr=0.01; "
        "optim=adamw has no optim.momentum, so start without the preset"
    ]
    optim = compose([]).optim
    assert isinstance(optim, MuonConfig)
    assert problems(["experiment=own", "optim=high"], tmp_path) == [
        "optim=high would keep what experiment=own sets for optim=muon: optim.momentum=0.9 optim.max_lr=0.01; "
        f"type these as well to keep them, or optim.momentum={optim.momentum} optim.max_lr=0.5 as optim=high has them, "
        "or start without the preset"
    ]


ELSEWHERE = {
    "learning_rate": "optim.max_lr",
    "lr": "optim.max_lr or optim.adamw_max_lr or schedule.min_lr",
    "training.learning_rate": "optim.max_lr",
    "batch_size": "data.tokens_per_update or hardware.micro_batch",
    "batch-size": "data.tokens_per_update or hardware.micro_batch",
    "epochs": "training_tokens",
    "max_steps": "training_tokens",
    "n_layers": "model.n_layers",
    "num_layers": "model.n_layers",
    "model.hidden_size": "model.dim",
    "seq_len": "data.max_seq_len",
    "device": "hardware.device",
    "dtype": "precision",
    "gpus": "hardware.processes",
    "text": "data.path",
}


@pytest.mark.parametrize("word", ELSEWHERE)
def test_names_from_elsewhere_are_told_what_they_are_here(word: str) -> None:
    (line,) = problems([f"{word}=1"])
    assert line.partition("?")[0] == f"{word}=1 is no field; did you mean {ELSEWHERE[word]}"


def test_names_from_elsewhere_lead_to_fields() -> None:
    there = {*any_shape(), "experiment"}
    assert {key for keys, _ in MEANT.values() for key in keys} <= there
    assert not set(MEANT) & {key for key in there if "." not in key}


def test_a_path_that_is_not_there_is_told_what_is_near(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "outputs" / "study").mkdir(parents=True)
    (tmp_path / "outputs" / "study" / "run-1").touch()
    (tmp_path / "README.md").touch()
    monkeypatch.chdir(tmp_path)
    for typed, said in (
        ("READNE.md", "did you mean README.md?"),
        (f"{tmp_path}/output/study", f"did you mean {tmp_path}/outputs/study?"),
        ("outputs/studdy/run-1", "did you mean outputs/study/run-1?"),
        ("outputs/studdy/other", "did you mean outputs/study?"),
        ("outputs/studdy/*", "did you mean outputs/study?"),
        ("outputs/study/*-2", "name another"),
        ("outputs/study", "name another"),
        ("zzz", "name another"),
    ):
        assert or_meant(Path(typed), "name another") == said


@pytest.mark.parametrize("mistake", ONE_LINE)
def test_each_mistake_has_its_message(mistake: str) -> None:
    words, line = ONE_LINE[mistake]
    assert problems(words) == [line]


def test_the_last_value_that_works_is_not_refused() -> None:
    """Of bounds between two keys."""
    budget = ["data.max_seq_len=256", "data.tokens_per_update=1024", f"training_tokens={50 * 1024}", "schedule=linear"]
    assert compose([*budget, "schedule.warmup_updates=49"]).updates == 50
    assert problems([*budget, "schedule.warmup_updates=50"]) == [
        "schedule.warmup_updates=50 is not below the run's 50 updates; the run would never leave warm-up; try 5"
    ]
    compose([*budget, "schedule.warmup_updates=1", "optim.max_lr=0.001", "schedule.min_lr=0.001"])
    compose([*budget, "schedule.warmup_updates=1", "hardware.processes=4"])


def test_all_problems_are_said_at_once() -> None:
    lines = problems(
        [
            "optim=adamx",
            "modle=x",
            "data.max_seq_len=abc",
            "model.dim=250",
            "=3",
            "schedule.min_lr=-1",
            "experiment=smoke",
            "seed.init=-2",
        ]
    )
    subjects = [line.split(" ", 1)[0] for line in lines]
    assert subjects == [
        "optim=adamx",
        "=3",
        "modle=x",
        "data.max_seq_len=abc",
        "seed.init=-2",
        "model.n_heads=2",
        "schedule.min_lr=-1.0",
    ]
    lines = problems(
        ["model.dim=251", "schedule.min_lr=-1", "seed.init=-2", "optim.beta1=1", "log.every_updates=0", "eval.max_tokens=-1"]
    )
    assert len(lines) == 6


BAD_VALUES = {
    "seed": {"init": -1, "data": -1, "sampling": 2**63},
    "model": {
        "dim": 0, "n_layers": 0, "n_heads": 0, "ffn_dim": 0, "multiple_of": 0, "rope_theta": 0.0, "norm_eps": 0.0, "dropout": 1.0,
        "n_kv_heads": 0,
    },
    "data": {"max_seq_len": 1, "tokens_per_update": 0, "val_bytes": 0},
    "tokenizer": {"vocab_size": 1_000_001},
    "optim": {
        "max_lr": math.nan, "weight_decay": -0.1, "max_grad_norm": 0.0, "beta1": -0.1, "beta2": 1.0, "eps": 0.0, "momentum": 1.0,
        "adamw_max_lr": math.inf,
    },
    "schedule": {"warmup_updates": -1, "min_lr": math.nan, "cooldown_fraction": 0.0},
    "hardware": {"processes": 0, "micro_batch": 0},
    "log": {"every_updates": 0},
    "eval": {"every_updates": 0, "max_tokens": 0, "tasks_every_updates": 0},
    "sample": {
        "first_tokens": 0, "growth": 0.5, "new_tokens": 0, "temperature": -1.0, "top_k": 0, "top_p": 0.0, "min_p": 1.1,
        "repetition_penalty": 0.0, "prompts": [],
    },
    "checkpoint": {"every_tokens": 0, "keep": 0},
    "guard": {"max_skipped": -1, "spike_deviations": 0.0},
    "wandb": {"project": ""},
}  # fmt: skip


def test_each_range_is_kept_and_named_with_its_key() -> None:
    run = compose([])
    for node, values in BAD_VALUES.items():
        for field, value in values.items():
            bad = replace(run, **{node: replace(getattr(run, node), **{field: value})})
            assert [subject for subject, _ in problems_of(bad)] == [f"{node}.{field}={shown(value)}"]


def test_text_and_its_tokenizer_have_ranges_too() -> None:
    run = compose(["data=text", "data.path=x", "tokenizer=file", "tokenizer.path=y"])
    bad = replace(
        run, data=replace(run.data, path="", val_fraction=1.0), tokenizer=replace(run.tokenizer, path=""), training_tokens=0
    )
    subjects = [subject for subject, _ in problems_of(bad)]
    assert subjects == ["training_tokens=0", "data.val_fraction=1.0", "data.path=", "tokenizer.path="]


def test_a_swap_under_a_preset_is_free_once_its_values_are_typed() -> None:
    run = compose(["experiment=overfit", "data.path=x", "optim=muon", "optim.weight_decay=0.1"])
    assert run.optim.weight_decay == 0.1
    assert compose(["experiment=overfit", "data.path=x", "optim=adamw"]).optim.weight_decay == 0.0


FILES = {
    "key": ("optim:\n  max_lrr: 1\n", "optim.max_lrr in experiment/own.yaml is no field; did you mean optim.max_lr?"),
    "type": (
        "model:\n  dim: wide\n",
        "model.dim in experiment/own.yaml is wrong: Value 'wide' of type 'str' could not be converted to Integer",
    ),
    "option": (
        "defaults:\n  - override /optim: muno\n",
        "optim=muno is no option; did you mean optim=muon? there are adamw, muon (a preset or an option asks for it)",
    ),
}


def test_an_option_of_a_kind_that_is_not_there_is_told_where_kinds_are_named(tmp_path: Path) -> None:
    (tmp_path / "schedule").mkdir()
    (tmp_path / "schedule" / "staircase.yaml").write_text("defaults:\n  - /schema/schedule/staircase@_here_\n  - _self_\n")
    with pytest.raises(ConfigError) as refused:
        compose(["schedule=staircase"], config_dir=tmp_path)
    rule = "begins with /schema/schedule/staircase, which is no kind of schedule; there are cosine, linear, constant, wsd, "
    rule += "and SHAPES in llama_lab/config/schema/run.py takes others"
    assert refused.value.problems == [("schedule/staircase.yaml", rule)]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("max_lr: 0.1\nweight_decay: 0.0\nmax_grad_norm: null\n", "optim=own does not say of which kind it is; its file says so"),
        ("max_lr: 0.1\nbeta1: 0.9\n", "optim=adamw and optim=muon have it; its file says so"),
    ],
)
def test_an_option_that_says_no_kind_is_told_how_to(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "optim").mkdir()
    (tmp_path / "optim" / "own.yaml").write_text(content, encoding="utf-8")
    (problem,) = problems(["optim=own", "optim.max_lr=1"], tmp_path)
    assert f"{said} in its defaults: /schema/optim/KIND@_here_, where KIND is one of adamw, muon" in problem


def test_an_option_with_the_name_of_a_shipped_one_is_refused(tmp_path: Path) -> None:
    shipped = config_folder("conf") / "optim" / "adamw.yaml"
    (tmp_path / "optim").mkdir()
    (tmp_path / "optim" / "muon.yaml").write_bytes((shipped.parent / "muon.yaml").read_bytes())  # a copy that says the same
    (tmp_path / "experiment").mkdir()
    assert compose(["optim=adamw"], config_dir=tmp_path) == compose(["optim=adamw"])
    own = {tmp_path / "optim" / "adamw.yaml": shipped}
    own[tmp_path / "experiment" / "smoke.yaml"] = config_folder("experiments") / "experiment" / "smoke.yaml"
    for file, other in own.items():
        file.write_text(other.read_text(encoding="utf-8").replace("name: smoke", "name: mine") + "\n", encoding="utf-8")
    lines = [
        f"{file} would be ignored, for {other} has the same name; "
        f"rename it, such as own_{file.name}, and type {file.parent.name}=own_{file.stem}"
        for file, other in own.items()
    ]
    assert problems([], tmp_path) == lines
    with pytest.raises(ConfigError, match="has the same name"):
        read_request(["experiment=smoke"], config_dir=tmp_path)


@pytest.mark.parametrize("mistake", FILES)
def test_mistakes_in_a_preset_name_its_file(mistake: str, tmp_path: Path) -> None:
    text, line = FILES[mistake]
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "own.yaml").write_text(f"# @package _global_\n{text}", encoding="utf-8")
    assert problems(["experiment=own"], tmp_path) == [line]


def test_broken_yaml_names_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    file = tmp_path / "experiment" / "own.yaml"
    file.write_text("# @package _global_\nmodel: [\n", encoding="utf-8")
    (line,) = problems(["experiment=own"], tmp_path)
    assert line.startswith(f"{file} is no YAML: ")
    assert line.endswith("in line 3")


def test_a_preset_without_its_package_says_what_to_add(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "own.yaml").write_text("name: x\n", encoding="utf-8")
    assert problems(["experiment=own"], tmp_path) == [
        "experiment in experiment/own.yaml is no field; the first line of a preset is # @package _global_"
    ]


def test_a_request_is_checked_before_it_is_expanded() -> None:
    with pytest.raises(ConfigError, match="optim=muno is no option"):
        read_request(["optim=muno", "model.dim=128,256"])


def test_a_wrong_config_answers_fast_and_without_torch(cpu_seconds) -> None:
    code = (
        "import sys\nfrom llama_lab.config.compose import compose\nfrom llama_lab.config.errors import ConfigError\n"
        "from llama_lab.config.resolve import resolve\nresolve(compose(['hardware=cpu']))\n"
        "try:\n    compose(['model.dim=3'])\nexcept ConfigError:\n    print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    # The promise is 2 s for one answer; these are two.
    assert cpu_seconds() < 4
