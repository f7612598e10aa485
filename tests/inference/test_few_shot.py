"""Few-shot prompts: the sets that are shipped, what is drawn from them, and what is said of a file that is none."""

import json
import random
from pathlib import Path

import pytest

from llama_lab.config.errors import ConfigError
from llama_lab.inference.few_shot import MOST_EXAMPLES, load_prompt_set, prompt_set_problems, shipped


def test_the_shipped_sets_show_several_examples_and_never_ask_what_they_show() -> None:
    assert shipped() == ["arithmetic", "email_reply", "rewriting", "sentiment", "spelling", "summary"]
    for name in shipped():
        found = load_prompt_set(name)
        assert len(found.examples) >= MOST_EXAMPLES and len(found.queries) >= 4
        assert not {given for given, _ in found.examples} & set(found.queries)
        texts = [text for example in found.examples for text in example] + list(found.queries)
        assert all(text == text.strip() and text.isascii() for text in texts)


def test_arithmetic_is_right() -> None:
    assert [int(answer) for _, answer in load_prompt_set("arithmetic").examples] == [4, 12, 12, 12, 6, 13, 2, 11, 10]


def test_a_prompt_ends_where_the_answer_would_begin_and_shows_what_fits() -> None:
    spelling = load_prompt_set("spelling")
    whole = spelling.prompt(random.Random(0), lambda prompt: True)
    lines = whole.split("\n")
    assert lines[0] == spelling.instruction and lines[-1] == "Corrected:"
    assert whole.count("Corrected: ") == MOST_EXAMPLES and whole.count("Corrected:") == MOST_EXAMPLES + 1
    shorter = spelling.prompt(random.Random(0), lambda prompt: len(prompt) <= 250)
    assert len(shorter) <= 250 and 0 < shorter.count("Corrected: ") < MOST_EXAMPLES
    assert shorter.split("\n")[-2:] == lines[-2:]
    assert spelling.prompt(random.Random(0), lambda prompt: False).count("Corrected:") == 1


def test_prompts_vary_with_chance_alone() -> None:
    spelling = load_prompt_set("spelling")
    prompts = [spelling.prompt(random.Random(seed), lambda prompt: True) for seed in range(8)]
    assert prompts[0] == spelling.prompt(random.Random(0), lambda prompt: True)
    assert len(set(prompts)) == 8 and len({prompt.split("\n")[-2] for prompt in prompts}) > 2


def written(path: Path, **changes: object) -> str:
    content = {"instruction": "Say the opposite.", "input": "Word", "output": "Opposite", "queries": ["dry"]}
    content["examples"] = [{"input": "hot", "output": "cold"}]
    path.write_text(json.dumps({key: value for key, value in (content | changes).items() if value is not None}))
    return str(path)


def test_a_file_of_ones_own_will_do(tmp_path: Path) -> None:
    found = load_prompt_set(written(tmp_path / "opposites.json"))
    assert found.name == "opposites"
    assert found.prompt(random.Random(0), lambda prompt: True) == (
        "Say the opposite.\n\nWord: hot\nOpposite: cold\n\nWord: dry\nOpposite:"
    )


@pytest.mark.parametrize("examples", [None, []])
def test_a_task_may_be_told_without_examples(tmp_path: Path, examples: list[object] | None) -> None:
    found = load_prompt_set(written(tmp_path / "opposites.json", examples=examples))
    assert found.examples == ()
    assert found.prompt(random.Random(0), lambda prompt: True) == "Say the opposite.\n\nWord: dry\nOpposite:"


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"examples": {"hot": "cold"}}, "has `examples` that are no list; type .*, or leave them out to show none"),
        ({"examples": "hot, cold"}, "has `examples` that are no list"),
        ({"examples": None, "example": []}, "has no `examples` but `example`; rename it"),
        ({"instruction": None}, "lacks a text as `instruction`"),
        ({"output": 3}, "lacks a text as `output`"),
        ({"queries": []}, "has no `queries`"),
        ({"queries": [1]}, "has a query that is no text"),
        ({"examples": [{"input": "hot", "output": "cold"}, {"input": "up"}]}, "no texts as `input` and `output` of example 2"),
    ],
)
def test_what_a_file_lacks_is_named(tmp_path: Path, changes: dict[str, object], rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        load_prompt_set(written(tmp_path / "set.json", **changes))


def test_every_set_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{\n,")
    (subject, rule), (_, other), (_, third) = prompt_set_problems(["speling", str(tmp_path / "broken.json"), "gone.json"])
    assert subject == "speling" and "there are arithmetic, email_reply" in rule
    assert "is no JSON" in other and "line 2" in other
    assert "cannot be read" in third
