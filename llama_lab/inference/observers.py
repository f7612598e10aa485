"""How the training loop looks at its model: validation and tasks over all ranks, samples from the first."""

import random
from collections.abc import Callable

from llama_lab.config.schema import RunConfig, SampleConfig, Window
from llama_lab.data.prepare import PreparedData
from llama_lab.data.stream import TokenStream
from llama_lab.data.tokenizer import Tokenizer
from llama_lab.inference.beginnings import beginnings
from llama_lab.inference.evaluate import Evaluation, evaluate, together
from llama_lab.inference.few_shot import load_prompt_set
from llama_lab.inference.generate import generate
from llama_lab.inference.options import Sampling
from llama_lab.inference.score import score_task
from llama_lab.inference.tasks import load_tasks
from llama_lab.model.llama import Llama
from llama_lab.training.metrics import Sample
from llama_lab.training.observing import Observers
from llama_lab.training.processes.worker import Worker


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


def score(
    model: Llama, tokenizer: Tokenizer, run: RunConfig, worker: Worker, stopped: Callable[[], bool]
) -> dict[str, dict[str, float]]:
    """Answer the run's tasks at its precision. All ranks take part and get the same result."""
    assert run.eval is not None
    place, found = worker.place, {}
    for task in load_tasks(run.eval.tasks):
        with worker.autocast(run.precision):
            answered = score_task(model, tokenizer, task, rank=place.rank, world_size=place.world_size, stopped=stopped)
        found[task.name] = answered.values()
    return found


def sample(model: Llama, data: PreparedData, node: SampleConfig, seed: int, stopped: Callable[[], bool]) -> list[Sample]:
    """A continuation of each prompt, taken as the beginning of a document, and of one from a set that `seed` draws.

    Without prompts those documents are continued that are held out.

    The same seed and weights give the same texts. Steps are not recorded as CUDA graphs here: training needs the memory, and there
    are too few of them to be worth it.
    """
    tokenizer = data.tokenizer
    prompts = beginnings(data) if node.prompts is None else node.prompts
    asked: list[tuple[str, str | None]] = [(prompt, None) for prompt in prompts]
    if node.prompt_sets:
        draw = random.Random(seed)
        chosen = load_prompt_set(draw.choice(node.prompt_sets))
        room = model.max_seq_len - node.new_tokens - 1
        asked.append((chosen.prompt(draw, lambda prompt: len(tokenizer.encode(prompt)) <= room), chosen.name))
    outputs = generate(
        model,
        [[tokenizer.eos_id, *tokenizer.encode(prompt)] for prompt, _ in asked],
        new_tokens=node.new_tokens,
        sampling=Sampling(
            temperature=node.temperature,
            top_k=node.top_k,
            top_p=node.top_p,
            min_p=node.min_p,
            repetition_penalty=node.repetition_penalty,
        ),
        # Updates follow each other by one; no two of their texts share their draws.
        seeds=[(seed << 16) % 2**63 + number for number in range(len(asked))],
        eos_id=tokenizer.eos_id,
        stopped=stopped,
    )
    return [Sample(prompt, tokenizer.decode(output), name) for (prompt, name), output in zip(asked, outputs, strict=True)]


OBSERVERS = Observers(evaluate=validate, score=score, sample=sample)
