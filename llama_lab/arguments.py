"""What stands after a command that takes overrides: flags, sorted from them."""

import difflib
import shlex
from dataclasses import dataclass, field
from pathlib import Path

FLAGS = {
    "train": ["--multirun", "--cfg", "--config-dir", "--help"],
    "plan": ["--gpu", "--probe", "--multirun", "--config-dir", "--help"],
    "prepare": ["--out", "--config-dir", "--help"],
    "fork": ["--update", "--cfg", "--config-dir", "--help"],
    "import": ["--no-training", "--cfg", "--config-dir", "--help"],
}
WITH_VALUE = ("--config-dir", "--out", "--update", "--gpu")
HYDRA_SHOWS = ("job", "hydra", "all")  # what Hydra's own --cfg takes, so people type it
SHORT = {"-m": "--multirun", "-h": "--help"}


class UsageError(Exception):
    """A mistake in commands or flags; the text says what to type instead."""


@dataclass
class Arguments:
    """What stands after a command."""

    overrides: list[str] = field(default_factory=list)
    multirun: bool = False
    show_config: bool = False
    config_dir: Path | None = None
    out: Path | None = None
    update: str | None = None
    training: bool = True
    probe: bool = False
    gpu: str | None = None
    help: bool = False


def parse(words: list[str], command: str) -> Arguments:
    """Sort flags from overrides; flags may stand anywhere.

    Raises:
        UsageError: a flag that the command lacks, or one without its value.
    """
    arguments = Arguments()
    rest = iter(words)
    for word in rest:
        flag, equals, value = word.partition("=")
        flag = SHORT.get(flag, flag)
        if not word.startswith("-"):
            if command == "train" and arguments.show_config and word in HYDRA_SHOWS:
                raise UsageError(f"--cfg takes no value; type it alone, without {word}")
            arguments.overrides.append(word)
        elif flag not in FLAGS[command]:
            after = next(rest, "")
            raise UsageError(_unknown_flag(word, "" if after.startswith("-") or "=" in after else after, command))
        elif flag == "--config-dir":
            value = value or next(rest, "")
            folder = _at_home(value)
            if not folder.is_dir() or not value:
                raise UsageError(f"--config-dir needs a folder with groups of options in it; {value!r} is none")
            if any(folder.glob("*.yaml")) and not any(folder.glob("*/*.yaml")):
                rule = "an option lies one folder deeper, in that of its group, such as model/mine.yaml or experiment/mine.yaml"
                raise UsageError(f"--config-dir {shlex.quote(value)} holds no group of options; {rule}")
            arguments.config_dir = folder.absolute()
        elif flag == "--out":
            value = value or next(rest, "")
            if not value or value.startswith("-") or "=" in value:
                raise UsageError(f"--out needs the folder to make, such as --out shards/books; {value!r} is none")
            arguments.out = Path(value).expanduser().absolute()
        elif flag == "--update":
            arguments.update = value or next(rest, "")
            if not arguments.update or "=" in arguments.update:
                raise UsageError("--update needs the number of an update, or last, or best")
        elif flag == "--gpu":
            arguments.gpu = value or next(rest, "")
            if not arguments.gpu or "=" in arguments.gpu or arguments.gpu.startswith("-"):
                raise UsageError("--gpu needs what to plan for, such as --gpu H100 or --gpu 8xH100")
        elif equals:
            raise UsageError(f"{flag} takes no value; type it alone, without ={value}")
        elif flag == "--multirun":
            arguments.multirun = True
        elif flag == "--cfg":
            arguments.show_config = True
        elif flag == "--probe":
            arguments.probe = True
        elif flag == "--no-training":
            arguments.training = False
        else:
            arguments.help = True
    return arguments


def _at_home(value: str) -> Path:
    """A path whose `~` the shell has left, as it does behind `=`; one of nobody's home stays as it was typed."""
    try:
        return Path(value).expanduser()
    except RuntimeError:
        return Path(value)


def _field_for(key: str) -> str | None:
    """The question whether another field was meant, if one is near; None if there is none, or this is one itself."""
    from llama_lab.config.overrides import any_shape, unknown_field

    _, asked, rest = unknown_field(key, any_shape(), {}).partition("did you mean ")
    return asked + rest if asked else None


def _is_field(key: str) -> bool:
    """Whether something can be set under a key."""
    from llama_lab.config.overrides import CHOSEN, any_shape

    return key in CHOSEN or key in any_shape()


def _unknown_flag(word: str, after: str, command: str) -> str:
    """What to say of a flag that a command lacks; `after` is the word behind it that may be its value."""
    flag, equals, value = word.partition("=")
    key = flag.lstrip("-").replace("-", "_")
    names = [name.lstrip("-") for name in FLAGS[command] if name in WITH_VALUE or not equals]
    close = difflib.get_close_matches(flag.lstrip("-"), names, n=1)
    if _is_field(key):
        hint = f"fields are set without dashes: {shlex.quote(f'{key}={value or after}') if value or after else f'{key}=VALUE'}"
    elif close:
        hint = f"did you mean --{close[0]}?"
    elif (meant := _field_for(key)) is not None:
        hint = f"a field is typed without dashes: {meant}"
    elif equals or "." in key:
        hint = f"fields are set without dashes: {key}={value or 'VALUE'}"
    else:
        hint = f"it takes {', '.join(FLAGS[command])}, and fields as key=value without dashes"
    return f"llama-lab {command} has no flag {word.partition('=')[0]}; {hint}"
