"""Flags of the commands that take no overrides."""

import argparse
import difflib
import re
import shlex
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

WRONG_TYPE = re.compile(r"argument (\S+): invalid (int|float) value: '(.*)'", re.DOTALL)
NO_VALUE = re.compile(r"argument (\S+): expected (?:one|at least one) argument")
CHOICE = re.compile(r"invalid choice: (.*) \(choose from (.*)\)", re.DOTALL)
KINDS = {"int": ("a whole number", "1"), "float": ("a number", "0.5")}


class Parser(argparse.ArgumentParser):
    """argparse's, which says in one line what is wrong and what to type instead."""

    _words: Sequence[str] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's; what was typed is kept for `error`."""
        self._words = self._words or list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, and exit with code 2."""
        self.exit(2, f"{self._told(message)}\n")

    def _told(self, message: str) -> str:
        prefix = "unrecognized arguments: "
        words = message.removeprefix(prefix).split() if message.startswith(prefix) else []
        unknown = next((word.partition("=")[0] for word in words if word.startswith("-")), None)
        if unknown is not None:
            known = [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]
            close = difflib.get_close_matches(unknown, known, n=1)
            return f"{self.prog} has no flag {unknown}; " + (
                f"did you mean {close[0]}?" if close else f"it takes {', '.join(known)}"
            )
        if message.startswith("the following arguments are required: "):
            return self._lacking(message.rpartition(": ")[2].split(", "))
        if (match := WRONG_TYPE.fullmatch(message)) is not None:
            action, (kind, example) = self._action(match[1]), KINDS[match[2]]
            flag = match[1].rpartition("/")[2]
            example = example if action is None or action.default is None else str(action.default)
            return f"{self.prog}: {flag} {match[3]} is not {kind}; try {flag} {example}"
        if (match := NO_VALUE.fullmatch(message)) is not None:
            flag, action = match[1].rpartition("/")[2], self._action(match[1])
            if (value := self._behind(flag)) is not None:
                return f"{self.prog}: {flag} needs a value; where {value} is it, type {shlex.quote(f'{flag}={value}')}"
            return f"{self.prog}: {flag} needs a value; type {flag if action is None else self._typed(action)}"
        message = CHOICE.sub(r"\1 is none of \2", message).removeprefix("argument ").replace(": ", " ", 1)
        return f"{self.prog}: {message}" + ("" if "; try " in message else f"; {self.prog} --help says more")

    def _lacking(self, names: list[str]) -> str:
        """What to say where something is not there that has to be, with what to type."""
        needed = [action for action in self._actions if action.required and action.nargs != argparse.ZERO_OR_MORE]
        lacking = [action for action in needed if {str(action.metavar), *action.option_strings} & set(names)] or needed
        said = ", ".join((*action.option_strings, str(action.metavar))[0] for action in lacking)
        explained = "; ".join(f"{self._typed(action)} is {action.help}" for action in lacking if not action.option_strings)
        example = " ".join([self.prog, *map(self._typed, needed)])
        return f"{self.prog} lacks {said}; type {example}" + (f" ({explained})" if explained else "")

    def _behind(self, flag: str) -> str | None:
        """The word behind a flag that looks like one itself and is none."""
        pairs = zip(self._words, self._words[1:], strict=False)
        return next((after for word, after in pairs if word == flag and after not in self._option_string_actions), None)

    def _action(self, name: str) -> argparse.Action | None:
        """The argument that argparse names so."""
        return next((action for action in self._actions if name in ("/".join(action.option_strings), action.metavar)), None)

    @staticmethod
    def _typed(action: argparse.Action) -> str:
        """An argument as it is typed, with its first choice or what stands for its value."""
        value = next(iter(action.choices)) if action.choices else str(action.metavar or action.dest)
        return f"{action.option_strings[-1]} {value}" if action.option_strings else value
