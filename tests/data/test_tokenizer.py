"""Tokenizers: text survives them, special tokens stay apart from text, and files of others are taken as they are."""

import itertools
import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from llama_lab.config.errors import ConfigError
from llama_lab.config.schema import BpeConfig, BytesConfig, FileTokenizerConfig
from llama_lab.data import tokenizer as module
from llama_lab.data.tokenizer import BytesTokenizer, Tokenizer, build_tokenizer, load_tokenizer, train_bpe

TEXTS = [
    f"The {animal} of number {number} naïvely runs → over 你好 and 😀.\n\n    code = {number}\r\n"
    for number in range(40)
    for animal in ("dog", "cat")
]
TRICKY = ["", " ", "\n\n\n", "<EOS> and <|endoftext|> and <PAD>", "a  b\t c ", "é\u0301\u200b\x00", "😀" * 3, *TEXTS[:2]]

BOUNDARIES = [
    "a",
    "it's",
    "'s",
    "don't ",
    " ",
    "  ",
    "\n",
    "\n\n",
    "\r\n",
    "\t",
    "\u3000",
    "\xa0",
    "\x85",
    "\x1c",
    "1",
    "。",
    "，",
    "天",
    "地玄",
    "ー",
    "の",
    "！",
    "...",
    "_",
]
"""What a pre-tokenizer may join or part, or Python and it may see differently."""


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_bpe(TEXTS, 320)


def test_bpe_has_the_entries_asked_for_and_its_special_ids(bpe: Tokenizer) -> None:
    assert bpe.vocab_size == 320
    assert bpe.eos_id == 1
    assert len(bpe.encode(TEXTS[0])) < len(TEXTS[0].encode()) / 2


def test_a_tiny_text_gives_fewer_entries() -> None:
    assert 260 <= train_bpe(["ab ab"], 5000).vocab_size < 270


@pytest.mark.parametrize("kind", ["bpe", "bytes"])
def test_text_survives_and_never_becomes_a_special_token(kind: str, bpe: Tokenizer) -> None:
    tokenizer = bpe if kind == "bpe" else BytesTokenizer()
    for text in TRICKY:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.eos_id not in ids
        assert all(0 <= id < tokenizer.vocab_size for id in ids)
    for text, ids in zip(TRICKY, tokenizer.encode_batch(TRICKY), strict=True):
        assert ids.tolist() == tokenizer.encode(text)


@pytest.mark.parametrize("kind", ["bpe", "bytes"])
def test_decode_takes_anything(kind: str, bpe: Tokenizer) -> None:
    tokenizer = bpe if kind == "bpe" else BytesTokenizer()
    broken = tokenizer.encode("é")[:1] if kind == "bytes" else [tokenizer.encode("\x80")[0]]
    assert "\N{REPLACEMENT CHARACTER}" in tokenizer.decode(broken)
    assert tokenizer.decode(np.array([tokenizer.eos_id, tokenizer.vocab_size + 7, -3])) == ""


@pytest.mark.parametrize("kind", ["bpe", "bytes"])
def test_save_and_load_keep_everything(kind: str, bpe: Tokenizer, tmp_path: Path) -> None:
    tokenizer = bpe if kind == "bpe" else BytesTokenizer()
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert type(loaded) is type(tokenizer)
    assert (loaded.hash, loaded.vocab_size, loaded.eos_id) == (tokenizer.hash, tokenizer.vocab_size, tokenizer.eos_id)
    assert [loaded.encode(text) for text in TRICKY] == [tokenizer.encode(text) for text in TRICKY]


def test_the_hash_ignores_the_layout_of_the_file(bpe: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    bpe.save(path)
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(content, indent=7, sort_keys=True), encoding="utf-8")
    assert load_tokenizer(path).hash == bpe.hash


def test_the_bytes_file_means_the_same_to_the_tokenizers_library(tmp_path: Path) -> None:
    BytesTokenizer().save(tmp_path / "tokenizer.json")
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    library.encode_special_tokens = True
    for text in TRICKY:
        assert library.encode(text).ids == list(text.encode())
        assert library.decode(list(text.encode())) == text
    assert library.token_to_id("<EOS>") == 256


def test_training_repeats(bpe: Tokenizer) -> None:
    assert train_bpe(iter(TEXTS), 320).hash == bpe.hash


