"""Text that OmegaConf is to give back as it is.

OmegaConf reads `${…}` in a text as another value's key, each time the text is read; `\\${…}` stands for the text `${…}`. What was
read once and becomes a tree again, in memory or as a file, is escaped on the way.
"""

import re
from dataclasses import fields, is_dataclass, replace
from typing import Any


def literal(value: Any) -> Any:
    """A value, a dataclass included, whose texts OmegaConf reads as what they are now.

    Of the backslashes before `${` OmegaConf takes every second one away; all others stay.
    """
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    if isinstance(value, list):
        return [literal(item) for item in value]
    if isinstance(value, dict):
        return {key: literal(item) for key, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: literal(getattr(value, field.name)) for field in fields(value)})
    return value


def unescaped(value: Any) -> Any:
    """What `literal` was given, where OmegaConf has not read it; text that was never escaped stays as it is."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\\\$\{", lambda found: found[1][: len(found[1]) // 2] + "${", value)
    if isinstance(value, list):
        return [unescaped(item) for item in value]
    return {key: unescaped(item) for key, item in value.items()} if isinstance(value, dict) else value
