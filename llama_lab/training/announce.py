"""What a run says before its first update and after its last."""

import shlex

import torch

from llama_lab.config.schema import BpeConfig, Compile, Device, DocsConfig, RunConfig
from llama_lab.data.mixture import exposures
from llama_lab.data.prepare import PreparedData
from llama_lab.model.count import flops_per_token, parameters
from llama_lab.training.console import Console
from llama_lab.training.foresight.forecast import said
from llama_lab.training.metrics import short_count, short_time
from llama_lab.training.run_folder import RunFolder, extending_command, relative
from llama_lab.training.saving.retention import beside_free, need
from llama_lab.training.tracking.tracker import Tracker

SHOWN_FILES = ("metrics.jsonl", "samples.jsonl", "checkpoints/", "plots/loss.png")
SMALL_MODEL = 20_000_000
BUSY_TOKENS = 16_384
"""At once on a GPU: with fewer its products are too small to run at full speed, and it waits for what it is to do next."""


def say_hello(run: RunConfig, folder: RunFolder, data: PreparedData, console: Console) -> None:
    """Say what is about to be trained, on what, and the loss it has to start from."""
    vocabulary = data.tokenizer.vocab_size
    size = parameters(run.model, vocabulary)
    tokens = run.updates * run.data.tokens_per_update
    cost = tokens * flops_per_token(run.model, vocabulary, run.data.max_seq_len)
    processes = "1 process" if run.hardware.processes == 1 else f"{run.hardware.processes} processes"
    device = torch.cuda.get_device_name() if run.hardware.device is Device.cuda else run.hardware.device.value
    short = ""
    if isinstance(run.tokenizer, BpeConfig) and vocabulary < run.tokenizer.vocab_size:
        short = f" (not the {run.tokenizer.vocab_size:,} of tokenizer.vocab_size: the text has no further pair that occurs twice)"
    compiled = ", compiled (the first update takes a while, once for this shape)" if run.hardware.compile is Compile.always else ""
    console.say(f"Run folder: {relative(folder.path)}", style="bold")
    console.say(f"Model: {size:,} parameters, context {run.data.max_seq_len}, vocabulary {vocabulary}{short}")
    console.say(
        f"Budget: {run.updates:,} updates of {run.data.tokens_per_update:,} tokens = {short_count(tokens)} tokens; {cost:.2e} FLOPs"
    )
    for source, exposure in zip(data.sources, exposures(run, data), strict=True):
        gives = f"{source.name} gives {100 * exposure.share:.1f} %, " if len(data.sources) > 1 else ""
        console.say(f"Data: {gives}{short_count(source.train.tokens)} tokens, {exposure.said}")
    console.say(f"Device: {processes} on {device}, {run.precision.value}, micro-batch {_micro_batch(run)}{compiled}")
    if (advice := batch_advice(run, size)) is not None:
        console.say(advice)
    console.say(f"Checkpoints: {beside_free(need(run, vocabulary), folder.checkpoints)}")
    if (foreseen := said(folder.meta().get("predicted", {}))) is not None:
        console.say(f"Foreseen: {foreseen}")


def batch_advice(run: RunConfig, size: int) -> str | None:
    """What to type where a GPU gets too few tokens at a time to be busy; null where it does not, or the model is small anyway.

    Args:
        run: resolved.
        size: the model's parameters.
    """
    processes = run.hardware.processes or 1
    share = run.data.tokens_per_update // processes
    if run.hardware.device is not Device.cuda or size < SMALL_MODEL or share >= BUSY_TOKENS:
        return None
    more = 8 * BUSY_TOKENS * processes // run.data.max_seq_len * run.data.max_seq_len
    each = " on each" if processes > 1 else ""
    return (
        f"  {share:,} tokens an update{each} do not keep a GPU busy: a larger data.tokens_per_update, such as {more}, trains far "
        "more tokens a second, with another curve"
    )


def _micro_batch(run: RunConfig) -> str:
    """What was asked for, and how many windows a process has where they are fewer."""
    windows = -(-run.windows_per_update // (run.hardware.processes or 1))
    if run.micro_batch <= windows:
        return str(run.micro_batch)
    return f"{windows} (of {run.micro_batch}; an update has no more windows)"


def say_results(run: RunConfig, folder: RunFolder, data: PreparedData, status: str, tracker: Tracker, console: Console) -> None:
    """Say what came out, where it lies, and what to type next."""
    summary = folder.summary()
    console.say("")
    if status == "preempted":
        again = "the same command without fresh=true" if run.fresh else "the same command"
        console.say(f"Stopped after update {summary.get('update', 0)} of {run.updates}; {again} goes on from there", style="bold")
        return
    console.say(f"Finished {run.updates:,} updates in {short_time(summary.get('seconds', 0.0))}", style="bold")
    if (bits := summary.get("val/bits_per_byte")) is not None:
        console.say(f"Bits per byte of held-out text: {bits:.3f}")
        for name, label in (("xz", "xz -9e"), ("gzip", "gzip -9"), ("unigram", "token frequencies alone")):
            if (reached := data.baselines.get(f"{name}_bits_per_byte")) is not None:
                console.say(f"    {label:<24} {reached:.3f}   (the model needs {100 * bits / reached:.0f} % of it)")
    elif summary.get("val/loss") is not None:
        console.say(f"Validation loss: {summary['val/loss']:.4f}")
    here = relative(folder.path)
    written = [name for name in SHOWN_FILES if (folder.path / name).exists()]
    console.say(f"Everything is in {here}: {', '.join([*written, '…'])}")
    console.say("Next:")
    for command, purpose in suggestions(run, data, folder):
        console.say(f"    {command:<56}  # {purpose}")
    if (where := tracker.where()) is not None:
        console.say(f"    {where}")


def suggestions(run: RunConfig, data: PreparedData, folder: RunFolder) -> list[tuple[str, str]]:
    """(command, what it does): sensible next steps after this run."""
    typed = folder.meta().get("command") or []  # of a run started from Python, for which there is nothing to type
    found = [(f"llama-lab generate {shlex.quote(relative(folder.path))} -i", "how it goes on with what you type")]
    if run.hardware.device is Device.cuda and isinstance(run.data, DocsConfig):
        larger = "llama-lab train model=llama_97m data=tinystories data.tokens_per_update=65536 training_tokens=200_000_000"
        found.append((larger, "a model and stories that are worth this GPU; needs the extra llama_lab[data]"))
    if (longer := extending_command(run, folder.path, 2 * run.training_tokens)) is not None:
        found.append((longer, "twice the budget, from a checkpoint of this run"))
    if typed[1:2] == ["train"]:
        words = [word for word in typed if not word.startswith(("optim.max_lr=", "fresh="))]
        rates = f"optim.max_lr={run.optim.max_lr / 2:g},{run.optim.max_lr * 2:g}"
        found.append((shlex.join([*words, "-m", rates]), "a sweep"))
    found.append(("llama-lab train --help", "groups, presets and fields"))
    return found
