"""What the nodes of a config are made of: problems, what a field says of itself, values as they are typed."""

import math
from dataclasses import field
from enum import Enum
from typing import Any

Problem = tuple[str, str]
"""The key path as typed on the command line, with its value (`schedule.min_lr=1.0`), and the rule with a value that works."""


BEFORE = "before"
"""Metadata key of a field that came after runs were made: the value that means what the code did without it. At that value the
field stays out of a run's identity, and a saved config without it is read as that value."""


EXAMPLE = "example"
"""Metadata key of a field that no option has a value for: one that a user may type."""


WORDS = "words"
"""Metadata key of a field whose value is a whole number, null, or one of a few words."""


AUTO = "auto"
"""The word that leaves a number to the machine."""


def later(value: Any) -> Any:
    """A field that came after runs were made. Options written before it, which do not name it, keep meaning what they meant."""
    default: Any = {"default_factory": value.copy} if isinstance(value, list) else {"default": value}
    return field(**default, metadata={BEFORE: value})


def shown(value: Any) -> str:
    """A value as it is typed on the command line."""
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, list):
        return f"[{','.join(map(shown, value))}]"
    return {None: "null", True: "true", False: "false"}.get(value, str(value)) if isinstance(value, bool | None) else str(value)


def nearest_multiples(value: int, step: int) -> str:
    """The multiples of `step` on either side of `value`, in words; never 0."""
    below = value // step * step
    return f"nearest: {below} or {below + step}" if below else f"nearest: {step}"


def broken(at: str, node: Any, *rules: tuple[str, bool, str]) -> list[Problem]:
    """A problem for each (field, whether it holds, what is wrong otherwise)."""
    return [(f"{at}.{name}={shown(getattr(node, name))}", wrong) for name, holds, wrong in rules if not holds]


def positive(value: float) -> bool:
    return 0 < value < math.inf
