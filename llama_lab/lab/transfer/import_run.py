"""`llama-lab import`: a run that begins with the weights of a Hugging Face folder.

    FOLDER/config.json + overrides -> the run's config -> its folder, begun with a checkpoint of update 0 -> training goes on there

The run is from then on like any other: interrupted, it continues with the same command; the folder may be removed, but for its
tokenizer.json, which the run's config names.
"""

import os
import shutil
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_lab.config.compose import compose
from llama_lab.config.errors import ConfigError
from llama_lab.config.identity import run_folder, save_config, science, to_yaml, values
from llama_lab.config.overrides import PRESET
from llama_lab.config.preset import Preset, read_preset
from llama_lab.config.resolve import resolve
from llama_lab.config.schema import (
    BytesConfig,
    FileTokenizerConfig,
    ModelConfig,
    Problem,
    RunConfig,
    TokenizerConfig,
    shown,
)
from llama_lab.config.validate import validate
from llama_lab.data.prepare import prepare
from llama_lab.data.tokenizer import Tokenizer, build_tokenizer
from llama_lab.formats.hf_folder import ForeignModel, open_folder
from llama_lab.lab.repeat.fork import SHAPE
from llama_lab.model.count import parameters
from llama_lab.training.run_folder import FORMAT_VERSION, RunFolder, describe_origin, hold_run, move_aside, relative, write_json

if TYPE_CHECKING:
    from llama_lab.training.launch import TrainResult

SCOPE = "this import"
LONGEST = 2048
"""Context that is taken where none is typed and the model knows a longer one: attention's cost grows with it."""


@dataclass(frozen=True)
class Import:
    """What was asked for, looked up.

    Attributes:
        foreign: the folder that the weights come from.
        sha256: of its config and weights.
        run: the run's own config, resolved.
        slug: what tells it from a run from nothing: eight digits that stand for the weights.
        folder: where it is, or will be.
    """

    foreign: ForeignModel
    sha256: str
    run: RunConfig
    slug: str
    folder: Path


def import_run(
    path: Path, overrides: list[str], *, training: bool = True, config_dir: Path | None = None, command: list[str] | None = None
) -> "TrainResult | Path":
    """Begin a run with the weights of a Hugging Face folder and train it, or go on with it where it stands.

    Args:
        path: the folder.
        overrides: what the run is trained on and how, as for `train`; the model's shape is the folder's.
        training: False makes the run's folder alone, so that it can be asked, evaluated or exported.
        config_dir: a folder with more options.
        command: what was typed, kept in the run's meta.json.

    Returns:
        What became of the run; its folder alone without training.

    Raises:
        ConfigError: the folder, its tokenizer, or what was typed does not allow it.
    """
    from llama_lab.api import train

    asked = look_up(path, overrides, config_dir=config_dir)
    if os.environ.get("RANK", "0") == "0":
        # Of several processes the first makes the folder; the others meet it in training, where it decides for all.
        begin(asked, training=training, command=command)
    if not training:
        return asked.folder
    return train(replace(asked.run, fresh=False), handle_signals=True, command=command, extra_slug=asked.slug)


def run_import(path: Path, overrides: list[str], *, training: bool, config_dir: Path | None, command: list[str] | None) -> int:
    """Answer `llama-lab import …`; returns the exit code."""
    done = import_run(path, overrides, training=training, config_dir=config_dir, command=command)
    if isinstance(done, Path):
        here = relative(done)
        print(f"Run folder: {here}")
        print(f"Next:\n    llama-lab export {here} --to gguf --out DIR\n    llama-lab serve {here}")
        return 0
    return 75 if done.status == "preempted" else 0


def show(path: Path, overrides: list[str], *, config_dir: Path | None = None) -> None:
    """Print the run's config, and start nothing."""
    asked = look_up(path, overrides, config_dir=config_dir)
    print(f"# {asked.folder}, from {asked.foreign.path}")
    print(to_yaml(asked.run), end="")


