"""What a run will take, said before it starts: seconds, hours of GPUs, peak memory. Torch-free.

Seconds come from a probe (`lab.probe`), which has trained some updates of such a run on this machine and is kept in the cache; on a
device whose speed docs/performance.md tells, from the FLOPs; elsewhere nobody knows. Memory comes from the same probe, and on a GPU
from a formula (`gpu_memory`). A run writes what was foreseen into meta.json before its first update; summary.json says what became
true: `wall_seconds` and `memory/peak_gib`.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from llama_lab.config import devices
from llama_lab.config.errors import ConfigError
from llama_lab.config.identity import plain_config, science
from llama_lab.config.schema import BudgetConfig, Compile, Device, Precision, Recompute, RunConfig, Window
from llama_lab.data.prepare import PreparedData
from llama_lab.model.count import flops_per_token, parameters
from llama_lab.training.foresight.gpu_memory import gpu_memory
from llama_lab.training.foresight.kept import keep, kept
from llama_lab.training.foresight.occasions import Occasions, occasions
from llama_lab.training.metrics import short_time
from llama_lab.training.run_folder import package_version

PROBES = "probes"
"""Under which name the cache keeps probes."""
UTILISATION = {"H100 80GB HBM3": ((97.5e6, 0.493), (1.267e9, 0.581))}
"""Share of the bf16 peak that training reaches, by a part of the GPU's name: (parameters, share) of models that were measured.
Source: docs/performance.md, at 2,048 tokens a window and 16,384 or more a micro-batch, compiled, on one GPU."""
FP8_PEAK = 2
"""Times its bf16 peak is what a GPU computes in float8."""
MEASURED_NUMBERS, MEASURED_LENGTHS, MEASURED_POSITIONS = (80e6, 1.5e9), (1024, 4096), 16_384
FROM_PROBE, FROM_SPEED, FROM_FORMULA = "a probe", "speeds measured on such a GPU", "a formula"


TOO_SLOW, TOLD_SECONDS = 0.7, 10.0
"""A run that takes less than this share of what a probe foresaw corrects it, if so many seconds were foreseen."""


@dataclass(frozen=True, slots=True)
class Probe:
    """What some updates of a run took. All but `peak_gib` are seconds.

    Attributes:
        start: everything that happens once: imports, processes, compiling, the last words.
        update, validation, score, sample, save: each time one of these happens.
        write: what a save takes in the background, beside the updates. The next one waits for it.
        updates: how many were trained to find out.
    """

    start: float
    update: float
    validation: float
    score: float
    sample: float
    save: float
    write: float
    peak_gib: float
    updates: int

    def seconds(self, times: Occasions) -> float:
        """What a run takes in which all of this happens so often."""
        found = times.updates * self.update + times.validations * self.validation + times.scores * self.score
        found += times.samples * self.sample + times.saves * self.save + (self.write if times.ends_saved else 0.0)
        # Saves that follow each other faster than they are written leave the pace to the disk.
        return self.start + max(found, times.saves * self.write)

    def scaled(self, factor: float) -> "Probe":
        """The same where everything takes so many times as long."""
        seconds = ("start", "update", "validation", "score", "sample", "save", "write")
        return replace(self, **{name: factor * getattr(self, name) for name in seconds})


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a run will take, each with where that is known from.

    Attributes:
        seconds: from the moment that its data is ready to its last word; null if nobody knows.
        peak_gib: of a device's memory, or of the process's on a CPU, as `memory/peak_gib` will say; null likewise.
        processes: of the run; on CUDA each has a GPU.
        unknown: why there are no seconds.
        at_least: seconds that it takes at the very least, where no more is known; null if not even that is.
        at_least_if: what would have to be so for it to take no more.
    """

    processes: int
    seconds: float | None = None
    seconds_from: str = ""
    peak_gib: float | None = None
    peak_from: str = ""
    unknown: str = ""
    at_least: float | None = None
    at_least_if: str = ""

    def rest(self, left: float) -> "Forecast":
        """What it will take from where it stands, with this share of its updates left."""
        if left == 1.0:
            return self
        seconds, at_least = (None if value is None else value * left for value in (self.seconds, self.at_least))
        return replace(self, seconds=seconds, at_least=at_least)

    @property
    def gpu_hours(self) -> float | None:
        """Hours of all devices together."""
        return None if self.seconds is None else self.seconds * self.processes / 3600

    def saved(self) -> dict[str, Any]:
        """What meta.json keeps of it."""
        found: dict[str, Any] = {}
        if self.seconds is not None:
            found |= {"seconds": round(self.seconds, 1), "seconds_from": self.seconds_from}
        if self.peak_gib is not None:
            found |= {"peak_gib": round(self.peak_gib, 3), "peak_from": self.peak_from}
        return found


