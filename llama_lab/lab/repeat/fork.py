"""A run that starts from another's checkpoint with changed values: one trunk, many cool-downs.

    RUN/config.yaml + overrides -> the fork's config -> its folder, begun with RUN's checkpoint and rows -> training goes on there

The fork has a folder and a name of its own and is from then on a run like any other: interrupted, it continues; its parent may be
trained further or removed. It keeps what the same command needs then: the parent's config, and the tokenizer where it has that from
the parent.
"""

import hashlib
import os
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_lab.config.compose import recompose
from llama_lab.config.errors import ConfigError
from llama_lab.config.identity import load_config, outputs_folder, plain_config, run_folder, run_hash, save_config, shapes, to_yaml
from llama_lab.config.resolve import resolve
from llama_lab.config.schema import BpeConfig, FileTokenizerConfig, Problem, RunConfig, shown
from llama_lab.data.prepare import prepare
from llama_lab.training.run_data import at_home
from llama_lab.training.run_folder import (
    FORMAT_VERSION,
    RunFolder,
    describe_origin,
    find_run,
    hold_run,
    move_aside,
    relative,
    write_json,
)
from llama_lab.training.saving.choice import chosen_update, damaged, missing
from llama_lab.training.saving.manifest import Checkpoint, DamagedCheckpoint, list_checkpoints, read_manifest, verify_checkpoint
from llama_lab.training.schedule import lr_factor

if TYPE_CHECKING:
    from llama_lab.data.prepare import PreparedData
    from llama_lab.training.launch import TrainResult
    from llama_lab.training.saving.manifest import Checkpoint

SCOPE = "this fork"
SHAPE = ("dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim", "multiple_of", "tie_embeddings", "qk_norm")
"""Fields of the model that say which weights there are."""
POSITION = ("max_seq_len", "tokens_per_update")
"""Fields of the data by which an update's number says how much was read."""
PARENT = "parent.yaml"
"""The parent's config, in a fork's folder."""
TOKENIZERS = ".tokenizers"
"""Folder beside a study's runs: tokenizers of parents whose forks read other text, by hash. A fork's own folder cannot be named in
its config, because the folder's name follows from the config."""
ORIGIN = re.compile(r"-(from-([0-9a-f]{8})-\d+)-[0-9a-f]{8}$")
"""At the end of a fork's name: the slug that says what it is a fork of, and in it the parent's hash."""
ROWS = ("metrics.jsonl", "samples.jsonl", "batches.jsonl")


@dataclass(frozen=True)
class Fork:
    """What was asked for, looked up.

    Attributes:
        parent, parent_run: the run it starts from, and its config.
        update: number of the update it starts after.
        checkpoint: where the parent's state of that update lies; null if it is gone.
        run: the fork's own config, resolved.
        slug: what tells it from a run from scratch.
        folder: where it is, or will be.
    """

    parent: RunFolder
    parent_run: RunConfig
    update: int
    checkpoint: Checkpoint | None
    run: RunConfig
    slug: str
    folder: Path


def fork(
    path: Path, overrides: list[str], *, update: str | None = None, config_dir: Path | None = None, command: list[str] | None = None
) -> "TrainResult":
    """Begin a fork and train it, or go on with it where it stands.

    Args:
        path: the parent's folder; or a fork's own, without anything that changes, to go on with it.
        overrides: what changes.
        update: number of the parent's update, `last` or `best` (by validation); null: last.
        config_dir: a folder with more options.
        command: what was typed, kept in the fork's meta.json.

    Raises:
        ConfigError: the parent, its checkpoint, or what changes does not allow it.
    """
    from llama_lab.api import train

    asked = look_up(path, overrides, update=update, config_dir=config_dir)
    _keep_tokenizer(asked)
    if os.environ.get("RANK", "0") == "0":
        # Of several processes the first makes the folder; the others meet it in training, where it decides for all.
        begin(asked, command)
    return train(replace(asked.run, fresh=False), handle_signals=True, command=command, extra_slug=asked.slug)


def show(path: Path, overrides: list[str], *, update: str | None = None, config_dir: Path | None = None) -> None:
    """Print the fork's config, and start nothing."""
    asked = look_up(path, overrides, update=update, config_dir=config_dir)
    print(f"# {asked.folder}, from update {asked.update} of {asked.parent.path}")
    print(to_yaml(asked.run), end="")