def look_up(path: Path, overrides: list[str], *, config_dir: Path | None) -> Import:
    """Everything about an import that can be known without reading weights into memory.

    Raises:
        ConfigError: the folder, or what was typed, does not allow it.
    """
    foreign = open_folder(path.expanduser().absolute())
    run = compose(overrides, config_dir=config_dir)
    # What a preset sets was asked for as what was typed was, so neither gives way to what the folder says.
    preset = read_preset(name, config_dir) if (name := run.origin.choices.get(PRESET)) else Preset()
    by_hand = {word.partition("=")[0].lstrip("+") for word in overrides}
    by_preset = {*preset.choices, *preset.values} - by_hand
    typed = by_hand | by_preset
    if found := _fixed(run, by_hand, by_preset):
        raise ConfigError(found, scope=SCOPE)
    model = replace(
        foreign.model, **{item.name: getattr(run.model, item.name) for item in fields(ModelConfig) if f"model.{item.name}" in typed}
    )
    tokenizer, data = run.tokenizer, run.data
    if not any(name.partition(".")[0] == "tokenizer" for name in typed):
        tokenizer = _own_tokenizer(foreign)
    if "data.max_seq_len" not in typed:
        data = replace(data, max_seq_len=_context(foreign.max_seq_len, data.tokens_per_update))
    known = replace(run, model=model, tokenizer=tokenizer, data=data)
    base = run.origin.base | {key: value for key, value in values(science(known)).items() if key not in typed}
    origin = replace(run.origin, label=foreign.path.name, choices=run.origin.choices | {"model": "imported"}, base=base)
    known = replace(known, origin=origin)
    validate(known)
    _check_tokenizer(known)
    known = resolve(known)
    sha256 = foreign.hash()
    slug = f"imported-{sha256[:8]}"
    return Import(foreign, sha256, known, slug, run_folder(known, slug))


