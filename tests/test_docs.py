"""The documentation's code runs, and its tables name what exists."""

import re
import shlex
from pathlib import Path

import pytest

from llama_lab.cli import main
from llama_lab.training.metrics import read_rows

ROOT = Path(__file__).parent.parent
LOOP = (ROOT / "docs" / "training-loop.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def snippets(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def test_the_training_loop_page_runs_from_top_to_bottom(capsys: pytest.CaptureFixture[str]) -> None:
    code = snippets(LOOP)
    assert len(code) >= 10
    names: dict[str, object] = {}
    for snippet in code:
        exec(compile(snippet, "docs/training-loop.md", "exec"), names)
    assert "beside ln(257) = 5.549" in capsys.readouterr().out


def test_the_readme_s_python_runs_and_its_metrics_page_names_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = snippets(README)
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    folder = names["result"].folder  # pyright: ignore[reportAttributeAccessIssue]
    keys = {key for row in read_rows(folder / "metrics.jsonl") for key in row} - {"update", "tokens", "seconds"}
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert keys == set(re.findall(r"^\| `([a-z]+/[a-z_]+)`", page, flags=re.MULTILINE))


def test_the_readme_s_mistakes_are_answered_as_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    samples = re.findall(r"^    \$ llama-lab (.*)\n((?:    .*\n)+)", README, flags=re.MULTILINE)
    assert len(samples) == 1
    for words, said in samples:
        assert main(shlex.split(words)) == 2
        assert capsys.readouterr().err == "".join(f"{line[4:]}\n" for line in said.splitlines())


def test_the_readme_is_short_enough_to_be_read_and_its_pictures_exist() -> None:
    assert len(README.splitlines()) <= 150
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / link).exists(), link
    for name in re.findall(r"^    ((?:conf|experiments|llama_lab|docs)/\S*) ", README, flags=re.MULTILINE):
        assert (ROOT / name).exists(), name
