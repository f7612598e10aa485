"""The copy of a run's metrics that goes to Weights & Biases. Nothing that happens here may cost a run."""

import contextlib
import netrc
import os
import secrets
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from llama_lab.config.identity import plain_config
from llama_lab.config.schema import RunConfig, TrackerMode, WandbConfig
from llama_lab.training.run_folder import RunFolder, relative

INIT_SECONDS = 20.0
FINISH_SECONDS = 30.0
# Offline rows reach the disk so often, in seconds; the library's default of 15 loses a run killed early.
FLUSH_SECONDS = 1.0


class Tracker:
    """A sink that does nothing: what a run without W&B, or with a W&B that failed, talks to."""

    def log(self, row: dict[str, Any]) -> None:
        """Send one row of metrics with its x-axes."""

    def samples(self, axes: dict[str, Any], samples: list[tuple[str, str]]) -> None:
        """Send generated texts, (prompt, continuation) each."""

    def finish(self, exit_code: int) -> None:
        """Close the run. `exit_code` 0 marks it finished, anything else failed."""

    def where(self) -> str | None:
        """A sentence for the closing words: where to look at the run."""
        return None


class WandbTracker(Tracker):
    """One W&B run. The first call that fails says so once and turns the rest off: training goes on."""

    def __init__(self, run: Any, wandb: Any, say: Callable[[str], None]):
        self._run, self._wandb, self._say = run, wandb, say
        self._table: Any = None
        self._broken = False
        self._offline = bool(run.settings._offline)
        self._url, self._folder = None if self._offline else run.url, run.dir

    def log(self, row: dict[str, Any]) -> None:
        self._attempt(lambda: self._run.log(row))

    def samples(self, axes: dict[str, Any], samples: list[tuple[str, str]]) -> None:
        def send() -> None:
            if self._table is None:
                # A table logged again after it grew would stay at its first row in the default mode.
                self._table = self._wandb.Table(columns=["update", "tokens", "prompt", "text"], log_mode="INCREMENTAL")
            for prompt, text in samples:
                self._table.add_data(axes["update"], axes["tokens"], prompt, text)
            self._run.log(axes | {"samples": self._table})

        self._attempt(send)

    def finish(self, exit_code: int) -> None:
        self._attempt(lambda: self._run.finish(exit_code=exit_code))

    def where(self) -> str | None:
        if self._broken:
            return None
        if not self._offline:
            return self._url
        folder = Path(self._folder).parent
        return f"wandb leet {relative(folder)}   (offline; `wandb sync` sends it)"

    def _attempt(self, call: Callable[[], None]) -> None:
        if self._broken:
            return
        # When its helper process dies, the library raises whatever its socket raised: there is no narrower class to catch.
        try:
            call()
        except Exception as error:
            self._broken = True
            self._say(f"W&B stopped working ({type(error).__name__}: {error}); training goes on, metrics.jsonl is complete")


def start_tracker(run: RunConfig, folder: RunFolder, say: Callable[[str], None]) -> Tracker:
    """Open the run's W&B run, or the same one again after a resume.

    Args:
        run: the resolved config; W&B gets it as nested plain values.
        say: prints a line.

    Returns:
        A sink that never raises; one that does nothing where `wandb: null` or W&B cannot start.
    """
    if run.wandb is None:
        return Tracker()
    try:
        import wandb
    except Exception as error:
        say(f"W&B is not used: it cannot be imported ({error})")
        return Tracker()
    mode = _mode(run.wandb, wandb)
    if mode == "disabled":
        return Tracker()
    tracker_id = folder.meta().get("wandb_id") or f"{folder.path.name}-{secrets.token_hex(3)}"
    folder.write_meta(wandb_id=tracker_id)
    for attempt in dict.fromkeys((mode, "offline")):
        try:
            return WandbTracker(_init(wandb, run, run.wandb, folder, tracker_id, attempt), wandb, say)
        except Exception as error:
            say(f"W&B does not start in mode {attempt} ({type(error).__name__}: {error})")
            with contextlib.suppress(Exception):
                wandb.teardown()
    return Tracker()


def _init(wandb: Any, run: RunConfig, node: WandbConfig, folder: RunFolder, tracker_id: str, mode: str) -> Any:
    handle = wandb.init(
        project=node.project,
        entity=node.entity,
        group=node.group or run.name,
        tags=node.tags,
        name=folder.path.name,
        id=tracker_id,
        resume="allow" if mode == "online" else None,
        job_type="train",
        dir=str(folder.path),
        config=plain_config(run),
        mode=mode,
        # In a notebook the default would hand back a run that is open already, and end the caller's own.
        reinit="create_new",
        settings=wandb.Settings(
            init_timeout=INIT_SECONDS,
            finish_timeout=FINISH_SECONDS,
            x_transaction_log_flush_interval=FLUSH_SECONDS,
            console="off",
            silent=True,
        ),
    )
    for axis in ("update", "tokens", "seconds"):
        handle.define_metric(axis, hidden=True)
    for group in ("train", "val", "speed", "memory"):
        handle.define_metric(f"{group}/*", step_metric="tokens")
    return handle


def _mode(node: WandbConfig, wandb: Any) -> str:
    """online, offline or disabled. What the user typed wins over the environment, that over what is configured."""
    if node.mode is not TrackerMode.auto:
        return node.mode.value
    asked = os.environ.get("WANDB_MODE", "")
    if asked:
        return {"dryrun": "offline", "run": "online"}.get(asked, asked)
    return "online" if _has_key(wandb) else "offline"


def _has_key(wandb: Any) -> bool:
    """Whether W&B could log in without asking: a key in the environment, or one that `wandb login` stored."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    with contextlib.suppress(Exception):
        host = urlparse(wandb.setup().settings.base_url).hostname or ""
        default = "_netrc" if sys.platform == "win32" else ".netrc"
        stored = netrc.netrc(os.environ.get("NETRC") or Path.home() / default)
        return stored.authenticators(host) is not None
    return False
