"""Questions with known answers, from local files in the shapes that the field uses. Torch-free.

A file has a JSON object a line, of one of four shapes, which its first line tells:

    HellaSwag   {"activity_label": …, "ctx_a": …, "ctx_b": …, "endings": [four texts], "label": 0 to 3}
    PIQA        {"goal": …, "sol1": …, "sol2": …, "label": 0 or 1}; or the labels, a line each, in NAME-labels.lst beside NAME.jsonl
    ARC         {"question": …, "choices": {"text": […], "label": ["A", …]}, "answerKey": "A"}, or as AI2 publishes it, with
                {"question": {"stem": …, "choices": [{"text": …, "label": "A"}, …]}, "answerKey": "A"}
    LAMBADA     {"text": …}, whose last word is to be found; or a .txt file with a text a line

What a model is shown for them is what lm-evaluation-harness shows (its tasks hellaswag, piqa, arc_easy and lambada_openai), so that
numbers can be compared.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_lab.config.errors import ConfigError
from llama_lab.config.schema import Problem

SHOWN_PROBLEMS = 10
SCOPE = "the tasks"


@dataclass(frozen=True, slots=True)
class Question:
    """What a model is shown, and how it may go on.

    Attributes:
        context: may be empty.
        continuations: each as it follows the context, the space between them included.
        gold: place of the right one.
    """

    context: str
    continuations: tuple[str, ...]
    gold: int


@dataclass(frozen=True, slots=True)
class Task:
    """Questions of one shape.

    Attributes:
        name: of the file, without its ending.
        is_choice: whether the right continuation is to be chosen among several; else it is to be found.
    """

    name: str
    is_choice: bool
    questions: tuple[Question, ...]


class _Wrong(ValueError):
    """A line that is no question; the text says why."""


def load_task(path: Path) -> Task:
    """Read a task.

    Raises:
        ConfigError: the file cannot be read or is empty, or naming file, line and fields, lines are not as their shape has them.
    """
    lines = _read_lines(path)
    shape, labels = _shape_of(path, lines), _labels(path)
    questions, found = [], []
    for number, (line, row) in enumerate(lines):
        try:
            if labels is not None and isinstance(row, dict) and "label" not in row:
                if number >= len(labels):
                    raise _Wrong(f"has no label: {labels_file(path).name} ends before it")
                row = row | {"label": labels[number]}
            questions.append(READERS[shape](row))
        except _Wrong as error:
            found.append((f"{path}:{line}", f"{error}; {EXPECTED[shape]}"))
    if found:
        left = len(found) - SHOWN_PROBLEMS
        more = [(str(path), f"has {left} more lines like these")] if left > 0 else []
        raise ConfigError([*found[:SHOWN_PROBLEMS], *more], scope=SCOPE)
    return Task(path.stem, shape != "LAMBADA", tuple(questions))


def load_tasks(paths: Sequence[str | Path]) -> list[Task]:
    """Read several tasks, whose files must have different names. Raises like `load_task`, with what is wrong in any of them."""
    tasks: list[Task] = []
    problems: list[Problem] = []
    for path in paths:
        try:
            task = load_task(Path(path).expanduser())
        except ConfigError as error:
            problems += error.problems
            continue
        if task.name in {known.name for known in tasks}:
            problems.append((str(path), f"has the name of another task, {task.name}; rename one of the files"))
        tasks.append(task)
    if problems:
        raise ConfigError(problems, scope=SCOPE)
    return tasks


def labels_file(path: Path) -> Path:
    """Where the labels of a file lie that holds none."""
    return path.with_name(f"{path.stem}-labels.lst")


def _read_lines(path: Path) -> list[tuple[int, Any]]:
    """(number, object) of each line that is not blank; of a .txt file the line itself as `text`."""
    try:
        content = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError([(str(path), f"cannot be read: {error.strerror or error}")], scope=SCOPE) from None
    except UnicodeDecodeError:
        raise ConfigError([(str(path), "is not UTF-8; a task is a .jsonl file, or a .txt file of texts")], scope=SCOPE) from None
    found: list[tuple[int, Any]] = []
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            found.append((number, {"text": line} if path.suffix == ".txt" else json.loads(line)))
        except json.JSONDecodeError as error:
            rule = f"is no JSON ({error.msg} in column {error.colno}); a task has one object a line"
            raise ConfigError([(f"{path}:{number}", rule)], scope=SCOPE) from None
    if not found:
        raise ConfigError([(str(path), "is empty; a task has at least one line")], scope=SCOPE)
    return found


def _labels(path: Path) -> list[str] | None:
    beside = labels_file(path)
    return beside.read_text(encoding="utf-8").split() if beside.is_file() else None


def _shape_of(path: Path, lines: list[tuple[int, Any]]) -> str:
    line, row = lines[0]
    keys = set(row) if isinstance(row, dict) else set()
    for shape, marks in MARKS.items():
        if keys & marks:
            return shape
    has = f"has {', '.join(sorted(keys)[:8])}" if keys else "is no object"
    shapes = "; ".join(EXPECTED.values())
    raise ConfigError([(f"{path}:{line}", f"{has}, which is no shape that is known: {shapes}")], scope=SCOPE)


def _text(row: Any, *names: str) -> list[str]:
    """Fields that must be texts."""
    if not isinstance(row, dict):
        raise _Wrong("is no object")
    missing = [name for name in names if name not in row]
    if missing:
        raise _Wrong(f"lacks {', '.join(f'`{name}`' for name in missing)}")
    wrong = [name for name in names if not isinstance(row[name], str)]
    if wrong:
        raise _Wrong(f"has no text as {', '.join(f'`{name}`' for name in wrong)}")
    return [row[name] for name in names]


def _label(row: dict[str, Any], count: int) -> int:
    """The place of the right answer."""
    if "label" not in row:
        raise _Wrong("lacks `label`")
    text = str(row["label"]).strip()
    if not text.isdecimal() or int(text) >= count:
        raise _Wrong(f"has `label` {row['label']!r}, which is none of 0 to {count - 1}")
    return int(text)


def _texts(value: Any, name: str) -> list[str]:
    if not isinstance(value, list) or len(value) < 2 or not all(isinstance(text, str) for text in value):
        raise _Wrong(f"has no list of texts as `{name}`")
    return value


def _hellaswag(row: Any) -> Question:
    (label,) = _text(row, "activity_label")
    if "ctx_a" in row:
        first, second = _text(row, "ctx_a", "ctx_b")
        context = f"{first} {second.capitalize()}"
    else:
        (context,) = _text(row, "ctx")
    if "endings" not in row:
        raise _Wrong("lacks `endings`")
    endings = [_without_marks(ending) for ending in _texts(row["endings"], "endings")]
    return _choice(_without_marks(f"{label}: {context}"), endings, _label(row, len(endings)))


def _without_marks(text: str) -> str:
    """WikiHow's marks in brackets taken out: a title ends a sentence, others go."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _piqa(row: Any) -> Question:
    goal, first, second = _text(row, "goal", "sol1", "sol2")
    return _choice(f"Question: {goal}\nAnswer:", [first, second], _label(row, 2))


