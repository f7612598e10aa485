"""Generation against transformers on the same weights: as fast as promised, the same tokens, and memory that stays flat.

    python tests/inference/compare_generate.py                      # speed, batch 1, one pinned thread of this CPU
    python tests/inference/compare_generate.py --device cuda        # the same on a GPU, where steps are recorded as CUDA graphs
    python tests/inference/compare_generate.py --prompts 200        # cache against none, and batches against texts alone
    python tests/inference/compare_generate.py --samples 2000       # memory after so many samples

What is timed is whole calls, ours and theirs in turn, and the fastest of each counts: a busy machine makes any of them slower and
none of them faster. On a CPU it is the thread's own time, without that in which others had the core. Exit code 1 says that
something is not as promised.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llama_lab import compose
from llama_lab.inference.generate import Decoder, Text, continued, generate
from llama_lab.inference.options import Sampling
from llama_lab.model.count import ffn_dim
from llama_lab.model.llama import Llama

GREEDY = Sampling(temperature=0)
TIE = 1e-4
"""Two logits so close may change places by rounding."""
MODELS = {"llama_3m": (4096, 256, 128), "llama_97m": (8192, 2048, 64)}
"""Option of `model` -> vocabulary, context, new tokens of a timed call."""
PROMISED = {"cpu": {"llama_3m": 2.0, "llama_97m": 1.15}, "cuda": {"llama_3m": 2.0, "llama_97m": 2.0}}
PROMPT_TOKENS = 16


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--prompts", type=int, help="compare tokens on so many prompts instead")
    parser.add_argument("--samples", type=int, help="look at memory while so many samples are drawn instead")
    asked = parser.parse_args()
    if asked.device == "cpu":
        torch.set_num_threads(1)
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    holds = True
    for name in asked.models:
        model = build(name, asked.device, torch.bfloat16 if asked.precision == "bf16" else torch.float32)
        if asked.prompts:
            holds &= compare_tokens(name, model, asked.prompts)
        elif asked.samples:
            holds &= watch_memory(name, model, asked.samples)
        else:
            holds &= compare_speed(name, model, asked.repeats)
    return 0 if holds else 1


def build(name: str, device: str, dtype: torch.dtype) -> Llama:
    """A model with weights of the size that trained ones have, so that its logits differ from each other."""
    vocabulary, context, _ = MODELS[name]
    model = Llama(compose([f"model={name}"]).model, vocab_size=vocabulary, max_seq_len=context)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(drawn * parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 1 + 0.1 * drawn)
    return model.to(device, dtype).eval()


def theirs_of(model: Llama) -> LlamaForCausalLM:
    """The same model as transformers has it."""
    config = model.config
    shape: dict[str, Any] = {"hidden_size": config.dim, "intermediate_size": ffn_dim(config), "num_hidden_layers": config.n_layers}
    shape |= {"num_attention_heads": config.n_heads, "num_key_value_heads": config.n_kv_heads or config.n_heads}
    shape |= {"rope_theta": config.rope_theta, "rms_norm_eps": config.norm_eps, "tie_word_embeddings": config.tie_embeddings}
    theirs = LlamaForCausalLM(LlamaConfig(vocab_size=model.vocab_size, max_position_embeddings=model.max_seq_len, **shape))
    names = {"embedding.": "model.embed_tokens.", "blocks.": "model.layers.", "output.": "lm_head.", "norm.": "model.norm."}
    parts = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    parts |= {f"attention.{part}.": f"self_attn.{part}_proj." for part in "qkvo"}
    parts |= {f"ffn.{part}.": f"mlp.{part}_proj." for part in ("gate", "up", "down")}
    state = {}
    for ours, weight in model.state_dict().items():
        theirs_name = next(new + ours.removeprefix(old) for old, new in names.items() if ours.startswith(old))
        for old, new in parts.items():
            theirs_name = theirs_name.replace(f".{old}", f".{new}")
        state[theirs_name] = weight
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    theirs.tie_weights()
    weight = model.embedding.weight
    return theirs.to(weight.device, weight.dtype).eval()


def compare_speed(name: str, model: Llama, repeats: int) -> bool:
    """Time one text of each, in turn."""
    theirs = theirs_of(model)
    count, device = MODELS[name][2], model.embedding.weight.device
    prompt = torch.randint(model.vocab_size, (1, PROMPT_TOKENS), generator=torch.Generator().manual_seed(1)).to(device)
    decoder = Decoder(model, 1, tuned=True)

    def ours() -> list[int]:
        text = Text(prompt[0].tolist(), count, GREEDY, torch.Generator())
        for _ in continued(model, [text], decoder=decoder):
            pass
        return text.new

    def other() -> list[int]:
        options: dict[str, Any] = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        return theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[0, PROMPT_TOKENS:].tolist()

    mine, yours = ours(), other()  # which also warms both up
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(repeats):
        for label, call in (("ours", ours), ("theirs", other)):
            times[label].append(timed(call, device))
    best = {label: min(values) / count * 1e3 for label, values in times.items()}
    ratio, promised = best["theirs"] / best["ours"], PROMISED[device.type][name]
    same = mine == yours
    print(
        f"{name} on {device.type}: {best['ours']:.2f} ms a token, transformers {best['theirs']:.2f}: {ratio:.2f} x"
        f" (promised {promised} x); {'the same tokens' if same else 'tokens differ from number ' + str(first_gap(mine, yours))}"
    )
    return ratio >= promised


def timed(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of a call."""
    if device.type == "cpu":
        start = time.thread_time()
        call()
        return time.thread_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def first_gap(ours: list[int], theirs: list[int]) -> int:
    """Place of the first token that differs."""
    return next(place for place, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1])


