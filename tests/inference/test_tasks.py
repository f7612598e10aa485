"""Task files: the field's shapes, what a model is shown for them, and what is said of a line that is none."""

import json
from pathlib import Path

import pytest

from llama_lab.config.errors import ConfigError
from llama_lab.inference.tasks import Question, load_task, load_tasks

HELLASWAG = {
    "activity_label": "Baking",
    "ctx_a": "A [title] loaf.",
    "ctx_b": "the BAKER",
    "endings": ["eats  it.", "[step] sells it."],
    "label": "1",
}
PIQA = {"goal": "Open a jar.", "sol1": "Turn the lid.", "sol2": "Shake it.", "label": 0}
ARC = {"id": "1", "question": "What is wet?", "choices": {"text": ["sand", "water"], "label": ["A", "B"]}, "answerKey": "B"}
ARC_AI2 = {
    "question": {"stem": "What is wet?", "choices": [{"text": "sand", "label": "1"}, {"text": "water", "label": "2"}]},
    "answerKey": "2",
}
LAMBADA = {"text": "He asked her for the salt , and she passed him the salt"}


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("row", "question"),
    [
        (HELLASWAG, Question("Baking: A. loaf. The baker", (" eats it.", "  sells it."), 1)),
        (PIQA, Question("Question: Open a jar.\nAnswer:", (" Turn the lid.", " Shake it."), 0)),
        (ARC, Question("Question: What is wet?\nAnswer:", (" sand", " water"), 1)),
        (ARC_AI2, Question("Question: What is wet?\nAnswer:", (" sand", " water"), 1)),
        (LAMBADA, Question("He asked her for the salt , and she passed him the", (" salt",), 0)),
    ],
    ids=["hellaswag", "piqa", "arc", "arc_ai2", "lambada"],
)
def test_each_shape_shows_what_the_field_shows(tmp_path, row, question):
    task = load_task(write(tmp_path / "questions.jsonl", row, row))
    assert task.questions == (question, question)
    assert (task.name, task.is_choice) == ("questions", row is not LAMBADA)


def test_labels_of_piqa_may_lie_beside_it_and_lambada_may_be_plain_text(tmp_path):
    bare = {key: value for key, value in PIQA.items() if key != "label"}
    path = write(tmp_path / "valid.jsonl", bare, bare, PIQA)
    (tmp_path / "valid-labels.lst").write_text("1\n0\n1\n")
    assert [question.gold for question in load_task(path).questions] == [1, 0, 0]
    (tmp_path / "lambada.txt").write_text("one two three\nfour five\n")
    assert [question.continuations for question in load_task(tmp_path / "lambada.txt").questions] == [(" three",), (" five",)]


@pytest.mark.parametrize(
    ("row", "changes", "rule"),
    [
        (HELLASWAG, {"label": 2}, "`label` 2, which is none of 0 to 1; HellaSwag has"),
        (HELLASWAG, {"label": ""}, "`label` '', which is none of"),
        (HELLASWAG, {"endings": None}, "lacks `endings`"),
        (HELLASWAG, {"endings": ["one"]}, "has no list of texts as `endings`"),
        (PIQA, {"sol1": None, "goal": None}, "lacks `goal`, `sol1`; PIQA has goal, sol1, sol2 and label"),
        (PIQA, {"sol2": 3}, "has no text as `sol2`"),
        (PIQA, {"label": None}, "lacks `label`"),
        (ARC, {"answerKey": "C"}, "`answerKey` 'C', which is none of its labels A, B"),
        (ARC, {"choices": None}, "lacks `choices`"),
        (ARC_AI2, {"question": {"stem": "?"}}, "lacks `question.choices`"),
        (LAMBADA, {"text": "word"}, "has fewer than two words"),
        (LAMBADA, {"text": None, "body": "a b"}, "lacks `text`"),
    ],
)
def test_a_line_that_lacks_something_is_named_with_its_number(tmp_path, row, changes, rule):
    wrong = {key: value for key, value in (row | changes).items() if value is not None}
    path = write(tmp_path / "task.jsonl", row, wrong, row)
    with pytest.raises(ConfigError) as caught:
        load_task(path)
    ((subject, said),) = caught.value.problems
    assert subject == f"{path}:3" and rule in said  # a blank line stands between two


def test_many_wrong_lines_are_counted_and_not_all_shown(tmp_path):
    path = write(tmp_path / "task.jsonl", PIQA, *[{"goal": "x"}] * 40)
    with pytest.raises(ConfigError) as caught:
        load_task(path)
    assert len(caught.value.problems) == 11 and caught.value.problems[-1][1] == "has 30 more lines like these"


def test_every_file_that_is_no_task_is_named(tmp_path):
    good = write(tmp_path / "good.jsonl", PIQA)
    other = write(tmp_path / "other.jsonl", {"prompt": "x", "answer": "y"})
    (tmp_path / "torn.jsonl").write_text('{"goal": ')
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "sub").mkdir()
    same = write(tmp_path / "sub" / "good.jsonl", PIQA)
    with pytest.raises(ConfigError) as caught:
        load_tasks([good, other, tmp_path / "torn.jsonl", tmp_path / "empty.jsonl", tmp_path / "gone.jsonl", same])
    rules = [rule for _, rule in caught.value.problems]
    for rule, part in zip(
        rules,
        ["has answer, prompt, which is no shape", "is no JSON", "is empty", "cannot be read", "another task, good"],
        strict=True,
    ):
        assert part in rule