def look_up(path: Path, overrides: list[str], *, update: str | None, config_dir: Path | None) -> Fork:
    """Everything about a fork that can be known without writing.

    Raises:
        ConfigError: the parent, its checkpoint, or what changes does not allow it.
    """
    path = path.expanduser().absolute()
    if not overrides and update is None and (own := _itself(path)):
        return own
    if overrides and not (path / "config.yaml").is_file() and (left := _left_behind(path, overrides, update, config_dir)):
        return left
    parent = find_run(path)
    parent_run = load_config(parent.path / "config.yaml")
    if not overrides:
        rule = "would repeat its parent: type what changes, e.g. schedule.cooldown_fraction=0.2, training_tokens=…, optim.max_lr=…"
        raise _refused([("this fork", rule)])
    checkpoints = {checkpoint.update: checkpoint for checkpoint in list_checkpoints(parent.checkpoints)}
    number = chosen_update(parent, list(checkpoints), update, scope=SCOPE)
    tokenizer = parent.meta().get("data", {}).get("tokenizer")
    run = _own_config(at_home(parent_run, parent), overrides, number, config_dir, tokenizer=tokenizer)
    slug = f"from-{_hash(parent, parent_run)}-{number}"
    found = Fork(parent, parent_run, number, checkpoints.get(number), run, slug, run_folder(run, slug))
    if found.checkpoint is None and (run.fresh or not RunFolder(found.folder).meta()):
        raise missing(parent, number, list(checkpoints), scope=SCOPE)
    if short := _ends_before(run.training_tokens, run.data.tokens_per_update, number):
        raise _refused(short)
    return found


def _own_config(
    parent: RunConfig, overrides: list[str], number: int, config_dir: Path | None, *, tokenizer: str | None
) -> RunConfig:
    """A fork's config, resolved; `tokenizer` is the hash of the parent's."""
    run = _recomposed(parent, overrides, number, config_dir)
    if found := _fixed(parent, run):
        raise _refused(found)
    if isinstance(run.tokenizer, BpeConfig) and _documents(run) != _documents(parent):
        # Trained anew, on other text, it would give other ids than the weights know.
        run = replace(run, tokenizer=FileTokenizerConfig(path=str(_tokenizer_file(run, tokenizer))))
    return resolve(run)


def _tokenizer_file(run: RunConfig, tokenizer: str | None) -> Path:
    return outputs_folder() / run.name / TOKENIZERS / f"{str(tokenizer)[:16]}.json"


def _keep_tokenizer(asked: Fork) -> None:
    """Copy the parent's tokenizer to where the fork's config names it. Each process does, since each reads it."""
    target, own = Path(getattr(asked.run.tokenizer, "path", "")), asked.parent.path / "tokenizer.json"
    if target.parent.name != TOKENIZERS or target.is_file() or not own.is_file():
        return
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    with RunFolder(target.parent).writing():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(own, draft)
        os.replace(draft, target)


def _itself(path: Path) -> Fork | None:
    """A fork whose own folder was named, which goes on with the config that it has; None if it is none."""
    lineage, name = RunFolder(path).meta().get("lineage", {}), ORIGIN.search(path.name)
    if "checkpoint_sha256" not in lineage or name is None:
        return None
    run = resolve(load_config(path / "config.yaml"))
    if (home := run_folder(run, name[1])).resolve() != path.resolve():
        rule = f"is a fork that would go on in {relative(home)}; move it there, or set LLAMA_LAB_OUTPUTS to where it is"
        raise _refused([(str(path), rule)])
    return Fork(RunFolder(Path(lineage["path"])), _kept_parent(path) or run, lineage["update"], None, run, name[1], home)


def _kept_parent(folder: Path) -> RunConfig | None:
    return load_config(folder / PARENT) if (folder / PARENT).is_file() else None


def _left_behind(path: Path, overrides: list[str], update: str | None, config_dir: Path | None) -> Fork | None:
    """The fork that the same command began before its parent was removed; None if there is none."""
    found: list[Fork] = []
    for kept in sorted(outputs_folder().glob(f"*/*/{PARENT}")):
        folder, name = RunFolder(kept.parent), ORIGIN.search(kept.parent.name)
        meta = folder.meta()
        lineage = meta.get("lineage", {})
        if name is None or lineage.get("path") != str(path) or update not in (None, "last", "best", str(lineage["update"])):
            continue
        parent, number = load_config(kept), lineage["update"]
        run = _own_config(parent, overrides, number, config_dir, tokenizer=meta["data"]["tokenizer"])
        if run_folder(run, name[1]) == folder.path and not run.fresh:
            found.append(Fork(RunFolder(path), parent, number, None, run, name[1], folder.path))
    if len(found) > 1:
        updates = ", ".join(str(one.update) for one in sorted(found, key=lambda one: one.update))
        rule = f"cannot be told, because {relative(path)} is gone; it was forked with these values after updates {updates}"
        raise _refused([(f"--update {update or 'last'}", f"{rule}: name one")])
    return found[0] if found else None


