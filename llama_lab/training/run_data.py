"""The data of a run that is there already, found from wherever the caller is."""

from dataclasses import replace
from pathlib import Path

from llama_lab.config.errors import ConfigError
from llama_lab.config.schema import (
    DocsConfig,
    FileTokenizerConfig,
    HuggingFaceConfig,
    MixtureConfig,
    RunConfig,
    ShardsConfig,
    TextConfig,
)
from llama_lab.data.corpus import Say
from llama_lab.data.prepare import PreparedData, prepare, text_key
from llama_lab.training.run_folder import RunFolder, relative

MADE_BY = "prepared"
"""Name in meta.json of `PreparedData.key`: the same text is known by it without being prepared again."""


def open_data(run: RunConfig, folder: RunFolder, say: Say) -> PreparedData:
    """Open what a run was trained on; text is prepared again if the cache was cleaned. Whether it is still the same is not asked.

    Raises:
        ConfigError: it is not there any more, or cannot be read.
    """
    found = at_home(run, folder)
    return prepare(found.data, found.tokenizer, say)


def trained_on(folder: RunFolder) -> str | None:
    """Fingerprint of the data that a run was trained on, as `PreparedData.fingerprint` gives it; None if it was not kept."""
    return folder.meta().get("data", {}).get("data")


def refuse_other_data(run: RunConfig, folder: RunFolder, say: Say) -> None:
    """Refuse a finished run as the answer to a request whose data path leads to other data now.

    Data that is not there any more is taken for the same, and so is what would have to be fetched to be known. Text that is
    prepared anew for this is what the request needs in any case.

    Args:
        run: what is asked for, resolved.
        folder: a finished run of the same identity.

    Raises:
        ConfigError: the data differs, or is there and can be trained on no more, and neither `fresh` nor `accept_changes` says what
            to do.
    """
    known = trained_on(folder)
    if known is None or run.fresh or run.accept_changes or isinstance(run.data, DocsConfig | HuggingFaceConfig):
        return
    made_by, is_other = folder.meta().get(MADE_BY), False
    try:
        if isinstance(run.data, TextConfig):
            if text_key(run.data, run.tokenizer) == made_by:
                return
            is_other = made_by is not None
        now = prepare(run.data, run.tokenizer, say).fingerprint
    except ConfigError:
        if is_other:
            raise
        return
    if now != known:
        rule = "since this run was trained; fresh=true trains it anew and keeps the old one beside it, name=… makes a run of its "
        rule += "own, accept_changes=true takes the old one for an answer"
        problem = (f"the data changed from {known[:12]} to {now[:12]}", rule)
        raise ConfigError([problem], scope=f"{relative(folder.path)}, which is finished")


def at_home(run: RunConfig, folder: RunFolder) -> RunConfig:
    """A run's config whose relative paths lead from here to where they led when it was trained.

    They are made absolute where that was in another directory and something is still there under such a name or pattern. The
    run's identity is that of its own config, not of this one.
    """
    home = Path(folder.meta().get("starts", [{}])[-1].get("directory", "."))
    if home == Path() or home == Path.cwd():
        return run

    def there(path: str) -> str:
        typed = Path(path).expanduser()
        is_there = not typed.is_absolute() and ((home / typed).exists() or any(home.glob(path)))
        return str(home / typed) if is_there else path

    data, tokenizer = run.data, run.tokenizer
    match data:
        case TextConfig() | ShardsConfig():
            data = replace(data, path=there(data.path))
        case MixtureConfig():
            data = replace(data, paths=[there(path) for path in data.paths])
        case HuggingFaceConfig():
            data = replace(data, dataset=there(data.dataset))
    if isinstance(tokenizer, FileTokenizerConfig):
        tokenizer = replace(tokenizer, path=there(tokenizer.path))
    return replace(run, data=data, tokenizer=tokenizer)
