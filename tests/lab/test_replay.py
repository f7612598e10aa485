"""Replay: the windows of an update are those that the run was fed, and a run that was fed anything else is told so."""

import json
import re
from pathlib import Path

import pytest

from llama_lab import compose, train
from llama_lab.cli import main
from llama_lab.config.errors import ConfigError
from llama_lab.data.prepare import prepare
from llama_lab.lab.datasets.replay import run_replay_command
from llama_lab.training.metrics import read_rows

SCIENCE = "data=text tokenizer=bytes precision=fp32 model.dim=16 model.n_layers=1 model.n_heads=2 model.multiple_of=16 optim=adamw"
BUDGET = "data.max_seq_len=16 data.tokens_per_update=128 training_tokens=1280 schedule.warmup_updates=1"
WATCHING = "eval=null sample=null wandb=null hardware=cpu log.every_updates=4 checkpoint.every_tokens=null"
TINY = [*SCIENCE.split(), *BUDGET.split(), *WATCHING.split()]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """30 documents that each repeat a word of their own."""
    path = tmp_path / "corpus.jsonl"
    lines = [json.dumps({"text": f"w{number:02d} " * (2 + number % 9)}) for number in range(30)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.mark.parametrize("window", ["contiguous", "document", "packed"])
def test_every_window_of_every_rank_is_found_again(text: Path, window: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = compose([*TINY, f"data.path={text}", f"data.window={window}"])
    folder = train(run).folder
    rows = read_rows(folder / "batches.jsonl")
    assert [row["update"] for row in rows] == list(range(1, 11))
    split = prepare(run.data, run.tokenizer, print).train
    starts, ids = split.document_starts.tolist(), split.read(0, split.tokens).tolist()
    for update, ranks in ((1, 1), (10, 3), (10, 8)):
        capsys.readouterr()
        assert run_replay_command([str(folder), "--update", str(update), "--ranks", str(ranks), "--tokens"]) == 0
        out = capsys.readouterr().out
        assert re.findall(r"^Rank \d of \d: (\d)", out, re.M) == [str(8 * (r + 1) // ranks - 8 * r // ranks) for r in range(ranks)]
        first = 8 * (update - 1)
        assert re.findall(r"^  window (\d+):", out, re.M) == [str(number) for number in range(first, first + 8)]
        assert out.endswith(f"Hash {rows[update - 1]['hash']}, equal to the one that the run recorded\n")
        for block in re.split(r"^  window ", out, flags=re.M)[1:]:
            start, stop = (int(number.replace(",", "")) for number in re.findall(r"tokens ([\d,]+) to ([\d,]+)$", block, re.M)[0])
            wanted = [ids[1 + (position % (split.tokens - 1))] for position in range(start, stop)]
            found: list[int] = []
            for name, begin, end, size in re.findall(r"^ {6}\S+?(\d+): tokens (\d+) to (\d+) of (\d+)$", block, re.M):
                document = next(number for number in range(split.documents) if split.document_name(number).endswith(name))
                assert int(size) == starts[document + 1] - starts[document]
                found += ids[starts[document] + 1 + int(begin) : starts[document] + 1 + int(end)]
            assert found == wanted
            shown = re.findall(r"^ {6}\| (.*)$", block, re.M)[0]
            assert shown.startswith(bytes(id for id in [ids[start], *wanted[:4]] if id < 256).decode()[:3])


def test_a_run_that_was_fed_something_else_is_told_so(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = train(compose([*TINY, f"data.path={text}"])).folder
    batches = folder / "batches.jsonl"
    rows = read_rows(batches)
    rows[2]["hash"] = "0" * 16
    batches.write_text("".join(json.dumps(row) + "\n" for row in rows[:9]), encoding="utf-8")
    assert run_replay_command([str(folder), "--update", "2"]) == 0
    assert run_replay_command([str(folder), "--update", "3"]) == 1
    assert "but the run recorded 0000000000000000: it was fed something else" in capsys.readouterr().out
    assert run_replay_command([str(folder), "--update", "10"]) == 0
    assert "; the run has not recorded this update (it has recorded updates up to 9)" in capsys.readouterr().out
    # The text is another by now, and so is what the updates hold.
    text.write_text(text.read_text(encoding="utf-8").replace("w07", "w77"), encoding="utf-8")
    codes = {run_replay_command([str(folder), "--update", str(update)]) for update in range(1, 10)}
    assert 1 in codes
    assert "The data is no longer what the run was trained on (" in capsys.readouterr().out


def test_a_run_finds_the_data_that_it_was_trained_on_from_any_directory(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = train(compose([*TINY, "data.path=corpus.js*"])).folder
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    # A file of that name is not the one that was meant.
    (elsewhere / "corpus.jsonl").write_text('{"text": "another"}\n' * 30)
    capsys.readouterr()
    for words in (["data", "replay", str(folder), "--update", "1"], ["verify", str(folder)], ["data", "inspect", str(folder)]):
        assert main(words) == 0, words
        assert not re.search("no longer|is not what", capsys.readouterr().out)
    assert main(["evaluate", str(folder)]) == 0
    capsys.readouterr()

    text.write_text(text.read_text(encoding="utf-8") + '\n{"text": "a document more"}', encoding="utf-8")
    assert main(["evaluate", str(folder)]) == 2
    error = capsys.readouterr().err
    assert f"{folder} was trained on other data than its config finds now (" in error
    assert "so what it held out is not known; put that data back, or name a file of text to measure" in error


def test_requests_that_make_no_sense_are_refused(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = train(compose([*TINY, f"data.path={text}"])).folder
    with pytest.raises(ConfigError) as caught:
        run_replay_command([str(folder), "--update", "11", "--ranks", "9"])
    assert [subject for subject, _ in caught.value.problems] == ["--update 11", "--ranks 9"]
    with pytest.raises(ConfigError, match=r"does not exist; name a run's folder, outputs/<name>/<run id>"):
        run_replay_command([str(tmp_path / "zzz"), "--update", "1"])
    assert run_replay_command([str(folder)]) == 2
    assert run_replay_command(["--help"]) == 0
    assert "--update N" in capsys.readouterr().out
