"""What a run would take, said before it starts: size, compute, memory, time, price, and where its files would go. Torch-free."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from llama_lab.config import devices
from llama_lab.config.compose import compose
from llama_lab.config.errors import ConfigError
from llama_lab.config.identity import run_folder
from llama_lab.config.resolve import resolve
from llama_lab.config.schema import AUTO, BpeConfig, BudgetConfig, BytesConfig, Device, Launcher, RunConfig, TokenizerConfig
from llama_lab.data.mixture import Exposure, exposures
from llama_lab.data.prepare import PreparedData, prepare
from llama_lab.data.tokenizer import BytesTokenizer
from llama_lab.lab.sweep import Sweep, expand
from llama_lab.lab.sweep.budget import left_of
from llama_lab.lab.sweep.frozen import take_over
from llama_lab.lab.sweep.local import packing
from llama_lab.lab.table import counted, print_table
from llama_lab.model.count import flops_per_token, parameters
from llama_lab.training.foresight.forecast import FROM_SPEED, Forecast, foresee, kind_of
from llama_lab.training.foresight.gpu_memory import gpu_memory
from llama_lab.training.foresight.memory import expected_micro_batch, settle_micro_batch
from llama_lab.training.metrics import short_time
from llama_lab.training.run_folder import RunFolder
from llama_lab.training.saving.retention import Need, beside_free, need

Rows = list[tuple[str, str]]


@dataclass(frozen=True)
class Plan:
    """What is known of a run before it starts.

    Attributes:
        run: its resolved config.
        folder: where it would be.
        data: what it would train on; null if that cannot be had yet.
        problem: why it cannot be had; null if it can.
        exposures: what it would take from each source of the data.
        forecast: what is foreseen of its time and memory, from its first update to its last; null without data.
        left: the share of its updates that is still to be trained.
    """

    run: RunConfig
    folder: Path
    data: PreparedData | None
    problem: ConfigError | None
    exposures: list[Exposure] = field(default_factory=list)
    forecast: Forecast | None = None
    left: float = 1.0

    @property
    def tokens(self) -> int:
        """Tokens of all whole updates."""
        return self.run.updates * self.run.data.tokens_per_update

    @property
    def vocab_size(self) -> int | None:
        """Entries of the tokenizer; those asked for while there is none; null if only its file could say."""
        return self.data.tokenizer.vocab_size if self.data is not None else _asked_vocabulary(self.run.tokenizer)

    @property
    def parameters(self) -> int | None:
        """Trained numbers of the model; null without a vocabulary."""
        return None if self.vocab_size is None else parameters(self.run.model, self.vocab_size)

    @property
    def flops(self) -> int | None:
        """Floating-point operations of the whole training; null without a vocabulary."""
        return (
            None
            if self.vocab_size is None
            else self.tokens * flops_per_token(self.run.model, self.vocab_size, self.run.data.max_seq_len)
        )

    @property
    def checkpoints(self) -> Need | None:
        """The disk that its checkpoints take; null without a vocabulary."""
        return None if self.vocab_size is None else need(self.run, self.vocab_size)

    @property
    def status(self) -> str:
        """What the run's folder says of itself; `new` if there is none."""
        return RunFolder(self.folder).summary().get("status", "started") if self.folder.exists() else "new"


def show(overrides: list[str], *, multirun: bool = False, config_dir: Path | None = None, probes: bool = False) -> None:
    """Print the plan of a run, or of each run of a sweep.

    Text is prepared and cached, as the run itself would do; where that fails, the problem is shown and the rest still is.

    Args:
        probes: whether some updates of each kind of run are trained first.

    Raises:
        ConfigError: the run could not be started, for other reasons than its data; or a probe failed.
    """
    sweep = expand(overrides, multirun=multirun, config_dir=config_dir)
    if sweep is None:
        run = resolve(compose(overrides, config_dir=config_dir))
        folder = run_folder(run)
        (plan,) = plans = _foreseen([_plan(run, folder, RunFolder(folder).left(run))], probes=probes)
        print_table("Plan", ("", ""), [*rows(plan), *_cost(plans, run.budget)])
    else:
        _show_sweep(sweep, plans := _planned(sweep, probes=probes))
    for problem in dict.fromkeys(str(plan.problem) for plan in plans if plan.problem is not None):
        print(f"The data is not ready, so what depends on it is left out or as asked for. {problem}")


