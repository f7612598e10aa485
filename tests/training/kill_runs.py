"""Kill a run at many moments with SIGKILL, let the same command go on, and compare it with the run that nobody killed.

    python tests/training/kill_runs.py --kills 50

Small runs on the CPU, of one process and of two in turn. Each is killed once: anywhere in its life, while it writes a checkpoint
(the draft that it leaves proves it), between a row and its validation, between a validation and its samples, or at an epoch's edge.
Then the command is typed again, and the end has to be that of the unbroken run, bit for bit: weights, optimizer states, metrics
(but for seconds, speed and memory), samples, and what each update was fed. `--elastic 10` resumes so many further ones with another
number of processes: they have to be fed the same, and their losses to differ by less than 1e-5.

Exits with 1 if any run differs. POSIX only; --folder keeps everything that it writes.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VOLATILE = ("seconds", "speed/", "memory/")
UPDATES, TOKENS_PER_UPDATE, LENGTH = 60, 512, 32
EVAL_UPDATES, SAVE_UPDATES, SAMPLE_UPDATES = 6, 4, 9
MOMENTS = ("anywhere", "save", "validation", "samples", "edge", "save", "anywhere", "save")
"""What kills are aimed at, in turn."""
LOSS_TOLERANCE = 1e-5
POLL_SECONDS = 0.0005
START_SECONDS = 300.0


@dataclass(frozen=True)
class Bench:
    """Where runs are made, and from what.

    Attributes:
        folder: holds the text, the cache, and one folder of outputs a run.
        overrides: further words of the command.
    """

    folder: Path
    overrides: tuple[str, ...] = ()

    def command(self, processes: int) -> list[str]:
        """What would be typed for the run."""
        science = (
            "precision=fp32 tokenizer=bytes model.dim=32 model.n_layers=2 model.n_heads=2 model.multiple_of=32 model.dropout=0.1"
        )
        batch = f"data=text data.max_seq_len={LENGTH} data.tokens_per_update={TOKENS_PER_UPDATE} hardware.micro_batch=4"
        budget = f"training_tokens={UPDATES * TOKENS_PER_UPDATE} schedule.warmup_updates=5 schedule.cooldown_fraction=0.5"
        watching = f"log.every_updates=1 eval.every_updates={EVAL_UPDATES} eval.max_tokens=2000 sample.growth=1"
        watching += f" sample.first_tokens={SAMPLE_UPDATES * TOKENS_PER_UPDATE} sample.new_tokens=16"
        saving = f"checkpoint.every_tokens={SAVE_UPDATES * TOKENS_PER_UPDATE} checkpoint.keep=2 checkpoint.keep_best=1"
        words = f"name=run {science} {batch} {budget} {watching} {saving} hardware=cpu hardware.processes={processes} wandb=null"
        path = f"data.path={self.folder / 'text.jsonl'}"
        return [sys.executable, "-m", "llama_lab", "train", *words.split(), path, *self.overrides]

    def start(self, name: str, processes: int) -> "subprocess.Popen[bytes]":
        """Start the run called `name`, in a process group of its own."""
        own = {"LLAMA_LAB_OUTPUTS": str(self.folder / name), "LLAMA_LAB_CACHE": str(self.folder / "cache"), "OMP_NUM_THREADS": "1"}
        with (self.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                self.command(processes), stdout=log, stderr=log, env=os.environ | own, cwd=self.folder, start_new_session=True
            )

    def run_of(self, name: str) -> Path | None:
        """The folder of the run called `name`, if it has begun."""
        return next((self.folder / name).glob("run/llama*"), None)

    def finish(self, name: str, processes: int) -> Path:
        """Let a run go on to its end."""
        process = self.start(name, processes)
        with ended(process):
            code = process.wait(START_SECONDS)
        folder = self.run_of(name)
        if code != 0 or folder is None:
            raise AssertionError(f"{name} ended with {code}:\n{(self.folder / f'{name}.log').read_text()[-4000:]}")
        return folder


@dataclass(frozen=True)
class Kill:
    """One kill, and what came of it.

    Attributes:
        victim: who was killed: `group`, `parent` or `worker`.
        update: newest row when it happened; 0: none.
        where: what its traces prove: inside a save (a draft was left), between a row and its validation, …
    """

    victim: str
    update: int
    where: str


def make_text(path: Path) -> None:
    """60 short documents: few enough that a run passes them over several times."""
    draw = random.Random(0)
    words = ["the", "a", "model", "learns", "reads", "text", "loss", "token", "batch", "slowly", "again", "because", "never"]
    documents = [" ".join(draw.choices(words, k=draw.randint(3, 40))) + "." for _ in range(60)]
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))


def kill_one(bench: Bench, name: str, processes: int, aim: str, life: float, edges: set[int], draw: random.Random) -> Kill | None:
    """Start a run and kill it once; None if it reached its end before that."""
    process = bench.start(name, processes)
    with ended(process):
        if not wait_for(MOMENTS_SEEN[aim], bench, name, process, life, edges, draw):
            return None
        # A save is the first worker's: if another one dies, it is still brought to its end.
        victim = "group" if processes == 1 else draw.choice(["group", "parent"] if aim == "save" else ["group", "parent", "worker"])
        workers = children(process.pid)
        if victim == "worker" and workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(draw.choice(workers), signal.SIGKILL)
        elif victim == "parent":
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(START_SECONDS)
        for worker in workers:
            until(lambda worker=worker: not Path(f"/proc/{worker}").exists(), START_SECONDS)
    folder = bench.run_of(name)
    return Kill(victim, newest_update(folder), where_it_died(folder, edges))


def wait_for(
    seen: Callable[..., Callable[[Path | None], bool]],
    bench: Bench,
    name: str,
    process: "subprocess.Popen[bytes]",
    life: float,
    edges: set[int],
    draw: random.Random,
) -> bool:
    """Wait until the moment has come; false if the run ended before."""
    begin, condition = time.monotonic(), seen(life, edges, draw)
    folder = None
    while process.poll() is None and time.monotonic() - begin < START_SECONDS:
        folder = folder or bench.run_of(name)
        if condition(folder):
            return True
        time.sleep(POLL_SECONDS)
    return False


def _anywhere(life: float, edges: set[int], draw: random.Random) -> Callable[[Path | None], bool]:
    moment = time.monotonic() + draw.uniform(0.0, life)
    return lambda folder: time.monotonic() >= moment


def _save(life: float, edges: set[int], draw: random.Random) -> Callable[[Path | None], bool]:
    after = draw.randrange(UPDATES - 10)

    def draft_seen(folder: Path | None) -> bool:
        return (
            folder is not None
            and (folder / "checkpoints").is_dir()
            and any((folder / "checkpoints").glob(".draft-*"))
            and newest_update(folder) >= after
        )

    return draft_seen


def _after_row(update: int, kind: str, delay: float) -> Callable[[Path | None], bool]:
    """A little after the row of `kind` that belongs to `update` was written."""
    since: list[float] = []

    def seen(folder: Path | None) -> bool:
        if folder is not None and not since and any(row["update"] >= update and kind in row for row in last_rows(folder)):
            since.append(time.monotonic())
        return bool(since) and time.monotonic() - since[0] >= delay

    return seen


def _validation(life: float, edges: set[int], draw: random.Random) -> Callable[[Path | None], bool]:
    return _after_row(EVAL_UPDATES * draw.randrange(1, UPDATES // EVAL_UPDATES), "train/loss", draw.uniform(0, 0.02))


def _samples(life: float, edges: set[int], draw: random.Random) -> Callable[[Path | None], bool]:
    both = [update for update in range(1, UPDATES) if update % EVAL_UPDATES == 0 and update % SAMPLE_UPDATES == 0]
    return _after_row(draw.choice(both), "val/loss", draw.uniform(0, 0.02))


def _edge(life: float, edges: set[int], draw: random.Random) -> Callable[[Path | None], bool]:
    return _after_row(draw.choice(sorted(edges)) - draw.randrange(2), "train/loss", draw.uniform(0, 0.005))


MOMENTS_SEEN = {"anywhere": _anywhere, "save": _save, "validation": _validation, "samples": _samples, "edge": _edge}


def where_it_died(folder: Path | None, edges: set[int]) -> str:
    """What the traces in the folder prove."""
    if folder is None or not (folder / "metrics.jsonl").is_file():
        return "before the first row"
    if list(folder.glob("checkpoints/.draft-*")):
        return "inside a save"
    row = [{"update": 0}, *last_rows(folder)][-1]
    update = row["update"]
    if "train/loss" in row and update % EVAL_UPDATES == 0:
        return "between a row and its validation"
    if "val/loss" in row and update % SAMPLE_UPDATES == 0 and update not in sampled(folder):
        return "between a validation and its samples"
    if update == UPDATES:
        return "after the last update"
    if {update, update + 1} & edges:
        return "at an epoch's edge"
    return "before the first checkpoint" if update < SAVE_UPDATES else "elsewhere"


def epoch_edges(bench: Bench) -> set[int]:
    """Updates in which an epoch ends."""
    (manifest,) = [json.loads(path.read_text()) for path in (bench.folder / "cache").rglob("manifest.json")]
    windows = (manifest["splits"]["train"]["tokens"] - 1) // LENGTH
    share = TOKENS_PER_UPDATE // LENGTH
    return {-(-number * windows // share) for number in range(1, UPDATES * share // windows + 1)}


def differences(expected: Path, found: Path) -> list[str]:
    """How the end of one run differs from that of another, in what has to be equal."""
    unequal = []
    for name in ("metrics.jsonl", "samples.jsonl", "batches.jsonl"):
        if steady(expected / name) != steady(found / name):
            unequal.append(name)
    mine, theirs = newest_files(expected), newest_files(found)
    unequal += [name for name in mine if mine[name] != theirs.get(name)]
    if json.loads((found / "summary.json").read_text())["status"] != "finished":
        unequal.append("status")
    if left := [path.name for path in (*found.glob("checkpoints/.*"), *found.glob(".*.draft"))]:
        unequal.append(f"left behind: {left}")
    return unequal


def loss_difference(expected: Path, found: Path) -> float:
    """Largest difference between two runs' training and validation losses; infinite where they have other rows or other batches."""
    if steady(expected / "batches.jsonl") != steady(found / "batches.jsonl"):
        return float("inf")
    pairs = list(zip(steady(expected / "metrics.jsonl"), steady(found / "metrics.jsonl"), strict=True))
    keys = ("train/loss", "val/loss")
    return max(abs(row[key] - other.get(key, float("inf"))) for row, other in pairs for key in keys if key in row)


