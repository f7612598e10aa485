"""What composing leaves behind, takes, and gives."""

import pickle
import shlex
from pathlib import Path

import hydra
import pytest
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.singleton import Singleton
from hydra.version import VersionBase
from omegaconf import OmegaConf

from llama_lab.config.compose import compose, read_request, recompose
from llama_lab.config.grammar import quoted, word
from llama_lab.config.identity import load_config, run_id, save_config
from llama_lab.config.literal import literal, unescaped
from llama_lab.config.schema import AdamWConfig, MuonConfig, TextConfig, Window


def test_values_arrive_as_plain_types() -> None:
    run = compose(
        ["optim=adamw", "optim.max_lr=1e-3", "data.window=document", "eval=null", "wandb.tags=[a,b]", "model.rope_theta=500"]
    )
    assert type(run.optim) is AdamWConfig
    assert run.optim.max_lr == 0.001
    assert run.data.window is Window.document
    assert run.eval is None
    assert run.wandb is not None and type(run.wandb.tags) is list
    assert type(run.model.rope_theta) is float


def test_overrides_may_repeat_and_the_last_counts() -> None:
    run = compose(["optim=adamw", "optim.max_lr=1", "optim=muon", "optim.max_lr=0.5", "experiment=smoke", "experiment=null"])
    assert type(run.optim) is MuonConfig
    assert (run.optim.max_lr, run.name) == (0.5, "runs")


def test_values_may_refer_to_others_and_nodes_be_set_whole() -> None:
    run = compose(["optim.max_lr=${optim.adamw_max_lr}", "seed={init: 5, data: 6}"])
    assert run.optim.max_lr == compose([]).optim.adamw_max_lr
    assert (run.seed.init, run.seed.data, run.seed.sampling) == (5, 6, 0)


def test_an_escaped_reference_is_text_wherever_a_text_stands(tmp_path: Path) -> None:
    words = [r"sample.prompts=['echo \${HOME}', 'at ${seed.init}']", r"wandb.group='\${a'", "data=text", r"data.path='\${B}/x'"]
    run = compose(words)
    assert run.sample is not None and run.wandb is not None and type(run.data) is TextConfig
    assert (run.sample.prompts, run.wandb.group, run.data.path) == (["echo ${HOME}", "at 0"], "${a", "${B}/x")
    child = recompose(run, ["training_tokens=2000000", "optim=adamw", r"wandb.group='\\\${a}'"])
    assert child.sample == run.sample and child.data == run.data
    assert child.wandb is not None and child.wandb.group == r"\${a}"
    (tmp_path / "experiment").mkdir()
    preset = "# @package _global_\nsample:\n  prompts: ['\\${HOME}']\n"
    (tmp_path / "experiment" / "shell.yaml").write_text(preset, encoding="utf-8")
    own = compose(["experiment=shell"], config_dir=tmp_path)
    assert own.sample is not None and own.sample.prompts == ["${HOME}"]


