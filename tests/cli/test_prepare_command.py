"""`llama-lab prepare`: what it makes, what it says, and how it takes being stopped."""

import json
import random
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llama_lab.cli import main
from llama_lab.completion import complete
from llama_lab.data.cache import entries

Output = pytest.CaptureFixture[str]
SENTENCE = "the river tells of mountains and windows because a paper learns what nobody reads slowly enough to write it down"
TEXTS = [" ".join(random.Random(number).choices(SENTENCE.split(), k=40)) for number in range(60)]
LINES = [json.dumps({"text": f"Line {number}: {text}."}) for number, text in enumerate(TEXTS)]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with some text, which is where the user stands, and a cache of its own."""
    (tmp_path / "lines.jsonl").write_text("\n".join(LINES), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLAMA_LAB_CACHE", str(tmp_path / "cache"))
    return tmp_path


def prepare(*words: str) -> int:
    return main(["prepare", "data=text", "data.path=lines.jsonl", "tokenizer.vocab_size=300", *words])


def test_a_folder_is_made_and_the_command_to_train_on_it_works(folder: Path, capsys: Output) -> None:
    assert prepare("--out", "my shards/lines") == 0
    shown = capsys.readouterr().out
    for part in (
        "documents          60 kept of 60 read",
        "vocabulary         300 entries, ids of uint16",
        "shards             1 training, 1 validation",
        "on disk ",
        "bytes a token",
        "took ",
    ):
        assert part in shown
    made = folder / "my shards" / "lines"
    assert [path.name for path in made.parent.iterdir()] == ["lines"]
    command = shlex.split(shown.splitlines()[-1])
    assert command[:3] == ["llama-lab", "train", "data=shards"]
    assert main(["plan", *command[2:], "tokenizer.path=" + f'"{made / "tokenizer.json"}"', "hardware=cpu"]) == 0
    assert "tokens in the data" in capsys.readouterr().out


def test_the_same_words_find_it_again(capsys: Output) -> None:
    for words in ([], ["--out", "made"]):
        assert prepare(*words) == 0
        first = capsys.readouterr().out
        assert "\nPrepared\n" in first
        assert prepare(*words) == 0
        again = capsys.readouterr().out
        assert again.startswith("Prepared before\n")
        assert "took" not in again
        assert again.splitlines()[-1] == first.splitlines()[-1]
    assert main(["plan", *shlex.split(first_train_words(first))]) == 0


def first_train_words(shown: str) -> str:
    return shown.splitlines()[-1].strip().removeprefix("llama-lab train ")


def test_without_a_folder_train_finds_it_by_the_same_words(capsys: Output) -> None:
    assert prepare() == 0
    words = first_train_words(capsys.readouterr().out)
    assert words == "data=text data.path=lines.jsonl tokenizer.vocab_size=300"
    assert main(["plan", *words.split()]) == 0
    assert "Encoded" not in capsys.readouterr().out


def test_standard_input_is_found_again_by_its_folder(folder: Path) -> None:
    words = [sys.executable, "-m", "llama_lab", "prepare", "data=text", "data.path=-", "tokenizer=bytes"]
    done = subprocess.run(words, input="some text " * 500, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith(f"  llama-lab train data=shards data.path={folder / 'cache'}")
    again = subprocess.run(words, input="some text " * 500, capture_output=True, text=True, timeout=170)
    assert again.stdout.startswith("Prepared before\n")
    assert [entry.kind for entry in entries()] == ["text, bytes"], "the copy of the input is of no use any more"


def test_only_data_and_tokenizer_count() -> None:
    assert prepare("schedule.warmup_updates=1000000", "training_tokens=1", "data.tokens_per_update=777", "tokenizer=bytes") == 2
    assert prepare("schedule.warmup_updates=1000000", "training_tokens=1", "data.tokens_per_update=777") == 0


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["lines.jsonl"], "lines.jsonl is a path; type data=text data.path=lines.jsonl"),
        (["data=text", "path=lines.jsonl"], "path=lines.jsonl is no field; type data=text data.path=lines.jsonl"),
        (["data=text"], "data.path=??? has no value yet; type one, e.g. data.path=book.txt"),
        (["data=text", "data.path=line.jsonl"], "data.path=line.jsonl does not exist"),
        (["data=text", "data.path=lines.jsonl", "--out"], "--out needs the folder to make, such as --out shards/books"),
        (["--out", "data=text", "data.path=lines.jsonl"], "--out needs the folder to make"),
        (["data=text", "data.path=lines.jsonl", "out=made"], "is no field; the folder to make is named by --out made"),
        (["data=text", "data.path=lines.jsonl", "--output=made"], "has no flag --output; did you mean --out?"),
        (["data=text", "data.path=lines.jsonl", "-m"], "has no flag -m; it takes --out, --config-dir, --help"),
        (["data=text", "data.path=lines.jsonl", "--out", "lines.jsonl"], "is a file; name a folder that does not exist yet"),
        (["data=text", "data.path=lines.jsonl", "--out", "."], "holds files of something else; name a folder that does not"),
        (["data=text", "data.path=lines.jsonl", "tokenizer.vocab_size=300,400"], "several sets; prepare them one after another"),
        (["data=text", "data.path=lines.jsonl", "tokenizer=file"], "tokenizer.path=??? has no value yet"),
        (["data=text", "data.path=lines.jsonl", "tokenizer=file", "tokenizer.path=lines.jsonl"], "is no tokenizer.json"),
        (["data=text", "data.path=lines.jsonl", "tokenizer.vocab_size=100"], "is below 261"),
        (["data=mixture", "data.paths=[a,b]", "data.weights=[1,1]"], "prepare each by itself"),
        (["data=shards", "data.path=nowhere"], "is no folder"),
        (["data=text", "data.path=.", "--out", "here"], "lies inside data.path=., where it would be taken for text"),
        (["data=txt", "data.path=lines.jsonl"], "did you mean data=text?"),
    ],
)
def test_mistakes_say_what_to_type(words: list[str], hint: str, folder: Path, capsys: Output) -> None:
    before = sorted(path.name for path in folder.iterdir())
    assert main(["prepare", *words]) == 2
    shown = capsys.readouterr()
    assert hint in shown.err
    assert shown.out == ""
    assert sorted(path.name for path in folder.iterdir() if path.name != "cache") == before


def test_what_is_prepared_already_is_not_prepared_again(capsys: Output) -> None:
    assert prepare("--out", "made") == 0
    words = first_train_words(capsys.readouterr().out)
    assert main(["prepare", "data=shards", "data.path=made", "--out", "other"]) == 2
    assert f"is prepared already; type llama-lab train {words}" in capsys.readouterr().err
    assert prepare("data.val_fraction=0.5", "--out", "made") == 2
    assert "holds a set that was prepared from other text or in another way" in capsys.readouterr().err


def test_help_shows_examples_that_parse(capsys: Output) -> None:
    assert main(["prepare", "--help"]) == 0
    shown = capsys.readouterr().out
    examples = [line for line in shown.splitlines() if "llama-lab prepare" in line and "usage" not in line]
    assert len(examples) >= 5
    assert "Exit codes: " in shown


def test_tab_offers_what_counts() -> None:
    commands = {"prepare": ["--out", "--config-dir", "--help"]}
    assert complete("llama-lab prepare --o", commands) == ["--out"]
    assert complete("llama-lab prepare mod", commands) == []
    assert "data=text" in complete("llama-lab prepare data=", commands)
    assert complete("llama-lab prepare tokenizer.vocab", commands) == ["tokenizer.vocab_size="]


# A command that gets a signal when it has encoded and saved a quarter of its documents.
SIGNALLED = """
import os, signal, sys
from llama_lab.cli import main
from llama_lab.data import build
from llama_lab.data.draft import FolderWriter

