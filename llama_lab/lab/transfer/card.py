"""The model card of an export: what was trained, on what, how it went, and what came of it, in Markdown.

Everything in it is read from the run's own files. Nothing of the machine's name or user is told.
"""

import json
import math
import shlex
from pathlib import Path
from typing import Any

from llama_lab.config.identity import science
from llama_lab.config.schema import RunConfig, shown
from llama_lab.data.cache import prepared_root
from llama_lab.data.shards import MANIFEST, content_fingerprint
from llama_lab.data.tokenizer import Tokenizer
from llama_lab.model.count import parameters
from llama_lab.training.metrics import read_rows, short_count, short_time
from llama_lab.training.run_folder import RunFolder

CURVE_ROWS = 12
BASELINES = (("xz", "`xz -9e`"), ("gzip", "`gzip -9`"), ("unigram", "token frequencies alone"))
HF_USE = """\
```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({folder_text})
model = AutoModelForCausalLM.from_pretrained({folder_text}, dtype=torch.float32)
# A document begins after the end of another, so a prompt that is meant as a beginning does too.
ids = [[tokenizer.bos_token_id, *tokenizer({prompt_text}, add_special_tokens=False).input_ids]]
print(tokenizer.decode(model.generate(torch.tensor(ids), max_new_tokens=40)[0], skip_special_tokens=True))
```

`vllm serve {folder_word}` and `lm_eval --model hf --model_args {pretrained_word}` take the folder as well."""
GGUF_USE = """\
```
llama-cli -m {file_word} -p {prompt_word} -n 40 -no-cnv
```"""


def model_card(
    folder: RunFolder,
    run: RunConfig,
    tokenizer: Tokenizer,
    *,
    update: int,
    target: str,
    out_name: str,
    has_picture: bool,
) -> str:
    """The card's text.

    Args:
        update: after which the exported checkpoint was written.
        target: `hf` or `gguf`.
        out_name: how the export's folder is called in examples.
        has_picture: whether loss.png lies beside it.
    """
    rows = read_rows(folder.path / "metrics.jsonl")
    summary, meta = folder.summary(), folder.meta()
    prompt = prompt_for(run, folder)
    use = _use(target, out_name, prompt)
    size = parameters(run.model, tokenizer.vocab_size)
    tokens = update * run.data.tokens_per_update
    shape = " with normalised queries and keys, as in Qwen3," if run.model.qk_norm else ""
    heading = f"""\
---
library_name: {"transformers" if target == "hf" else "gguf"}
pipeline_tag: text-generation
tags:
- llama_lab
- llama
---

# {folder.path.name}

A Llama{shape} of {size:,} parameters, trained by llama_lab on {tokens:,} tokens ({update:,} updates)."""
    sections = {
        "Use": use,
        "Verdicts": "\n".join(f"- {line}" for line in _verdicts(run, summary, meta, rows, update)),
        "Curve": _curve(rows, has_picture),
        "Data": _data(run, tokenizer, meta),
        "Config": _config(run),
        "Where it came from": _origin(summary, meta, folder),
    }
    return heading + "".join(f"\n\n## {title}\n\n{text}" for title, text in sections.items() if text) + "\n"


def prompt_for(run: RunConfig, folder: RunFolder) -> str:
    """A text that the run was asked to continue while it trained."""
    if run.sample is not None and run.sample.prompts:
        return run.sample.prompts[0]
    rows = read_rows(folder.path / "samples.jsonl")
    return next((row["prompt"] for row in rows if row.get("set") is None and row["prompt"]), "The")


def _use(target: str, folder: str, prompt: str) -> str:
    """What to type, whatever the folder's name and the prompt hold: newlines, quotes, spaces."""
    if target == "gguf":
        return GGUF_USE.format(file_word=shlex.quote(f"{folder}/model.gguf"), prompt_word=shlex.quote(prompt))
    # A text of JSON is one of Python, unless a letter beyond 16 bits were written as the two halves that JSON knows.
    folder_text, prompt_text = (json.dumps(text, ensure_ascii=False) for text in (folder, prompt))
    folder_word, pretrained_word = shlex.quote(folder), shlex.quote(f"pretrained={folder}")
    return HF_USE.format(folder_text=folder_text, prompt_text=prompt_text, folder_word=folder_word, pretrained_word=pretrained_word)


def _verdicts(run: RunConfig, summary: dict[str, Any], meta: dict[str, Any], rows: list[dict[str, Any]], update: int) -> list[str]:
    """What can be said of the run, a sentence each."""
    found = [f"Training: {summary.get('status', 'not begun')}, {summary.get('update', 0):,} of {run.updates:,} updates"]
    if update != summary.get("update", 0):
        found.append(f"Not the run's last state: this is the checkpoint after update {update:,}")
    validated = [row for row in rows if row.get("val/loss") is not None and row["update"] <= update]
    if validated:
        last, best = validated[-1], min(validated, key=lambda row: row["val/loss"])
        where = "its best so far" if best is last else f"its best was {best['val/loss']:.4f} after update {best['update']:,}"
        found.append(f"Held-out text after update {last['update']:,}: {_measures(last)}; {where}")
        found += _beside_baselines(run, meta, last)
    else:
        found.append("Held-out text: never validated up to here")
    found += _tasks([row for row in rows if row["update"] <= update])
    if run.guard.spike_deviations is not None:
        spikes = sum(bool(row.get("train/spike")) for row in rows if row["update"] <= update)
        found.append(f"Spikes of the loss: {spikes or 'none'}")
    if run.guard.max_skipped:
        found.append(f"Updates left out because a number was not finite: {_last(rows, 'train/skipped', update) or 'none'}")
    found.append("The checkpoint was whole: every checksum was compared when this was written")
    return found