def foresee(run: RunConfig, data: PreparedData, *, threads: int | None = None) -> Forecast:
    """What a run will take on this machine.

    Args:
        run: resolved, with a micro-batch.
        threads: of the CPU that each process will have; null: as many as one would have that started now.
    """
    known = Forecast(run.hardware.processes or 1)
    vocab_size = data.tokenizer.vocab_size
    if run.hardware.device is Device.cuda:
        memory = gpu_memory(run, vocab_size, run.micro_batch)
        known = replace(known, peak_gib=memory.gib, peak_from=FROM_FORMULA)
    if (probe := known_probe(run, data, threads=threads)) is not None:
        seconds = probe.seconds(occasions(run, vocab_size))
        return replace(known, seconds=seconds, seconds_from=FROM_PROBE, peak_gib=probe.peak_gib, peak_from=FROM_PROBE)
    if run.hardware.device is not Device.cuda:
        return replace(known, unknown=_unknown(run))
    flops = run.updates * run.data.tokens_per_update * flops_per_token(run.model, vocab_size, run.data.max_seq_len)
    speed, several = _speed_of_one(run, vocab_size), known.processes
    if speed is not None and several == 1:
        return replace(known, seconds=flops / speed, seconds_from=FROM_SPEED)
    if speed is not None:
        return replace(
            known, unknown=_unknown(run), at_least=flops / speed / several, at_least_if=f"if {several} GPUs are {several} times one"
        )
    name = devices.probe_cuda().name
    if (peak := devices.bf16_peak_flops(name)) is None:
        return replace(known, unknown=_unknown(run))
    peak *= FP8_PEAK if run.precision is Precision.fp8 else 1
    return replace(known, unknown=_unknown(run), at_least=flops / peak / several, at_least_if="at the whole of its peak")


def kind_of(run: RunConfig, data: PreparedData, *, threads: int | None = None) -> str:
    """The same for runs that take the same for each thing that they do: one probe serves them all."""
    return _key(run, data, threads)[0]


def known_probe(run: RunConfig, data: PreparedData, *, threads: int | None = None) -> Probe | None:
    """What was measured of such runs on this machine."""
    key, _ = _key(run, data, threads)
    try:
        return Probe(**kept(PROBES)[key]["probe"])
    except (KeyError, TypeError):  # none, or one of another version
        return None


def keep_probe(run: RunConfig, data: PreparedData, probe: Probe, *, threads: int | None = None) -> None:
    """Keep what was measured for the next time."""
    key, facts = _key(run, data, threads)
    keep(PROBES, {**kept(PROBES), key: {"probe": asdict(probe), "facts": facts}})


def correct_probe(run: RunConfig, data: PreparedData, seconds: float) -> float | None:
    """Hold what a probe foresees against a whole run, and correct it where the run took much less: the machine was busy then.

    A run that took longer corrects nothing, since it may have had to share the machine itself.

    Args:
        run: finished, in a single start.
        seconds: from the moment that its data was ready to its last word.

    Returns:
        The seconds that were foreseen, if they were wrong; else null.
    """
    if (probe := known_probe(run, data)) is None:
        return None
    foreseen = probe.seconds(occasions(run, data.tokenizer.vocab_size))
    if foreseen < TOLD_SECONDS or seconds > TOO_SLOW * foreseen:
        return None
    keep_probe(run, data, probe.scaled(seconds / foreseen))
    return foreseen


def keep_to_budget(
    budget: BudgetConfig,
    forecasts: Sequence[Forecast],
    subject: str,
    command: str,
    *,
    left: Sequence[float] | None = None,
    to_come: int = 0,
) -> None:
    """Refuse what is foreseen to take more than it may, and what nobody can foresee. What is done costs nothing more.

    Args:
        forecasts: of each run, from its first update to its last.
        subject: what they are, in words.
        command: what measures it, as typed.
        left: the share of each that is still to be trained; null: all of it.
        to_come: further runs that are not known yet; they are taken to be like these.

    Raises:
        ConfigError: it is too much, or not known.
    """
    shares = left or [1.0] * len(forecasts)
    open_ones = [forecast for forecast, share in zip(forecasts, shares, strict=True) if share or to_come]
    if budget.gpu_hours is None or not open_ones:
        return
    setting = f"budget.gpu_hours={budget.gpu_hours:g}"
    if unknown := next((forecast.unknown for forecast in open_ones if forecast.gpu_hours is None), ""):
        rule = f"cannot be kept to: {unknown}. {command} measures it in ten updates, which is remembered; null allows any"
        raise ConfigError([(setting, rule)], scope=subject)
    whole = sum(forecast.gpu_hours or 0.0 for forecast in forecasts)
    more = whole * to_come / len(forecasts)
    hours = more + sum(forecast.rest(share).gpu_hours or 0.0 for forecast, share in zip(forecasts, shares, strict=True))
    if hours > budget.gpu_hours:
        source = " and ".join(sorted({forecast.seconds_from for forecast in open_ones}))
        if min(shares) == 1.0:
            share = 100 * budget.gpu_hours / hours
            advice = f"lower training_tokens to {share:.0f} % or less, or raise the budget" if share >= 1 else "raise the budget"
            rule = f"is less than the {hours:.3g} hours foreseen, from {source}; {advice}"
        else:
            rule = f"is less than the {hours:.3g} hours foreseen for what is left, of {whole + more:.3g} in all, from {source}; "
            rule += "raise the budget (other training_tokens would begin anew what is done)"
        raise ConfigError([(setting, rule)], scope=subject)