def steady(path: Path) -> list[dict[str, Any]]:
    """The rows of a file without what depends on the machine and the moment."""
    if not path.is_file():
        return []
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith(VOLATILE)} for row in rows]


def newest_files(folder: Path) -> dict[str, str]:
    """SHA-256 of the tensors in the newest checkpoint, by file."""
    newest = max(folder.glob("checkpoints/tokens-*"))
    files = json.loads((newest / "manifest.json").read_text())["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name.endswith(".safetensors")}


def last_rows(folder: Path) -> list[dict[str, Any]]:
    """The last few whole rows of metrics.jsonl."""
    try:
        with (folder / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 2000))
            lines = file.read().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    rows = []
    for line in lines:
        with contextlib.suppress(ValueError):
            if line.endswith(b"\n") and line.startswith(b"{"):
                rows.append(json.loads(line))
    return rows


def newest_update(folder: Path | None) -> int:
    """Update of the newest row."""
    return 0 if folder is None else [{"update": 0}, *last_rows(folder)][-1]["update"]


def sampled(folder: Path) -> set[int]:
    """Updates that have samples."""
    path = folder / "samples.jsonl"
    return {row["update"] for row in steady(path)} if path.is_file() and path.read_bytes().endswith(b"\n") else set()


def children(parent: int) -> list[int]:
    """Training processes that a process has started."""
    try:
        found = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        return [int(pid) for pid in found if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    except OSError:
        return []


def until(condition: Callable[[], bool], seconds: float) -> None:
    """Wait for something that has to happen."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError("it did not happen in time")
        time.sleep(0.01)


@contextlib.contextmanager
def ended(process: "subprocess.Popen[bytes]") -> Iterator[None]:
    """Leave nothing of a process group behind."""
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def main() -> int:
    """Run the kills that the command line asks for, and say what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="runs that are killed (50)")
    parser.add_argument("--elastic", type=int, default=0, help="further ones that go on with another number of processes (0)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (0)")
    parser.add_argument("--folder", type=Path, help="a new folder for everything; by default it is removed at the end")
    asked = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = asked.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kill_runs-")))
        code = survive(Bench(folder.absolute() / "same"), kills=asked.kills, seed=asked.seed) if asked.kills else 0
        if asked.elastic:
            # Dropout's masks belong to the processes, so here there is none.
            other = Bench(folder.absolute() / "other", ("model.dropout=0.0",))
            code |= survive(other, kills=asked.elastic, seed=asked.seed + 1, elsewhere=True)
        return code


