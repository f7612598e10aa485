"""Token ids that others wrote: what lies in a bare folder, whether it is whole, and how it is read where it lies.

Three kinds are known, each told by what a file begins with:

- `.npy` files of one dimension, as SimpleLLaMA's encode_dataset.py writes them;
- `.bin` files of llm.c and modded-nanogpt: 256 int32 (a magic number, a version, the count of ids), then the ids;
- `.bin` files without a header, uint16, as nanoGPT's prepare.py writes them.

The files of a split are one sequence, in the natural order of their names (`shard_2` before `shard_10`; where numbers have leading
zeros, that is the alphabetical order), and windows run across their ends, so no id is left out. A file with `val` among the words
of its name belongs to the validation split. Where documents begin is not known here.
"""

import hashlib
import json
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import numpy as np

from llama_lab.config.errors import ConfigError
from llama_lab.config.schema import BpeConfig, FileTokenizerConfig, Problem, ShardsConfig, TokenizerConfig
from llama_lab.data.shards import MANIFEST, TOKENIZER, Split
from llama_lab.data.tokenizer import BytesTokenizer, Tokenizer, build_tokenizer, load_tokenizer

SUFFIXES = (".npy", ".bin")
NPY_MAGIC = b"\x93NUMPY"
HEADER = np.dtype("<i4")
HEADER_BYTES = 256 * HEADER.itemsize
# (version, dtype of the ids) by magic number: for GPT-2's vocabulary and for Llama 3's.
HEADERS = {20240520: (1, np.dtype("<u2")), 20240801: (7, np.dtype("<u4"))}
EVALUATION_MAGIC = 20240522
VALIDATION = re.compile(r"(?<![a-z])(val|valid|validation)(?![a-z])")
TEST = re.compile(r"(?<![a-z])test(?![a-z])")
# A table of ours beside shards says that the folder was prepared here, and that its manifest is what is missing.
OUR_TABLE = re.compile(r"(train|val)-(starts|bytes)\.bin")
SHOWN_PROBLEMS = 5


class Kind(Enum):
    """Who writes such files."""

    npy = ".npy"
    llm_c = ".bin with llm.c's header"
    nano_gpt = ".bin without a header"


@dataclass(frozen=True, slots=True)
class TokenFile:
    """A file of token ids, its size checked but its ids not read.

    Attributes:
        dtype: of the ids; unsigned and little-endian.
        offset: bytes before the first id.
        tokens: at least 1.
    """

    path: Path
    kind: Kind
    dtype: np.dtype
    offset: int
    tokens: int

    @property
    def bytes(self) -> int:
        """Size of the whole file."""
        return self.offset + self.tokens * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class TokenFolder:
    """A bare folder: its files in the order in which they are read.

    Attributes:
        train, val: one of them may be empty.
    """

    path: Path
    train: tuple[TokenFile, ...]
    val: tuple[TokenFile, ...]

    @property
    def files(self) -> tuple[TokenFile, ...]:
        """All of them."""
        return self.train + self.val

    @property
    def kind(self) -> Kind:
        """The one kind of all files."""
        return self.files[0].kind

    def split(self, name: str) -> Split | None:
        """The `train` or `val` files as one sequence; None if there are none."""
        files = self.val if name == "val" else self.train
        if not files:
            return None
        ends = np.cumsum([file.tokens for file in files]).tolist()
        return Split(
            folder=self.path,
            files=tuple(file.path.name for file in files),
            starts=(0, *ends[:-1]),
            dtype=files[0].dtype,
            tokens=ends[-1],
            documents=0,
            text_bytes=0,
            starts_file=None,
            bytes_file=None,
            offsets=tuple(file.offset for file in files),
        )


def is_bare(folder: Path) -> bool:
    """Whether a folder holds files of tokens, and no sign of having been prepared here."""
    names = _names(folder)
    return MANIFEST not in names and any(map(_is_tokens, names)) and not any(map(OUR_TABLE.fullmatch, names))


