"""`llama-lab generate` and `llama-lab evaluate` as they are typed: what they print, and what they say to mistakes."""

import io
import json
import math
import sys
from pathlib import Path

import pytest

from llama_lab import compose, load, train
from llama_lab.cli import main
from llama_lab.training.metrics import read_rows
from llama_lab.training.run_folder import relative

from .conftest import tiny_overrides

FIXED = ("--device", "cpu", "--temperature", "0")


def test_one_text_is_printed_behind_its_prompt(run_folder, capsys):
    assert main(["generate", str(run_folder), "the model", "--max-new-tokens", "6", *FIXED]) == 0
    expected = load(run_folder).generate("the model", max_new_tokens=6, temperature=0)
    assert capsys.readouterr().out == f"the model{expected}\n"


def test_flags_may_stand_before_and_behind_the_text_and_texts_are_printed_in_order(run_folder, capsys):
    words = ["generate", "--seed", "3", str(run_folder), "--json", "--samples", "2", "the", "a text", "--max-new-tokens", "4"]
    assert main([*words, "--device", "cpu", "--top-k", "0", "--top-p", "0.9"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["prompt"], row["seed"]) for row in rows] == [("the", 3), ("the", 4), ("a text", 5), ("a text", 6)]
    run = load(run_folder)
    for row in rows:
        assert row["text"] == run.generate(row["prompt"], seed=row["seed"], max_new_tokens=4, top_k=None, top_p=0.9)
        assert (row["new_tokens"], row["finish"], row["update"]) == (4, "length", 8)


def test_prompts_come_from_files_and_pipes(run_folder, tmp_path, capsys, monkeypatch):
    (tmp_path / "prompts.txt").write_text("the\n\na text\n")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "two\\nlines"}\n')
    monkeypatch.setattr(sys, "stdin", io.StringIO("from a pipe"))
    words = ["generate", str(run_folder), "-", "--json", "--max-new-tokens", "2", *FIXED]
    assert main([*words, "--prompts", str(tmp_path / "prompts.txt")]) == 0
    assert main([*words[:2], *words[3:], "--prompts", str(tmp_path / "prompts.jsonl"), "--update", "best"]) == 0
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n"))
    assert main([*words[:2], *words[3:], "--prompts", "-"]) == 0
    prompts = [json.loads(line)["prompt"] for line in capsys.readouterr().out.splitlines()]
    assert prompts == ["from a pipe", "the", "a text", "two\nlines", "one", "two"]


