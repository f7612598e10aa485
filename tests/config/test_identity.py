"""A run's name and folder follow from its config, and stay where they are when the code grows."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from omegaconf import MISSING

from llama_lab.config import schema
from llama_lab.config.compose import compose
from llama_lab.config.errors import ConfigError
from llama_lab.config.identity import (
    is_science,
    joined_slug,
    load_config,
    outputs_folder,
    run_folder,
    run_hash,
    run_id,
    save_config,
    science,
    slug_part,
)
from llama_lab.config.resolve import resolve
from llama_lab.config.schema import BEFORE, Origin, Precision, RunConfig


def written_out() -> RunConfig:
    """A run whose every value stands here, so that tuning `conf/` moves no frozen id."""
    return RunConfig(
        name="frozen",
        training_tokens=1_000_000,
        precision=Precision.fp32,
        fresh=False,
        accept_changes=False,
        seed=schema.SeedConfig(init=0, data=1, sampling=2),
        model=schema.ModelConfig(
            dim=256,
            n_layers=3,
            n_heads=4,
            n_kv_heads=None,
            ffn_dim=None,
            multiple_of=256,
            rope_theta=10000.0,
            norm_eps=1e-5,
            tie_embeddings=True,
            qk_norm=False,
            zero_init_outputs=True,
            dropout=0.0,
        ),
        data=schema.DocsConfig(
            max_seq_len=256, tokens_per_update=8192, window=schema.Window.contiguous, packages=[], val_bytes=200_000
        ),
        tokenizer=schema.BpeConfig(vocab_size=2048),
        optim=schema.AdamWConfig(max_lr=0.003, weight_decay=0.1, max_grad_norm=1.0, beta1=0.9, beta2=0.95, eps=1e-8),
        schedule=schema.CosineConfig(warmup_updates=10, min_lr=0.0),
        hardware=schema.HardwareConfig(
            device=schema.Device.cpu, processes=1, micro_batch=16, compile=schema.Compile.never, deterministic=False
        ),
        log=schema.LogConfig(every_updates=10),
        eval=schema.EvalConfig(every_updates=50, max_tokens=None),
        sample=None,
        checkpoint=schema.CheckpointConfig(every_tokens=None, keep=2),
        wandb=None,
        origin=Origin(choices={"model": "llama_3m", "data": "docs"}, label="llama_3m-docs"),
    )


def variants() -> list[RunConfig]:
    """Ten runs, one for each part of the science."""
    run = written_out()
    adamw = run.optim
    assert isinstance(adamw, schema.AdamWConfig)
    muon = schema.MuonConfig(
        max_lr=0.01, weight_decay=0.1, max_grad_norm=None, beta1=0.9, beta2=0.95, eps=1e-8, momentum=0.95, adamw_max_lr=0.003
    )
    text = schema.TextConfig(
        max_seq_len=64, tokens_per_update=768, window=schema.Window.document, path="input.txt", val_fraction=0.1
    )
    return [
        run,
        replace(run, training_tokens=2_000_000),
        replace(run, precision=Precision.bf16),
        replace(run, seed=replace(run.seed, init=1)),
        replace(run, model=replace(run.model, n_kv_heads=2)),
        replace(run, data=text),
        replace(run, tokenizer=schema.BytesConfig()),
        replace(run, optim=muon),
        replace(run, schedule=schema.WsdConfig(warmup_updates=10, min_lr=0.0, cooldown_fraction=0.5)),
        replace(run, optim=replace(adamw, max_lr=1e-4)),
    ]


FROZEN = [
    "llama_3m-docs-91211313",
    "llama_3m-docs-eebf220b",
    "llama_3m-docs-bf16-a533c0bf",
    "llama_3m-docs-f6583a11",
    "llama_3m-docs-b142d60d",
    "llama_3m-docs-d1bf25b0",
    "llama_3m-docs-47da9141",
    "llama_3m-docs-223b95eb",
    "llama_3m-docs-3bb3bc27",
    "llama_3m-docs-d1e91ff7",
]


def test_ten_ids_are_frozen() -> None:
    assert [run_id(run) for run in variants()] == FROZEN


def test_a_value_that_follows_another_is_named_where_it_moved(tmp_path: Path) -> None:
    folder = tmp_path / "experiment"
    folder.mkdir()
    (folder / "paired.yaml").write_text("# @package _global_\nseed:\n  data: ${seed.init}\n", encoding="utf-8")
    words = ["experiment=paired", "precision=fp32", "hardware=cpu"]
    names = [run_id(resolve(compose([*words, f"seed.init={seed}"], config_dir=tmp_path))) for seed in (0, 2)]
    assert "seed" not in names[0]
    assert "seed.init-2-seed.data-2" in names[1]


def test_hardware_and_what_only_watches_are_no_science() -> None:
    run = written_out()
    other = replace(
        run,
        name="elsewhere",
        fresh=True,
        hardware=replace(run.hardware, micro_batch=4, processes=2),
        log=schema.LogConfig(every_updates=1),
        eval=None,
    )
    assert run_id(other) == run_id(run)
    assert set(science(run)) == {"training_tokens", "precision", "seed", "model", "data", "tokenizer", "optim", "schedule"}
    assert is_science("optim.max_lr") and not is_science("hardware.micro_batch")


@dataclass(kw_only=True, slots=True)
class GrownModel(schema.ModelConfig):
    """The model's schema with a field that came later."""

    soft_cap: float | None = field(default=MISSING, metadata={BEFORE: None})