def find_tokens(folder: Path, subject: str) -> TokenFolder:
    """Look at what a bare folder holds. Headers and sizes are checked; ids are not read.

    Args:
        subject: what a problem is reported under.

    Raises:
        ConfigError: files that are cut, of several kinds, or no list of ids that can be read in place.
    """
    names = sorted(filter(_is_tokens, _names(folder)), key=natural_order)
    problems: list[Problem] = []
    files: list[TokenFile] = []
    for name in names:
        try:
            files.append(_describe(folder / name))
        except (OSError, ValueError) as error:
            reason = error.strerror or str(error) if isinstance(error, OSError) else str(error)
            problems.append((f"{subject}: {name}", reason))
    if len(problems) > SHOWN_PROBLEMS:
        problems[SHOWN_PROBLEMS:] = [(subject, f"has {len(problems) - SHOWN_PROBLEMS:,} more files like these")]
    problems = problems or [(subject, rule) for rule in _mixtures(files)]
    if not files and not problems:
        problems = [(subject, "holds no .npy or .bin files of tokens; folders inside it are not searched")]
    if problems:
        raise ConfigError(problems, scope="the data")
    val = tuple(file for file in files if _is_validation(file))
    return TokenFolder(folder, tuple(file for file in files if not _is_validation(file)), val)


def tokens_fingerprint(folder: TokenFolder, digests: list[str], tokenizer_hash: str) -> str:
    """Equal for folders with the same files, however they are called, and the same tokenizer."""
    sides = [digests[: len(folder.train)], digests[len(folder.train) :]]
    return hashlib.sha256(json.dumps(["bare", tokenizer_hash, sides]).encode()).hexdigest()


def open_tokenizer(folder: Path, config: TokenizerConfig, subject: str) -> Tokenizer:
    """The tokenizer that a config names for a bare folder.

    What stands beside the ids as `tokenizer.json` is taken for theirs: the config may name no other one, and `tokenizer=bpe` takes
    it if its number of entries is the one asked for, since nothing is trained here.

    Raises:
        ConfigError: there is none, or it is not the one beside the ids.
    """
    path = folder / TOKENIZER
    beside = load_tokenizer(path) if path.is_file() else None
    named = f"tokenizer=file tokenizer.path={path}"
    match config:
        case BpeConfig():
            if beside is None:
                rule = f"brings no {TOKENIZER}; name the one its ids were made with: tokenizer=file tokenizer.path=FILE"
                raise ConfigError([(subject, rule)], scope="the data")
            if config.vocab_size != beside.vocab_size or isinstance(beside, BytesTokenizer):
                rule = f"is not that of {path}, which has {beside.vocab_size}; use {named}"
                raise ConfigError([(f"tokenizer.vocab_size={config.vocab_size}", rule)], scope="the data")
            return beside
        case _:
            found = build_tokenizer(config, lambda: ())
            if beside is not None and beside.hash != found.hash:
                typed = f"tokenizer.path={config.path}" if isinstance(config, FileTokenizerConfig) else "tokenizer=bytes"
                rule = f"is another one than {path}; use {named}, or remove that file if it does not belong to these ids"
                raise ConfigError([(typed, rule)], scope="the data")
            return found


def prepare_command(data: ShardsConfig, config: TokenizerConfig) -> str:
    """What to type to bring a bare folder into the form of this project, documents and all."""
    words = ["llama-lab", "prepare", "data=shards", f"data.path={data.path}"]
    if data.val_fraction is not None:
        words.append(f"data.val_fraction={data.val_fraction}")
    if isinstance(config, FileTokenizerConfig):
        words += ["tokenizer=file", f"tokenizer.path={config.path}"]
    return shlex.join([*words, "--out", "NEW"])


def natural_order(name: str) -> tuple[list[str | int], str]:
    """Sorts names as people count: digits in them as numbers, the rest as text."""
    parts = re.split(r"([0-9]+)", name)
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], name


def _names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []


def _is_tokens(name: str) -> bool:
    return name.endswith(SUFFIXES) and not name.startswith(".")


def _is_validation(file: TokenFile) -> bool:
    return VALIDATION.search(file.path.stem.lower()) is not None


