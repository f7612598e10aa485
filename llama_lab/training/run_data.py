"""The data of a run that is there already, found from wherever the caller is."""

from dataclasses import replace
from pathlib import Path

from llama_lab.config.schema import FileTokenizerConfig, HuggingFaceConfig, MixtureConfig, RunConfig, ShardsConfig, TextConfig
from llama_lab.data.corpus import Say
from llama_lab.data.prepare import PreparedData, prepare
from llama_lab.training.run_folder import RunFolder


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
