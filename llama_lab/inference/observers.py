"""How the training loop looks at its model: validation over all ranks, samples from the first."""

from collections.abc import Callable

from llama_lab.config.schema import RunConfig, SampleConfig, Window
from llama_lab.data.prepare import PreparedData
from llama_lab.data.stream import TokenStream
from llama_lab.data.tokenizer import Tokenizer
from llama_lab.inference.evaluate import Evaluation, evaluate, together
from llama_lab.inference.generate import generate
from llama_lab.inference.options import Sampling
from llama_lab.model.llama import Llama
from llama_lab.training.loop import Observers
from llama_lab.training.worker import Worker


def validate(model: Llama, data: PreparedData, run: RunConfig, worker: Worker, stopped: Callable[[], bool]) -> Evaluation:
    """Score the held-out tokens of all sources at the run's precision. All ranks take part and get the same result.

    Validation windows are contiguous whatever training does, so that runs with either kind are measured alike.
    """
    assert run.eval is not None
    length, limit, place = run.data.max_seq_len, run.eval.max_tokens, worker.place
    found = {}
    for source in data.sources:
        if source.val is not None:
            stream = TokenStream(source.val, max_seq_len=length, window=Window.contiguous, shuffle=False, max_tokens=limit)
            with worker.autocast(run.precision):
                found[source.name] = evaluate(
                    model,
                    stream,
                    micro_batch=run.micro_batch,
                    rank=place.rank,
                    world_size=place.world_size,
                    stopped=stopped,
                )
    return together(found) if len(data.sources) > 1 else next(iter(found.values()))


def sample(model: Llama, tokenizer: Tokenizer, node: SampleConfig, seed: int, stopped: Callable[[], bool]) -> list[str]:
    """A continuation of each prompt, taken as the beginning of a document. The same seed and weights give the same text."""
    outputs = generate(
        model,
        [[tokenizer.eos_id, *tokenizer.encode(prompt)] for prompt in node.prompts],
        new_tokens=node.new_tokens,
        sampling=Sampling(temperature=node.temperature, top_k=node.top_k),
        seed=seed,
        eos_id=tokenizer.eos_id,
        stopped=stopped,
    )
    return [tokenizer.decode(output) for output in outputs]


OBSERVERS = Observers(evaluate=validate, sample=sample)
