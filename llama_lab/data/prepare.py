"""From a config to token shards that are ready to train on, made once and then found in the cache.

Flow: source -> fingerprint -> cache entry if there is one, else corpus -> tokenizer (trained on the training side only) ->
shards -> baselines -> manifest -> the entry's name. An entry is a folder as `data=shards` takes it: it may be copied, moved and
trained on elsewhere.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from llama_lab.config.errors import ConfigError
from llama_lab.config.schema import (
    BpeConfig,
    BytesConfig,
    DataConfig,
    DocsConfig,
    FileTokenizerConfig,
    HuggingFaceConfig,
    MixtureConfig,
    Problem,
    ShardsConfig,
    TextConfig,
    TokenizerConfig,
    Window,
)
from llama_lab.data import cache, foreign
from llama_lab.data.build import asked_for, build
from llama_lab.data.corpus import Say, Source
from llama_lab.data.docs import DocsSource
from llama_lab.data.huggingface import HuggingFaceSource
from llama_lab.data.id_check import check_ids
from llama_lab.data.importing import TokenSource, import_tokens
from llama_lab.data.place import Place, making
from llama_lab.data.shards import (
    FORMAT_VERSION,
    TOKENIZER,
    Split,
    content_fingerprint,
    open_split,
    read_manifest,
)
from llama_lab.data.text import TextSource
from llama_lab.data.tokenizer import BytesTokenizer, Tokenizer, build_tokenizer, load_tokenizer

# Raised when the same corpus and tokenizer config give other shards.
RECIPE = 1


@dataclass(frozen=True, slots=True)
class PreparedSource:
    """One folder of tokens.

    Attributes:
        name: no two sources of a run share it.
        weight: its share of the training windows; those of all sources add up to 1.
        folder: where the tokens lie.
        val: None if nothing is held out, which only `data=shards` and a mixture of such can bring about.
    """

    name: str
    weight: float
    folder: Path
    train: Split
    val: Split | None


@dataclass(frozen=True, slots=True)
class PreparedData:
    """Tokens ready to train on.

    Attributes:
        sources: one, or several for a mixture.
        fingerprint: equal for equal tokens and tokenizer, wherever they lie and however they came about.
        baselines: `gzip_bits_per_byte` and `xz_bits_per_byte` of the validation text (of its first 8 MB), `unigram_bits_per_byte`
            of its tokens under the training tokens' frequencies. Empty if they are unknown.
    """

    tokenizer: Tokenizer
    sources: tuple[PreparedSource, ...]
    fingerprint: str
    baselines: dict[str, float]

    @property
    def train_tokens(self) -> int:
        """Training tokens of all sources."""
        return sum(source.train.tokens for source in self.sources)

    @property
    def val_tokens(self) -> int:
        """Validation tokens of all sources; 0 if nothing is held out."""
        return sum(source.val.tokens for source in self.sources if source.val is not None)

    @property
    def validation_text(self) -> str | None:
        """Hash that is equal for equal validation text, whatever the tokenizer; null where nothing says which text it is.

        It covers the length in bytes of each held-out document, in order: two texts that agree in all of them are the same.
        """
        if any(source.val is None or source.val.bytes_file is None for source in self.sources):
            return None
        manifests = [read_manifest(source.folder, str(source.folder)) for source in self.sources]
        tables = [manifest["splits"]["val"]["document_bytes"]["sha256"] for manifest in manifests]
        return hashlib.sha256(json.dumps(tables).encode()).hexdigest()

    @property
    def folder(self) -> Path:
        """Where the tokens lie, if they are no mixture; asking a mixture is a ValueError, here and below."""
        return self._only.folder

    @property
    def train(self) -> Split:
        """Training tokens, if they are no mixture."""
        return self._only.train

    @property
    def val(self) -> Split | None:
        """Validation tokens, if they are no mixture."""
        return self._only.val

    @property
    def key(self) -> str | None:
        """What decided on the tokens when they were made; null for a mixture, and for what others have made."""
        if len(self.sources) > 1 or foreign.is_bare(self.folder):
            return None
        return read_manifest(self.folder, str(self.folder))["source"].get("key")

    @property
    def _only(self) -> PreparedSource:
        (only,) = self.sources
        return only


def prepare(data: DataConfig, tokenizer: TokenizerConfig, say: Say = print, *, out: Path | None = None) -> PreparedData:
    """Tokens for a config: from the cache, or made now.

    Several processes and users may call this at once: one prepares, the others wait and find the result. A process that is
    killed leaves nothing that counts as prepared; the next call goes on where it was.

    Args:
        say: takes short sentences about progress; silent if everything is there already.
        out: the folder to make, instead of a cache entry; it is empty or does not exist, or was made by such a call before.

    Raises:
        ConfigError: the text, the tokenizer, the prepared folder or the cache folder is not as it must be.
    """
    if out is not None:
        Place.at(out, f"--out {out}").check()
    if isinstance(data, ShardsConfig):
        return _open_shards(data, tokenizer, say) if out is None else _import_shards(data, tokenizer, say, out)
    if isinstance(data, MixtureConfig):
        return _open_mixture(data, tokenizer, say)
    source = _find_source(data)
    key = _key_of(source, tokenizer)
    name = f"{source.name}-{''.join(asked_for(tokenizer).split()[:2])}-{key[:12]}"
    place = Place.in_cache(name) if out is None else Place.at(out, f"--out {out}")
    if not place.is_made(key):
        with making(place, key, say) as draft:
            if draft is not None:
                build(draft, source, tokenizer, key, say)
    if out is not None:
        return open_prepared(place.folder)
    cache.mark_used(place.folder)
    return open_prepared(place.folder, f"{place.folder} (llama-lab cache clean {name} removes it)")


def check_sources(data: DataConfig, tokenizer: TokenizerConfig) -> None:
    """Refuse what `prepare` would refuse, as far as that is seen without reading a text: a path where nothing is, a prepared folder
    that is not whole, a tokenizer that cannot be read or is not the one that the folder was made with.

    Raises:
        ConfigError: there is such a problem.
    """
    problems: list[Problem] = []
    for part in _parts(data) if isinstance(data, MixtureConfig) else [data]:
        try:
            _check_source(part, tokenizer)
        except ConfigError as error:
            problems += error.problems if part is data else _named_in_mixture(error)
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)), scope="the data")


def open_prepared(folder: Path, subject: str | None = None) -> PreparedData:
    """Open a prepared folder, its sizes and ids checked but its tokens not read.

    Args:
        subject: what a problem is reported under; the folder if not given.

    Raises:
        ConfigError: it is not complete, or its ids or tokenizer do not fit.
    """
    subject = subject or str(folder)
    manifest = read_manifest(folder, subject)
    tokenizer = load_tokenizer(folder / TOKENIZER)
    described = manifest["tokenizer"]
    if tokenizer.hash != described["hash"]:
        rule = f"has a {TOKENIZER} that is not the one its shards were made with; copy the folder again as a whole"
        raise ConfigError([(subject, rule)], scope="the data")
    largest = max(split["max_id"] for split in manifest["splits"].values())
    if largest >= tokenizer.vocab_size:
        rule = f"holds token id {largest}, but its tokenizer has {tokenizer.vocab_size} entries; prepare it again"
        raise ConfigError([(subject, rule)], scope="the data")
    train = open_split(folder, manifest, "train")
    if train is None:
        raise ConfigError([(subject, "holds no training tokens")], scope="the data")
    return PreparedData(
        tokenizer=tokenizer,
        sources=(PreparedSource(folder.name, 1.0, folder, train, open_split(folder, manifest, "val")),),
        fingerprint=content_fingerprint(manifest),
        baselines=manifest.get("baselines", {}),
    )


def text_key(data: TextConfig, tokenizer: TokenizerConfig) -> str:
    """What decides on the tokens of a text, as `PreparedData.key` has it of those that were made: contents, names, tokenizer.

    Raises:
        ConfigError: there is no such text, or no such tokenizer.
    """
    return _key_of(_find_source(data), tokenizer)


def _check_source(data: DataConfig, tokenizer: TokenizerConfig) -> None:
    """`check_sources` of what is no mixture."""
    if not isinstance(data, ShardsConfig):
        # What comes through a pipe can be read once.
        if not (isinstance(data, TextConfig) and data.path == "-"):
            _find_source(data)
        if isinstance(tokenizer, FileTokenizerConfig):
            build_tokenizer(tokenizer, lambda: ())
        return
    folder = Path(data.path).expanduser().absolute()
    if foreign.is_bare(folder):
        foreign.find_tokens(folder, f"data.path={data.path}")
        foreign.open_tokenizer(folder, tokenizer, f"data.path={data.path}")
    else:
        _open_own(data, tokenizer, folder)


def _open_shards(data: ShardsConfig, config: TokenizerConfig, say: Say) -> PreparedData:
    """A folder of tokens, its tokenizer the one that the config names."""
    folder = Path(data.path).expanduser().absolute()
    is_bare = foreign.is_bare(folder)
    if data.val_fraction is not None:
        rule = "holds out nothing from what is prepared already; leave it out"
        if is_bare:
            rule = f"holds out nothing from tokens that are read where they lie; type {foreign.prepare_command(data, config)}"
        raise ConfigError([(f"data.val_fraction={data.val_fraction}", rule)], scope="the data")
    return _open_bare(data, config, folder, say) if is_bare else _open_own(data, config, folder)


def _open_bare(data: ShardsConfig, config: TokenizerConfig, folder: Path, say: Say) -> PreparedData:
    """A folder of files that others wrote, read where they lie."""
    subject = f"data.path={data.path}"
    if data.window is not Window.contiguous:
        rule = f"needs to know where documents begin, which {data.path} does not say; type {foreign.prepare_command(data, config)}"
        raise ConfigError([(f"data.window={data.window.name}", rule)], scope="the data")
    tokens = foreign.find_tokens(folder, subject)
    tokenizer = foreign.open_tokenizer(folder, config, subject)
    digests = check_ids(tokens, tokenizer.vocab_size, subject, say)
    train = tokens.split("train")
    if train is None:
        raise ConfigError([(subject, "holds no training tokens: all of its files have val in their names")], scope="the data")
    return PreparedData(
        tokenizer=tokenizer,
        sources=(PreparedSource(folder.name, 1.0, folder, train, tokens.split("val")),),
        fingerprint=foreign.tokens_fingerprint(tokens, digests, tokenizer.hash),
        baselines={},
    )


def _import_shards(data: ShardsConfig, config: TokenizerConfig, say: Say, out: Path) -> PreparedData:
    """A folder of ours out of files that others wrote, cut into documents."""
    subject, folder = f"data.path={data.path}", Path(data.path).expanduser().absolute()
    if not foreign.is_bare(folder):
        read_manifest(folder, subject)
        raise ConfigError([(subject, "is prepared already; copy it, or train on it where it lies")], scope="the data")
    tokens = foreign.find_tokens(folder, subject)
    tokenizer = foreign.open_tokenizer(folder, config, subject)
    source = TokenSource(data, tokens, tokenizer, say)
    key = _key(source.fingerprint(), tokenizer.hash)
    place = Place.at(out, f"--out {out}")
    if not place.is_made(key):
        with making(place, key, say) as draft:
            if draft is not None:
                import_tokens(draft, source, key, asked_for(config), say)
    return open_prepared(out)


def _open_own(data: ShardsConfig, config: TokenizerConfig, folder: Path) -> PreparedData:
    """A folder prepared before, if its tokenizer is the one that the config names.

    Shards are only readable with the tokenizer they were made with, which lies beside them. `tokenizer=file` and
    `tokenizer=bytes` must be that one. `tokenizer=bpe` takes it as it is, since nothing is trained here, provided that it has
    `vocab_size` entries, or was asked for with that: otherwise the config would record a vocabulary that the model does not have.
    """
    prepared = open_prepared(folder, f"data.path={data.path}")
    own = prepared.tokenizer
    beside = f"tokenizer=file tokenizer.path={prepared.folder / TOKENIZER}"
    match config:
        case FileTokenizerConfig():
            fits = build_tokenizer(config, lambda: ()).hash == own.hash
            typed = f"tokenizer.path={config.path}"
        case BytesConfig():
            fits = isinstance(own, BytesTokenizer)
            typed = "tokenizer=bytes"
        case BpeConfig():
            asked = read_manifest(prepared.folder, f"data.path={data.path}")["source"]["tokenizer"]
            fits = not isinstance(own, BytesTokenizer) and (config.vocab_size == own.vocab_size or asked == asked_for(config))
            typed = f"tokenizer.vocab_size={config.vocab_size}"
            if not isinstance(own, BytesTokenizer):
                beside = f"tokenizer.vocab_size={own.vocab_size} or {beside}"
        case _:
            raise TypeError(f"no tokenizer is checked against {type(config).__name__}")
    if isinstance(own, BytesTokenizer):
        beside = "tokenizer=bytes"
    if not fits:
        rule = f"is not the tokenizer that {data.path} was made with, which has {own.vocab_size} entries; use {beside}"
        raise ConfigError([(typed, rule)], scope="the data")
    return prepared


def _open_mixture(data: MixtureConfig, config: TokenizerConfig, say: Say) -> PreparedData:
    """Several folders, each opened as `data=shards` does, with one tokenizer between them."""
    parts: list[PreparedData] = []
    problems: list[Problem] = []
    for one in _parts(data):
        try:
            parts.append(_open_shards(one, config, say))
        except ConfigError as error:
            problems += _named_in_mixture(error)
    for path, part in zip(data.paths, parts, strict=False):
        if not problems and part.tokenizer.hash != parts[0].tokenizer.hash:
            rule = f"has another tokenizer than {data.paths[0]}; prepare one of them again with the other's {TOKENIZER}"
            problems.append((f"data.paths: {path}", rule))
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)), scope="the data")
    names = _unique_names([part.folder for part in parts])
    weights = [weight / sum(data.weights) for weight in data.weights]
    sources = [
        PreparedSource(name, weight, part.folder, part.train, part.val)
        for name, weight, part in zip(names, weights, parts, strict=True)
    ]
    fingerprint = hashlib.sha256(json.dumps([part.fingerprint for part in parts]).encode()).hexdigest()
    return PreparedData(tokenizer=parts[0].tokenizer, sources=tuple(sources), fingerprint=fingerprint, baselines={})


def _parts(data: MixtureConfig) -> list[ShardsConfig]:
    """The folders of a mixture, each as `data=shards` names one."""
    return [
        ShardsConfig(
            path=path, max_seq_len=data.max_seq_len, tokens_per_update=data.tokens_per_update, window=data.window, val_fraction=None
        )
        for path in data.paths
    ]


def _named_in_mixture(error: ConfigError) -> list[Problem]:
    """Problems of one folder, for somebody who typed a list of folders."""
    return [(subject.replace("data.path=", "data.paths: "), rule) for subject, rule in error.problems]


def _unique_names(folders: list[Path]) -> list[str]:
    """The last part of each path; where that is taken, with a number behind it."""
    names: list[str] = []
    for folder in folders:
        base = folder.name or "source"
        number = 1
        while (name := base if number == 1 else f"{base}.{number}") in names:
            number += 1
        names.append(name)
    return names


def _find_source(data: DataConfig) -> Source:
    match data:
        case DocsConfig():
            return DocsSource(data)
        case TextConfig():
            return TextSource(data, cache.ContentHashes())
        case HuggingFaceConfig():
            return HuggingFaceSource(data, cache.ContentHashes())
        case _:
            raise TypeError(f"no text is found for {type(data).__name__}")


def _key_of(source: Source, tokenizer: TokenizerConfig) -> str:
    from_file = isinstance(tokenizer, FileTokenizerConfig)
    return _key(source.fingerprint(), build_tokenizer(tokenizer, lambda: ()).hash if from_file else asked_for(tokenizer))


def _key(source: str, tokenizer: str) -> str:
    """Hash of everything that decides on the tokens."""
    return hashlib.sha256(json.dumps([RECIPE, FORMAT_VERSION, source, tokenizer]).encode()).hexdigest()
