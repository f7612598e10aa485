"""Scanning and choosing: what is kept, in which order and on which side, with any number of processes and after a kill."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from llama_lab.config.errors import ConfigError
from llama_lab.config.schema import Dedup, Length, OnError, TextConfig
from llama_lab.data import clock, scan, scan_pool, selection
from llama_lab.data.cache import ContentHashes
from llama_lab.data.clock import Clock, duration
from llama_lab.data.corpus import Corpus, Side, text_digest
from llama_lab.data.scan import length_of
from llama_lab.data.text import TextSource

ROOT = Path(__file__).parents[2]
LENGTHS = (0, 5, 7_480, 7_499, 7_500, 12_000, 12_001, 15_000)


def config(path: Path, **changes) -> TextConfig:
    return replace(TextConfig(path=str(path), val_fraction=0.3), **changes)


def read(chosen: TextConfig, work: Path, processes: int | None = None) -> Corpus:
    return TextSource(chosen, ContentHashes(), processes).corpus(lambda sentence: None, work)


def random_corpus(folder: Path, chance: random.Random) -> list[str | None]:
    """Files with texts of every kind, duplicates among them; returns the texts in their order, None for broken lines."""
    folder.mkdir()
    pool = [f"{number} " + chance.choice(["", "größe ", "plain "]) + "x" * chance.choice(LENGTHS) for number in range(40)]
    written: list[str | None] = []
    for file in range(chance.randint(1, 6)):
        lines = []
        for _ in range(chance.randint(0, 25)):
            kind = chance.random()
            text = None if kind < 0.1 else " \n" if kind < 0.2 else chance.choice(pool) + " " * chance.randint(0, 1)
            lines.append("{broken" if text is None else json.dumps({"text": text}))
            written.append(text)
        (folder / f"{file}.jsonl").write_text("\n".join(lines))
    return written


def expected(written: list[str | None], chosen: TextConfig) -> tuple[list[str], dict[str, int]]:
    """What is kept of texts, and the counts, by the rules as they are written down."""
    counts = dict.fromkeys(("read", "kept", "empty", "broken", "not_ascii", "other_length", "duplicates"), 0)
    seen, kept, size = set(), [], 0
    for text in written:
        counts["read"] += 1
        if text is None:
            counts["broken"] += 1
        elif not text.strip():
            counts["empty"] += 1
        elif chosen.ascii_only and not text.isascii():
            counts["not_ascii"] += 1
        elif chosen.length is not None and length_of(text) is not chosen.length:
            counts["other_length"] += 1
        elif chosen.dedup is not None and text_digest(text) in seen:
            counts["duplicates"] += 1
        else:
            seen.add(text_digest(text))
            kept.append(text)
            counts["kept"] += 1
            size += len(text.encode())
            if chosen.max_bytes is not None and size >= chosen.max_bytes:
                break
    return kept, {key: count for key, count in counts.items() if count or key in ("read", "kept")}


@pytest.mark.parametrize("seed", range(40))
def test_what_is_kept_follows_from_the_rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    chance = random.Random(seed)
    written = random_corpus(tmp_path / "text", chance)
    chosen = config(
        tmp_path / "text",
        on_error=OnError.skip,
        ascii_only=chance.random() < 0.5,
        length=chance.choice([None, None, *Length]),
        dedup=chance.choice([None, Dedup.exact]),
        max_bytes=chance.choice([None, None, 1, 30_000, 200_000]),
    )
    monkeypatch.setattr(scan_pool, "JOB_BYTES", chance.choice([1, 20_000, 10**9]))
    monkeypatch.setattr(scan, "BLOCK_ITEMS", chance.choice([3, 1 << 20]))
    monkeypatch.setattr(selection, "BUCKET_ITEMS", chance.choice([4, 1 << 20]))
    kept, counts = expected(written, chosen)
    try:
        corpus = read(chosen, tmp_path / "work")
    except ConfigError as error:
        assert not kept or len(kept) < 20, error
        return
    assert corpus.counts == counts
    assert corpus.counts["read"] == sum(count for key, count in corpus.counts.items() if key != "read")
    found = list(corpus.documents(0))
    assert corpus.count == len(found)
    assert (
        corpus.text_bytes == sum(len(document.text.encode()) for _, document in found) == sum(len(text.encode()) for text in kept)
    )
    if len(kept) < 20:
        assert "".join(document.text for _, document in found) == "".join(kept)
        assert [side for side, _ in found] == sorted(side for side, _ in found)
    else:
        assert [document.text for _, document in found] == kept
    sides = {side: {text_digest(document.text) for found_side, document in found if found_side is side} for side in Side}
    assert sides[Side.train]
    assert sides[Side.val]
    if chosen.dedup is not None and len(kept) >= 20:
        assert not sides[Side.train] & sides[Side.val]
    for first in {0, 1, len(found) // 2, len(found) - 1, len(found), len(found) + 5}:
        assert list(corpus.documents(first)) == list(islice(found, first, None))


def test_documents_are_named_by_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "text" / "a").mkdir(parents=True)
    (tmp_path / "text" / "a" / "1.jsonl").write_text("\n".join(['{"text": "one"}', "", '{"text": "two"}']))
    (tmp_path / "text" / "b.txt").write_text("three")
    corpus = read(config(tmp_path / "text", val_fraction=0.1), tmp_path / "work")
    assert [(document.name, document.item) for _, document in corpus.documents(0)] == [
        ("a/1.jsonl", 1),
        ("a/1.jsonl", 3),
        ("b.txt", 0),
        ("b.txt", 0),
    ]


def several_files(folder: Path) -> Path:
    folder.mkdir()
    chance = random.Random(0)
    words = ["".join(chance.choices("abcdefghij", k=chance.randint(2, 9))) for _ in range(500)]
    for file in range(6):
        texts = (" ".join(chance.choices(words, k=90)) for _ in range(30))
        (folder / f"{file}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return folder


def everything(corpus: Corpus) -> list:
    return [corpus.counts, corpus.count, corpus.text_bytes, list(corpus.documents(0))]


@pytest.mark.parametrize("dedup", [Dedup.exact, Dedup.near])
def test_several_processes_find_what_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dedup: Dedup) -> None:
    monkeypatch.setattr(scan_pool, "JOB_BYTES", 1)
    before = descendants(os.getpid())
    (tmp_path / "text").mkdir()
    for seed in range(5):
        random_corpus(tmp_path / "text" / str(seed), random.Random(seed))
    for max_bytes in (None, 100_000):
        chosen = config(tmp_path / "text", on_error=OnError.skip, dedup=dedup, max_bytes=max_bytes)
        one = read(chosen, tmp_path / f"work1{max_bytes}", processes=1)
        two = read(chosen, tmp_path / f"work2{max_bytes}", processes=2)
        assert everything(one) == everything(two)
    assert descendants(os.getpid()) == before


ON_ONE_CORE = """
import os, sys, threading
from pathlib import Path
import numpy as np
from llama_lab.config.schema import OnError, TextConfig
from llama_lab.data import scan_pool
from llama_lab.data.cache import ContentHashes
from llama_lab.data.foreign import find_tokens
from llama_lab.data.id_check import check_ids
from llama_lab.data.text import TextSource