def grown(soft_cap: float | None) -> RunConfig:
    """The run under the grown schema."""
    run = written_out()
    values = {name: getattr(run.model, name) for name in schema.ModelConfig.__dataclass_fields__}
    return replace(run, model=GrownModel(**values, soft_cap=soft_cap))


def test_a_field_that_came_later_counts_only_off_its_old_behaviour() -> None:
    assert run_hash(grown(None)) == run_hash(written_out())
    assert run_hash(grown(30.0)) != run_hash(written_out())


def test_an_unresolved_run_has_no_identity() -> None:
    with pytest.raises(ValueError, match="precision=auto"):
        run_id(replace(written_out(), precision=Precision.auto))


SLUGS = {
    "": "llama_3m-docs",
    "model=llama_97m optim=adamw": "llama_97m-docs-adamw",
    "optim.max_lr=0.5 model.n_layers=2": "llama_3m-docs-n_layers-2-max_lr-0.5",
    "seed.init=3 seed.data=3 seed.sampling=3": "llama_3m-docs-seed-3",
    "seed.init=3": "llama_3m-docs-seed.init-3",
    "data=text data.path=/some/My_Book.txt tokenizer=bytes": "llama_3m-text-bytes-data.path-my_book.txt",
    "experiment=smoke": "smoke",
    "experiment=smoke optim=adamw model.dim=32": "smoke-adamw-dim-32",
    "precision=bf16": "llama_3m-docs-bf16",
    "hardware.micro_batch=4 log.every_updates=1": "llama_3m-docs",
    "model.dim=128 model.n_heads=2 model.n_layers=2 model.multiple_of=32 optim.max_lr=0.5": (
        "llama_3m-docs-dim-128-n_layers-2-n_heads-2-multiple_of-32-1_more"
    ),
}


@pytest.mark.parametrize("words", SLUGS)
def test_slugs_say_what_was_chosen_and_changed(words: str) -> None:
    run = compose(words.split())
    run = resolve(replace(run, precision=Precision.fp32 if run.precision is Precision.auto else run.precision))
    assert run_id(run) == f"{SLUGS[words]}-{run_hash(run)}"


def test_typing_a_value_that_is_the_default_changes_nothing() -> None:
    run = resolve(compose([]))
    same = resolve(compose([f"optim.max_lr={run.optim.max_lr}", "optim=muon", f"precision={run.precision.name}"]))
    assert run_id(same) == run_id(run)


def test_a_slug_is_short_and_safe_however_odd_the_request() -> None:
    run = resolve(compose(["data=text", f"data.path='/tmp/{'Ünïcode (odd) ' * 20}.txt'", "precision=fp32"]))
    name = run_id(run)
    assert len(name) <= 90
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789._-")
    assert name.endswith(run_hash(run))


def test_no_value_is_cut_in_a_name() -> None:
    words = ["data=text", "data.path=a_text_file_with_a_rather_long_name_indeed.txt", "training_tokens=819200", "model.n_layers=2"]
    run = resolve(compose([*words, "optim.max_lr=0.02", "precision=bf16"]))
    assert run_id(run) == f"llama_3m-text-training_tokens-819200-n_layers-2-max_lr-0.02-1_more-bf16-{run_hash(run)}"
    alone = resolve(compose(["data=text", f"data.path={'a' * 90}.txt", "precision=bf16"]))
    assert run_id(alone) == f"llama_3m-text-1_more-bf16-{run_hash(alone)}"


def test_a_run_that_was_made_under_a_name_that_was_cut_keeps_it(outputs: Path) -> None:
    run = resolve(compose(["data=text", f"data.path={'a' * 90}.txt", "precision=fp32", "name=frozen"]))
    former = outputs / "frozen" / f"llama_3m-text-data.path-{'a' * 56}-{run_hash(run)}"
    assert run_folder(run).name == f"llama_3m-text-1_more-{run_hash(run)}"
    former.mkdir(parents=True)
    assert run_folder(run) == former
    # Begun anew, it is moved aside, and the new one takes its name.
    former.rename(f"{former}.1")
    assert run_folder(run) == former


def test_a_key_that_a_sweep_adds_joins_the_slug() -> None:
    run = written_out()
    assert run_id(run, slug_part("hardware.micro_batch", 8)) == f"llama_3m-docs-micro_batch-8-{run_hash(run)}"


