"""Generation: neither cache nor company changes a text, chance comes from its generator alone, and the model is left as it was."""

from itertools import islice

import pytest
import torch

from llama_lab.inference.generate import Decoder, Text, continued, generate
from llama_lab.inference.options import Sampling
from llama_lab.inference.plain_step import PlainStep
from llama_lab.model.cache import KVCache, Step
from llama_lab.model.llama import Llama

from .conftest import CONTEXT, VOCABULARY, small_model

GREEDY = Sampling(temperature=0)
FREE = Sampling(temperature=1.0, top_k=5)


def random_prompts(count: int, longest: int, seed: int = 0, vocabulary: int = VOCABULARY) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(vocabulary, (size,), generator=generator).tolist() for size in sizes]


def uncached(model: Llama, prompt: list[int], new_tokens: int) -> list[int]:
    """Greedy tokens, each from a fresh look at the whole context, by the documented rule of what the context is."""
    model.eval()
    longest = model.max_seq_len
    context, output = prompt[-longest:], []
    with torch.no_grad():
        for _ in range(new_tokens):
            if len(context) > longest:
                context = context[-(longest // 2) :]
            output.append(int(model(torch.tensor([context]))[0, -1].argmax()))
            context = [*context, output[-1]]
    model.train()
    return output


@pytest.mark.parametrize("length", [1, 5, CONTEXT - 1, CONTEXT, CONTEXT + 8])
def test_greedy_tokens_are_those_of_no_cache_even_beyond_the_context(model, length):
    prompt = torch.randint(31, (length,), generator=torch.Generator().manual_seed(0)).tolist()
    expected = uncached(model, prompt, 3 * CONTEXT)
    assert generate(model, [prompt], new_tokens=3 * CONTEXT, sampling=GREEDY) == [expected]
    assert len(set(expected)) > 3


@pytest.mark.parametrize("sampling", [GREEDY, FREE], ids=["greedy", "drawn"])
def test_company_changes_no_text(model, sampling):
    """Batches of three, so that texts of all lengths end and begin beside each other, and windows start anew."""
    prompts = random_prompts(20, CONTEXT + 4)
    alone = [
        generate(model, [prompt], new_tokens=CONTEXT, sampling=sampling, seeds=[number], eos_id=3)[0]
        for number, prompt in enumerate(prompts)
    ]
    assert generate(model, prompts, new_tokens=CONTEXT, sampling=sampling, eos_id=3, batch=3) == alone
    assert generate(model, prompts, new_tokens=CONTEXT, sampling=sampling, eos_id=3, batch=64) == alone
    assert len({len(text) for text in alone}) > 2


SHAPES = [{}, {"n_kv_heads": 2, "qk_norm": True, "norm_eps": 0.1}, {"n_heads": 4, "n_kv_heads": 2, "tie_embeddings": True}]


@pytest.mark.parametrize("shape", SHAPES)
def test_texts_of_different_lengths_step_as_each_would_alone(shape):
    model = small_model(1, **shape).eval().double()
    prompts = random_prompts(4, CONTEXT - 1)
    cache = KVCache(model.config, batch=5, max_len=CONTEXT, dtype=torch.float64, device="cpu")
    with torch.no_grad():
        for row, prompt in enumerate(prompts):
            model(torch.tensor([prompt]), cache=cache.row(row, 0))
        lengths = [len(prompt) for prompt in prompts]
        step = Step(cache, torch.tensor(lengths), max(lengths) + 1)
        found = model(torch.full((4, 1), 7), cache=step)[:, 0]
        expected = torch.stack([model(torch.tensor([[*prompt, 7]]))[0, -1] for prompt in prompts])
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)


def test_draws_come_from_the_generator_alone(model):
    def texts(seed: int) -> list[list[int]]:
        return generate(model, [[1], [2, 3]], new_tokens=20, sampling=FREE, seeds=[seed, seed + 7])

    global_state = torch.random.get_rng_state()
    assert texts(0) == texts(0) != texts(1)
    assert torch.equal(global_state, torch.random.get_rng_state())


def test_the_model_is_left_as_it_was(model):
    weights = [parameter.clone() for parameter in model.parameters()]
    assert model.training
    generate(model, [[1]], new_tokens=3, sampling=FREE)
    tokens = continued(model, [Text([1], 5, FREE, torch.Generator())])
    next(tokens)
    assert torch.is_grad_enabled() and not model.training
    tokens.close()
    assert model.training and all(module.training for module in model.modules())
    assert all(torch.equal(one, other) and one.grad is None for one, other in zip(model.parameters(), weights, strict=True))


def test_a_text_ends_where_its_end_is_drawn_and_forbidden_tokens_never_come(model):
    greedy = generate(model, [[7]], new_tokens=20, sampling=GREEDY)[0]
    end = greedy[4]
    assert generate(model, [[7]], new_tokens=20, sampling=GREEDY, eos_id=end) == [greedy[: greedy.index(end)]]
    free = Sampling(temperature=2.0, top_k=None)
    others = generate(model, [[7]], new_tokens=200, sampling=free, forbidden_ids=greedy)[0]
    assert len(others) == 200 and not set(others) & set(greedy)


def test_the_token_that_ends_a_text_is_not_penalised_for_the_one_before_it(model):
    """Every document begins with it, so a penalty would make texts longer."""
    with torch.no_grad():
        logits = model.eval()(torch.arange(VOCABULARY).unsqueeze(1))[:, -1]
    model.train()
    penalty = Sampling(temperature=0, repetition_penalty=1e6)
    tried = 0
    for end in range(VOCABULARY):
        # The likeliest other token that the penalty would put before it.
        others = [token for token in range(VOCABULARY) if 0 < logits[end, token] < logits[end, end]]
        if not others:
            continue
        tried += 1
        other = max(others, key=lambda token: float(logits[end, token]))
        forbidden = [token for token in range(VOCABULARY) if token not in (end, other)]
        assert generate(model, [[end]], new_tokens=1, sampling=penalty, eos_id=end, forbidden_ids=forbidden) == [[]]
        assert generate(model, [[end]], new_tokens=1, sampling=penalty, forbidden_ids=forbidden) == [[other]]
    assert tried


def test_tokens_come_as_they_are_asked_for_and_a_reader_may_end_a_text(model):
    text = Text([7], 1000, GREEDY, torch.Generator())
    tokens = continued(model, [text])
    assert [len(found.new) for found in islice(tokens, 3)] == [1, 2, 3]
    text.finish = "stop"
    assert list(tokens) == []
    assert text.new == generate(model, [[7]], new_tokens=3, sampling=GREEDY)[0]


def test_a_decoder_can_be_used_again(model):
    decoder = Decoder(model.eval(), 2)
    prompts = random_prompts(5, 6)
    for _ in range(2):
        texts = [Text(list(prompt), 6, GREEDY, torch.Generator()) for prompt in prompts]
        for _ in continued(model, texts, decoder=decoder):
            pass
        assert [text.new for text in texts] == [uncached(model, prompt, 6) for prompt in prompts]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_of_one_text_on_a_cpu_is_the_models_own(shape):
    """Also with the weights that were laid out anew, whose values are the same, and which training could go on with."""
    model, untouched = small_model(2, dropout=0.0, **shape), small_model(2, dropout=0.0, **shape)
    caches = [KVCache(model.config, batch=1, max_len=CONTEXT, dtype=torch.float32, device="cpu") for _ in range(2)]
    step = PlainStep(model, caches[0])
    assert all(torch.equal(one, model.state_dict()[name]) for name, one in untouched.state_dict().items())
    with torch.no_grad():
        for place, token in enumerate((3, 1, 4, 1, 5, 9, 2, 6)):
            expected = untouched(torch.tensor([[token]]), cache=caches[1])[0]
            torch.testing.assert_close(step(token, place), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(caches[0].keys, caches[1].keys, atol=1e-5, rtol=1e-5)
    tokens = torch.tensor([[3, 1, 4, 1, 5]])
    losses = [one(tokens[:, :-1], tokens[:, 1:]) for one in (model, untouched)]
    torch.testing.assert_close(*losses)


def test_tuned_texts_are_those_of_no_cache():
    model = small_model(13)
    decoder = Decoder(model.eval(), 2, tuned=True)
    prompts = random_prompts(9, CONTEXT + 3)
    texts = [Text(list(prompt), 2 * CONTEXT, GREEDY, torch.Generator()) for prompt in prompts]
    for _ in continued(model, texts, decoder=decoder):
        pass
    assert [text.new for text in texts] == [uncached(model, prompt, 2 * CONTEXT) for prompt in prompts]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([], "an empty prompt"), ([3, 31], "ids 3 to 31 are not all in a vocabulary of 31"), ([-1], "ids -1 to -1")],
)
def test_mistakes_are_named(model, prompt, message):
    with pytest.raises(ValueError, match=message):
        generate(model, [prompt], new_tokens=1, sampling=GREEDY)


@pytest.mark.gpu
def test_a_recorded_step_gives_the_tokens_of_a_plain_one():
    model = small_model(3, context=600).eval().cuda()
    prompts = random_prompts(7, 300, seed=4)
    plain = generate(model, prompts, new_tokens=40, sampling=GREEDY, batch=3)
    texts = [Text(list(prompt), 40, GREEDY, torch.Generator()) for prompt in prompts]
    for _ in continued(model, texts, decoder=Decoder(model, 3, tuned=True)):
        pass
    assert [text.new for text in texts] == plain
