"""Few-shot prompts from data files: a task shown by examples, to see whether a model picks it up. Torch-free.

A set is a JSON file: an `instruction`, names of its two columns (`input`, `output`), `examples` of both, and `queries` without an
output. Without examples the instruction alone says what is asked (zero-shot). Which of the examples are shown, in which order, and
which query is asked is drawn anew for every prompt.
"""

import difflib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_lab.config.errors import ConfigError
from llama_lab.config.schema import Problem

FOLDER = Path(__file__).parent / "prompt_sets"
MOST_EXAMPLES = 5


@dataclass(frozen=True, slots=True)
class PromptSet:
    """A task in examples.

    Attributes:
        name: of its file, without the ending.
        examples: (input, output) of each; none of a task that is only told.
    """

    name: str
    instruction: str
    input: str
    output: str
    examples: tuple[tuple[str, str], ...]
    queries: tuple[str, ...]

    def prompt(self, draw: random.Random, fits: Callable[[str], bool]) -> str:
        """An instruction, examples, and a query without its output.

        Args:
            draw: chooses examples and query.
            fits: whether a prompt is short enough. As many examples are shown as fit, up to five; none if not even one does.
        """
        query = draw.choice(self.queries)
        shown = draw.sample(self.examples, min(MOST_EXAMPLES, len(self.examples)))
        while shown and not fits(self._written(shown, query)):
            shown.pop()
        return self._written(shown, query)

    def _written(self, examples: Sequence[tuple[str, str]], query: str) -> str:
        parts = [f"{self.input}: {given}\n{self.output}: {answer}" for given, answer in examples]
        return "\n\n".join([self.instruction, *parts, f"{self.input}: {query}\n{self.output}:"])


def shipped() -> list[str]:
    """Names of the sets that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def load_prompt_set(named: str) -> PromptSet:
    """A set by the name of one that is shipped, or by its file.

    Raises:
        ConfigError: there is none, or it is not as it must be.
    """
    path = FOLDER / f"{named}.json" if named in shipped() else Path(named).expanduser()
    if (problem := _problem(path)) is not None:
        if not path.is_file() and path.suffix != ".json":
            problem = f"is no prompt set; there are {', '.join(shipped())}, or name a .json file of your own"
        raise ConfigError([(named, problem)], scope="the prompt sets")
    read = json.loads(path.read_text(encoding="utf-8"))
    examples = tuple((example["input"], example["output"]) for example in read.get("examples", []))
    return PromptSet(path.stem, read["instruction"], read["input"], read["output"], examples, tuple(read["queries"]))


def prompt_set_problems(names: Sequence[str]) -> list[Problem]:
    """What is wrong with each of some sets."""
    found: list[Problem] = []
    for name in names:
        try:
            load_prompt_set(name)
        except ConfigError as error:
            found += error.problems
    return found


def _problem(path: Path) -> str | None:
    """Why a file is no prompt set."""
    try:
        read: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    except UnicodeDecodeError:
        return "is not UTF-8"
    except json.JSONDecodeError as error:
        return f"is no JSON: {error.msg} in line {error.lineno}"
    if not isinstance(read, dict):
        return "is no JSON object with instruction, input, output, examples and queries"
    for name in ("instruction", "input", "output"):
        if not isinstance(read.get(name), str) or not read[name]:
            return f"lacks a text as `{name}`"
    if not isinstance(read.get("examples", []), list):
        return 'has `examples` that are no list; type [{"input": …, "output": …}, …], or leave them out to show none'
    if "examples" not in read and (close := difflib.get_close_matches("examples", read, n=1)):
        return f"has no `examples` but `{close[0]}`; rename it"
    for number, example in enumerate(_listed(read, "examples"), 1):
        if not isinstance(example, dict) or not all(isinstance(example.get(name), str) for name in ("input", "output")):
            return f"has no texts as `input` and `output` of example {number}"
    if not all(isinstance(query, str) for query in _listed(read, "queries")):
        return "has a query that is no text"
    return None if _listed(read, "queries") else "has no `queries`, so there is nothing to ask"


def _listed(read: dict[str, Any], name: str) -> list[Any]:
    found = read.get(name)
    return found if isinstance(found, list) else []