def _recomposed(parent: RunConfig, overrides: list[str], number: int, config_dir: Path | None) -> RunConfig:
    """The parent's config with what changes. Of a fork that ends too early that is said, and not what its schedule says of it."""
    try:
        return recompose(parent, overrides, config_dir=config_dir)
    except ConfigError as error:
        typed = [word.partition("=")[2].replace("_", "") for word in overrides if word.startswith("training_tokens=")]
        tokens = int(typed[-1]) if typed and typed[-1].isdecimal() else 0
        short = _ends_before(tokens, parent.data.tokens_per_update, number) if tokens else []
        if not short:
            raise
        others = [problem for problem in error.problems if not problem[0].startswith(("schedule.", "training_tokens="))]
        raise _refused([*short, *others]) from None


def _ends_before(training_tokens: int, tokens_per_update: int, number: int) -> list[Problem]:
    """That a budget is spent before the update that a fork starts after, or with it."""
    updates = training_tokens // tokens_per_update
    if updates > number:
        return []
    rule = f"ends after update {updates}, and the checkpoint is of update {number}; at least {(number + 1) * tokens_per_update}"
    return [(f"training_tokens={training_tokens}", rule)]


def begin(asked: Fork, command: list[str] | None) -> None:
    """Make the fork's folder with the state and the rows that it starts from, in one step; a folder that is there stays.

    Raises:
        ConfigError: the state is damaged or another than the one the folder began with, or the tokenizer or data changed.
    """
    with hold_run(asked.folder):
        if asked.run.fresh and asked.folder.exists():
            move_aside(asked.folder)
        known = RunFolder(asked.folder).meta()
        if known:
            _same_parent(asked, known)
            return
        if asked.folder.exists():
            raise _refused([(str(asked.folder), "is in the way and holds no run; move it")])
        data = prepare(asked.run.data, asked.run.tokenizer, print)
        fingerprints = {"data": data.fingerprint, "tokenizer": data.tokenizer.hash}
        _same_data(asked, fingerprints)
        draft = asked.folder.with_name(f".draft-{asked.folder.name}")
        shutil.rmtree(draft, ignore_errors=True)
        try:
            with RunFolder(asked.folder).writing():
                draft.mkdir(parents=True)
                said = _fill(asked, draft, _origin(asked, data, command))
                os.replace(draft, asked.folder)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
        print(said, flush=True)


def _origin(asked: Fork, data: "PreparedData", command: list[str] | None) -> dict[str, Any]:
    fingerprints = {"data": data.fingerprint, "tokenizer": data.tokenizer.hash}
    return describe_origin(asked.run, command=command, data=fingerprints, validation=data.validation_text)


def _fill(asked: Fork, draft: Path, origin: dict[str, Any]) -> str:
    """Write a fork's first files; returns what is to be said of it."""
    lineage = _inherit(asked, draft)
    facts = {"format_version": FORMAT_VERSION, "run_id": asked.folder.name, "name": asked.run.name}
    write_json(draft / "meta.json", facts | origin | {"starts": [], "lineage": lineage})
    said = _said(asked, lineage)
    (draft / "train.log").write_text(said + "\n", encoding="utf-8")
    return said


def _inherit(asked: Fork, draft: Path) -> dict[str, Any]:
    """Fill a fork's folder from its parent's; returns where it came from, as meta.json keeps it."""
    from llama_lab.training.metrics import cut_back, read_rows

    assert asked.checkpoint is not None
    state = asked.checkpoint.path
    try:
        verify_checkpoint(asked.checkpoint)
        files = read_manifest(state)["files"]
        target = draft / "checkpoints" / state.name
        target.mkdir(parents=True)
        for file in sorted(state.iterdir()):
            _link(file, target / file.name)
    except DamagedCheckpoint as error:
        raise damaged(asked.parent, error, scope=SCOPE) from None
    except FileNotFoundError as error:  # of a run that is being trained
        raise _refused([(f"--update {asked.update}", f"was removed just now: {error}; name another")]) from None
    for name in ROWS:
        if (asked.parent.path / name).is_file():
            shutil.copyfile(asked.parent.path / name, draft / name)
    cut_back(draft, asked.update)
    losses = [row["val/loss"] for row in read_rows(draft / "metrics.jsonl") if row.get("val/loss") is not None]
    if losses:
        write_json(draft / "summary.json", {"best/val/loss": min(losses)})
    save_config(replace(asked.run, fresh=False), draft / "config.yaml")
    save_config(asked.parent_run, draft / PARENT)
    return {
        "parent": asked.parent.path.name,
        "path": str(asked.parent.path),
        "update": asked.update,
        "tokens": asked.checkpoint.tokens,
        "checkpoint_sha256": {name: entry["sha256"] for name, entry in files.items()},
        "changes": _changes(asked.parent_run, asked.run),
    }


