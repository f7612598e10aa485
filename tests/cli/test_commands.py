"""Commands, flags, help and exit codes, in real processes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llama_lab import vocabulary
from llama_lab.arguments import UsageError, parse
from llama_lab.cli import main
from llama_lab.commands import COMMANDS
from llama_lab.config.compose import compose
from llama_lab.config.paths import config_folder
from llama_lab.vocabulary import groups, presets

Output = pytest.CaptureFixture[str]


def test_help_answers_within_a_second(llama_lab, cpu_seconds):
    done = llama_lab("--help")
    assert done.returncode == 0
    assert done.stderr == ""
    assert {"train", "plan", "cache", "completion"} <= set(done.stdout.split())
    assert "75" in done.stdout
    assert cpu_seconds() < 1


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--help"],
        ["train", "--help"],
        ["plan", "-h"],
        ["data"],
        ["completion", "bash"],
        ["__complete", "llama-lab train mod"],
    ],
)
def test_answers_without_composing(words: list[str]):
    """Neither help nor TAB may pay for Hydra, OmegaConf or torch."""
    code = f"""
import sys
from llama_lab.cli import main
main({words!r})
heavy = {{'torch', 'hydra', 'omegaconf', 'wandb', 'numpy'}} & set(sys.modules)
sys.exit(repr(heavy) if heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(os.name != "posix", reason="pipes of POSIX")
@pytest.mark.parametrize("flags", [[], ["-u"]])
def test_a_reader_that_leaves_is_no_error(flags: list[str], tmp_path: Path):
    words = [sys.executable, *flags, "-m", "llama_lab", "train", "--help"]
    with subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""


def test_version(llama_lab):
    done = llama_lab("--version")
    assert done.returncode == 0
    assert done.stdout.startswith("llama-lab ")
    assert done.stdout.split()[1][0].isdigit()


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["tarin"], "did you mean train?"),
        (["frobnicate"], f"there are {', '.join(COMMANDS)}"),
        (["data", "inspct"], "did you mean inspect?"),
        (["data", "shards"], "try: llama-lab data inspect shards"),
        (["optim=muon"], "try: llama-lab train optim=muon"),
        (["train", "--multrun"], "did you mean --multirun?"),
        (
            ["generate", "run", "text", "--temprature", "0"],
            "generate has no flag --temprature; did you mean --temperature?",
        ),
        (["evaluate", "run", "--tasks=x"], "did you mean --task?"),
        (["train", "--lr=0.1"], "llama-lab train has no flag --lr; a field is typed without dashes: did you mean optim.max_lr"),
        (["watch", "--zzz"], "llama-lab watch has no flag --zzz; it takes --help, --once, --every"),
        (["train", "--optim.max_lr=0.1"], "without dashes: optim.max_lr=0.1"),
        (["train", "--optim.max_lr", "0.1"], "without dashes: optim.max_lr=0.1"),
        (["train", "--optim.max_lr", "model.dim=64"], "without dashes: optim.max_lr=VALUE"),
        (["train", "--model", "llama_3m"], "has no flag --model; fields are set without dashes: model=llama_3m"),
        (["train", "--data.path", "a b.txt"], "without dashes: 'data.path=a b.txt'"),
        (["train", "--batch-size", "32"], "without dashes: did you mean data.tokens_per_update or hardware.micro_batch?"),
        (["train", "--resume"], "without dashes: did you mean fresh? the same command goes on with a run by itself"),
        (["plan", "--config", "a"], "llama-lab plan has no flag --config; did you mean --config-dir?"),
        (["runs", "--sort", "-val/loss"], "--sort needs a value; where -val/loss is it, type --sort=-val/loss"),
        (["runs", "--sort", "--json"], "--sort needs a value; type --sort KEY"),
        (["train", "optim=muon", "--wrong"], "it takes --multirun, --cfg, --config-dir, --help"),
        (["train", "--cfg=job"], "takes no value"),
        (["train", "--cfg", "job"], "--cfg takes no value; type it alone, without job"),
        (["train", "--config-dir"], "needs a folder"),
        (["train", "--config-dir", "nowhere"], "'nowhere' is none"),
        (["train", "--config-dir", str(config_folder("conf") / "optim")], "holds no group of options; an option lies one folder"),
        (["plan", "--cfg"], "no flag --cfg"),
        (["plan", "--gpu"], "--gpu needs what to plan for, such as --gpu H100 or --gpu 8xH100"),
        (["plan", "--gpu", "H100", "--probe"], "--probe measures this machine, and --gpu plans for another"),
        (["--versoin"], "llama-lab has no flag --versoin; did you mean --version? (llama-lab --help lists commands)"),
        (
            ["generate", "run", "--temperature", "hot"],
            "llama-lab generate: --temperature hot is not a number; try --temperature 0.5",
        ),
        (["data", "replay", "run", "--update", "x"], "llama-lab data replay: --update x is not a whole number; try --update 1"),
        (["runs", "--sort"], "llama-lab runs: --sort needs a value; type --sort KEY"),
        (["serve", "run", "--port", "a"], "llama-lab serve: --port 'a' is no port; try 8000"),
        (
            ["evaluate"],
            "llama-lab evaluate lacks RUN; type llama-lab evaluate RUN (RUN is the run's folder, outputs/<name>/<run id>, its",
        ),
        (["export", "run"], "llama-lab export lacks --to, --out; type llama-lab export RUN --to hf --out DIR"),
        (["completion", "tcsh"], "takes one of bash, zsh, fish, not tcsh"),
    ],
)
def test_mistakes_in_words_say_what_to_type(words: list[str], hint: str, capsys: Output):
    assert main(words) == 2
    shown = capsys.readouterr()
    assert hint in shown.err
    assert shown.out == ""


