"""Every option and every preset composes, validates, and means what its name says."""

import re
from pathlib import Path

import pytest

from llama_lab.config import paths
from llama_lab.config.compose import compose, read_request
from llama_lab.config.preset import read_preset
from llama_lab.config.resolve import resolve
from llama_lab.config.schema import GROUPS
from llama_lab.model.count import ffn_dim, parameters

GIVEN = {
    "data=text": ["data.path=book.txt"],
    "data=shards": ["data.path=shards"],
    "data=mixture": ["data.paths=[web,code]", "data.weights=[0.7,0.3]"],
    "tokenizer=file": ["tokenizer.path=tokenizer.json"],
}
OPTIONS = [f"{group}={option}" for group in GROUPS for option in paths.options(group)]
PRESETS = paths.options("experiment")


def preset_words(name: str) -> list[str]:
    """A preset with what it leaves to the user."""
    choices = read_preset(name).choices
    return [f"experiment={name}", *[word for group, option in choices.items() for word in GIVEN.get(f"{group}={option}", [])]]


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_composes(option: str) -> None:
    group, _, name = option.partition("=")
    run = compose([option, *GIVEN.get(option, []), "schedule.warmup_updates=1"])
    assert run.origin.choices[group] == name


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_composes_and_resolves(name: str) -> None:
    run = resolve(compose([*preset_words(name), "hardware.device=cpu", "hardware.processes=1"]))
    assert run.name == name
    assert run.updates > run.schedule.warmup_updates


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_says_question_command_and_expectation(name: str) -> None:
    file = paths.option_file("experiment", name)
    assert file is not None
    header = [line for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert header[0] == "# @package _global_"
    assert header[1].endswith("?")
    assert f"llama-lab train experiment={name}" in "\n".join(header)
    assert "Expected: " in "\n".join(header)


def test_the_index_of_presets_lists_each() -> None:
    index = (paths.config_folder("experiments") / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)`", index, re.MULTILINE)) == set(PRESETS)


@pytest.mark.parametrize("name", [name for name in paths.options("model") if name != "seed_1b"])
def test_models_are_named_by_what_they_count(name: str) -> None:
    model = compose([f"model={name}"]).model
    vocabulary = 4096 if name == "llama_3m" else 8192
    millions = int(name.removeprefix("llama_").removesuffix("m"))
    assert abs(parameters(model, vocabulary) - millions * 1e6) < 1e6


def test_the_seeds_largest_model_is_exact() -> None:
    model = compose(["model=seed_1b"]).model
    assert ffn_dim(model) == 5632
    assert parameters(model, 8192) == 1_266_780_160


def test_tiny_shakespeare_keeps_to_its_terms() -> None:
    run = compose(["experiment=tiny_shakespeare", "data.path=input.txt"])
    assert run.updates == 2000
    assert (run.windows_per_update, run.data.max_seq_len) == (12, 64)
    assert parameters(run.model, 257) <= 860_000


def test_a_sweep_preset_asks_for_several_runs() -> None:
    request = read_request(["experiment=lr_sweep", "model.dim=128,256"])
    assert request.is_sweep
    assert list(request.sweep_params) == ["optim.max_lr"]
    assert [override.key_or_group for override in request.overrides] == ["experiment", "model.dim"]
    assert not read_request(["experiment=smoke"]).is_sweep


def test_options_and_presets_of_ones_own(tmp_path: Path) -> None:
    for file, text in {
        "optim/mine.yaml": "defaults:\n  - muon\n  - _self_\nmax_lr: 0.5\n",
        "experiment/study.yaml": "# @package _global_\ndefaults:\n  - smoke\n  - override /optim: mine\n  - _self_\nname: study\n",
    }.items():
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).write_text(text, encoding="utf-8")
    run = compose(["experiment=study"], config_dir=tmp_path)
    assert (run.name, run.optim.max_lr, run.model.dim) == ("study", 0.5, 64)
    assert run.origin.label == "study"