def said(predicted: dict[str, Any]) -> str | None:
    """What meta.json keeps of a forecast, in words; null if nothing was known."""
    parts = []
    if "seconds" in predicted:
        parts.append(f"about {short_time(predicted['seconds'])} in all (from {predicted['seconds_from']})")
    if "peak_gib" in predicted:
        parts.append(f"{predicted['peak_gib']:.2f} GiB of memory (from {predicted['peak_from']})")
    return ", ".join(parts) or None


def validated_tokens(run: RunConfig, data: PreparedData) -> int:
    """Tokens that one validation predicts, to a window's."""
    if run.eval is None:
        return 0
    limit = run.eval.max_tokens
    held_out = [source.val.tokens for source in data.sources if source.val is not None]
    return sum(tokens if limit is None else min(limit, tokens) for tokens in held_out)


def _speed_of_one(run: RunConfig, vocab_size: int) -> float | None:
    """Operations a second that training is known to reach on one such GPU with such a model; None if nobody has measured it."""
    hardware, cuda = run.hardware, devices.probe_cuda()
    measured = next((points for part, points in UTILISATION.items() if part in cuda.name), None)
    peak = devices.bf16_peak_flops(cuda.name)
    if measured is None or peak is None:
        return None
    if run.precision is not Precision.bf16 or hardware.compile is not Compile.always or hardware.recompute is not Recompute.none:
        return None
    if hardware.deterministic or run.data.window is not Window.contiguous:
        return None
    numbers, length = parameters(run.model, vocab_size), run.data.max_seq_len
    at_once = min(run.micro_batch, -(-run.windows_per_update // (hardware.processes or 1))) * length
    within = MEASURED_NUMBERS[0] <= numbers <= MEASURED_NUMBERS[1] and MEASURED_LENGTHS[0] <= length <= MEASURED_LENGTHS[1]
    if not within or at_once < MEASURED_POSITIONS:
        return None
    (small, low), (large, high) = measured
    between = min(max((numbers - small) / (large - small), 0.0), 1.0)
    return peak * (low + (high - low) * between)


def _unknown(run: RunConfig) -> str:
    """Why nobody knows how long a run takes."""
    if run.hardware.device is Device.cuda:
        return f"how fast such a model trains on {devices.probe_cuda().name or 'this GPU'} is not known without a probe"
    return f"how fast {'this CPU' if run.hardware.device is Device.cpu else 'this GPU'} trains is not known without a probe"


def _key(run: RunConfig, data: PreparedData, threads: int | None) -> tuple[str, dict[str, Any]]:
    """Name of a probe in the cache, and everything that it depends on."""
    decisive, whole, cuda = science(run), plain_config(run), devices.probe_cuda()
    is_cuda = run.hardware.device is Device.cuda
    unspaced = {"first_tokens", "growth"}
    facts = {
        "model": decisive["model"],
        "optim": [decisive["optim"]["type"], decisive["optim"].get("state_dtype")],
        "precision": decisive["precision"],
        "vocab_size": data.tokenizer.vocab_size,
        "max_seq_len": run.data.max_seq_len,
        "tokens_per_update": run.data.tokens_per_update,
        "window": run.data.window.name,
        "sources": len(data.sources),
        "hardware": {name: value for name, value in whole["hardware"].items() if name != "timeout_seconds"},
        "parts": run.log.parts,
        "validated": validated_tokens(run, data),
        "tasks": [] if run.eval is None else run.eval.tasks,
        "sample": whole["sample"] and {name: value for name, value in whole["sample"].items() if name not in unspaced},
        "tracker": run.wandb is not None,
        "device": cuda.name if is_cuda else devices.cpu_name(),
        "threads": None if is_cuda else threads or int(os.environ.get("OMP_NUM_THREADS") or devices.usable_cores()),
        "torch": package_version("torch"),
        "llama_lab": package_version("llama_lab"),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16], facts
