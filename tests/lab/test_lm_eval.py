"""lm-evaluation-harness on an export, offline, with tasks of our own: what it finds is what we find."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from llama_lab import load
from llama_lab.inference.score import log_likelihoods, score_task
from llama_lab.inference.tasks import load_task
from llama_lab.lab.transfer.export import export

lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed")

CHOICE = """\
output_type: multiple_choice
doc_to_text: "Question: {{goal}}\\nAnswer:"
doc_to_choice: "{{[sol1, sol2]}}"
doc_to_target: label
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
LAST_WORD = """\
output_type: loglikelihood
doc_to_text: "{{text.split(' ')[:-1]|join(' ')}}"
doc_to_target: "{{' '+text.split(' ')[-1]}}"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
SOURCE = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{file}"}}}}
test_split: test
"""
QUESTIONS = 40


def write_tasks(folder: Path, words: list[str]) -> dict[str, Path]:
    """A file of questions for each task, and what lm_eval has to know of it."""
    draw = random.Random(0)

    def some() -> str:
        return " ".join(draw.choices(words, k=draw.randint(1, 4)))

    choices = [{"goal": some(), "sol1": some(), "sol2": some() + ".", "label": draw.randrange(2)} for _ in range(QUESTIONS)]
    rows: dict[str, tuple[list[dict[str, Any]], str]] = {
        "our_choices": (choices, CHOICE),
        "our_last_words": ([{"text": f"{some()} {draw.choice(words)}"} for _ in range(QUESTIONS)], LAST_WORD),
    }
    found = {}
    for name, (lines, asks) in rows.items():
        found[name] = folder / f"{name}.jsonl"
        found[name].write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        (folder / f"{name}.yaml").write_text(SOURCE.format(name=name, file=found[name]) + asks, encoding="utf-8")
    return found


@pytest.mark.filterwarnings("ignore")  # of its own and of its dependencies
def test_lm_eval_finds_what_we_find(shaped_runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from lm_eval.tasks import TaskManager

    for name, value in {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}.items():
        monkeypatch.setenv(name, value)
    files = write_tasks(tmp_path, ["the", "a", "model", "learns", "reads", "text"])
    export(shaped_runs["mha"], tmp_path / "out", target="hf")
    theirs = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(tmp_path / "out"), "dtype": "float32"},
        tasks=list(files),
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        device="cpu",
        batch_size=1,
        bootstrap_iters=0,
    )
    ours = load(shaped_runs["mha"])
    for name, file in files.items():
        task, result = load_task(file), theirs["results"][name]
        score = score_task(ours.model, ours.tokenizer, task).values()
        assert result["acc,none"] == pytest.approx(score["accuracy"], abs=1e-12)
        if task.is_choice:
            assert result["acc_norm,none"] == pytest.approx(score["accuracy_norm"], abs=1e-12)
        else:
            assert result["perplexity,none"] == pytest.approx(score["perplexity"], rel=1e-4)
        samples = sorted(theirs["samples"][name], key=lambda sample: sample["doc_id"])
        found = log_likelihoods(ours.model, ours.tokenizer, task.questions)
        assert found is not None
        for sample, answers in zip(samples, found, strict=True):
            expected = [float(answer[0]) for answer in sample["filtered_resps"]]
            assert [answer.log_likelihood for answer in answers] == pytest.approx(expected, rel=1e-5)
