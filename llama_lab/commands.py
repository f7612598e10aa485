"""Every command: what it says of itself, which words follow it, and what it runs.

Each imports what it needs when it runs, so that help, completion and a refused config never wait for torch.
"""

import difflib
import importlib
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llama_lab.arguments import FLAGS, UsageError, parse
from llama_lab.manual import DATA_HELP, EXIT_CODES, FORK_HELP, IMPORT_HELP, OVERRIDES, PLAN_HELP, PREPARE_HELP, TRAIN_EXAMPLES

DONE, FAILED, CONFIG, PREEMPTED = 0, 1, 2, 75
"""Exit codes. 75 is EX_TEMPFAIL of sysexits.h: stopped on request with its state saved; type the same command to go on."""


@dataclass(frozen=True)
class Command:
    """One command: how it is explained, what it accepts beside overrides, and what it runs."""

    summary: str
    words: list[str]
    run: Callable[[list[str]], int]


def _in(module: str, function: str) -> Callable[[list[str]], int]:
    """The function of a module of this package, which is imported when it is called."""

    def run(words: list[str]) -> int:
        return getattr(importlib.import_module(f"llama_lab.{module}"), function)(words)

    return run


def _on_runs(module: str, function: str) -> Callable[[list[str]], int]:
    """The same of a command that takes several runs: a shell's pattern finds also what lies beside them."""

    def run(words: list[str]) -> int:
        from llama_lab.lab.patterns import without_asides

        return _in(module, function)(without_asides(words))

    return run


def _train(words: list[str]) -> int:
    arguments = parse(words, "train")
    if arguments.help:
        from llama_lab.field_help import field_help

        topics = [word for word in arguments.overrides if "=" not in word]
        print(field_help(topics, arguments.config_dir) if topics else _train_help(arguments.config_dir))
        return DONE
    from llama_lab.lab import sweep

    jobs = sweep.expand(arguments.overrides, multirun=arguments.multirun, config_dir=arguments.config_dir)
    if jobs is not None:
        if arguments.show_config:
            print(sweep.describe(jobs))
            return DONE
        return sweep.run_sweep(jobs)
    from llama_lab.config.compose import compose

    run = compose(arguments.overrides, config_dir=arguments.config_dir)
    if arguments.show_config:
        from llama_lab.config.identity import to_yaml
        from llama_lab.config.resolve import resolve

        print(to_yaml(resolve(run)), end="")
        return DONE
    from llama_lab.api import train

    result = train(run, handle_signals=True, command=["llama-lab", "train", *words])
    return PREEMPTED if result.status == "preempted" else DONE


def _fork(words: list[str]) -> int:
    arguments = parse(words, "fork")
    if arguments.help:
        print(FORK_HELP)
        return DONE
    named = [word for word in arguments.overrides if "=" not in word or Path(word).is_dir()]
    if len(named) != 1:
        said = f"{len(named)} are named: {' '.join(named)}" if named else "none is named"
        raise UsageError(f"llama-lab fork takes one run's folder, outputs/<name>/<run id>; {said}")
    overrides = [word for word in arguments.overrides if word != named[0]]
    from llama_lab.lab.repeat import fork
    from llama_lab.training.run_folder import named_run

    parent = named_run(Path(named[0]))
    if arguments.show_config:
        fork.show(parent, overrides, update=arguments.update, config_dir=arguments.config_dir)
        return DONE
    command = ["llama-lab", "fork", *words]
    result = fork.fork(parent, overrides, update=arguments.update, config_dir=arguments.config_dir, command=command)
    return PREEMPTED if result.status == "preempted" else DONE


def _import(words: list[str]) -> int:
    arguments = parse(words, "import")
    if arguments.help:
        print(IMPORT_HELP)
        return DONE
    named = [word for word in arguments.overrides if "=" not in word or Path(word).is_dir()]
    if len(named) != 1:
        said = f"{len(named)} are named: {' '.join(named)}" if named else "none is named"
        raise UsageError(f"llama-lab import takes one folder of a Hugging Face model; {said}")
    overrides = [word for word in arguments.overrides if word != named[0]]
    from llama_lab.lab.transfer import import_run

    if arguments.show_config:
        import_run.show(Path(named[0]), overrides, config_dir=arguments.config_dir)
        return DONE
    return import_run.run_import(
        Path(named[0]),
        overrides,
        training=arguments.training,
        config_dir=arguments.config_dir,
        command=["llama-lab", "import", *words],
    )