def _arc(row: Any) -> Question:
    if not isinstance(row, dict) or "question" not in row:
        raise _Wrong("lacks `question`")
    (key,) = _text(row, "answerKey")
    question = row["question"]
    if isinstance(question, dict):
        (stem,) = _text(question, "stem")
        listed = question.get("choices")
        if not isinstance(listed, list):
            raise _Wrong("lacks `question.choices`")
        pairs = [_text(choice, "text", "label") for choice in listed]
        texts, labels = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    else:
        (stem,) = _text(row, "question")
        if not isinstance(row.get("choices"), dict):
            raise _Wrong("lacks `choices`")
        texts, labels = (_texts(row["choices"].get(name), f"choices.{name}") for name in ("text", "label"))
    if len(texts) != len(labels) or key not in labels:
        raise _Wrong(f"has `answerKey` {key!r}, which is none of its labels {', '.join(labels)}")
    return _choice(f"Question: {stem}\nAnswer:", texts, labels.index(key))


def _lambada(row: Any) -> Question:
    (text,) = _text(row, "text")
    before, _, word = text.rpartition(" ")
    if not before or not word:
        raise _Wrong("has fewer than two words as `text`, or ends in a space")
    return Question(before, (f" {word}",), 0)


def _choice(context: str, choices: Sequence[str], gold: int) -> Question:
    return Question(context, tuple(f" {choice}" for choice in choices), gold)


READERS: dict[str, Callable[[Any], Question]] = {"HellaSwag": _hellaswag, "PIQA": _piqa, "ARC": _arc, "LAMBADA": _lambada}
MARKS = {
    "HellaSwag": {"endings", "ctx", "ctx_a"},
    "PIQA": {"goal", "sol1", "sol2"},
    "ARC": {"question", "answerKey"},
    "LAMBADA": {"text"},
}
"""Fields of which one tells the shape."""
EXPECTED = {
    "HellaSwag": "HellaSwag has activity_label, ctx_a, ctx_b, endings and label",
    "PIQA": "PIQA has goal, sol1, sol2 and label",
    "ARC": "ARC has question, choices and answerKey",
    "LAMBADA": "LAMBADA has text",
}