# Whoever runs the tests in the background of a shell has made every child deaf to Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
build.SAVE_SECONDS = 0.0
save, sent = FolderWriter.save, [getattr(signal, sys.argv[1])]

def save_and_get_a_signal(writer):
    save(writer)
    if writer.documents > 100 and sent:
        os.kill(os.getpid(), sent.pop())

FolderWriter.save = save_and_get_a_signal
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_keeps_what_is_done(sent: signal.Signals, folder: Path) -> None:
    text = "\n".join(json.dumps({"text": f"{number} " + "a river runs " * 300}) for number in range(400))
    (folder / "long.jsonl").write_text(text, encoding="utf-8")
    words = ["prepare", "data=text", "data.path=long.jsonl", "tokenizer.vocab_size=300", "--out", "made"]
    stopped = subprocess.run([sys.executable, "-c", SIGNALLED, sent.name, *words], capture_output=True, text=True, timeout=170)
    assert (stopped.returncode, stopped.stderr) == (75, "")
    kept = f"Interrupted; what is done is kept in {folder / '.made.partial'}, and the same command goes on from there"
    assert kept in stopped.stdout
    assert not (folder / "made").exists()
    again = subprocess.run([sys.executable, "-m", "llama_lab", *words], capture_output=True, text=True, timeout=170)
    assert again.returncode == 0, again.stderr
    assert "Going on where an earlier command stopped" in again.stdout
    assert main([*words[:-1], "fresh"]) == 0
    made, fresh = ({path.name: path.read_bytes() for path in (folder / name).iterdir()} for name in ("made", "fresh"))
    assert made == fresh
