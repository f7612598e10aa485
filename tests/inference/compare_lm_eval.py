"""Task scores against lm-evaluation-harness on an export, offline: the same accuracies, and log-likelihoods to a relative 1e-5.

    pip install lm_eval && python tests/inference/compare_lm_eval.py outputs/<name>/<run id>

Files in the shapes of HellaSwag, PIQA, ARC and LAMBADA are written, with titles in brackets, spaces at ends, contexts that are too
long, and letters beyond ASCII. The harness reads them with its own definitions of the four tasks. Exit code 1: something differs.
"""

import argparse
import json
import os
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

# Nothing is downloaded: data and model are local.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import lm_eval
from lm_eval.tasks import TaskManager

from llama_lab import load
from llama_lab.cli import main as llama_lab
from llama_lab.inference.score import log_likelihoods, score_task
from llama_lab.inference.tasks import load_task

QUESTIONS = 40
TOLERANCE = 1e-5
WORDS = ["return", "the", "value", "of a", "list", "if", "is not", "None", "naïve", "über", "🙂", "[title]", "[substeps]", ",", "."]
DEFINITIONS = {
    "hellaswag": "hellaswag/hellaswag.yaml",
    "piqa": "piqa/piqa.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "lambada_openai": "lambada/lambada_openai.yaml",
}
"""The harness's tasks, and where it defines them."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    asked = parser.parse_args()
    run = load(asked.run)
    holds = True
    with tempfile.TemporaryDirectory() as folder:
        files = write_tasks(Path(folder), longest=3 * run.model.max_seq_len)
        exported = Path(folder) / "export"
        assert llama_lab(["export", str(asked.run), "--to", "hf", "--out", str(exported)]) == 0
        theirs = ask_harness(exported, files)
        for name, path in files.items():
            task = load_task(path)
            scored, found = score_task(run.model, run.tokenizer, task), log_likelihoods(run.model, run.tokenizer, task.questions)
            assert found is not None
            samples = sorted(theirs["samples"][name], key=lambda sample: sample["doc_id"])
            worst = max(
                abs(answer.log_likelihood - float(response[0])) / abs(float(response[0]))
                for answers, sample in zip(found, samples, strict=True)
                for answer, response in zip(answers, sample["filtered_resps"], strict=True)
            )
            own = {key.replace("accuracy", "acc"): value for key, value in scored.values().items()}
            other = {key: theirs["results"][name][f"{key},none"] for key in own}
            same = all(abs(own[key] - other[key]) <= TOLERANCE * abs(other[key]) for key in own)
            holds &= same and worst <= TOLERANCE
            print(f"{name}: ours {own}, theirs {other}; log-likelihoods differ by {worst:.1e} at most")
    return 0 if holds else 1


def write_tasks(folder: Path, longest: int) -> dict[str, Path]:
    """A file of questions for each of the harness's tasks."""
    draw = random.Random(0)

    def text(least: int = 1, most: int = 20) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(least, most)))

    def row(task: str, number: int) -> dict[str, Any]:
        context = text(3, longest if number % 10 == 9 else 30) + ("  " if number % 7 == 3 else "")
        match task:
            case "hellaswag":
                parts = {"activity_label": text(1, 3), "ctx_a": context, "ctx_b": text(1, 4)}
                return parts | {"endings": [text() for _ in range(4)], "label": str(draw.randrange(4))}
            case "piqa":
                return {"goal": context, "sol1": text(), "sol2": text(), "label": draw.randrange(2)}
            case "arc_easy":
                labels = ["A", "B", "C", "D"] if number % 2 else ["1", "2", "3"]
                choices = {"text": [text(1, 5) for _ in labels], "label": labels}
                return {"question": context, "choices": choices, "answerKey": draw.choice(labels)}
            case _:
                return {"text": f"{context.strip()} {draw.choice(['value', 'list', 'über', '🙂'])}"}

    files = {}
    for task in DEFINITIONS:
        files[task] = folder / f"{task}.jsonl"
        rows = [row(task, number) for number in range(QUESTIONS)]
        files[task].write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    return files


def ask_harness(exported: Path, files: dict[str, Path]) -> dict[str, Any]:
    """What the harness makes of its own tasks on our files."""
    tasks = []
    for name, path in files.items():
        # It opens every split that a task names.
        data = {"test": str(path)} if name == "lambada_openai" else dict.fromkeys(("train", "validation", "test"), str(path))
        tasks.append(str(path.with_suffix(".yaml")))
        theirs = Path(lm_eval.__file__).parent / "tasks" / DEFINITIONS[name]
        local = {"include": str(theirs), "dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": data}}
        # JSON is YAML.
        Path(tasks[-1]).write_text(json.dumps({"task": name} | local), encoding="utf-8")
    arguments = {"pretrained": str(exported), "dtype": "float32"}
    found = lm_eval.simple_evaluate(
        model="hf", model_args=arguments, tasks=tasks, task_manager=TaskManager(), device="cpu", batch_size=4, log_samples=True
    )
    assert found is not None
    return found


if __name__ == "__main__":
    sys.exit(main())