def survive(
    bench: Bench,
    *,
    kills: int,
    seed: int,
    processes: tuple[int, ...] = (1, 2),
    elsewhere: bool = False,
    moments: tuple[str, ...] = MOMENTS,
) -> int:
    """Kill and compare; returns the exit code.

    Args:
        processes: numbers of processes that runs have, in turn.
        elsewhere: whether runs go on with another number of processes.
        moments: what the kills are aimed at, in turn.
    """
    bench.folder.mkdir(parents=True, exist_ok=True)
    make_text(bench.folder / "text.jsonl")
    draw, begin = random.Random(seed), time.perf_counter()
    unbroken, lives = {}, {}
    for many in processes:
        start = time.perf_counter()
        unbroken[many] = bench.finish(f"unbroken-{many}", many)
        lives[many] = time.perf_counter() - start
    edges = epoch_edges(bench)
    print(f"unbroken: {', '.join(f'{life:.1f} s' for life in lives.values())}; epochs end in updates {sorted(edges)}", flush=True)

    done, differing = Counter[str](), 0
    for number in range(kills):
        many, aim = processes[number % len(processes)], moments[number // len(processes) % len(moments)]
        name, kill = f"killed-{number}", None
        while kill is None:
            shutil.rmtree(bench.folder / name, ignore_errors=True)
            kill = kill_one(bench, name, many, aim, lives[many], edges, draw)
        found = bench.finish(name, 3 - many if elsewhere else many)
        wrong, said = compare(unbroken[many], found, elsewhere)
        differing += wrong
        done[kill.where] += 1
        line = f"{number + 1:3}  processes: {many}  {kill.victim:6} killed at update {kill.update:3}, {kill.where}: {said}"
        print(line, flush=True)
        if not wrong:
            shutil.rmtree(bench.folder / name)
    print(", ".join(f"{count} {where}" for where, count in done.most_common()))
    print(f"{kills - differing} of {kills} as if never killed, in {time.perf_counter() - begin:.0f} s", flush=True)
    return 1 if differing else 0


def compare(expected: Path, found: Path, elsewhere: bool) -> tuple[bool, str]:
    """Whether a run that was killed ended in another way than it should have, and that in words."""
    if elsewhere:
        difference = loss_difference(expected, found)
        return not difference < LOSS_TOLERANCE, f"same batches, losses within {difference:.1e}"
    unequal = differences(expected, found)
    return bool(unequal), f"differs: {', '.join(unequal)}" if unequal else "equal"


if __name__ == "__main__":
    sys.exit(main())
