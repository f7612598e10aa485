"""The documentation corpus: what is read, what is held out, and that the two sides have nothing in common."""

import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from llama_lab.config.errors import ConfigError
from llama_lab.config.schema import DocsConfig
from llama_lab.data.corpus import Corpus, Document, Side, text_digest
from llama_lab.data.docs import DocsSource, Unit, _hold_out

VAL_BYTES = 150_000


def silent(sentence: str) -> None:
    """Takes progress and keeps it."""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An installed package that must not be imported."""
    folder = tmp_path_factory.mktemp("site") / "wonderland"
    folder.mkdir()
    (folder / "__init__.py").write_text('"""A package about rabbits, hats and several other curious things."""\nraise SystemExit\n')
    (folder / "broken.py").write_text("def f(:\n")
    (folder / "half.py").write_text('"""Half a pair: \\ud800, and an invalid escape \\d."""\n')
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder.parent))
        yield folder


@pytest.fixture(scope="module")
def corpus(package: Path) -> Corpus:
    """The whole library and the package: parsing takes seconds, so once for all tests."""
    return DocsSource(DocsConfig(packages=[package.name], val_bytes=VAL_BYTES)).corpus(silent, Path("unused"))


def test_holds_a_useful_amount_of_english(corpus: Corpus) -> None:
    train, val = ("\n\n".join(document.text for document in corpus.side(side)) for side in Side)
    assert len(train.encode()) > 1_500_000
    assert VAL_BYTES <= len(val.encode()) < 1.3 * VAL_BYTES
    for text in (train, val):
        assert text.count(" the ") > len(text) / 300


def test_no_paragraph_of_validation_stands_in_training(corpus: Corpus) -> None:
    def paragraphs(text: str) -> set[bytes]:
        return {text_digest(paragraph) for paragraph in text.split("\n\n") if len(paragraph.split()) >= 8}

    train = set().union(*(paragraphs(document.text) for document in corpus.side(Side.train)))
    val = set().union(*(paragraphs(document.text) for document in corpus.side(Side.val)))
    assert val
    assert not train & val


def test_few_word_sequences_of_validation_stand_in_training(corpus: Corpus) -> None:
    def sequences(text: str) -> list[tuple[str, ...]]:
        words = text.split()
        return [tuple(words[start : start + 8]) for start in range(len(words) - 7)]

    train = {sequence for document in corpus.side(Side.train) for sequence in sequences(document.text)}
    val = [sequence for document in corpus.side(Side.val) for sequence in sequences(document.text)]
    assert sum(sequence in train for sequence in val) < 0.01 * len(val)


def test_packages_are_held_out_whole(corpus: Corpus) -> None:
    train, val = ({document.name.split(".")[0] for document in corpus.side(side)} for side in Side)
    assert not train & val
    assert len(val) >= 6


def test_no_unit_is_most_of_the_validation_text() -> None:
    units = [Unit(str(number), [Document("", "x" * (90_000 if number % 3 else 5_000))]) for number in range(300)]
    held_out = _hold_out(units, VAL_BYTES)
    assert all(int(name) % 3 == 0 for name in held_out)
    assert len(held_out) == 30
    # Where the small ones do not suffice, the large ones follow.
    assert len(_hold_out([unit for unit in units if unit.bytes > 5_000], VAL_BYTES)) == 2


def test_a_topic_and_a_signature_read_as_documentation(corpus: Corpus) -> None:
    texts = {document.name: document.text for side in Side for document in corpus.side(side)}
    assert "\n\ndumps(obj, skipkeys, ensure_ascii," in texts["json"]
    assert "Serialize ``obj`` to a JSON formatted ``str``." in texts["json"]
    assert "class Fraction\n" in texts["fractions"]
    assert any(name.startswith("topic ") for name in texts)


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Another place for the standard library, which does not exist yet."""
    schemes = vars(sysconfig)["_INSTALL_SCHEMES"]
    monkeypatch.setitem(schemes[sysconfig.get_default_scheme()], "stdlib", str(tmp_path / "library"))
    return tmp_path / "library"


def test_more_held_out_than_there_is_names_the_limit(library: Path) -> None:
    library.mkdir()
    (library / "many.py").write_text(
        "".join(f'def f{number}():\n    """Does the thing with number {number}."""\n' for number in range(9000))
    )
    with pytest.raises(ConfigError, match=r"data\.val_bytes=900000000 is more than half of the .* bytes found; use at most \d+"):
        DocsSource(DocsConfig(packages=[], val_bytes=900_000_000)).corpus(silent, Path("unused"))


def test_a_python_without_sources_points_to_text(library: Path) -> None:
    source = DocsSource(DocsConfig(packages=[], val_bytes=VAL_BYTES))
    with pytest.raises(ConfigError, match="came without its library's sources; use data=text"):
        source.corpus(silent, Path("unused"))


def test_packages_are_read_and_not_imported(corpus: Corpus) -> None:
    texts = {document.name: document.text for side in Side for document in corpus.side(side)}
    assert "curious things" in texts["wonderland"]
    assert "Half a pair: ?" in texts["wonderland.half"]
    assert "wonderland.broken" not in texts


def test_every_package_that_cannot_be_read_is_named(package: Path) -> None:
    with pytest.raises(ConfigError) as error:
        DocsSource(DocsConfig(packages=["wonderlant", "json", "wonderland.half"], val_bytes=VAL_BYTES))
    assert "data.packages=wonderlant is not installed; did you mean wonderland?" in str(error.value)
    assert "data.packages=json is in the standard library" in str(error.value)
    assert "name the package, wonderland" in str(error.value)


def test_the_fingerprint_follows_the_sources(package: Path) -> None:
    def fingerprint(val_bytes: int = VAL_BYTES) -> str:
        return DocsSource(DocsConfig(packages=[package.name], val_bytes=val_bytes)).fingerprint()

    before = fingerprint()
    assert before == fingerprint()
    assert before != fingerprint(VAL_BYTES + 1)
    more = package / "more.py"
    more.write_text('"""Another text."""\n')
    after = fingerprint()
    more.unlink()
    assert before == fingerprint() != after