def _mixtures(files: list[TokenFile]) -> Iterable[str]:
    """What does not go together."""
    kinds = {file.kind: file.path.name for file in files}
    if len(kinds) > 1:
        both = " and ".join(f"{kind.value} ({name})" for kind, name in kinds.items())
        yield f"mixes {both}; give each kind a folder of its own"
        return
    dtypes = {file.dtype.name: file.path.name for file in files}
    if len(dtypes) > 1:
        both = " and ".join(f"{dtype} ({name})" for dtype, name in dtypes.items())
        yield f"mixes {both}; write all files with one dtype"
    tests = [file.path.name for file in files if TEST.search(file.path.stem.lower())]
    if tests:
        yield f"holds {tests[0]}, which is kept for a test by its name and would be trained on; move it elsewhere, or rename it"


def _describe(path: Path) -> TokenFile:
    """What a file begins with, and whether its size is what that says.

    Raises:
        ValueError: it is no whole file of tokens; the text says what to do.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(HEADER_BYTES)
    if path.suffix == ".npy":
        return _describe_npy(path, size, start)
    if size == 0:
        raise ValueError("is empty; remove it or copy it again")
    if start.startswith(NPY_MAGIC):
        raise ValueError("is a .npy file by its content; rename it")
    magic, version, count = (int(value) for value in np.frombuffer(start[:12].ljust(12, b"\0"), HEADER))
    if magic == EVALUATION_MAGIC:
        raise ValueError("holds questions for an evaluation by llm.c, not text; move it elsewhere")
    if int(np.array(magic, HEADER).byteswap()) in {*HEADERS, EVALUATION_MAGIC}:
        raise ValueError("is big-endian; write it on, or for, a little-endian machine")
    if magic not in HEADERS:
        if size % 2:
            raise ValueError(f"has no header that is known, and {size:,} bytes are no whole number of uint16 ids; copy it again")
        return TokenFile(path, Kind.nano_gpt, np.dtype("<u2"), 0, size // 2)
    expected_version, dtype = HEADERS[magic]
    if version != expected_version:
        raise ValueError(f"has version {version} of llm.c's header; only {expected_version} is known for {magic}")
    return _sized(path, Kind.llm_c, dtype, HEADER_BYTES, count, size)


def _describe_npy(path: Path, size: int, start: bytes) -> TokenFile:
    """The same for what is called `.npy`. Nothing is ever unpickled."""
    if not start.startswith(NPY_MAGIC):
        raise ValueError("is not what numpy.save writes; copy it again or rename it")
    with path.open("rb") as file:
        try:
            major, _ = np.lib.format.read_magic(file)
            read_header = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
            shape, _, dtype = read_header(file)
        except ValueError as error:
            raise ValueError(f"has a header that numpy cannot read ({error}); copy it again") from None
        offset = file.tell()
    if dtype.hasobject:
        raise ValueError("holds Python objects, which are never loaded; save the ids with numpy.save(path, ids.astype('uint16'))")
    if dtype.kind != "u" or dtype.itemsize not in (2, 4):
        raise ValueError(f"has dtype {dtype}; save the ids as uint16 or uint32: numpy.save(path, ids.astype('uint16'))")
    if dtype.newbyteorder("<") != dtype:
        raise ValueError("is big-endian; save the ids with numpy.save(path, ids.astype('<u2'))")
    if len(shape) != 1:
        raise ValueError(f"has {len(shape)} dimensions {shape} instead of one; save ids.reshape(-1)")
    return _sized(path, Kind.npy, dtype, offset, shape[0], size)


def _sized(path: Path, kind: Kind, dtype: np.dtype, offset: int, count: int, size: int) -> TokenFile:
    """A file whose header says how many ids follow."""
    if count < 1:
        raise ValueError("holds no ids; remove it")
    expected = offset + count * dtype.itemsize
    if size != expected:
        what = "is cut" if size < expected else "is longer than it says"
        raise ValueError(f"{what}: its header says {count:,} ids, {expected:,} bytes in all, and it has {size:,}; copy it again")
    return TokenFile(path, kind, dtype.newbyteorder("<"), offset, count)