os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
os.cpu_count = lambda: 4  # as on any machine with more cores than this process may use
started, readers = [], set()
sys.addaudithook(lambda event, _: started.append(event) if event == "subprocess.Popen" else None)
scan_pool.JOB_BYTES = scan_pool.MANY_BYTES = 1
text = TextConfig(path="text", val_fraction=0.3, on_error=OnError.skip)
TextSource(text, ContentHashes()).corpus(lambda sentence: None, Path("work"))
threading.setprofile(lambda *_: readers.add(threading.get_ident()))
check_ids(find_tokens(Path("ids"), "data.path=ids"), 9, "data.path=ids", lambda sentence: None)
print(len(started), len(readers))
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores cannot be taken from a process here")
def test_a_process_on_one_core_starts_no_others_and_reads_with_one_thread(tmp_path: Path) -> None:
    random_corpus(tmp_path / "text", random.Random(4))
    (tmp_path / "ids").mkdir()
    for number in range(4):
        np.save(tmp_path / "ids" / f"{number}.npy", np.full(2**22, number, dtype=np.uint16))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "LLAMA_LAB_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", ON_ONE_CORE], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=170
    )
    assert done.stdout == "0 1\n", done.stderr


def wait_for(path: Path, process: "subprocess.Popen[bytes]") -> None:
    end = time.monotonic() + 170
    while not path.exists():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.005)