def compare_tokens(name: str, model: Llama, prompts: int) -> bool:
    """Greedy texts: in batches and alone, with the cache and from the whole context anew."""
    draw = torch.Generator().manual_seed(2)
    sizes = torch.randint(1, 33, (prompts,), generator=draw).tolist()
    given = [torch.randint(model.vocab_size, (size,), generator=draw).tolist() for size in sizes]
    count = 24
    together = generate(model, given, new_tokens=count, sampling=GREEDY, batch=16)
    texts = [Text(list(prompt), count, GREEDY, torch.Generator()) for prompt in given]
    for _ in continued(model, texts, decoder=Decoder(model, 1, tuned=True)):
        pass
    alone = [text.new for text in texts]
    differing, ties, wrong = 0, 0, 0
    for prompt, first, second in zip(given, together, alone, strict=True):
        ids = [*prompt, *second]
        with torch.no_grad():
            logits = model(torch.tensor([ids[:-1]], device=model.embedding.weight.device))[0, len(prompt) - 1 :].float().cpu()
        # Up to the first gap the texts have read the same; behind it they are different texts.
        for other in (first, logits.argmax(dim=-1).tolist()):
            if other != second:
                differing += 1
                best = logits[first_gap(other, second)].topk(2).values
                ties += bool(best[0] - best[1] <= TIE)
                wrong += bool(best[0] - best[1] > TIE)
    print(
        f"{name}: {prompts} prompts of {count} new tokens, batched, alone and without a cache: {differing} differ, {ties} by ties"
    )
    return wrong == 0


def watch_memory(name: str, model: Llama, samples: int) -> bool:
    """The process's memory, or the GPU's, after a tenth of the samples and after all of them."""
    device = model.embedding.weight.device
    seen = []
    for number in range(samples):
        generate(model, [[1, 2, 3]] * 4, new_tokens=8, sampling=Sampling(), seeds=range(number, number + 4))
        if number + 1 in (max(1, samples // 10), samples):
            seen.append(torch.cuda.memory_allocated() / 2**20 if device.type == "cuda" else resident_mib())
    print(f"{name}: {seen[0]:.1f} MiB after {max(1, samples // 10)} calls of 4 samples, {seen[-1]:.1f} MiB after {samples}")
    return seen[-1] - seen[0] < 8


def resident_mib() -> float:
    """Memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


if __name__ == "__main__":
    sys.exit(main())