def test_what_a_sweep_adds_stays_below_what_file_systems_take() -> None:
    run = replace(written_out(), origin=Origin(label="x" * 300))
    values = {"wandb.group": "Größe " * 60, "sample.prompts": ["a" * 400], "hardware.micro_batch": 8}
    others = [
        values | {"wandb.group": "Größe " * 60 + "b"},
        values | {"sample.prompts": ["a" * 401]},
        values | {"sample.new_tokens": 3},
    ]
    names = [run_id(run, joined_slug([slug_part(key, value) for key, value in each.items()])) for each in (values, *others)]
    assert len(set(names)) == 4
    assert all(len(name.encode()) <= 240 and name.endswith(f"-{run_hash(run)}") for name in names)
    assert "-group-gr_e_gr_e" in names[0] and "-micro_batch-8-" in names[0]
    whole = [run_id(run, joined_slug([f"log{number}.every_updates-{number}" for number in range(count)])) for count in (30, 31)]
    assert whole[0] != whole[1] and max(map(len, whole)) <= 240
    assert len(run_id(run, "y" * 300)) <= 240
    # What fits is not touched.
    short = [slug_part("wandb.group", "g" * 100), slug_part("hardware.micro_batch", 8)]
    assert joined_slug(short) == f"group-{'g' * 100}-micro_batch-8"
    assert joined_slug([]) is None


@pytest.mark.parametrize("typed", ["./books", "books/", "books/.", "more/../books"])
def test_a_text_has_one_identity_however_its_path_is_typed(typed: str) -> None:
    runs = [resolve(compose(["data=text", f"data.path={path}", "precision=fp32"])) for path in ("books", typed, "other")]
    assert run_hash(runs[1]) == run_hash(runs[0]) != run_hash(runs[2])


def test_a_mixture_has_one_identity_however_its_paths_are_typed() -> None:
    typed = ["[web,code]", "[./web,code/]", "[code,web]"]
    runs = [resolve(compose(["data=mixture", f"data.paths={paths}", "data.weights=[1,2]", "precision=fp32"])) for paths in typed]
    assert run_hash(runs[1]) == run_hash(runs[0]) != run_hash(runs[2])


@pytest.mark.parametrize("typed", ["../out", "a/../../out/./", "~/../out"])
def test_outputs_have_one_name_however_they_are_typed(typed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path / "work"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "work"))
    monkeypatch.setenv("LLAMA_LAB_OUTPUTS", typed)
    assert outputs_folder() == tmp_path / "out"
    assert run_folder(written_out()) == tmp_path / "out" / "frozen" / run_id(written_out())


def test_folders_lie_below_the_outputs(outputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = written_out()
    assert run_folder(run) == outputs / "frozen" / run_id(run)
    monkeypatch.delenv("LLAMA_LAB_OUTPUTS")
    monkeypatch.chdir(tmp_path)
    assert run_folder(run) == tmp_path / "outputs" / "frozen" / run_id(run)
    assert not outputs.exists()


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["optim=adamw", "optim.max_lr=1e-3", "optim.eps=1e-9", "schedule=linear", "eval=null", "sample=null", "wandb=null"],
        ["data=text", "data.path='a: b, #c'", "tokenizer=file", "tokenizer.path=1e3", "schedule=constant", "data.window=document"],
        ["experiment=smoke", "model.dim=32", "sample.prompts=['null', ' x', 'a\\n']"],
        ["sample.prompts=['\\${HOME}', '\\\\\\${a}', 'x\\\\']", "data=text", "data.path='\\${B/x'", "wandb.group='\\${name}'"],
    ],
)
def test_a_saved_config_comes_back_whole(words: list[str], tmp_path: Path) -> None:
    run = resolve(compose(words))
    save_config(run, tmp_path / "config.yaml")
    back = load_config(tmp_path / "config.yaml")
    assert back == run
    assert run_id(back) == run_id(run)
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == ["config.yaml"]


def test_what_was_changed_from_comes_back_as_it_was(tmp_path: Path) -> None:
    run = compose(["data=text", "data.path=x", "precision=fp32"])
    run.origin.base["data.path"] = "\\${HOME"
    save_config(run, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml").origin.base["data.path"] == "\\${HOME"


def test_a_config_saved_before_a_field_came_has_its_old_behaviour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_config(written_out(), tmp_path / "config.yaml")
    known = run_hash(written_out())

    @dataclass(kw_only=True, slots=True)
    class GrownAdamW(schema.AdamWConfig):
        amsgrad: bool = field(default=MISSING, metadata={BEFORE: False})

    shapes: dict[str, Any] = {**schema.SHAPES, "optim": {**schema.SHAPES["optim"], "adamw": GrownAdamW}}
    monkeypatch.setattr("llama_lab.config.identity.SHAPES", shapes)
    back = load_config(tmp_path / "config.yaml")
    assert getattr(back.optim, "amsgrad") is False  # noqa: B009
    assert run_hash(back) == known


def test_what_is_no_saved_config_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(tmp_path / "config.yaml")
    for text in ("name: [", "name: x\n", "origin: {}\n", "- a\n", "origin: {shapes: {optim: sgd}}\n"):
        (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError, match="is no config that this version can read"):
            load_config(tmp_path / "config.yaml")