DONE = 3
# The files behind the first three are never scanned to their end, neither in this process nor in those that it starts.
NEVER_ENDING = f"""
import time
from llama_lab.data import scan_pool

def scan_job(job, progress, real=scan_pool.scan_job):
    while int(job.stem.name) >= {DONE}:
        time.sleep(0.01)
    return real(job, progress)

scan_pool.scan_job = scan_job
scan_pool.SERVE = "import sys; sys.path[:] = {{path!r}}; import never_ending; never_ending.scan_pool.serve()"
scan_pool.JOB_BYTES = 1
"""


def started(chosen: TextConfig, work: Path, processes: int) -> "subprocess.Popen[bytes]":
    """A scan that goes on until it is killed."""
    program = (
        "import never_ending\n"
        "from pathlib import Path\n"
        "from llama_lab.config.schema import TextConfig\n"
        "from llama_lab.data.cache import ContentHashes\n"
        "from llama_lab.data.text import TextSource\n"
        f"config = TextConfig(path={chosen.path!r}, val_fraction={chosen.val_fraction})\n"
        f"TextSource(config, ContentHashes(), {processes}).corpus(print, Path({str(work)!r}))\n"
    )
    (work.parent / "never_ending.py").write_text(NEVER_ENDING)
    script = work.parent / "scan.py"
    script.write_text(program)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with (work.parent / "said").open("wb") as said:
        return subprocess.Popen([sys.executable, script], env=environment, stdout=subprocess.DEVNULL, stderr=said)


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_scan_goes_on_with_the_files_that_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    monkeypatch.setattr(scan_pool, "JOB_BYTES", 1)
    chosen = config(several_files(tmp_path / "text"))
    process = started(chosen, tmp_path / "work", processes)
    for number in range(DONE):
        wait_for(tmp_path / "work" / "scan" / f"{number:06}.json", process)
    children = descendants(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    end = time.monotonic() + 170
    while any(alive(child) for child in children):  # they find out by themselves that their parent is gone
        assert time.monotonic() < end
        time.sleep(0.02)
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "work" / "scan").glob("*.json")}
    assert len(done) == DONE
    corpus = read(chosen, tmp_path / "work")
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert everything(corpus) == everything(read(chosen, tmp_path / "fresh"))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs to find the processes that read")
def test_a_reading_process_that_is_killed_is_named(tmp_path: Path) -> None:
    chosen = config(several_files(tmp_path / "text"))
    process = started(chosen, tmp_path / "work", 2)
    wait_for(tmp_path / "work" / "scan" / f"{DONE - 1:06}.json", process)
    children = descendants(process.pid)
    assert len(children) == 2
    os.kill(children[0], signal.SIGKILL)
    assert process.wait(60) == 1
    message = "A process that read the text ended before its time, perhaps for want of memory; run the command again"
    assert message in (tmp_path / "said").read_text()
    assert not any(alive(child) for child in children)


