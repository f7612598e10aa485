"""What a run would take, said before it starts: size, compute, budget, and where its files would go. Torch-free."""

from dataclasses import dataclass, field
from pathlib import Path

from llama_lab.config.compose import compose
from llama_lab.config.errors import ConfigError
from llama_lab.config.identity import run_folder
from llama_lab.config.resolve import resolve
from llama_lab.config.schema import AUTO, BpeConfig, BytesConfig, RunConfig, TokenizerConfig
from llama_lab.data.mixture import Exposure, exposures
from llama_lab.data.prepare import PreparedData, prepare
from llama_lab.data.tokenizer import BytesTokenizer
from llama_lab.lab.sweep import expand
from llama_lab.lab.table import print_table
from llama_lab.model.count import flops_per_token, parameters
from llama_lab.training.retention import Need, beside_free, need
from llama_lab.training.run_folder import RunFolder

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
    """

    run: RunConfig
    folder: Path
    data: PreparedData | None
    problem: ConfigError | None
    exposures: list[Exposure] = field(default_factory=list)

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


def show(overrides: list[str], *, multirun: bool = False, config_dir: Path | None = None) -> None:
    """Print the plan of a run, or of each run of a sweep.

    Text is prepared and cached, as the run itself would do; where that fails, the problem is shown and the rest still is.

    Raises:
        ConfigError: the run could not be started, for other reasons than its data.
    """
    sweep = expand(overrides, multirun=multirun, config_dir=config_dir)
    if sweep is None:
        run = resolve(compose(overrides, config_dir=config_dir))
        plans = [_plan(run, run_folder(run))]
        print_table("Plan", ("", ""), rows(plans[0]))
    else:
        plans = [_plan(job.run, job.folder) for job in sweep.jobs]
        headings = [*sweep.jobs[0].values, "parameters", "updates", "tokens", "FLOPs", "status", "folder"]
        lines = [[*job.values.values(), *_line(plan)] for job, plan in zip(sweep.jobs, plans, strict=True)]
        print_table(f"Plan of {len(plans)} runs", headings, lines)
        total = None if any(plan.flops is None for plan in plans) else sum(plan.flops or 0 for plan in plans)
        print(f"In total: {_count(sum(plan.tokens for plan in plans))} tokens, {_power(total)} FLOPs")
    for problem in dict.fromkeys(str(plan.problem) for plan in plans if plan.problem is not None):
        print(f"The data is not ready, so what depends on it is left out or as asked for. {problem}")


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
        ("device", f"{hardware.device.value}, {run.precision.value}"),
        *_disk(plan),
        ("run folder", f"{plan.folder} ({plan.status})"),
    ]


def _line(plan: Plan) -> list[str]:
    counts = [_count(number) for number in (plan.parameters, plan.run.updates, plan.tokens)]
    return [*counts, _power(plan.flops), plan.status, str(plan.folder)]


def _plan(run: RunConfig, folder: Path) -> Plan:
    try:
        data = prepare(run.data, run.tokenizer, say=print)
        return Plan(run, folder, data, None, exposures(run, data))
    except ConfigError as error:
        return Plan(run, folder, None, error)


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