NAMES = [
    "../Bücher.txt", "~/book.txt", "it's.txt", "/a b/c.txt", 'Büch er/mein "Faust" ü.txt', '"Faust" ü.txt', "book (1).txt",
    "a[1].txt", "[ü].txt", "{ü}", "/a=b.txt", "#a&b!;.txt", "C:\\Bü\\", "ü\\\\\"", "ü\\'x\"\\", "«x»y.txt", "Ελλάδα/書.txt",
    "ü\n.txt",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_path_is_what_was_typed_whatever_is_in_it(name: str, tmp_path: Path) -> None:
    run = compose(["data=text", f"data.path={name}", "precision=fp32"])
    assert type(run.data) is TextConfig and run.data.path == name
    assert compose(["data=text", shlex.split(word("data.path", name))[0], "precision=fp32"]) == run
    assert compose(["data=text", f"data.path={quoted(name)}", "precision=fp32"]) == run
    save_config(run, tmp_path / "config.yaml")
    saved = load_config(tmp_path / "config.yaml")
    assert saved == run
    assert run_id(saved) == run_id(run)
    assert recompose(run, ["training_tokens=2000000", f"wandb.group={name}"]).data == run.data
    # The jobs of a sweep are given what was typed.
    request = read_request(["data=text", f"data.path={name}", "seed.init=0,1"])
    assert [override.input_line for override in request.overrides][1] == f"data.path={name}"


LISTS = {
    "[a,b c,ü]": ["a", "b c", "ü"],
    '[a,"b c",ü]': ["a", "b c", "ü"],
    "[ü, 'b, c' ,it's ü]": ["ü", "b, c", "it's ü"],
    '["say \\"ü\\"",C:\\Bü\\,ü]': ['say "ü"', "C:\\Bü\\", "ü"],
}


@pytest.mark.parametrize("typed", LISTS)
def test_a_list_of_texts_is_what_was_typed_whatever_is_in_them(typed: str) -> None:
    run = compose([f"wandb.tags={typed}"])
    assert run.wandb is not None and run.wandb.tags == LISTS[typed]
    request = read_request([f"wandb.tags={typed}", "seed.init=0,1"])
    assert request.overrides[0].input_line == f"wandb.tags={typed}"


@pytest.mark.parametrize("name", ["[a]", "null", "a,b", "'a'", "'a", "“a”", "choice(1)", " a"])
def test_a_text_that_would_be_read_otherwise_is_put_in_quotes(name: str) -> None:
    data = compose(["data=text", *shlex.split(word("data.path", name))]).data
    assert type(data) is TextConfig and data.path == name


@pytest.mark.parametrize("text", ["${a}", r"\${a}", r"\\${", "a${b", r"\${a\${", "${${", r"\a\\", "$", "${a}\\", "\\\n${b}"])
def test_what_is_escaped_is_read_as_it_was(text: str) -> None:
    tree = {"one": text, "several": [text, 1, None]}
    assert OmegaConf.to_container(OmegaConf.create(literal(tree)), resolve=True) == tree
    assert unescaped(literal(tree)) == tree


def test_updates_are_whole_ones_within_the_budget() -> None:
    run = compose(["training_tokens=100000", "data.tokens_per_update=8192", "schedule.warmup_updates=1"])
    assert (run.updates, run.windows_per_update) == (12, 32)


def test_an_edited_file_is_seen_at_once(tmp_path: Path) -> None:
    file = tmp_path / "optim" / "mine.yaml"
    file.parent.mkdir()
    for max_lr in (0.5, 0.25):
        file.write_text(f"defaults:\n  - muon\n  - _self_\nmax_lr: {max_lr}\n", encoding="utf-8")
        assert compose(["optim=mine"], config_dir=tmp_path).optim.max_lr == max_lr


def test_composing_twice_is_composing_once() -> None:
    assert compose(["optim=adamw"]) == compose(["optim=adamw"])
    assert compose(["model.dim=512"]).model.dim == 512
    assert compose([]).model.dim == 256


def test_another_hydra_application_notices_nothing(tmp_path: Path) -> None:
    (tmp_path / "theirs.yaml").write_text("answer: 42\n", encoding="utf-8")
    ConfigStore.instance().store(group="schema/optim", name="adamw", node={"theirs": True})
    with hydra.initialize_config_dir(str(tmp_path), version_base="1.2"):
        before = (GlobalHydra.instance().hydra, VersionBase.instance().getbase(), ConfigStore.instance().repo)
        # A folder that was never searched before: nothing is answered from what is kept of earlier choices.
        assert type(compose(["optim=adamw"], config_dir=tmp_path).optim) is AdamWConfig
        assert (GlobalHydra.instance().hydra, VersionBase.instance().getbase(), ConfigStore.instance().repo) == before
        assert hydra.compose("theirs").answer == 42
    assert OmegaConf.to_container(ConfigStore.instance().load("schema/optim/adamw.yaml").node) == {"theirs": True}
    ConfigStore.instance().repo.pop("schema")


def test_nothing_is_set_up_where_nothing_was(tmp_path: Path) -> None:
    for kind in (GlobalHydra, VersionBase):
        Singleton._instances.pop(kind, None)
    compose([], config_dir=tmp_path)
    assert {GlobalHydra, VersionBase}.isdisjoint(Singleton._instances)


def test_a_run_survives_the_way_to_another_process() -> None:
    run = compose(["experiment=smoke", "optim.max_lr=0.5"])
    copy = pickle.loads(pickle.dumps(run))
    assert copy == run
    assert copy.origin == run.origin


def test_any_working_directory_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert compose(["experiment=smoke"]).name == "smoke"
    assert list(tmp_path.iterdir()) == []


def test_a_preset_reads_other_data_in_windows_of_its_own() -> None:
    run = compose(["experiment=smoke", "data=text", "data.path=mine.txt"])
    assert isinstance(run.data, TextConfig)
    assert (run.data.max_seq_len, run.data.tokens_per_update, run.training_tokens) == (128, 2048, 40960)
    assert compose(["experiment=smoke", "data=text", "data.path=a", "data.max_seq_len=64"]).data.max_seq_len == 64


def test_a_preset_warms_up_as_long_under_another_schedule() -> None:
    assert compose(["experiment=smoke", "schedule=cosine"]).schedule.warmup_updates == 2
    assert compose(["schedule=cosine"]).schedule.warmup_updates > 2
