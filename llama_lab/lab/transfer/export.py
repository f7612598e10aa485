"""`llama-lab export`: a run's checkpoint in a form that others load.

RUN -> checkpoint, config, tokenizer -> a draft beside DIR -> DIR, in one step
"""

import argparse
import json
import os
import shlex
import shutil
from pathlib import Path

from llama_lab.config.disk import writing
from llama_lab.config.errors import ConfigError
from llama_lab.config.flags import Parser
from llama_lab.config.identity import load_config
from llama_lab.config.schema import RunConfig
from llama_lab.data.tokenizer import Tokenizer, load_tokenizer
from llama_lab.lab.patterns import RUN_HELP
from llama_lab.lab.transfer.card import model_card, prompt_for
from llama_lab.training.run_folder import RunFolder, find_run, relative
from llama_lab.training.saving.choice import chosen_checkpoint, damaged
from llama_lab.training.saving.manifest import WEIGHTS, Checkpoint, DamagedCheckpoint
from llama_lab.training.saving.retention import short_bytes

SCOPE = "this export"
TARGETS = ("hf", "gguf")
DTYPES = ("fp32", "bf16")
GGUF_FILE = "model.gguf"


def run_export_command(words: list[str]) -> int:
    """Write a run's checkpoint as a Hugging Face folder or a GGUF file; returns the exit code.

    Args:
        words: what follows `export` on the command line.

    Raises:
        ConfigError: there is no such run or checkpoint, the folder is in the way, or the format cannot hold the model.
    """
    try:
        asked = _parser().parse_args(words)
    except SystemExit as stop:
        return int(stop.code or 0)
    files = export(asked.run, asked.out, target=asked.to, update=asked.update, dtype=asked.dtype)
    here = relative(asked.out.absolute())
    print(f"Wrote {here}: " + ", ".join(f"{file.name} ({short_bytes(file.stat().st_size)})" for file in files))
    run = find_run(asked.run)
    prompt = prompt_for(load_config(run.path / "config.yaml"), run).strip().partition("\n")[0]
    print(f"Try it: {_next(asked.to, here, prompt)}")
    return 0


def export(run_folder: Path, out: Path, *, target: str, update: str | None = None, dtype: str = "fp32") -> list[Path]:
    """Write a run's checkpoint in another format.

    Args:
        run_folder: the run's.
        out: the folder to make; it may exist if it is empty.
        target: `hf` for a folder of Hugging Face, `gguf` for a file of llama.cpp.
        update: number of the update that the checkpoint follows, `last` or `best` by validation; None: last.
        dtype: what the weights are rounded to, `fp32` or `bf16`.

    Returns:
        The files written.

    Raises:
        ConfigError: there is no such run or checkpoint, the folder is in the way, or the format cannot hold the model.
    """
    folder = find_run(run_folder)
    run = load_config(folder.path / "config.yaml")
    chosen = chosen_checkpoint(folder, update, scope=SCOPE)
    out = out.expanduser().absolute()
    _check_place(out)
    if target == "gguf":
        from llama_lab.formats.gguf_file import check_gguf

        check_gguf()
    draft = out.with_name(f".{out.name}.draft")
    try:
        with writing(f"--out {out}", "name another folder", scope=SCOPE, goes_on=False):
            out.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir()
            _write(folder, run, draft, out.name, target=target, chosen=chosen, dtype=dtype)
            if out.is_dir():
                out.rmdir()
            os.replace(draft, out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return sorted(out.iterdir())


def _next(target: str, out: str, prompt: str) -> str:
    """What to type to hear the export speak, whatever its path and the prompt hold."""
    if target == "gguf":
        file = shlex.quote(f"{out}/{GGUF_FILE}")
        return f"llama-cli -m {file} -p {shlex.quote(prompt)}"
    model, text = (json.dumps(word, ensure_ascii=False) for word in (out, prompt))
    made = f'pipeline("text-generation", {model})({text})'
    return "python -c " + shlex.quote(f"from transformers import pipeline; print({made})")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="llama-lab export",
        description="Write a checkpoint so that others load it: transformers, vLLM, lm-evaluation-harness (hf), llama.cpp (gguf).",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help=RUN_HELP)
    parser.add_argument("--to", required=True, choices=TARGETS, help="hf: a folder of Hugging Face; gguf: a file of llama.cpp")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="the folder to make")
    parser.add_argument("--update", metavar="N", help="the checkpoint after update N, or last (the default), or best")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="what weights are rounded to; fp32, the default, is exact")
    return parser


def _check_place(out: Path) -> None:
    """Refuse a place where something is: known before any weight is read."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        what = "holds files" if out.is_dir() else "is a file"
        raise ConfigError([(f"--out {out}", f"{what}; name a folder that does not exist yet")], scope=SCOPE)


def _write(folder: RunFolder, run: RunConfig, draft: Path, name: str, *, target: str, chosen: Checkpoint, dtype: str) -> None:
    """Fill a draft: weights, what belongs to them, the card and its picture."""
    from llama_lab.formats.gguf_file import write_gguf
    from llama_lab.formats.hf_weights import write_folder
    from llama_lab.training.metrics import read_rows
    from llama_lab.training.plots import draw_loss
    from llama_lab.training.saving.checkpoint import load_weights

    tokenizer: Tokenizer = load_tokenizer(folder.path / "tokenizer.json")
    try:
        weights = load_weights(chosen)
    except DamagedCheckpoint as error:
        raise damaged(folder, error, scope=SCOPE, files=WEIGHTS) from None
    length = run.data.max_seq_len
    if target == "gguf":
        write_gguf(draft / GGUF_FILE, weights, run.model, tokenizer, name=folder.path.name, max_seq_len=length, dtype=dtype)
    else:
        write_folder(draft, weights, run.model, tokenizer, max_seq_len=length, dtype=dtype)
    has_rows = any("train/loss" in row for row in read_rows(folder.path / "metrics.jsonl"))
    if has_rows:
        draw_loss(folder.path, draft / "loss.png", vocab_size=tokenizer.vocab_size)
    card = model_card(folder, run, tokenizer, update=chosen.update, target=target, out_name=name, has_picture=has_rows)
    (draft / "README.md").write_text(card, encoding="utf-8")