def _link(file: Path, target: Path) -> None:
    """The same file under another name where the file system can, else a copy: a checkpoint is never written to again."""
    try:
        os.link(file, target)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copyfile(file, target)


def _fixed(parent: RunConfig, run: RunConfig) -> list[Problem]:
    """What changed of what the parent's state was made for."""
    found: list[Problem] = []
    for name in SHAPE:
        if (now := getattr(run.model, name)) != (before := getattr(parent.model, name)):
            found.append((f"model.{name}={shown(now)}", f"cannot change in a fork: the weights are made for {shown(before)}"))
    for name in POSITION:
        if (now := getattr(run.data, name)) != (before := getattr(parent.data, name)):
            rule = f"cannot change in a fork: updates are counted, and the data read, in steps of {shown(before)}"
            found.append((f"data.{name}={shown(now)}", rule))
    if (now := shapes(run)["optim"]) != (before := shapes(parent)["optim"]):
        found.append((f"optim={now}", f"cannot change in a fork: its state is that of optim={before}"))
    if run.tokenizer != parent.tokenizer and not isinstance(run.tokenizer, FileTokenizerConfig):
        rule = "cannot change in a fork: the weights know the ids of the parent's"
        found.append((f"tokenizer={shapes(run)['tokenizer']}", rule))
    return found


def _documents(run: RunConfig) -> dict[str, Any]:
    """What decides which documents there are, and so what a tokenizer learns from them."""
    node = plain_config(run)["data"]
    shape = {"type": shapes(run)["data"]}
    return shape | {name: value for name, value in node.items() if name not in (*POSITION, "window")}


def _hash(parent: RunFolder, run: RunConfig) -> str:
    """Eight digits that stand for the parent: its config's, or where it is a fork itself those that end its name's origin."""
    return hashlib.sha256(parent.path.name.encode()).hexdigest()[:8] if parent.meta().get("lineage") else run_hash(run)


def _same_parent(asked: Fork, known: dict[str, Any]) -> None:
    """Refuse to go on with a fork of another state: the parent may have been trained anew under the same name."""
    if asked.checkpoint is None:
        return
    now = {name: entry["sha256"] for name, entry in read_manifest(asked.checkpoint.path)["files"].items()}
    before = known.get("lineage", {}).get("checkpoint_sha256")
    if before != now:
        rule = f"began with another state of update {asked.update} than {relative(asked.parent.path)} has now; "
        raise _refused([(relative(asked.folder), rule + "fresh=true moves it aside and forks anew")])


def _same_data(asked: Fork, now: dict[str, str]) -> None:
    """Refuse another tokenizer, and text that changed though nobody asked for other text."""
    before, tokenizer = asked.parent.meta().get("data", {}), asked.parent.path / "tokenizer.json"
    same_text = _documents(asked.run) == _documents(asked.parent_run)
    if before.get("tokenizer") != now["tokenizer"]:
        rule = "is another than the parent's, whose ids the weights know; "
        rule += f"the parent's is tokenizer=file tokenizer.path={relative(tokenizer)}"
        raise _refused([(f"tokenizer={shapes(asked.run)['tokenizer']}", rule)])
    if same_text and before.get("data") != now["data"] and not asked.run.accept_changes:
        said = f"the data changed from {str(before.get('data'))[:12]} to {now['data'][:12]}"
        raise _refused([(said, "since the parent was trained; accept_changes=true forks all the same")])


def _changes(parent: RunConfig, run: RunConfig) -> dict[str, Any]:
    """Key path -> new value, of everything that differs from the parent's config; of a group whose kind differs, that first."""
    before, now = (shapes(config) | _leaves(plain_config(config)) for config in (parent, run))
    return {key: value for key, value in now.items() if key not in ("fresh", "accept_changes") and before.get(key, ...) != value}


def _leaves(tree: Any, at: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {at: tree}
    return {key: value for name, item in tree.items() for key, value in _leaves(item, f"{at}.{name}" if at else name).items()}


def _said(asked: Fork, lineage: dict[str, Any]) -> str:
    """Where the fork starts and what is different, in two lines."""
    changes = ", ".join(f"{key}={shown(value)}" for key, value in lineage["changes"].items())
    rates = []
    for run, update in ((asked.parent_run, asked.update), (asked.run, asked.update + 1)):
        rates.append(f"{run.optim.max_lr * lr_factor(run.schedule, run.optim.max_lr, update, run.updates):.3g} in update {update}")
    start = f"after update {asked.update} ({lineage['tokens']:,} tokens)"
    return (
        f"Fork of {relative(asked.parent.path)} {start}: {changes or 'nothing that counts'}\n"
        f"Learning rate: {rates[0]} of the parent, {rates[1]} of the fork"
    )


def _refused(found: list[Problem]) -> ConfigError:
    return ConfigError(found, scope=SCOPE)