def _measures(row: dict[str, Any]) -> str:
    bits = row.get("val/bits_per_byte")
    said = f"loss {row['val/loss']:.4f} nats a token, perplexity {math.exp(row['val/loss']):.2f}"
    return said + (f", {bits:.4f} bits a byte" if bits is not None else "")


def _tasks(rows: list[dict[str, Any]]) -> list[str]:
    """What the tasks of the run came to last."""
    last: dict[str, dict[str, float]] = {}
    for row in rows:
        for key, value in row.items():
            if key.startswith("task/") and value is not None:
                _, task, name = key.split("/", 2)
                last.setdefault(task, {})[name] = value
    return [f"Task {task}: " + ", ".join(f"{name} {value:.4g}" for name, value in found.items()) for task, found in last.items()]


def _beside_baselines(run: RunConfig, meta: dict[str, Any], row: dict[str, Any]) -> list[str]:
    """How the model does beside compressors, where the prepared data still says how they do."""
    bits, known = row.get("val/bits_per_byte"), _baselines(run, meta.get("data", {}).get("data"))
    found = []
    for name, said in BASELINES:
        if bits is not None and (reached := known.get(f"{name}_bits_per_byte")):
            verb = "better" if bits < reached else "no better"
            found.append(f"Predicts held-out text {verb} than {said} ({bits:.3f} against {reached:.3f} bits a byte)")
    return found


def _baselines(run: RunConfig, fingerprint: str | None) -> dict[str, float]:
    """What the manifest of the run's data says, wherever on this machine it lies; nothing if it is gone."""
    places = list(prepared_root().glob(f"*/{MANIFEST}"))
    if path := getattr(run.data, "path", None):
        places.append(Path(path).expanduser() / MANIFEST)
    for place in places:
        try:
            manifest = json.loads(place.read_text(encoding="utf-8"))
            if content_fingerprint(manifest) == fingerprint:
                return manifest.get("baselines", {})
        except (OSError, ValueError, LookupError, TypeError):
            continue
    return {}


def _curve(rows: list[dict[str, Any]], has_picture: bool) -> str:
    """A dozen points of the loss, evenly over the run, as a table under the picture."""
    training = [row for row in rows if row.get("train/loss") is not None]
    if not training:
        return ""
    picked = sorted({round(place * (len(training) - 1) / (CURVE_ROWS - 1)) for place in range(CURVE_ROWS)})
    lines = ["| update | tokens | training loss | validation loss |", "|---:|---:|---:|---:|"]
    validations = {row["update"]: row["val/loss"] for row in rows if row.get("val/loss") is not None}
    shown_updates = {training[index]["update"] for index in picked} | set(_thinned(sorted(validations)))
    losses = {row["update"]: row["train/loss"] for row in training}
    tokens = {row["update"]: row["tokens"] for row in rows}
    for update in sorted(shown_updates):
        cells = [f"{values[update]:.4f}" if update in values else "" for values in (losses, validations)]
        lines.append(f"| {update:,} | {short_count(tokens[update])} | {cells[0]} | {cells[1]} |")
    picture = "![Loss over training tokens](loss.png)\n\n" if has_picture else ""
    return picture + "\n".join(lines)


def _thinned(updates: list[int]) -> list[int]:
    """At most a dozen of them, the last included."""
    step = -(-len(updates) // CURVE_ROWS)
    return updates[::-1][::step] if updates else []


def _data(run: RunConfig, tokenizer: Tokenizer, meta: dict[str, Any]) -> str:
    fingerprints = meta.get("data", {})
    kind, node = run.origin.choices.get("data", "text"), science(run)["data"]
    settings = ", ".join(f"`{name}={shown(value)}`" for name, value in node.items() if name != "type" and value not in (None, []))
    return "\n".join(
        [
            f"- Source: `data={kind}`, {settings}",
            f"- Fingerprint of tokens and tokenizer: `{fingerprints.get('data', 'unknown')}`",
            f"- Tokenizer: {tokenizer.vocab_size:,} entries, SHA-256 `{tokenizer.hash}`",
        ]
    )


def _config(run: RunConfig) -> str:
    """Every value that decides the curve. Fields that came later and mean what was done before them are left out."""
    lines = ["| field | value |", "|---|---|"]
    for key, value in science(run).items():
        if isinstance(value, dict):
            lines += [f"| {key}.{name} | {shown(item)} |" for name, item in value.items() if name != "type"]
        else:
            lines.append(f"| {key} | {shown(value)} |")
    return "\n".join(lines)


def _origin(summary: dict[str, Any], meta: dict[str, Any], folder: RunFolder) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in meta.get("versions", {}).items() if version)
    code, machine = meta.get("code", {}), meta.get("machine", {})
    commit = f", commit `{code['commit'][:12]}`{' with changes' if code.get('diff') else ''}" if "commit" in code else ""
    count = machine.get("processes") or 1
    device = machine.get("processor") or machine.get("device") or "something"
    lines = [
        f"- Run `{folder.path.name}`; sources SHA-256 `{str(code.get('sha256', 'unknown'))[:16]}`{commit}",
        f"- {versions or 'versions unknown'}",
        f"- {count} process{'es' if count > 1 else ''} on {device}, {short_time(summary.get('seconds', 0.0))}",
    ]
    if lineage := meta.get("lineage"):
        lines.append(f"- Began from `{lineage['parent']}`")
    return "\n".join(lines)


def _last(rows: list[dict[str, Any]], key: str, update: int) -> Any:
    return next((row[key] for row in reversed(rows) if key in row and row["update"] <= update), None)