def descendants(pid: int) -> list[int]:
    """Child processes, where the system tells."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_finished_reading_is_found_again_until_a_file_changes(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"number {number}"}) for number in range(50)))
    first = everything(read(config(path), tmp_path / "work"))
    marker = tmp_path / "work" / "scan" / "selection.json"
    written = marker.stat().st_mtime_ns
    assert everything(read(config(path), tmp_path / "work")) == first
    assert marker.stat().st_mtime_ns == written
    path.write_text("\n".join(json.dumps({"text": f"number {number}"}) for number in range(51)))
    assert read(config(path), tmp_path / "work").count == 51
    assert read(config(path, max_bytes=100), tmp_path / "work").text_bytes == 107


def test_results_that_are_not_whole_are_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"number {number}"}) for number in range(50)))
    first = everything(read(config(path), tmp_path / "work"))
    for name, content in (("000000.items", b"cut"), ("000000.json", b"{"), ("selection.json", b"{}"), ("states", b"")):
        (tmp_path / "work" / "scan" / name).write_bytes(content)
        assert everything(read(config(path), tmp_path / "work")) == first


def test_stop_names_up_to_ten_problems_and_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for file in range(4):
        (tmp_path / "text" / f"{file}.jsonl").write_text('{"text": "good"}\n' + "{broken\n" * 4)
    with pytest.raises(ConfigError) as error:
        read(config(tmp_path / "text"), tmp_path / "work")
    message = str(error.value)
    assert message.startswith("10 problems in the data\n")
    assert f"{tmp_path / 'text' / '0.jsonl'}:2 is no JSON object: " in message
    assert f"{tmp_path / 'text' / '2.jsonl'}:3 is no JSON object: " in message
    assert message.endswith("; data.on_error=skip leaves out what cannot be read")
    assert not (tmp_path / "work" / "scan").exists()


def test_skip_says_the_first_problems_and_how_many_there_are(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"number {number}"}) for number in range(30)] + ["{broken"] * 5 + ['{"body": 1}', '{"text": " "}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    said: list[str] = []
    chosen = config(tmp_path / "a.jsonl", on_error=OnError.skip)
    corpus = TextSource(chosen, ContentHashes()).corpus(said.append, tmp_path / "work")
    assert corpus.counts == {"read": 37, "kept": 30, "empty": 1, "broken": 6}
    assert len(said) == 4
    assert (
        said[0]
        == f"Left out: {tmp_path / 'a.jsonl'}:31 is no JSON object: Expecting property name enclosed in double quotes at column 2"
    )
    assert said[3].startswith("Read 30 documents of 0.00 MB in ")
    assert said[3].endswith(" s, dropped 1 empty, 6 that cannot be read")


def test_what_is_broken_behind_the_limit_is_not_met(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"number {number:02}"}) for number in range(30)]
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.jsonl").write_text("\n".join(lines[:20]))
    (tmp_path / "text" / "b.jsonl").write_text("\n".join([*lines[20:], "{broken"]))
    corpus = read(config(tmp_path / "text", max_bytes=9 * 25), tmp_path / "work")
    assert corpus.counts == {"read": 25, "kept": 25}
    with pytest.raises(ConfigError, match=r"b\.jsonl:11 is no JSON object"):
        read(config(tmp_path / "text", max_bytes=9 * 31), tmp_path / "work")


def test_nothing_kept_says_why(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "Größe"}\n{"text": "größer"}\n{"text": ""}')
    with pytest.raises(ConfigError) as error:
        read(config(tmp_path / "a.jsonl", ascii_only=True), tmp_path / "work")
    assert "holds no text that is kept: of 3 documents, 1 empty, 2 with characters beyond ASCII" in str(error.value)


def test_lengths_are_those_of_the_seed() -> None:
    sizes = {Length.short: (1, 7_499), Length.medium: (7_500, 12_000), Length.long: (12_001, 50_000)}
    for length, ends in sizes.items():
        assert {length_of("x" * end) for end in ends} == {length}


def test_progress_is_said_with_the_time_that_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "SAY_SECONDS", 0.0)
    said: list[str] = []
    Clock("Read", 4_000_000, said.append)(1_000_000)
    Clock("Fetched", None, said.append)(2_000_000)
    Clock("Compared", 20, said.append, "bands")(20)
    assert said == [
        "Read 1 of 4 MB in 0 s, about 0 s left",
        "Fetched 2 MB in 0 s",
        "Compared 20 of 20 bands in 0 s, about 0 s left",
    ]
    assert [duration(seconds) for seconds in (3, 120, 7200)] == ["3 s", "2 min", "2.0 h"]


def test_a_missing_package_says_what_to_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.parquet", "a.jsonl.zst", "a.txt"):
        (tmp_path / name).write_bytes(b"x")
    for module in ("pyarrow.parquet", "pyarrow", "backports.zstd", "compression.zstd", "rensa"):
        monkeypatch.setitem(sys.modules, module, None)
    for path, subject in (
        ("a.parquet", tmp_path / "a.parquet"),
        ("a.jsonl.zst", tmp_path / "a.jsonl.zst"),
        ("a.txt", "data.dedup=near"),
    ):
        with pytest.raises(ConfigError) as error:
            TextSource(config(tmp_path / path, dedup=Dedup.near), ContentHashes())
        assert f"{subject} needs " in str(error.value)
        assert "which is not installed; type pip install 'llama_lab[data]'" in str(error.value)