@pytest.mark.parametrize("prefix", [False, True])
def test_a_long_text_encoded_in_pieces_has_the_tokens_of_the_whole(
    bpe: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefix: bool
) -> None:
    bpe.save(tmp_path / "a.json")
    content = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    content["pre_tokenizer"]["add_prefix_space"] = prefix
    text = "".join(TEXTS + TRICKY)
    whole = Tokenizer(json.dumps(content)).encode(text)
    monkeypatch.setattr(module, "PIECE_CHARS", 17)
    monkeypatch.setattr(module, "BATCH_CHARS", 100)
    pieces = Tokenizer(json.dumps(content))
    assert len(list(module._pieces([text], pieces._piece_end))) > 100
    assert pieces.encode(text) == whole
    assert [ids.tolist() for ids in pieces.encode_batch([text, "", "dog"])] == [whole, [], pieces.encode("dog")]


def test_wherever_a_text_is_cut_it_has_the_tokens_of_the_whole(bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(0)
    texts = ["".join(draw.choices(BOUNDARIES, k=draw.randint(1, 12))) for _ in range(5_000)]
    whole = bpe.encode_batch(texts)
    monkeypatch.setattr(module, "PIECE_CHARS", 1)
    assert [ids.tolist() for ids in bpe.encode_batch(texts)] == [ids.tolist() for ids in whole]
    assert len(list(module._pieces(texts, bpe._piece_end))) > 2 * len(texts)


def test_scripts_without_spaces_and_lines_without_any_are_cut(bpe: Tokenizer) -> None:
    """Encoding takes a hundred times the memory of a piece."""
    for text in ("天地玄黄，宇宙洪荒。" * 30_000, "なまえはまだない。" * 30_000, "line\n" * 60_000):
        assert max(len(piece) for piece, _ in module._pieces([text], bpe._piece_end)) < 1.01 * module.PIECE_CHARS


@pytest.mark.parametrize("unit", ["a", " ", "\n", "ACGT", "天地玄黄"], ids=["letter", "spaces", "lines", "DNA", "Chinese"])
def test_a_word_of_any_length_is_learned_from_in_seconds(unit: str) -> None:
    """Two million characters took hours; what is cut is no other word where there are such words at all."""
    start = time.monotonic()
    tokenizer = train_bpe(iter([unit * (2_000_000 // len(unit)), *TEXTS]), 320)
    assert time.monotonic() - start < 30
    assert len(tokenizer.encode(unit * 1000)) < 100
    short = " word" * 20_000
    assert list(module._without_long_words(short)) == [short]


@pytest.mark.parametrize("name", ["<|endoftext|>", "</s>"])
def test_a_foreign_file_neither_truncates_nor_adds_tokens(tmp_path: Path, name: str) -> None:
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    library.train_from_iterator(
        TEXTS,
        tokenizers.trainers.BpeTrainer(
            special_tokens=[name],
            vocab_size=300,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    library.enable_truncation(4)
    library.enable_padding(length=50)
    library.post_processor = tokenizers.processors.TemplateProcessing(single=f"{name} $A", special_tokens=[(name, 0)])
    library.save(str(tmp_path / "tokenizer.json"))
    loaded = build_tokenizer(FileTokenizerConfig(path=str(tmp_path / "tokenizer.json")), lambda: ())
    assert loaded.eos_id == 0
    text = f" {TEXTS[0]} {name}"
    ids = loaded.encode(text)
    assert 0 not in ids
    assert loaded.decode(ids) == text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file or directory"),
        ("{", "is no tokenizer.json: .* in line 1"),
        ("{}", "is no tokenizer: "),
        (b"\xff", "it is not UTF-8"),
        (
            '{"version":"1.0","added_tokens":[],"model":{"type":"BPE","vocab":{"a":0},"merges":[]}}',
            "looked for <EOS>, <|endoftext|>, </s>",
        ),
    ],
)
def test_a_file_that_is_no_tokenizer_is_named(tmp_path: Path, content: str | bytes | None, message: str) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ConfigError) as error:
        build_tokenizer(FileTokenizerConfig(path=str(path)), lambda: ())
    assert f"tokenizer.path={path}" in str(error.value)
    assert error.match(message.replace("|", r"\|"))


def test_the_config_decides() -> None:
    assert build_tokenizer(BpeConfig(vocab_size=300), lambda: TEXTS).vocab_size == 300
    assert isinstance(build_tokenizer(BytesConfig(), lambda: ()), BytesTokenizer)


def test_special_tokens_by_name_follow_the_four_and_stay_out_of_text() -> None:
    names = ["<|im_start|>", "<|im_end|>", "Ω mark"]
    tokenizer = build_tokenizer(BpeConfig(vocab_size=330, special_tokens=names), lambda: [*TEXTS, " ".join(names) * 50])
    expected = ["<SOS>", "<EOS>", "<PAD>", "<UNK>", *names]
    assert tokenizer.special_ids == {name: place for place, name in enumerate(expected)}
    assert tokenizer.vocab_size == 330
    text = "<|im_start|>user Ω mark<EOS><|im_end|>"
    ids = tokenizer.encode(text)
    assert min(ids) >= len(expected)
    assert tokenizer.decode(ids) == text
    loaded = Tokenizer(tokenizer.content)
    assert (loaded.hash, loaded.encode(text)) == (tokenizer.hash, ids)


def test_training_ends_with_the_document_that_reaches_the_bytes_asked_for() -> None:
    read: list[str] = []

    def texts():
        for text in ["ä" * 10, "bcbcbc", "dede"]:
            read.append(text)
            yield text

    config = BpeConfig(vocab_size=5000, train_bytes=21)
    tokenizer = build_tokenizer(config, texts)
    assert read == ["ä" * 10, "bcbcbc"]
    assert len(tokenizer.encode("bcbc")) < 4
    assert len(tokenizer.encode("dede")) == 4


def test_a_stream_reads_ahead_by_a_few_batches_only(bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH_CHARS", 30)
    read: list[str] = []

    def texts():
        for number in range(200):
            read.append(f"the dog of number {number} runs over the river")
            yield read[-1]

    seen = 0
    for ids in bpe.encode_stream(texts()):
        assert len(read) - seen <= module.BATCHES_AHEAD + 1
        assert bpe.decode(ids) == read[seen]
        seen += 1
    assert seen == 200


def test_an_error_in_the_text_ends_the_stream_and_its_threads(bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH_CHARS", 10)

    def texts():
        yield from TEXTS[:8]
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        list(bpe.encode_stream(texts()))
    half = bpe.encode_stream(iter(TEXTS))
    next(half)
    half.close()
    assert [thread for thread in threading.enumerate() if thread.name.startswith("encode")] == []


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_ctrl_c_is_heard_while_a_tokenizer_is_trained() -> None:
    program = (
        "import os, signal, time\n"
        "from itertools import count\n"
        "from llama_lab.data.tokenizer import train_bpe\n"
        # Whoever runs the tests in the background of a shell has made every child deaf to Ctrl-C.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def texts():\n"
        "    for number in count():\n"
        "        if number == 1000:\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "        yield f'text number {number}'\n"
        "try:\n"
        "    train_bpe(texts(), 300)\n"
        "except KeyboardInterrupt:\n"
        "    print('heard')\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=170)
    assert (done.returncode, done.stdout, done.stderr) == (0, "heard\n", "")


def test_ctrl_c_while_the_thread_starts_leaves_nothing_running(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, enough = threading.Event(), threading.Event()

    class Interrupted(threading.Thread):
        def start(self) -> None:
            super().start()
            reading.wait(170)
            raise KeyboardInterrupt

    def texts() -> Iterator[str]:
        for number in itertools.takewhile(lambda _: not enough.is_set(), itertools.count()):
            reading.set()
            yield f"text number {number}"

    monkeypatch.setattr("llama_lab.data.tokenizer.threading.Thread", Interrupted)
    try:
        with pytest.raises(KeyboardInterrupt):
            train_bpe(texts(), 300)
        assert "train tokenizer" not in {thread.name for thread in threading.enumerate()}
    finally:
        enough.set()


def test_an_error_in_the_text_is_that_of_the_training() -> None:
    def texts():
        yield "some text"
        raise ConfigError([("data.path=x", "is broken")])

    with pytest.raises(ConfigError, match="is broken"):
        train_bpe(texts(), 300)