def _planned(sweep: Sweep, *, probes: bool) -> list[Plan]:
    take_over(sweep)
    plans = [_plan(job.run, job.folder, left_of(sweep, job)) for job in sweep.jobs]
    if sweep.settings.launcher is Launcher.slurm:
        if probes:
            rule = "would measure this machine, and sweep.launcher=slurm trains on others; plan without it, or probe on such a node"
            raise ConfigError([("--probe", rule)], scope="this sweep")
        return plans
    return _foreseen(plans, probes=probes, threads=packing(sweep)[1])


def _show_sweep(sweep: Sweep, plans: list[Plan]) -> None:
    headings = [*sweep.jobs[0].values, "parameters", "updates", "tokens", "FLOPs", "peak GiB", "time", "status", "folder"]
    lines = [[*job.values.values(), *_line(plan)] for job, plan in zip(sweep.jobs, plans, strict=True)]
    print_table(f"Plan of {counted(len(plans), 'run')}", headings, lines)
    total = None if any(plan.flops is None for plan in plans) else sum(plan.flops or 0 for plan in plans)
    tokens = sum(plan.tokens for plan in plans)
    print(f"In total: {_count(tokens)} tokens, {_power(total)} FLOPs")
    if any(plan.left < 1.0 for plan in plans):
        left = round(sum(plan.left * plan.tokens for plan in plans))
        done = sum(plan.left == 0.0 for plan in plans)
        print(f"Left: {_count(left)} tokens; {done} of {len(plans)} runs {'is' if done == 1 else 'are'} done")
    at_once = None if sweep.settings.launcher is Launcher.slurm else packing(sweep)[0]
    for what, how_much in _cost(plans, sweep.budget, at_once=at_once):
        print(f"{what[0].upper()}{what[1:]}: {how_much}")
    if sweep.to_come:
        print(f"{sweep.to_come} more runs follow from what these show; they are not in these numbers")
    if sweep.settings.halvings is not None:
        print("Runs that are stopped early take less than this")


