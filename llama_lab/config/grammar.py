"""Values as they are typed, where Hydra's grammar reads them otherwise than they were meant, or not at all.

A path with an umlaut, a quote or a parenthesis in it is taken as the text that it is. Of the rest is said how to type it.
"""

import re
import shlex
import typing
from enum import Enum
from typing import Any

from hydra.core.override_parser.types import Quote, QuotedString

SWEEP = re.compile(r"(choice|range|interval|glob)\s*\(")
FUNCTION = re.compile(r"(choice|range|interval|glob|sort|shuffle|tag|extend_list|int|float|str|bool|json_str)\s*\(")
CURLY = "“”„‟«»‘’‚‹›"
"""Quotes that word processors and some keyboards make of straight ones."""
QUOTES = ("'", '"')
_PART = r"""\s*(?:"(?:\\.|[^"\\])*"\s*|'(?:\\.|[^'\\])*'\s*|[^\s,\[\]'"][^,\[\]]*)"""
PART = re.compile(_PART)
LIST = re.compile(rf"\[({_PART}(?:,{_PART})*)\]")
"""A list of texts, some of them in quotes; a quote inside a text that begins with none belongs to it."""
THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2}([,.'’ \u00a0\u202f])\d{3}(?:\1\d{3})*")
DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+(?:[eE][+-]?\d+)?")
NUMBERS = {int: ("a whole number", "64"), float: ("a number", "1e-3")}


def quoted(text: str) -> str:
    """A text in quotes, as Hydra's grammar reads any text at all."""
    return QuotedString(text, Quote.double).with_quotes()


def word(key: str, text: str) -> str:
    """An override that gives a key this text, as a shell takes it."""
    is_plain = as_text(f"{key}={text}") is not None and text[:1] not in tuple("[{'\" \t") and text.lower() != "null"
    return shlex.quote(f"{key}={text if is_plain else quoted(text)}")


def as_text(line: str) -> str | None:
    """An override whose value is put in quotes, where it can be meant as nothing but a text as it stands.

    Returns:
        Nothing where it may be several values, a function of Hydra's, or quotes that went wrong.
    """
    key, equals, value = line.partition("=")
    value = value.strip(" \t")
    is_open = value[:1] in ("'", '"') and value.count(value[0]) % 2 == 1
    if not equals or "," in value or is_open or FUNCTION.match(value) or _has_curly_quotes(value):
        return None
    return f"{key}={quoted(value)}"


def as_texts(line: str) -> str | None:
    """An override whose value is a list of texts, each put in quotes that has none.

    Returns:
        Nothing where it is no such list, or where quotes or brackets went wrong.
    """
    key, equals, value = line.partition("=")
    inside = LIST.fullmatch(value.strip(" \t"))
    if not equals or inside is None:
        return None
    texts = [part.strip() for part in PART.findall(inside[1])]
    if any(not text or _has_curly_quotes(text) for text in texts):
        return None
    return f"{key}=[{','.join(text if text[0] in QUOTES else quoted(text) for text in texts)}]"


def one_number(text: str, kind: Any) -> str | None:
    """What was meant by a number with a comma in it, or with thousands set apart; nothing where it is no such number."""
    if kind is float and DECIMAL_COMMA.fullmatch(text):
        return text.replace(",", ".")
    return re.sub(r"[^\d+-]", "", text) if kind in NUMBERS and THOUSANDS.fullmatch(text) else None


def unreadable(line: str, kind: Any) -> str:
    """What to say of an override that Hydra's grammar refuses.

    Args:
        kind: type of the field's value; None where there is no such field, or it is a node.
    """
    key, _, value = line.partition("=")
    value = value.strip()
    if not key.strip():
        return "has no key before the =; type key=value"
    if _has_curly_quotes(value):
        return _curly(key, value, kind)
    if FUNCTION.match(value) and (lacking := value.count("(") - value.count(")")) > 0:
        closed = shlex.quote(f"{key}={value}{')' * lacking}")
        text = f", or {word(key, value)} for a text" if kind is str else ""
        return f"lacks a closing parenthesis; type {'-m ' if SWEEP.match(value) else ''}{closed}{text}"
    if kind in NUMBERS:
        if (number := one_number(value, kind)) is not None:
            return f"is not written as a number; type {key}={number}"
        return f"is not {NUMBERS[kind][0]}; e.g. {key}={NUMBERS[kind][1]}"
    if kind is bool:
        return f"is not true or false; e.g. {key}=true"
    if isinstance(kind, type) and issubclass(kind, Enum):
        return f"is none of {', '.join(member.name for member in kind)}"
    if typing.get_origin(kind) is list and typing.get_args(kind) != (str,):
        return f"cannot be read; a list of numbers is typed {key}=[0.7,0.3]"
    return _in_quotes(key, value, kind)


def _in_quotes(key: str, value: str, kind: Any) -> str:
    """How to type a text, or a list of texts, that is read only in quotes."""
    parts = ",".join(quoted(part.strip(f" \"'{CURLY}")) for part in value.strip("[]").split(","))
    if typing.get_origin(kind) is list:
        return f"cannot be read; each text of the list goes in quotes: {shlex.quote(f'{key}=[{parts}]')}"
    if kind is not str:
        bare = value.strip("\"'")
        works = shlex.quote(f"{key}={quoted(bare)}")
        return f"cannot be read; a value with spaces or any of , : = ( ) [ ] {{ }} in it goes in quotes: {works}"
    whole = shlex.quote(f"{key}={quoted(value)}")
    if "," in value and not FUNCTION.match(value):
        each = shlex.quote(f"{key}={parts}")
        return f"cannot be read; a text with a comma in it goes in quotes: {whole}, and of several each: -m {each}"
    if value[:1] in ("'", '"'):
        return f"begins with a quote that is not closed; type {word(key, value.strip(value[0]))}, or {whole} where it belongs to it"
    return f"cannot be read; in quotes it is taken as it is: {whole}"


def several(key: str, value: str, kind: Any) -> str:
    """What to say of several values where one is expected: how to type what was probably meant."""
    rule = "stands for several runs; start them with -m, or "
    if FUNCTION.match(value):
        return f"{rule}give one value"
    if (number := one_number(value, kind)) is not None:
        return f"{rule}type {key}={number} for one number"
    if kind is str:
        return f"{rule}type {shlex.quote(f'{key}={quoted(value)}')} for one text"
    if typing.get_origin(kind) is list:
        return f"{rule}type {shlex.quote(f'{key}=[{value}]')} for one list, or give one value"
    return f"{rule}give one value"


def _has_curly_quotes(value: str) -> bool:
    """Whether typographic quotes stand around a value, or only at its beginning, where a shell has cut it at a space."""
    return value[:1] in tuple(CURLY) and (value[-1] in CURLY or not set(CURLY) & set(value[1:]))


def _curly(key: str, value: str, kind: Any) -> str:
    if value[-1] not in CURLY or len(value) < 3:
        return f"begins with a typographic quote, which holds no words together; straight ones do: '{key}=two words'"
    plain = value.strip(CURLY)
    meant = f"stands in typographic quotes, which are part of the value; type {word(key, plain)}"
    return f"{meant}, or {shlex.quote(f'{key}={quoted(value)}')} where they belong to it" if kind is str else meant