def begin(asked: Import, *, training: bool, command: list[str] | None) -> None:
    """Make the run's folder with the weights that it starts from, in one step; a folder that is there stays.

    Raises:
        ConfigError: the weights cannot be read or do not fit the tokenizer, or something is in the way.
    """
    with hold_run(asked.folder):
        if asked.run.fresh and asked.folder.exists():
            move_aside(asked.folder)
        folder = RunFolder(asked.folder)
        known = folder.meta()
        if known.get("starts"):
            return
        if not known and asked.folder.exists():
            raise ConfigError([(str(asked.folder), "is in the way and holds no run; move it")], scope=SCOPE)
        tokenizer, fingerprints = _data(asked.run, training=training)
        origin = describe_origin(asked.run, command=command, data=fingerprints)
        if known:  # made without training before
            folder.write_meta(**origin)
            return
        draft = asked.folder.with_name(f".draft-{asked.folder.name}")
        shutil.rmtree(draft, ignore_errors=True)
        try:
            with folder.writing():
                draft.mkdir(parents=True)
                said = _fill(asked, draft, tokenizer, origin)
                os.replace(draft, asked.folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        print(said, flush=True)


def _fill(asked: Import, draft: Path, tokenizer: Tokenizer, origin: dict[str, Any]) -> str:
    """Write a run's first files; returns what is to be said of it."""
    from llama_lab.formats.hf_weights import read_weights
    from llama_lab.training.beginning import save_beginning

    run, foreign = asked.run, asked.foreign
    weights, left_out = read_weights(foreign, tokenizer)
    facts = {"run_id": asked.folder.name, "data": origin["data"], "versions": origin["versions"], "imported": str(foreign.path)}
    saved = save_beginning(draft / "checkpoints", weights, run, vocab_size=tokenizer.vocab_size, facts=facts)
    tokenizer.save(draft / "tokenizer.json")
    save_config(replace(run, fresh=False), draft / "config.yaml")
    lineage = {"parent": foreign.path.name, "path": str(foreign.path), "update": saved.update, "tokens": saved.tokens}
    about = {"format_version": FORMAT_VERSION, "run_id": asked.folder.name, "name": run.name}
    write_json(draft / "meta.json", about | origin | {"starts": [], "lineage": lineage | {"sha256": asked.sha256}})
    size = parameters(run.model, tokenizer.vocab_size)
    lines = [
        f"Imported {relative(foreign.path)}: {size:,} parameters, vocabulary {tokenizer.vocab_size:,}",
        f"Context: {run.data.max_seq_len:,} of the {foreign.max_seq_len:,} positions that it knows (data.max_seq_len)",
    ]
    if left_out:
        lines.append(f"Left out: {left_out:,} rows of the embedding, for which the tokenizer has no token")
    (draft / "train.log").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return "\n".join(lines)


def _data(run: RunConfig, *, training: bool) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer, and the fingerprints of it and of the data, which is prepared only where it is trained on."""
    if training:
        data = prepare(run.data, run.tokenizer, print)
        return data.tokenizer, {"data": data.fingerprint, "tokenizer": data.tokenizer.hash}
    tokenizer = build_tokenizer(run.tokenizer, lambda: ())
    return tokenizer, {"tokenizer": tokenizer.hash}


def _own_tokenizer(foreign: ForeignModel) -> TokenizerConfig:
    """The folder's tokenizer as a run's config names it."""
    if foreign.tokenizer.is_file():
        return FileTokenizerConfig(path=relative(foreign.tokenizer))
    rule = "holds no tokenizer.json; give one as tokenizer=file tokenizer.path=FILE"
    if (foreign.path / "tokenizer.model").is_file():
        rule += ', or make it of its tokenizer.model: python -c "from transformers import AutoTokenizer as T; '
        rule += f"T.from_pretrained('{relative(foreign.path)}').save_pretrained('{relative(foreign.path)}')\""
    raise ConfigError([(str(foreign.path), rule)], scope=SCOPE)


def _check_tokenizer(run: RunConfig) -> None:
    """Refuse a tokenizer that is not the model's: the weights know the ids of another."""
    if not isinstance(run.tokenizer, FileTokenizerConfig):
        preset = run.origin.choices.get(PRESET)
        leave = f"leave it out, and {PRESET}={preset} if that sets it" if preset else "leave it out"
        is_bytes = isinstance(run.tokenizer, BytesConfig)
        wrong = "is not the model's own" if is_bytes else "would be trained anew"
        rule = f"{wrong}, and the weights know other ids; {leave}, or give tokenizer=file tokenizer.path=FILE"
        raise ConfigError([(f"tokenizer={'bytes' if is_bytes else 'bpe'}", rule)], scope=SCOPE)


def _fixed(run: RunConfig, by_hand: set[str], by_preset: set[str]) -> list[Problem]:
    """What was typed, or set by a preset, of what the weights decide."""
    found: list[Problem] = [("model=", "is the folder's; leave it out")] if "model" in by_hand else []
    rule = "cannot be chosen, because the weights decide it; leave it out"
    found += [(f"model.{name}={shown(getattr(run.model, name))}", rule) for name in SHAPE if f"model.{name}" in by_hand]
    keys = [f"model.{name}" for name in SHAPE if f"model.{name}" in by_preset]
    said = [f"model={run.origin.choices['model']}"] if "model" in by_preset else []
    said += [f"{key}={shown(getattr(run.model, key.partition('.')[2]))}" for key in keys]
    if said:
        rule = f"sets {', '.join(said)}, and the weights decide the model; use a preset without that, or none"
        found.append((f"{PRESET}={run.origin.choices[PRESET]}", rule))
    return found


def _context(known: int, tokens_per_update: int) -> int:
    """The longest context that the model knows, that is not costly, and that divides an update evenly."""
    longest = min(known, LONGEST, tokens_per_update)
    return next(length for length in range(longest, 0, -1) if tokens_per_update % length == 0)
