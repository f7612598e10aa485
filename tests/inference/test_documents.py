"""Texts measured document by document: the loss is validation's, intervals cover the truth, calibration counts what it says."""

import math
import tracemalloc

import numpy as np
import pytest
import torch

from llama_lab.config.schema import Window
from llama_lab.data.shards import FORMAT_VERSION, open_split
from llama_lab.data.stream import TokenStream
from llama_lab.data.tokenizer import BytesTokenizer
from llama_lab.data.writer import SplitWriter, write_manifest
from llama_lab.inference.documents import Calibration, Measured, measure, ratio_interval, together, worth
from llama_lab.inference.evaluate import evaluate
from llama_lab.inference.sources import Document, find_sources

from .conftest import CONTEXT, VOCABULARY

EOS = VOCABULARY - 1
SIZES = (9, 1, 0, 24, 16, 6, 40)


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    draw = np.random.default_rng(0)
    return [Document(draw.integers(0, EOS, size), 3 * size) for size in SIZES]


def test_the_loss_is_that_of_validation(model, documents, tmp_path):
    writer = SplitWriter(tmp_path, "val", vocab_size=VOCABULARY, eos_id=EOS)
    for document in documents:
        writer.add(document.ids, document.text_bytes)
    split = open_split(tmp_path, {"token_dtype": "uint16", "splits": {"val": writer.close()}}, "val")
    assert split is not None
    for limit in (None, 50):
        stream = TokenStream(split, max_seq_len=CONTEXT, window=Window.contiguous, shuffle=False, max_tokens=limit)
        expected = evaluate(model, stream, micro_batch=3)
        found = measure(model, documents, eos_id=EOS, max_tokens=limit)
        assert found.tokens.sum() == expected.tokens
        assert found.loss == pytest.approx(expected.loss_nats, rel=1e-6)
        assert found.bits_per_byte == pytest.approx(expected.bits_per_byte, rel=1e-6)
    assert model.training


def test_each_document_has_its_own_tokens_and_the_one_that_ends_it(model, documents):
    found = measure(model, documents, eos_id=EOS)
    assert found.tokens.tolist() == [size + 1 for size in SIZES]
    assert found.text_bytes.tolist() == [3 * size for size in SIZES]
    ids = np.concatenate([[EOS], *(np.append(document.ids, EOS) for document in documents)])
    nats = []
    model.eval()
    for start in range(0, len(ids) - 1, CONTEXT):
        window = torch.from_numpy(ids[start : start + CONTEXT + 1])
        with torch.no_grad():
            chances = torch.log_softmax(model(window[None, :-1])[0], dim=-1)
        nats += (-chances.gather(1, window[1:, None])[:, 0]).tolist()
    model.train()
    ends = np.cumsum([size + 1 for size in SIZES])
    expected = [sum(nats[start:end]) for start, end in zip([0, *ends], ends, strict=False)]
    np.testing.assert_allclose(found.nats, expected, rtol=1e-5)


def test_sources_together_are_their_documents_together(model, documents):
    parts = [measure(model, part, eos_id=EOS) for part in (documents[:3], documents[3:])]
    whole = together(parts)
    assert whole.loss == pytest.approx(sum(part.nats.sum() for part in parts) / sum(part.tokens.sum() for part in parts))
    assert whole.calibration.counts.sum() == whole.tokens.sum() == sum(SIZES) + len(SIZES)


@pytest.mark.parametrize(("count", "unevenness"), [(10, 0.0), (30, 0.0), (30, 0.5), (60, 1.0), (200, 1.5)])
def test_intervals_cover_the_truth_where_documents_differ(count: int, unevenness: float):
    """Lengths and difficulties vary together, as they do in texts: tokens counted as independent would miss most of the time."""
    draw = np.random.default_rng(0)
    limits = []
    while len(limits) < 2000:
        hardness = draw.normal(3.0, 0.6, count)
        tokens = 300 * np.exp(draw.normal(0.0, unevenness, count))
        found = ratio_interval(hardness * tokens + draw.normal(0, np.sqrt(tokens)), tokens)
        assert (found is None) == (worth(tokens) < 10)
        limits += [] if found is None else [found]
    assert 0.935 < np.mean([found.low < 3.0 < found.high for found in limits]) < 0.975