def rows(plan: Plan) -> Rows:
    """(what, how much) of one run."""
    run, hardware = plan.run, plan.run.hardware
    processes = hardware.processes or 1
    batch = f"{run.windows_per_update} of {run.data.max_seq_len} tokens: {processes} {'process' if processes == 1 else 'processes'}"
    if hardware.micro_batch == AUTO:
        accumulated = "as many as fit in a micro-batch, found when it starts"
    else:
        share = -(-run.windows_per_update // processes)
        passes = -(-share // run.micro_batch)
        most = "" if processes * passes * run.micro_batch == run.windows_per_update else "at most "
        accumulated = f"{passes} accumulated x {most}{min(run.micro_batch, share)} in a micro-batch"
    return [
        *_size(plan),
        ("updates", _count(run.updates)),
        ("training tokens", _count(plan.tokens)),
        *_epochs(plan),
        ("windows an update", f"{batch} x {accumulated}"),
        ("device", f"{hardware.device.value}, {run.precision.value}{_elsewhere(run)}"),
        *_memory(plan),
        *_disk(plan),
        ("run folder", f"{plan.folder} ({plan.status})"),
        *_truth(plan),
    ]


def _line(plan: Plan) -> list[str]:
    counts = [_count(number) for number in (plan.parameters, plan.run.updates, plan.tokens)]
    known = plan.forecast or Forecast(1)
    peak = "" if known.peak_gib is None else f"{known.peak_gib:.2f}"
    seconds = "" if known.seconds is None else short_time(known.seconds)
    return [*counts, _power(plan.flops), peak, seconds, plan.status, str(plan.folder)]


def _plan(run: RunConfig, folder: Path, left: float) -> Plan:
    try:
        data = prepare(run.data, run.tokenizer, say=print)
        return Plan(run, folder, data, None, exposures(run, data), left=left)
    except ConfigError as error:
        return Plan(run, folder, None, error, left=left)


def _foreseen(plans: list[Plan], *, probes: bool, threads: int | None = None) -> list[Plan]:
    """The plans with their forecasts; of runs that take alike, one is probed."""
    found, probed = [], set()
    for plan in plans:
        if plan.data is None:
            found.append(plan)
            continue
        run = expected_micro_batch(plan.run, plan.data)
        if probes and (kind := kind_of(run, plan.data, threads=threads)) not in probed:
            from llama_lab.lab.probe import probe

            run = settle_micro_batch(plan.run, plan.data, print)
            probe(run, plan.data, print, threads=threads)
            probed |= {kind, kind_of(run, plan.data, threads=threads)}
        found.append(replace(plan, forecast=foresee(run, plan.data, threads=threads)))
    return found


def _cost(plans: Sequence[Plan], budget: BudgetConfig, *, at_once: int | None = 1) -> Rows:
    """What all runs together take: time, hours of GPUs, price, and whether that is within the budget; of what is left, beside all.

    Args:
        at_once: how many run side by side; null if that is not known.
    """
    whole = [plan.forecast for plan in plans if plan.forecast is not None]
    left = [plan.forecast.rest(plan.left) for plan in plans if plan.forecast is not None and plan.left]
    if not left:
        return [("time", "nothing is left to train")] if whole else []
    if unknown := next((forecast.unknown for forecast in left if forecast.seconds is None), ""):
        over = f"; budget.gpu_hours={budget.gpu_hours:g} needs it" if budget.gpu_hours is not None else ""
        where = "" if devices.probe_cuda().is_here else " there"
        return [("time", f"{_at_least(left, budget)}{unknown}: --probe{where} measures ten updates{over}")]
    is_begun = any(plan.left < 1.0 for plan in plans)
    times = [forecast.seconds or 0.0 for forecast in left]
    hours = sum(forecast.gpu_hours or 0.0 for forecast in left)
    sources = " and ".join(dict.fromkeys(forecast.seconds_from for forecast in left))
    beside = "; updates alone, without start, validation and samples" if FROM_SPEED in sources else ""
    took = f"{short_time(sum(times))}{' of runs' if len(plans) > 1 else ''}"
    if at_once is not None and len(plans) > 1:
        took = f"{short_time(max(sum(times) / at_once, *times))} with {at_once} at once, {took}"
    hours_of = "GPU hours" if plans[0].run.hardware.device is Device.cuda else "hours of processes"
    said = f"{hours:.3g}"
    if is_begun:
        took += f" for what is left, {short_time(sum(forecast.seconds or 0.0 for forecast in whole))} in all"
        said += f" for what is left, {sum(forecast.gpu_hours or 0.0 for forecast in whole):.3g} in all"
    if budget.gpu_hours is not None:
        limit = f"budget.gpu_hours={budget.gpu_hours:g}"
        said += f"; more than {limit}: train refuses it" if hours > budget.gpu_hours else f"; {limit} allows it"
    found = [("time", f"{took} (from {sources}{beside})"), (hours_of, said)]
    if budget.gpu_hour_price is not None:
        found.append(("price", f"{hours * budget.gpu_hour_price:,.2f} at {budget.gpu_hour_price:g} an hour"))
    return found


def _at_least(left: Sequence[Forecast], budget: BudgetConfig) -> str:
    """What all runs together take at the very least, where that is known of each."""
    times = [forecast.at_least if forecast.seconds is None else forecast.seconds for forecast in left]
    if any(seconds is None for seconds in times):
        return ""
    hours = sum((seconds or 0.0) * forecast.processes for seconds, forecast in zip(times, left, strict=True)) / 3600
    price = (
        f", {hours * budget.gpu_hour_price:,.2f} at {budget.gpu_hour_price:g} an hour" if budget.gpu_hour_price is not None else ""
    )
    conditions = " and ".join(dict.fromkeys(forecast.at_least_if for forecast in left if forecast.at_least_if))
    took = f"{short_time(sum(seconds or 0.0 for seconds in times))}{' of runs' if len(left) > 1 else ''}"
    return f"at least {took}, {hours:.3g} GPU hours{price} ({conditions}); "


def _memory(plan: Plan) -> Rows:
    """The peak, and what it is made of where a formula says so."""
    if plan.forecast is None or plan.forecast.peak_gib is None:
        return []
    assert plan.data is not None
    text = f"{plan.forecast.peak_gib:.2f} GiB at the peak (from {plan.forecast.peak_from}){_room(plan, plan.data)}"
    if plan.run.hardware.device is Device.cuda:
        run = expected_micro_batch(plan.run, plan.data)
        parts = gpu_memory(run, plan.data.tokenizer.vocab_size, run.micro_batch)
        named = (("weights", parts.weights), ("gradients", parts.gradients), ("optimizer", parts.optimizer))
        text += "; by the formula " + ", ".join(f"{name} {size / 2**30:.2f}" for name, size in named)
        text += f", activations and the like {parts.passing / 2**30:.2f} {parts.moment}"
    return [("memory", text)]


def _room(plan: Plan, data: PreparedData) -> str:
    """That the peak is more than the GPU has, where it is, and what to type instead."""
    run, has = plan.run, devices.probe_cuda().bytes / 2**30
    assert plan.forecast is not None and plan.forecast.peak_gib is not None
    if run.hardware.device is not Device.cuda or not has or plan.forecast.peak_gib <= has:
        return ""
    smaller = expected_micro_batch(replace(run, hardware=replace(run.hardware, micro_batch=AUTO)), data).micro_batch
    takes = gpu_memory(run, data.tokenizer.vocab_size, smaller).gib
    fits = takes < min(has, plan.forecast.peak_gib)
    advice = (
        f"hardware.micro_batch={smaller} would take {takes:.2f}"
        if fits
        else "try optim.state_dtype=bf16, hardware.recompute=full or a smaller model"
    )
    return f", more than the {has:.2f} of the GPU: {advice}"


def _elsewhere(run: RunConfig) -> str:
    """The GPUs that a plan is for, where they are not in this machine, and how to take all of them."""
    cuda = devices.probe_cuda()
    if cuda.is_here or run.hardware.device is not Device.cuda:
        return ""
    several = f"{cuda.devices} " if cuda.devices > 1 else ""
    idle = f"; hardware=ddp takes all {cuda.devices}" if (run.hardware.processes or 1) < cuda.devices else ""
    return f", as if on {several}{cuda.name}{idle}"


def _truth(plan: Plan) -> Rows:
    """What was foreseen of a run that is there, beside what became true."""
    folder = RunFolder(plan.folder)
    predicted, summary = folder.meta().get("predicted", {}), folder.summary()
    if summary.get("status") != "finished":
        return []
    pairs = []
    if (seconds := summary.get("wall_seconds")) is not None:
        pairs.append(short_time(seconds) + (f", foreseen {short_time(predicted['seconds'])}" if "seconds" in predicted else ""))
    if (peak := summary.get("memory/peak_gib")) is not None:
        pairs.append(f"{peak:.2f} GiB" + (f", foreseen {predicted['peak_gib']:.2f}" if "peak_gib" in predicted else ""))
    return [("took", "; ".join(pairs))] if pairs else []


def _size(plan: Plan) -> Rows:
    if plan.vocab_size is None or plan.parameters is None or plan.flops is None:
        return []
    asked = " (as asked for; a small text gives fewer)" if plan.data is None and isinstance(plan.run.tokenizer, BpeConfig) else ""
    return [
        ("vocabulary", f"{plan.vocab_size:,}{asked}"),
        ("parameters", _count(plan.parameters)),
        ("without embedding", _count(plan.parameters - plan.vocab_size * plan.run.model.dim)),
        ("FLOPs a token", _power(plan.flops / plan.tokens)),
        ("FLOPs in total", _power(plan.flops)),
    ]


def _epochs(plan: Plan) -> Rows:
    if plan.data is None:
        return []
    held_out = f", {_count(plan.data.val_tokens)} to validate" if plan.data.val_tokens else ""
    rows = [("tokens in the data", f"{_count(plan.data.train_tokens)} to train{held_out}")]
    if len(plan.exposures) == 1:
        return [*rows, ("epochs", plan.exposures[0].said)]
    return [*rows, *((one.name, f"{100 * one.share:.1f} % of the tokens, {one.said}") for one in plan.exposures)]


def _disk(plan: Plan) -> Rows:
    needed = plan.checkpoints
    if needed is None:
        return []
    return [("checkpoints", f"{_count(needed.written)} written, {beside_free(needed, plan.folder / 'checkpoints')}")]


def _asked_vocabulary(tokenizer: TokenizerConfig) -> int | None:
    match tokenizer:
        case BpeConfig():
            return tokenizer.vocab_size
        case BytesConfig():
            return BytesTokenizer().vocab_size
        case _:
            return None


def _count(number: int | None) -> str:
    return "" if number is None else f"{number:,}"


def _power(number: float | None) -> str:
    return "" if number is None else f"{number:.3e}"