def _plan(words: list[str]) -> int:
    arguments = parse(words, "plan")
    if arguments.help:
        print(f"{PLAN_HELP}\n\n{OVERRIDES}")
        return DONE
    if arguments.gpu is not None and arguments.probe:
        raise UsageError("--probe measures this machine, and --gpu plans for another; plan without --probe, or probe there")
    from llama_lab.config.devices import in_place_of, named_gpus
    from llama_lab.lab.plan import show

    with in_place_of(named_gpus(arguments.gpu) if arguments.gpu is not None else None):
        show(arguments.overrides, multirun=arguments.multirun, config_dir=arguments.config_dir, probes=arguments.probe)
    return DONE


def _prepare(words: list[str]) -> int:
    arguments = parse(words, "prepare")
    if arguments.help:
        print(f"{PREPARE_HELP}\n\n{EXIT_CODES}")
        return DONE
    from llama_lab.lab.datasets.prepare import prepare_and_show

    finished = prepare_and_show(arguments.overrides, out=arguments.out, config_dir=arguments.config_dir)
    return DONE if finished else PREEMPTED


def _data(words: list[str]) -> int:
    name, rest = (words[0], words[1:]) if words else ("--help", [])
    if name in ("-h", "--help"):
        print(DATA_HELP)
        return DONE
    if name == "inspect":
        from llama_lab.lab.datasets.inspect import run_inspect_command

        return run_inspect_command(rest)
    if name == "replay":
        from llama_lab.lab.datasets.replay import run_replay_command

        return run_replay_command(rest)
    close = difflib.get_close_matches(name, ["inspect", "replay"], n=1)
    hint = f"did you mean {close[0]}?" if close else f"try: {shlex.join(['llama-lab', 'data', 'inspect', name, *rest])}"
    raise UsageError(f"llama-lab data takes inspect or replay, not {name}; {hint}")


def _completion(words: list[str]) -> int:
    from llama_lab.completion import SCRIPTS

    if words == ["--help"] or words == ["-h"]:
        print("usage: llama-lab completion bash|zsh|fish\n\nPrints a script for your shell; its first lines say how to load it.")
        return DONE
    if len(words) != 1 or words[0] not in SCRIPTS:
        raise UsageError(f"llama-lab completion takes one of {', '.join(SCRIPTS)}, not {' '.join(words) or 'nothing'}")
    print(SCRIPTS[words[0]], end="")
    return DONE


CACHE_WORDS = ["list", "clean", "--all", "--older-than", "--help"]
DATA_WORDS = ["inspect", "replay", "--verify", "--samples", "--plot", "--tokenizer", "--update", "--help"]
SERVE_WORDS = ["--port", "--host", "--device", "--precision", "--loaded", "--running", "--waiting", "--help"]
EXPORT_WORDS = ["--to", "hf", "gguf", "--out", "--update", "--dtype", "fp32", "bf16", "--help"]
COMPARE_WORDS = [
    "--metric",
    "--baseline",
    "--at",
    "--price",
    "--to-loss",
    "--worth",
    "--higher",
    "--lower",
    "--unpaired",
    "--finished",
    "--ignore",
    "--help",
]
REPORT_WORDS = ["--out", "--title", *COMPARE_WORDS]
RUNS_WORDS = ["--sort", "--columns", "--json", "--csv", "--help"]
NOISE_WORDS = ["--seeds", "--repeats", "--cfg", "--config-dir", "--help"]
VERIFY_WORDS = ["--updates", "--update", "--data", "--validation", "--help"]
CHECKPOINT_WORDS = ["--update", "--device", "--precision"]
GENERATE_WORDS = [
    *CHECKPOINT_WORDS,
    *("--prompts", "--interactive", "--max-new-tokens", "--temperature", "--greedy", "--top-k", "--top-p", "--min-p"),
    *("--repetition-penalty", "--stop", "--seed", "--samples", "--batch", "--beyond-context", "--json", "--help"),
]
EVALUATE_WORDS = [
    *CHECKPOINT_WORDS,
    *("--task", "--split", "--max-tokens", "--text-field", "--separator", "--calibration", "--plot", "--out", "--help"),
]

