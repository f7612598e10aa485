"""Text in, text out: nothing is given before it is certain, stop texts end it, and every wrong prompt is named."""

import random

import pytest
import torch

from llama_lab import load
from llama_lab.config.errors import ConfigError
from llama_lab.data.tokenizer import BytesTokenizer, Tokenizer, train_bpe
from llama_lab.inference.completion import Reader, complete
from llama_lab.inference.options import Beyond, Options

from .conftest import WORDS, small_model

TEXT = "naïve 🙂 café — „Anführung“ 日本語 \u200d👩‍👩‍👧 the end"


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_bpe([" ".join(WORDS)] * 3, 300)


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_what_comes_piece_by_piece_is_what_comes_at_once(kind, bpe):
    tokenizer = BytesTokenizer() if kind == "bytes" else bpe
    draw = random.Random(1)
    for ids in [tokenizer.encode(TEXT), *([draw.randrange(256) for _ in range(40)] for _ in range(50))]:
        reader = Reader(tokenizer)
        pieces = [reader.add([id]) for id in ids]
        assert "".join(pieces) + reader.rest() == tokenizer.decode(ids)


def test_no_character_is_given_before_it_is_whole():
    tokenizer = BytesTokenizer()
    reader = Reader(tokenizer, before=tokenizer.encode("über"))
    assert [reader.add([id]) for id in tokenizer.encode("é🙂x")] == ["", "é", "", "", "", "🙂", "x"]


def test_a_stop_text_ends_where_it_would_begin_and_its_beginning_is_held_back():
    tokenizer = BytesTokenizer()
    reader = Reader(tokenizer, stop=["\n\n", "END"])
    pieces = [reader.add([id]) for id in tokenizer.encode("a\nENb\n\nc")]
    assert pieces == ["a", "", "\n", "", "ENb", "", "", ""]
    assert reader.stopped and reader.rest() == ""
    open_end = Reader(tokenizer, stop=["END"])
    assert [open_end.add([id]) for id in tokenizer.encode("xEN")] == ["x", "", ""]
    assert open_end.rest() == "EN" and not open_end.stopped


@pytest.fixture(scope="module")
def talker():
    """A model over bytes, whose every letter is as good as any."""
    return small_model(5, context=48, vocabulary=257).eval()


def test_prompts_get_side_by_side_what_each_gets_alone(talker):
    tokenizer = BytesTokenizer()
    prompts = ["the", "a much longer text than that", "über"]
    options = Options(max_new_tokens=12, temperature=1.2, top_k=None, seed=3)
    texts = ["", "", ""]
    ends = {}
    for piece in complete(talker, tokenizer, prompts, options):
        texts[piece.index] += piece.text
        if piece.finish:
            ends[piece.index] = piece
    for number, prompt in enumerate(prompts):
        alone = list(complete(talker, tokenizer, [prompt], options, seeds=[3 + number]))
        assert "".join(piece.text for piece in alone) == texts[number]
        assert (alone[-1].new_tokens, alone[-1].finish) == (ends[number].new_tokens, ends[number].finish)
    assert ends[2].prompt_tokens == 6


def test_a_stop_text_frees_its_place_and_leaves_no_trace_in_the_text(talker):
    tokenizer = BytesTokenizer()
    free = "".join(piece.text for piece in complete(talker, tokenizer, ["the"], Options(max_new_tokens=30, temperature=0)))
    stop = free[4:6]
    pieces = list(complete(talker, tokenizer, ["the"], Options(max_new_tokens=30, temperature=0, stop=(stop,))))
    assert "".join(piece.text for piece in pieces) == free[: free.index(stop)]
    assert pieces[-1].finish == "stop" and pieces[-1].new_tokens < 30


def test_without_a_number_a_text_gets_what_the_context_has_room_for(talker):
    tokenizer = BytesTokenizer()
    (*_, last) = complete(talker, tokenizer, ["x" * 40], Options(temperature=0))
    assert (last.new_tokens, last.finish) == (48 - 41, "length")
    (*_, last) = complete(talker, tokenizer, ["x" * 80], Options(temperature=0, beyond_context=Beyond.window))
    assert last.new_tokens == 100