def test_a_conversation_continues_sets_options_and_survives_mistakes(run_folder, capsys, monkeypatch):
    lines = ["", "/temperature 0", "/max_new_tokens 3", "/temperature hot", "/top_p 7", "/wrong", "/options", "the", "", "/quit"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    assert main(["generate", str(run_folder), "--interactive", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    run = load(run_folder)
    first = run.generate("the", max_new_tokens=3, temperature=0)
    second = run.generate("the" + first, max_new_tokens=3, temperature=0)
    for part in (
        f"the{first}\n",
        f"> {second}\n",
        "Type a text first",
        "hot is no number",
        "top_p=7.0 is outside (0, 1]",
        "/wrong is no",
    ):
        assert part in said
    assert "  temperature is 0.0\n" in said and "  max_new_tokens is 3\n" in said
    assert "temperature 0.0" in said and "max_new_tokens 3" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{run}"], "no prompt was typed"),
        (["{run}", ""], "is empty; give it a first word"),
        (["{run}", "x" * 70], "the model was trained with a context of 64, which leaves no room"),
        (["{run}", "x" * 40, "--max-new-tokens", "40"], "room for 23 new ones, not 40; --max-new-tokens 23 fits, or --beyond"),
        (["{run}", "x", "--top-p", "2", "--min-p", "-1", "--seed", "-1"], "3 problems"),
        (["{run}", "x", "--greedy", "--temperature", "1"], "contradicts --greedy"),
        (["{run}", "x", "temperature=0.5"], "would be a text to continue; the option is --temperature 0.5"),
        (["{run}", "x", "--samples", "0"], "--samples 0 is below 1"),
        (["{run}", "x", "--interactive"], "--interactive asks for its prompts itself"),
        (["{run}", "x", "--device", "cuda:9"], "cuda:9 is not there"),
        (["{run}", "--prompts", "gone.txt"], "--prompts gone.txt cannot be read"),
        (["{run}", "x", "--update", "5"], "there are 4, 8"),
        (["{run}", "x", "--update", "worst"], "or last, or best"),
        (["once upon/a time's end"], "is no run, and RUN is missing: llama-lab generate RUN 'once upon/a time'\"'\"'s end'"),
        (["nowhere", "x"], "nowhere does not exist; name a run's folder, outputs/<name>/<run id>"),
    ],
)
def test_mistakes_in_a_request_for_text_are_named(run_folder, capsys, words, said):
    assert main(["generate", *(word.replace("{run}", str(run_folder)) for word in words)]) == 2
    assert said in capsys.readouterr().err


def test_a_run_is_asked_by_the_hash_at_the_end_of_its_name(run_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LLAMA_LAB_OUTPUTS", str(run_folder.parent.parent))
    code = run_folder.name[-8:]
    assert main(["generate", code, "the", "--max-new-tokens", "2"]) == 0
    assert main(["evaluate", code, "--max-tokens", "64"]) == 0
    assert main(["evaluate", code, code, "--max-tokens", "64"]) == 0
    assert main(["data", "inspect", code, "--samples", "0"]) == 0
    assert main(["data", "replay", code, "--update", "1"]) == 0
    assert main(["fork", code, "seed.data=5", "training_tokens=4096", "--cfg"]) == 0
    assert main(["export", code, "--to", "hf", "--out", str(tmp_path / "model")]) == 0
    assert "seed" in capsys.readouterr().out
    assert main(["generate", code]) == 2
    assert "no prompt was typed" in capsys.readouterr().err
    assert main(["generate", run_folder.name[:-1]]) == 2
    assert f"{run_folder.name[:-1]} does not exist; did you mean " in capsys.readouterr().err


def test_a_run_without_a_checkpoint_says_so(run_folder, tmp_path, capsys):
    for name in ("config.yaml", "tokenizer.json"):
        (tmp_path / name).write_bytes((run_folder / name).read_bytes())
    for command in (["generate", str(tmp_path), "x"], ["evaluate", str(tmp_path)]):
        assert main(command) == 2
        assert "has no checkpoint yet; train it further" in capsys.readouterr().err


def test_a_runs_own_text_has_the_loss_that_it_ended_with(run_folder, tmp_path, capsys):
    out, picture = tmp_path / "found.json", tmp_path / "calibration.png"
    words = ["evaluate", str(run_folder), "--out", str(out), "--plot", str(picture), "--calibration", "--device", "cpu"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "its held-out text" in said and "expected calibration error" in said and "over-confident by" in said
    found = json.loads(out.read_text())["texts"]["its held-out text"]
    last = read_rows(run_folder / "metrics.jsonl")[-1]
    assert found["loss"] == pytest.approx(last["val/loss"], rel=1e-6)
    assert found["bits_per_byte"] == pytest.approx(last["val/bits_per_byte"], rel=1e-6)
    assert (found["documents"] < 10, found["loss_interval"], found["bits_per_byte_interval"]) == (True, None, None)
    assert picture.stat().st_size > 10_000


def test_any_text_and_any_task_can_be_measured(run_folder, text_file, tmp_path, capsys):
    (tmp_path / "one.txt").write_text("the model learns\n---\na text\n---\nthe loss")
    rows = [{"goal": "the", "sol1": "model", "sol2": "text", "label": 0}] * 3
    (tmp_path / "quiz.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "last_words.txt").write_text("the model reads\na text again\n")
    words = ["evaluate", str(run_folder), str(tmp_path / "one.txt"), str(text_file), "--separator=---", "--device", "cpu"]
    tasks = ["--task", str(tmp_path / "quiz.jsonl"), "--task", str(tmp_path / "last_words.txt")]
    assert main([*words, *tasks, "--out", str(tmp_path / "out.json")]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    one, corpus = (found["texts"][name] for name in (str(tmp_path / "one.txt"), str(text_file)))
    assert (one["documents"], corpus["documents"], found["texts"]["together"]["documents"]) == (3, 60, 63)
    assert one["loss_interval"] is None
    assert corpus["loss_interval"][0] < corpus["loss"] < corpus["loss_interval"][1]
    expected = (one["loss"] * one["tokens"] + corpus["loss"] * corpus["tokens"]) / (one["tokens"] + corpus["tokens"])
    assert found["texts"]["together"]["loss"] == pytest.approx(expected)
    assert found["tasks"]["quiz"]["questions"] == 3 and found["tasks"]["quiz"]["accuracy"] in (0.0, 1.0)
    assert set(found["tasks"]["last_words"]) == {"questions", "accuracy", "perplexity"}
    said = capsys.readouterr().out
    assert "Tasks under" in said and "accuracy norm" in said


def test_text_that_a_run_was_trained_on_is_said_to_be_that(run_folder, text_file, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def is_said(typed: Path) -> bool:
        assert main(["evaluate", str(run_folder), str(typed), "--device", "cpu", "--max-tokens", "100"]) == 0
        held_out = f"llama-lab evaluate {relative(run_folder)} measures what it held out"
        return f"{typed} holds text that this run was trained on; {held_out}" in capsys.readouterr().err

    copies, text = tmp_path / "copies", text_file.read_bytes()
    copies.mkdir()
    (copies / "copy.jsonl").write_bytes(text)
    (copies / "more.txt").write_text("a text of its own", encoding="utf-8")
    other = tmp_path / text_file.name
    other.write_bytes(text.replace(b"a", b"o"))
    assert all(map(is_said, (text_file, text_file.parent, copies, copies / "copy.jsonl")))
    assert not any(map(is_said, (other, copies / "more.txt", run_folder)))
    away = text_file.rename(text_file.with_name("away"))
    try:
        assert is_said(copies / "copy.jsonl")
    finally:
        away.rename(text_file)


def test_text_is_read_as_the_run_s_was(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lines = [f"line {number} of a text with many lines" for number in range(400)]
    (tmp_path / "win.txt").write_bytes("\r\n===\r\n".join(lines).encode())
    (tmp_path / "unix.txt").write_bytes("\n===\n".join(lines).encode())
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps({"line": f"{line}\r\n"}) + "\n" for line in lines[:-1]))
    words = ["experiment=smoke", "data=text", "data.path=win.txt", "data.unix_line_ends=true", "data.separator='==='"]
    words += ["data.text_field=line", "sample=null", "training_tokens=2048", "schedule.warmup_updates=0"]
    folder = train(compose(words)).folder
    paths = ["win.txt", "unix.txt", "lines.jsonl"]
    assert main(["evaluate", str(folder), *paths, "--max-tokens", "500", "--out", "out.json", "--device", "cpu"]) == 0
    found = json.loads((tmp_path / "out.json").read_text())["texts"]
    assert found["win.txt"] == found["unix.txt"] == found["lines.jsonl"]
    assert main(["evaluate", str(folder), "unix.txt", "--separator=no", "--out", "out.json", "--device", "cpu"]) == 0
    assert json.loads((tmp_path / "out.json").read_text())["texts"]["unix.txt"]["documents"] == 1


def test_sources_of_one_name_are_told_apart_by_what_was_typed(run_folder, text_file, tmp_path, capsys, monkeypatch):
    """Two runs, of which each has held-out text, and a file that is called as the total is."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").symlink_to(run_folder)
    (tmp_path / "together").mkdir()
    (tmp_path / "together" / "a.jsonl").write_bytes(text_file.read_bytes())
    paths = [str(run_folder), "other", "together", "other"]
    assert main(["evaluate", str(run_folder), *paths, "--out", "out.json", "--device", "cpu"]) == 0
    found = json.loads((tmp_path / "out.json").read_text())["texts"]
    names = [f"{run_folder}: its held-out text", "other: its held-out text", "together: together"]
    assert list(found) == [*names, "together"], "what is typed twice is measured once"
    assert found["together"]["documents"] == sum(found[name]["documents"] for name in names)
    said = capsys.readouterr().out
    assert all(f"  {name} " in said for name in names)


def test_mixtures_with_folders_of_one_name_are_told_apart(text_file, tmp_path, monkeypatch):
    """One mixture has its sources' names, also where one of them is called as the total is; two have what was typed before them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLAMA_LAB_OUTPUTS", str(tmp_path / "outputs"))
    lines = text_file.read_text(encoding="utf-8").splitlines(keepends=True)
    runs = []
    for number in range(2):
        folders = [tmp_path / f"{number}" / name for name in ("web", "together")]
        for place, folder in enumerate(folders):
            folder.parent.mkdir(exist_ok=True)
            text = folder.with_suffix(".jsonl")
            text.write_text("".join(lines[30 * number + 15 * place :][:15]), encoding="utf-8")
            assert (
                main(
                    ["prepare", "data=text", f"data.path={text}", "data.val_fraction=0.3", "tokenizer=bytes", "--out", str(folder)]
                )
                == 0
            )
        changes = ["data=mixture", f"data.paths=[{','.join(map(str, folders))}]", "data.weights=[1,1]", "training_tokens=512"]
        kept = [word for word in tiny_overrides(text_file) if not word.startswith(("data=", "data.path=", "training_tokens="))]
        runs.append(str(train(compose([*kept, *changes, "checkpoint.every_tokens=512"])).folder))
    for paths, names in (
        (runs[:1], ["web", f"{runs[0]}: together"]),
        (runs, [f"{run}: {name}" for run in runs for name in ("web", "together")]),
    ):
        assert main(["evaluate", runs[0], *paths, "--out", "out.json", "--device", "cpu"]) == 0
        assert list(json.loads((tmp_path / "out.json").read_text())["texts"]) == [*names, "together"]


def test_a_prepared_set_is_measured_with_its_tokenizer_alone(run_folder, text_file, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_bytes(text_file.read_bytes())
    prepare = ["prepare", "data=text", f"data.path={tmp_path / 'a.jsonl'}"]
    assert main([*prepare, "tokenizer=bytes", "--out", str(tmp_path / "same")]) == 0
    assert main([*prepare, "tokenizer.vocab_size=300", "--out", str(tmp_path / "other")]) == 0
    words = ["evaluate", str(run_folder), "--device", "cpu"]
    assert main([*words, str(tmp_path / "same"), "--split", "train", "--max-tokens", "500", "--out", str(tmp_path / "o.json")]) == 0
    assert json.loads((tmp_path / "o.json").read_text())["texts"][str(tmp_path / "same")]["tokens"] == 500
    assert main([*words, str(tmp_path / "other")]) == 2
    assert "was prepared with another tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["gone.txt"], "gone.txt does not exist"),
        (["--max-tokens", "0"], "--max-tokens 0 is below 1"),
        (["--plot", "x.bmp"], "has no ending of a picture; try x.png"),
        (["--out", "nowhere/x.json"], "lies in no folder"),
        (["--task", "gone.jsonl"], "gone.jsonl cannot be read"),
        (["--precision", "fp64"], "llama-lab evaluate: --precision 'fp64' is none of "),
    ],
)
def test_mistakes_in_a_request_for_figures_are_named(run_folder, capsys, words, said):
    assert main(["evaluate", str(run_folder), *words]) == 2
    assert said in capsys.readouterr().err


def test_a_line_without_text_is_named(run_folder, tmp_path, capsys):
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"body": "x"}\n')
    assert main(["evaluate", str(run_folder), str(tmp_path / "bad.jsonl"), "--device", "cpu"]) == 2
    assert "bad.jsonl:2" in (said := capsys.readouterr().err) and "has no `text`" in said


@pytest.mark.parametrize("documents", [1, 2, 9, 10])
def test_few_documents_have_no_interval(run_folder, tmp_path, capsys, documents):
    few = tmp_path / "few.jsonl"
    few.write_text("".join(json.dumps({"text": f"the model learns {number}"}) + "\n" for number in range(documents)))
    assert main(["evaluate", str(run_folder), str(few), "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    row = next(line for line in said.splitlines() if line.startswith(f"  {few}"))
    rule = f"No interval for fewer than 10 documents, which say too little about others: {few} has {documents}\n"
    assert (row.split().count("-"), row.count(" to "), rule in said) == ((3, 0, True) if documents < 10 else (0, 3, False))
    assert not math.isnan(float(said.split()[-1]))


def test_documents_of_which_one_is_nearly_all_the_text_have_no_interval(run_folder, tmp_path, capsys):
    texts, out = tmp_path / "uneven.jsonl", tmp_path / "found.json"
    sizes = [*range(1, 14), 800]
    texts.write_text("".join(json.dumps({"text": "the model " * size}) + "\n" for size in sizes))
    assert main(["evaluate", str(run_folder), str(texts), "--device", "cpu", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    row = next(line for line in said.splitlines() if line.startswith(f"  {texts}"))
    assert (row.split().count("-"), row.count(" to ")) == (3, 0)
    assert f"{texts} has 14, worth 1.2 of equal length (the longest is 90 % of the tokens)\n" in said
    (found,) = json.loads(out.read_text())["texts"].values()
    assert (found["documents"], found["loss_interval"], found["bits_per_byte_interval"]) == (14, None, None)


def test_a_field_that_is_not_there_is_said_as_the_flag_has_it(run_folder, tmp_path, capsys):
    (tmp_path / "bad.jsonl").write_text('{"id": "a", "body": "some text"}\n')
    assert main(["evaluate", str(run_folder), str(tmp_path / "bad.jsonl"), "--device", "cpu"]) == 2
    rule = "has no `text`; it has body, id. Name the one that holds the text, for example --text-field body"
    assert rule in capsys.readouterr().err