COMMANDS = {
    "train": Command("train a model, or with -m several", FLAGS["train"], _train),
    "plan": Command("say what a run would take, without starting it", FLAGS["plan"], _plan),
    "sweep": Command("list sweeps, or go on with one", ["--show", "--help"], _in("lab.sweep.command", "run_sweep_command")),
    "fork": Command("go on from a checkpoint of a run with other values", FLAGS["fork"], _fork),
    "generate": Command("continue texts with a trained run", GENERATE_WORDS, _in("lab.ask.generate", "run_generate_command")),
    "evaluate": Command(
        "measure a trained run on texts and tasks", EVALUATE_WORDS, _in("lab.ask.evaluate", "run_evaluate_command")
    ),
    "runs": Command(
        "list runs, filtered and sorted by anything they say", RUNS_WORDS, _on_runs("lab.runs.command", "run_runs_command")
    ),
    "watch": Command(
        "follow runs while they train", ["--once", "--every", "--help"], _on_runs("lab.runs.watch", "run_watch_command")
    ),
    "compare": Command(
        "which config is better, and how sure that is", COMPARE_WORDS, _on_runs("lab.compare.command", "run_compare_command")
    ),
    "report": Command(
        "one page with verdicts, curves, samples and costs of runs",
        REPORT_WORDS,
        _on_runs("lab.report.command", "run_report_command"),
    ),
    "bench": Command(
        "measure how fast configs train here",
        ["--updates", "--out", "--multirun", "--config-dir", "--help"],
        _in("lab.bench.command", "run_bench_command"),
    ),
    "noise": Command(
        "measure how far runs scatter by chance", NOISE_WORDS, _on_runs("lab.compare.noise_command", "run_noise_command")
    ),
    "diff": Command("what differs between two runs", ["--all", "--help"], _on_runs("lab.compare.diff_command", "run_diff_command")),
    "verify": Command(
        "check a run's files, and make updates of it again", VERIFY_WORDS, _in("lab.repeat.verify", "run_verify_command")
    ),
    "serve": Command(
        "try checkpoints on a local page, or through OpenAI's interface",
        SERVE_WORDS,
        _on_runs("lab.serve.command", "run_serve_command"),
    ),
    "import": Command("begin a run with the weights of a Hugging Face folder", FLAGS["import"], _import),
    "export": Command(
        "write a checkpoint for transformers, vLLM or llama.cpp", EXPORT_WORDS, _in("lab.transfer.export", "run_export_command")
    ),
    "prepare": Command("turn text into tokens to train on", FLAGS["prepare"], _prepare),
    "data": Command("look into tokens, or at what a run was fed", DATA_WORDS, _data),
    "track": Command(
        "send runs to Weights & Biases afterwards",
        ["--mode", "--project", "--entity", "--help"],
        _on_runs("lab.runs.track", "run_track_command"),
    ),
    "cache": Command("list or clean prepared data", CACHE_WORDS, _in("data.cache", "run_cache_command")),
    "completion": Command("print a completion script for bash, zsh or fish", ["bash", "zsh", "fish"], _completion),
}


def _train_help(config_dir: Path | None) -> str:
    from llama_lab.vocabulary import groups, nodes, presets

    questions = presets(config_dir)
    width = max(map(len, questions), default=0) + 2
    lines = ["usage: llama-lab train [overrides...] [-m] [--cfg] [--config-dir DIR]", ""]
    lines += ["  -m, --multirun    one run for each combination of the comma lists among the overrides (docs/sweeps.md)"]
    lines += ["  --cfg             print the whole config, checked and resolved, and start nothing"]
    lines += ["  --config-dir DIR  further options and presets: DIR/<group>/<option>.yaml, DIR/experiment/<preset>.yaml"]
    lines += ["  --help WORD       what the fields of a part mean (optim, sample, …), or one field (optim.max_lr, learning_rate),"]
    lines += ["                    or all of them (all); what an option or a preset sets (adamw, smoke)"]
    lines += ["", OVERRIDES, "", "Groups and their options:"]
    lines += [f"  {group:<12}{'  '.join(options)}" for group, options in groups(config_dir).items()]
    lines += ["", "Further parts: " + "  ".join(name for name in nodes() if name not in groups(config_dir))]
    lines += ["", "Presets (experiment=...):"]
    lines += [f"  {preset:<{width}}{question}".rstrip() for preset, question in questions.items()]
    lines += ["", TRAIN_EXAMPLES, "", EXIT_CODES]
    return "\n".join(lines)