def test_flags_stand_anywhere(tmp_path: Path):
    orders = [
        ["-m", "optim=muon", "--config-dir", str(tmp_path), "seed.init=0,1"],
        ["optim=muon", f"--config-dir={tmp_path}", "seed.init=0,1", "--multirun"],
    ]
    for words in orders:
        arguments = parse(words, "train")
        assert arguments.overrides == ["optim=muon", "seed.init=0,1"]
        assert arguments.multirun
        assert arguments.config_dir == tmp_path


@pytest.mark.parametrize("words", [["--config-dir=~/own"], ["--config-dir", "~/own"]])
def test_a_folder_may_be_named_from_home(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "own" / "optim").mkdir(parents=True)
    (tmp_path / "own" / "optim" / "mine.yaml").write_text("defaults:\n  - muon\n  - _self_\nmax_lr: 0.5\n", encoding="utf-8")
    assert parse([*words, "optim=mine"], "train").config_dir == tmp_path / "own"
    assert compose(["optim=mine"], config_dir=Path("~/own")).optim.max_lr == 0.5
    with pytest.raises(UsageError, match="'~nobody-of-this-name/own' is none"):
        parse(["--config-dir=~nobody-of-this-name/own"], "train")


def test_parse_refuses_an_unknown_flag():
    with pytest.raises(UsageError, match="no flag --foo"):
        parse(["--foo"], "train")


def test_train_help_lists_every_option_and_preset(capsys: Output):
    assert main(["train", "--help"]) == 0
    shown = capsys.readouterr().out
    for group, options in groups().items():
        line = next(line for line in shown.splitlines() if line.startswith(f"  {group} "))
        assert line.split()[1:] == options
    for preset, question in presets().items():
        assert f"  {preset} " in shown
        assert question, f"{preset}.yaml has no question in its header"
        assert question in shown


