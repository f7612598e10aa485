"""How a text is continued: what may be asked for, and what is wrong with it. Torch-free, so that mistakes are answered at once."""

import math
from dataclasses import dataclass, fields
from enum import Enum
from numbers import Integral, Real
from typing import Any

from llama_lab.config.errors import ConfigError
from llama_lab.config.schema import Problem, shown

NEW_TOKENS = 100
"""Tokens that a text gets if nothing is said, as far as the context has room for them."""


class Beyond(Enum):
    """What happens to a text that would grow longer than the context that the model was trained with."""

    refuse = "refuse"
    window = "window"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is chosen from its probabilities. The steps follow each other in the order of the fields.

    Attributes:
        repetition_penalty: logits of tokens that the text holds already are divided by it where they are positive, else multiplied;
            above 0. 1 or None: they are left alone. Source: CTRL, arXiv:1909.05858, section 4.1.
        temperature: divides the logits; at least 0. 0 takes the most likely token, and what follows has no effect.
        top_k: only so many most likely tokens are drawn from; at least 1. None: all.
        top_p: only the most likely tokens that reach this probability together are; in (0, 1]. None: all. Source: nucleus sampling,
            arXiv:1904.09751.
        min_p: only tokens with at least this share of the most likely one's probability are; in [0, 1]. None: all. Source:
            arXiv:2407.01082.
    """

    repetition_penalty: float | None = None
    temperature: float = 0.8
    top_k: int | None = 50
    top_p: float | None = None
    min_p: float | None = None

    def problems(self) -> list[Problem]:
        """What is out of its range."""
        rules = [
            (
                "repetition_penalty",
                self.repetition_penalty is None or 0 < self.repetition_penalty < math.inf,
                "is not above 0; try 1.2",
            ),
            ("temperature", 0 <= self.temperature < math.inf, "is below 0; 0 takes the most likely token"),
            ("top_k", self.top_k is None or self.top_k >= 1, "is below 1; try 50"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "is outside (0, 1]; try 0.9"),
            ("min_p", self.min_p is None or 0 <= self.min_p <= 1, "is outside [0, 1]; try 0.05"),
        ]
        return [(f"{name}={shown(getattr(self, name))}", rule) for name, holds, rule in rules if not holds]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options(Sampling):
    """How texts are continued.

    Attributes:
        max_new_tokens: most tokens that a text gets; at least 1. None: 100, or as many as the context has room for.
        stop: texts that end a continuation where they would begin.
        seed: of the draws; the same seed gives the same text, whatever else is in the batch. At least 0.
        beyond_context: refuse, or read on in a window: whenever the context is full, its last half becomes the beginning.
    """

    max_new_tokens: int | None = None
    stop: tuple[str, ...] = ()
    seed: int = 0
    beyond_context: Beyond = Beyond.refuse

    def problems(self) -> list[Problem]:
        # Not super(): with slots the decorator makes another class, which the bare form does not know.
        found = Sampling.problems(self)
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            found.append((f"max_new_tokens={self.max_new_tokens}", "is below 1; try 100"))
        if any(not text for text in self.stop):
            found.append(("stop=''", "is empty, and would end every text before it begins; leave it out"))
        if not 0 <= self.seed < 2**63:
            found.append((f"seed={self.seed}", "is outside 0 to 2**63 - 1; try 0"))
        return found


NUMBERS = {
    "repetition_penalty": (Real, "is no number; try 1.2"),
    "temperature": (Real, "is no number; try 0.8"),
    "top_k": (Integral, "is no whole number; try 50"),
    "top_p": (Real, "is no number; try 0.9"),
    "min_p": (Real, "is no number; try 0.05"),
    "max_new_tokens": (Integral, "is no whole number; try 100"),
    "seed": (Integral, "is no whole number; try 0"),
}
"""Options that are numbers: of which kind, and what is said of anything else."""
NEEDED = ("temperature", "seed")
"""Those of them that are never None."""


def is_number(value: Any, kind: type) -> bool:
    """Whether a value, numpy's included, is a number of a kind. A truth value is none."""
    return isinstance(value, kind) and not isinstance(value, bool)


def read_options(**given: Any) -> Options:
    """Options by name, as a caller gives them; `stop` may be one text, `beyond_context` a word.

    Raises:
        ConfigError: everything that is no option, of another type, or out of its range.
    """
    known = {field.name: field.default for field in fields(Options)}
    found: list[Problem] = [
        (f"{name}={value!r}", f"is no option; there are {', '.join(known)}") for name, value in given.items() if name not in known
    ]
    stop, beyond = given.pop("stop", None), given.pop("beyond_context", Beyond.refuse)
    fitting: dict[str, Any] = {}
    for name, (kind, rule) in NUMBERS.items():
        value = given.get(name, known[name])
        if (value is None and name not in NEEDED) or is_number(value, kind):
            fitting[name] = value
        else:
            found.append((f"{name}={value!r}", rule))
    stops = [stop] if isinstance(stop, str) else stop or []
    if isinstance(stops, list | tuple) and all(isinstance(text, str) for text in stops):
        fitting["stop"] = tuple(stops)
    else:
        found.append((f"stop={stop!r}", "is neither a text nor a list of texts; try stop='.'"))
    if isinstance(beyond, Beyond) or (isinstance(beyond, str) and beyond in Beyond.__members__):
        fitting["beyond_context"] = beyond if isinstance(beyond, Beyond) else Beyond[beyond]
    else:
        found.append((f"beyond_context={beyond}", "is neither refuse nor window"))
    options = Options(**fitting)
    if found := found + options.problems():
        raise ConfigError(found, scope="this request")
    return options
