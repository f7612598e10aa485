"""Send a run to Weights & Biases after it was trained: `llama-lab track RUN…`.

For runs that were trained without it, or lost it on the way. W&B gets what it would have got while training, read from the same
files by the same process. Sent once, a run is not sent again; of one that was trained further only the new rows are.
"""

import argparse
import glob
import time
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from llama_lab.config.compose import compose
from llama_lab.config.errors import ConfigError
from llama_lab.config.flags import Parser
from llama_lab.config.identity import load_config
from llama_lab.config.schema import TrackerMode, WandbConfig
from llama_lab.lab.patterns import RUN_HELP, matches
from llama_lab.lab.sweep.frozen import is_sweep, load_sweep
from llama_lab.training.metrics import read_rows
from llama_lab.training.run_folder import RunFolder, find_run, hold_run, named_run, relative
from llama_lab.training.tracking.sent import GrowingRows, Sent, read_sent, sending
from llama_lab.training.tracking.tracker import SenderProcess, make_request, new_id, place
from llama_lab.training.tracking.wandb_run import decide_mode

# Uploading a run takes as long as it takes; this only ends what hangs.
PATIENCE_SECONDS = 3600.0
PROGRESS_SECONDS = 2.0
EXIT_CODES = {"finished": 0, "preempted": 75}
"""Status of a run -> exit code that W&B records; 1, a failure, for any other."""


def run_track_command(words: list[str]) -> int:
    """Answer `llama-lab track …`; returns the exit code: 1 if W&B did not take a run.

    Raises:
        ConfigError: everything wrong with the runs that were named; nothing is sent then.
    """
    try:
        asked = _parser().parse_intermixed_args(words)
    except SystemExit as stop:
        return int(stop.code or 0)
    folders = _named(asked.runs)
    sent = [_send(folder, asked.mode, asked.project, asked.entity) for folder in folders]
    return 0 if all(sent) else 1


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="llama-lab track", description="Send runs to Weights & Biases after they were trained.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help=f"{RUN_HELP}; a sweep's folder, or a pattern for several")
    parser.add_argument(
        "--mode", choices=["online", "offline"], help="offline writes a run that `wandb sync` sends; else as there is a key"
    )
    parser.add_argument("--project", help="the project it appears in; else the run's own")
    parser.add_argument("--entity", help="user or team; else the run's own")
    return parser


def _named(words: list[str]) -> list[RunFolder]:
    """The runs that paths and patterns name, each once, if all of them can be sent."""
    paths: dict[Path, None] = {}
    found = []
    for word in words:
        try:
            path = named_run(Path(word)).absolute()
        except ConfigError as error:
            found += error.problems
            continue
        meant = matches(word) if glob.has_magic(word) and not path.exists() else [path]
        if not meant:
            found.append((word, "matches nothing; name runs' folders, outputs/<name>/<run id>"))
        paths |= dict.fromkeys(run for match in meant for run in (_members(match) if is_sweep(match) else [match]))
    folders = []
    for path in paths:
        try:
            folder = find_run(path)
            if not read_rows(path / "metrics.jsonl"):
                raise ConfigError([(str(path), "has no rows in metrics.jsonl; there is nothing to send")])
            with _held(folder):
                folders.append(folder)
        except ConfigError as error:
            found += error.problems
    if found:
        raise ConfigError(found, scope="this request")
    return folders


def _members(path: Path) -> list[Path]:
    """The runs of a sweep that have begun."""
    return [job.folder for job in load_sweep(path).jobs if (job.folder / "metrics.jsonl").is_file()]


def _held(folder: RunFolder) -> AbstractContextManager[None]:
    return hold_run(folder.path, instead="send it when it has ended")


def _send(folder: RunFolder, mode: str | None, project: str | None, entity: str | None) -> bool:
    """Send one run; whether W&B took all of it."""
    import wandb

    run = load_config(folder.path / "config.yaml")
    node = run.wandb or compose([]).wandb
    assert node is not None
    decided = decide_mode(mode or "auto", wandb)
    if decided not in ("online", "offline"):
        rule = "is set in the environment, and means that nothing is sent; --mode online or --mode offline wins over it"
        raise ConfigError([(f"WANDB_MODE={decided}", rule)], scope="this request")
    node = replace(node, mode=TrackerMode[decided], project=project or node.project, entity=entity or node.entity)
    with _held(folder):
        with sending(folder.path):
            # Of a run that was just killed the rest is still under way.
            before = _sent_before(folder, node)
        if before is not None and not _rest(folder, before):
            said = "W&B has it already" if before.mode == "online" else "an offline run that holds all of it is there already"
            print(f"{relative(folder.path)}: {said}: {place(before.mode, before.where)}")
            return True
        tracker_id = before.id if before is not None else _unused_id(folder)
        request = replace(make_request(run, node, folder, tracker_id, fallback=False), finish_seconds=PATIENCE_SECONDS)
        return _hand_over(SenderProcess(request), folder)


def _sent_before(folder: RunFolder, node: WandbConfig) -> Sent | None:
    """The W&B run of this project that holds everything up to some row, if there is one."""
    sound = [
        sent
        for sent in read_sent(folder.path)
        if (sent.mode, sent.project, sent.entity) == (node.mode.value, node.project, node.entity)
        and sent.closed
        and sent.lost is None
        and (sent.mode == "online" or Path(sent.where).is_dir())
    ]
    return sound[-1] if sound else None


def _rest(folder: RunFolder, sent: Sent) -> bool:
    """Whether the run has rows that its W&B run has not."""
    files = (("metrics.jsonl", sent.metrics), ("samples.jsonl", sent.samples))
    return any(GrowingRows(folder.path / name, last).new() for name, last in files)


def _unused_id(folder: RunFolder) -> str:
    """The run's id at W&B if that is free yet, else a new one: rows that are there cannot be sent a second time under one id."""
    own = folder.meta().get("wandb_id")
    if own is None:
        own = new_id(folder)
        folder.write_meta(wandb_id=own)
    elif any(sent.id == own for sent in read_sent(folder.path)):
        print(f"{relative(folder.path)}: W&B may hold a part of it as {own}; this is a run of its own beside that")
        return new_id(folder)
    return own


def _hand_over(sender: SenderProcess, folder: RunFolder) -> bool:
    """Have everything sent, say how it goes, and whether it went."""
    name, said, where = relative(folder.path), time.monotonic(), ""
    try:
        sender.tell(finish=EXIT_CODES.get(folder.summary().get("status", ""), 1))
        for event in sender.heard(wait=PATIENCE_SECONDS, after_opened=PATIENCE_SECONDS):
            match event["event"]:
                case "opened":
                    where = place(event["mode"], event["where"])
                case "sent" if time.monotonic() - said > PROGRESS_SECONDS:
                    said = time.monotonic()
                    print(f"{name}: {event['rows']:,} of {event['of']:,} rows", flush=True)
                case "lost":
                    rule = "--mode offline writes a run that `wandb sync` sends later"
                    print(f"{name}: not sent ({event['reason']}); {rule}", flush=True)
                    return False
        rows, samples = (len(read_rows(folder.path / file)) for file in ("metrics.jsonl", "samples.jsonl"))
        print(f"{name}: {rows:,} rows and {samples:,} samples: {where}", flush=True)
        return True
    finally:
        sender.end()