def test_train_help_says_what_fields_mean(capsys: Output, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["train", "--help", "optim"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("optim, a group with options:\n  optim=adamw  AdamW ")
    assert "  optim.max_grad_norm   number | null\n      Global L2 norm that gradients are clipped to." in shown
    assert "  optim.momentum   number   (optim=muon)\n" in shown
    assert max(map(len, shown.splitlines()[4:])) <= 80
    assert main(["train", "--help", "window", "optim.beta1", "optim.max_lr=1"]) == 0
    shown = capsys.readouterr().out
    assert "contiguous | document | packed" in shown and "optim.beta1   number" in shown and "max_lr" not in shown
    assert main(["train", "--help", "learning_rate", "lr"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("learning_rate is called optim.max_lr here\n\n  optim.max_lr   number\n")
    assert all(f"\n  {path}   number" in shown for path in ("optim.adamw_max_lr", "schedule.min_lr"))
    hints = {"optin": "did you mean optim?", "optim.max_rl": "mean optim.max_lr?", "lerning_rate": "mean learning_rate?"}
    for topic, hint in (hints | {"xyz": "there are run"}).items():
        assert main(["train", "--help", topic]) == 2
        assert hint in capsys.readouterr().err


def test_help_before_a_word_is_help_behind_it(capsys: Output):
    for asked, same in (["help", "plan"], ["plan", "--help"]), (["help", "smoke", "lr"], ["train", "--help", "smoke", "lr"]):
        assert main(asked) == main(same) == 0
        shown = capsys.readouterr().out
        assert len(shown) % 2 == 0 and shown[: len(shown) // 2] == shown[len(shown) // 2 :]
    assert main(["help", "trian"]) == 2
    assert "train --help trian: there is no such part" in capsys.readouterr().err


def test_train_help_shows_what_options_and_presets_set(capsys: Output):
    assert main(["train", "--help", "adamw", "smoke", "experiment"]) == 0
    shown = capsys.readouterr().out
    for file in (config_folder("conf") / "optim" / "adamw.yaml", config_folder("experiments") / "experiment" / "smoke.yaml"):
        assert f"={file.stem}, as {file} has it:\n\n{file.read_text(encoding='utf-8').strip()}" in shown
    for preset, question in vocabulary.presets().items():
        assert re.search(rf"^  experiment={preset} +{re.escape(question)}$", shown, flags=re.MULTILINE)


def test_train_help_knows_every_field_that_a_run_has(capsys: Output):
    assert main(["train", "--help", "all"]) == 0
    shown = re.findall(r"^  ([a-z_.0-9]+)   \S", capsys.readouterr().out, flags=re.MULTILINE)
    assert set(shown) == {path for path, field in vocabulary.fields().items() if not field.is_node}
    fields = [field for node in vocabulary.nodes().values() for field in node.fields]
    assert [field.path for field in fields if not field.text or not field.values] == []


def test_train_help_shows_the_options_of_a_folder(tmp_path: Path, capsys: Output):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("dim: 64\n", encoding="utf-8")
    assert main(["train", "--help", "--config-dir", str(tmp_path)]) == 0
    assert "  mine" in capsys.readouterr().out


def test_a_wrong_config_answers_in_two_seconds_without_torch(llama_lab):
    before = os.times()
    done = llama_lab("train", "optim.max_lr=abc", "schedule.warmup_updates=-1", PYTHONPROFILEIMPORTTIME="1")
    after = os.times()
    assert done.returncode == 2
    assert "ConfigError: 2 problems" in done.stderr
    assert "optim.max_lr=abc" in done.stderr
    assert "Traceback" not in done.stderr
    imported = {
        line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines() if line.startswith("import time:") and "|" in line
    }
    assert "hydra" in imported
    assert "torch" not in imported
    # Computing time, which is what the clock shows on a machine that does nothing else.
    assert after.children_user + after.children_system - before.children_user - before.children_system < 2


def test_cfg_prints_a_config_that_starts_nothing(llama_lab, outputs: Path):
    done = llama_lab("train", "--cfg", "model=llama_3m", "hardware=cpu", "optim.max_lr=2e-3")
    assert done.returncode == 0, done.stderr
    from omegaconf import OmegaConf

    shown = OmegaConf.create(done.stdout)
    assert shown.optim.max_lr == 2e-3
    assert shown.precision in ("fp32", "bf16"), "auto must be resolved"
    assert shown.hardware.device == "cpu"
    assert not outputs.exists()