def test_every_prompt_that_cannot_be_continued_is_named_at_once(talker):
    prompts = ["", "x" * 47, [], [1, 999], "x" * 60, "fine"]
    with pytest.raises(ConfigError) as caught:
        complete(talker, BytesTokenizer(), prompts, Options(max_new_tokens=10))
    rules = [rule for _, rule in caught.value.problems]
    assert len(rules) == 5
    assert "is empty" in rules[0] and "is empty" in rules[2]
    assert "leaves no room" in rules[1] and "61 tokens" in rules[4]
    assert "id 999, which is outside the vocabulary; ids are 0 to 256" in rules[3]
    with pytest.raises(ConfigError, match="max_new_tokens=20 fits"):
        complete(talker, BytesTokenizer(), ["x" * 27], Options(max_new_tokens=21))


def test_padding_of_a_vocabulary_is_never_drawn():
    padded = small_model(5, context=48, vocabulary=300).eval()
    tokenizer = BytesTokenizer()
    with torch.no_grad():
        padded.output.weight[:257] *= 1e-3  # so that one of the others is the first choice; none of them has a text
    text = "".join(piece.text for piece in complete(padded, tokenizer, ["the"], Options(max_new_tokens=30, temperature=0)))
    assert len(text.encode()) >= 30


def test_a_loaded_run_answers_one_prompt_or_several(run_folder):
    run = load(run_folder)
    options = {"max_new_tokens": 8, "temperature": 1.0}
    one, two = run.generate(["the model", "a text"], seed=4, **options)
    assert (one, two) == (run.generate("the model", seed=4, **options), run.generate("a text", seed=5, **options))
    assert run.generate([256, 116, 104, 101], max_new_tokens=5, temperature=0) == run.generate(
        "the", max_new_tokens=5, temperature=0
    )
    (found,) = run.complete(["the"], max_new_tokens=8, temperature=0)
    assert (found.prompt_tokens, found.new_tokens, found.finish) == (4, 8, "length")
    assert "".join(piece.text for piece in run.stream("the", max_new_tokens=8, temperature=0)) == found.text


def test_logits_are_those_of_the_checkpoint_that_was_asked_for(run_folder):
    first, last = load(run_folder, 4), load(run_folder)
    assert (first.update, last.update) == (4, 8)
    ids = [256, 97, 98]
    assert not torch.equal(first.logits(ids), last.logits(ids))
    before = last.logits(ids)
    last.generate("the", max_new_tokens=3)
    torch.testing.assert_close(last.logits(ids), before, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("ids", "rule"), [([], "is empty"), ([1, 257], "outside the vocabulary"), ([-1], "outside"), ([1] * 65, "context of 64")]
)
def test_ids_that_a_model_cannot_read_are_named(run_folder, ids, rule):
    with pytest.raises(ConfigError, match=rule):
        load(run_folder).logits(ids)


def test_what_cannot_be_loaded_is_named(run_folder, tmp_path):
    with pytest.raises(ConfigError, match="there are 4, 8"):
        load(run_folder, 5)
    with pytest.raises(ConfigError, match="is no device"):
        load(run_folder, device="tpu")
    with pytest.raises(ConfigError, match="neither fp32 nor bf16"):
        load(run_folder, precision="fp4")  # pyright: ignore[reportArgumentType]
    (tmp_path / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
    with pytest.raises(ConfigError, match="a Hugging Face model, GPT2LMHeadModel; llama-lab import makes a run"):
        load(tmp_path)


def test_bfloat16_is_close_to_float32(run_folder):
    narrow = load(run_folder, precision="bf16").logits([256, 97, 98])
    torch.testing.assert_close(narrow, load(run_folder).logits([256, 97, 98]), atol=0.05, rtol=0.05)