def test_few_documents_have_no_interval_and_none_reaches_below_zero():
    draw = np.random.default_rng(0)
    nats, tokens = draw.exponential(1.0, 100) ** 3, np.ones(100)
    for count in (1, 2, 9):
        assert ratio_interval(nats[:count], tokens[:count]) is None
    limits = ratio_interval(nats[:10], tokens[:10])
    assert ratio_interval(nats[:20], np.eye(20)[0]) is None, "one document is all there is"
    assert limits is not None and limits.low == 0.0 < nats[:10].mean() < limits.high


def test_documents_of_which_one_is_nearly_all_have_no_interval():
    tokens = np.array([*range(40, 53), 90_000.0])
    assert worth(np.ones(14)) == 14 and 1 < worth(tokens) < 1.02
    found = Measured(tokens * 3, tokens, tokens * 2, Calibration())
    assert found.loss == 3 and found.loss_interval() is None and found.bits_interval() is None
    equal = np.full(14, 1000.0)
    assert Measured(tokens, equal, equal, Calibration()).bits_interval() is not None
    assert Measured(tokens, tokens, equal, Calibration()).bits_interval() is None, "what the loss is not known to"


def test_calibration_counts_by_confidence():
    calibration = Calibration()
    calibration.add(torch.tensor([0.05, 0.5, 0.5, 1.0]), torch.tensor([False, True, False, True]))
    assert calibration.counts[[0, 7, 14]].tolist() == [1, 2, 1]
    assert calibration.accuracy == 0.5
    assert calibration.error == pytest.approx((0.05 + 0.0 + 0.0) / 4)


def test_a_model_that_knows_its_chances_is_calibrated(model):
    """Tokens drawn from the model itself: it is right as often as it says."""
    from llama_lab.inference.generate import generate
    from llama_lab.inference.options import Sampling

    texts = generate(model, [[EOS]] * 80, new_tokens=CONTEXT - 1, sampling=Sampling(temperature=1.0, top_k=None))
    calibration = Calibration()
    # Each in a window of its own, as it was drawn.
    for text in texts:
        found = measure(model, [Document(np.array(text), 0)], eos_id=EOS, max_tokens=len(text))
        for name in ("counts", "confidences", "hits"):
            getattr(calibration, name).__iadd__(getattr(found.calibration, name))
    assert calibration.counts.sum() == 80 * (CONTEXT - 1)
    assert calibration.error < 0.08
    assert math.isclose(calibration.accuracy, calibration.confidences.sum() / calibration.counts.sum(), abs_tol=0.05)


def test_no_document_is_a_mistake_of_the_caller(model):
    with pytest.raises(ValueError, match="no document"):
        measure(model, [], eos_id=EOS)


def test_a_set_of_many_documents_is_read_in_little_memory(tmp_path):
    """The edges of all of them as Python numbers would be 4 MB."""
    tokenizer, count = BytesTokenizer(), 50_000
    writer = SplitWriter(tmp_path, "train", vocab_size=tokenizer.vocab_size, eos_id=tokenizer.eos_id)
    sizes = [number % 3 for number in range(count)]
    for number, size in enumerate(sizes):
        writer.add(np.full(size, number % 200), 2 * size)
    about = {"hash": tokenizer.hash, "vocab_size": tokenizer.vocab_size, "eos_id": tokenizer.eos_id}
    manifest = {"format_version": FORMAT_VERSION, "token_dtype": "uint16", "tokenizer": about, "splits": {"train": writer.close()}}
    write_manifest(tmp_path, manifest | {"source": {"data": "test", "tokenizer": "test"}})
    tokenizer.save(tmp_path / "tokenizer.json")
    (source,) = find_sources(str(tmp_path), tokenizer, print, split="train")
    documents = source.documents()
    tracemalloc.start()
    try:
        next(documents)
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()
    found = list(documents)
    assert [len(document.ids) for document in found] == sizes[1:]
    assert [document.text_bytes for document in found] == [2 * size for size in sizes[1:]]
    assert all((document.ids == number % 200).all() for number, document in enumerate(found, 1))
