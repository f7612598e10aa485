"""Where options and presets lie: beside the package in a checkout, inside it in an installed wheel.

Read as plain files, so that every list of options is exactly what `llama-lab` would accept.
"""

import difflib
import os
from glob import has_magic
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent


def config_folder(name: str) -> Path:
    """Absolute path of `conf` or `experiments`."""
    inside = PACKAGE / name
    return inside if inside.is_dir() else PACKAGE.parent / name


def search_folders(config_dir: Path | None = None) -> list[Path]:
    """Folders searched for `<group>/<option>.yaml`, in order.

    Args:
        config_dir: the user's own options and presets, searched last.
    """
    own = [] if config_dir is None else [config_dir.expanduser().resolve()]
    return [config_folder("conf"), config_folder("experiments"), *own]


def options(group: str, config_dir: Path | None = None) -> list[str]:
    """Options of a group, or the presets where `group` is `experiment`, sorted."""
    return sorted({file.stem for folder in search_folders(config_dir) for file in folder.glob(f"{group}/*.yaml")})


def shadowed(groups: tuple[str, ...], config_dir: Path) -> list[tuple[Path, Path]]:
    """The user's options that have the name of a shipped one and say something else, each with the shipped one.

    They would never be read, for shipped options are found first. Nor may they win: a run's name says which options it has, and
    presets and other options that build on the shipped one would take the user's.
    """
    *shipped, own = search_folders(config_dir)
    pairs = [
        (file, folder / group / file.name) for group in groups for file in sorted(own.glob(f"{group}/*.yaml")) for folder in shipped
    ]
    return [(file, other) for file, other in pairs if other.is_file() and other.read_bytes() != file.read_bytes()]


def option_file(group: str, option: str, config_dir: Path | None = None) -> Path | None:
    """The file that an option is read from; none if there is no such option."""
    files = (folder / group / f"{option}.yaml" for folder in search_folders(config_dir))
    return next((file for file in files if file.is_file()), None)


def options_of_kind(group: str, kind: str, config_dir: Path | None = None) -> list[str]:
    """Options of a group that have one kind's fields."""
    files = {option: option_file(group, option, config_dir) for option in options(group, config_dir)}
    mark = f"/schema/{group}/{kind}@"
    return [option for option, file in files.items() if file is not None and mark in file.read_text(encoding="utf-8")]


def or_meant(path: Path, otherwise: str) -> str:
    """What to say of a path that a user typed and that is not there: which near it was probably meant.

    Args:
        otherwise: what to say where nothing near is named alike, or the path is there.
    """
    there = next((folder for folder in path.parents if folder.is_dir()), None)
    if there is None or os.path.exists(path):  # noqa: PTH110 - a text that is no path at all is answered, not an error
        return otherwise
    mistyped, *rest = path.parts[len(there.parts) :]
    try:
        names = [] if has_magic(mistyped) else [entry.name for entry in there.iterdir()]
    except OSError:
        return otherwise
    close = difflib.get_close_matches(mistyped, [name for name in names if not name.startswith(".")], n=1)
    if not close:
        return otherwise
    meant = there / close[0]
    return f"did you mean {meant.joinpath(*rest) if meant.joinpath(*rest).exists() else meant}?"


def fingerprint(folders: list[Path]) -> tuple[tuple[str, int, int], ...]:
    """Path, time and size of every YAML file below some folders: another one as soon as a file was edited."""
    files = sorted(file for folder in folders for file in folder.rglob("*.yaml"))
    return tuple((str(file), (stat := file.stat()).st_mtime_ns, stat.st_size) for file in files)
