"""Verify: a run that is whole is made again bit for bit, and whatever is changed in one is named."""

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llama_lab import compose, train
from llama_lab.config.errors import ConfigError
from llama_lab.config.schema import Device
from llama_lab.data.prepare import prepare
from llama_lab.lab.repeat import reproduce
from llama_lab.lab.repeat.fork import fork
from llama_lab.lab.repeat.reproduce import apart
from llama_lab.lab.repeat.rows import Rows
from llama_lab.lab.repeat.verify import run_verify_command
from llama_lab.training.errors import Diverged
from llama_lab.training.metrics import perplexity, read_rows
from llama_lab.training.run_folder import RunFolder
from llama_lab.training.saving.checkpoint import load_checkpoint, save_checkpoint
from llama_lab.training.saving.manifest import list_checkpoints

Output = pytest.CaptureFixture[str]

SCIENCE = "precision=fp32 model.dim=16 model.n_layers=1 model.n_heads=2 model.multiple_of=16 optim=adamw schedule.warmup_updates=1"
BUDGET = "data.max_seq_len=16 data.tokens_per_update=128 training_tokens=1280"
WATCHING = "eval.every_updates=5 sample=null wandb=null hardware=cpu log.every_updates=4 checkpoint.every_tokens=512"
TINY = [*SCIENCE.split(), *BUDGET.split(), *WATCHING.split(), "name=tiny", "tokenizer=bytes", "checkpoint.keep=9"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder out of 60 documents."""
    folder = tmp_path_factory.mktemp("data")
    lines = [json.dumps({"text": f"w{number:02d} and the mill " * (2 + number % 9)}) for number in range(60)]
    (folder / "corpus.jsonl").write_text("\n".join(lines), encoding="utf-8")
    run = compose([*TINY, "data=text", f"data.path={folder / 'corpus.jsonl'}"])
    prepare(run.data, run.tokenizer, print, out=folder / "shards")
    return folder / "shards"


@pytest.fixture(scope="module")
def trained(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 10 updates, with rows of updates 1, 4, 8 and 10, and checkpoints of 4, 8 and 10."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAMA_LAB_OUTPUTS", str(tmp_path_factory.mktemp("trained")))
        return train(compose([*TINY, "data=shards", f"data.path={shards}"])).folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(trained, tmp_path / "copy" / trained.name))


def verify(folder: Path, *words: object) -> int:
    return run_verify_command([str(folder), *map(str, words)])


def found(capsys: Output) -> dict[str, str]:
    """The table of checks that was printed, and the verdict."""
    lines = capsys.readouterr().out.splitlines()
    begin = next(number for number, line in enumerate(lines) if line.startswith("Checks of "))
    width = lines[begin + 1].index("found")
    rows = {
        line[:width].rsplit(None, 1)[0].strip(): line[:width].split()[-1] + " " + line[width:] for line in lines[begin + 2 : -1]
    }
    return rows | {"verdict": lines[-1]}


def change(path: Path, number: int, **values: object) -> None:
    """Change a row of a file."""
    lines = path.read_text(encoding="utf-8").splitlines()
    lines[number] = json.dumps(json.loads(lines[number]) | values)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def change_json(path: Path, **values: Any) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    for key, value in values.items():
        content[key] = {**content[key], **value} if isinstance(value, dict) else value
    path.write_text(json.dumps(content), encoding="utf-8")


def flip(path: Path, place: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)


def test_a_finished_run_is_made_again_bit_for_bit(run: Path, capsys: Output) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert verify(run, "--updates", 10, "--data") == 0
    shown = found(capsys)
    assert shown.pop("verdict") == "Verified: the run is whole, and this machine reproduces it bit for bit"
    assert shown["checkpoints"] == "ok every checksum of 3 is right (after update 4, 8, 10)"
    assert shown["rows"] == "ok 6 of metrics, 10 of batches, to update 10 of 10"
    assert shown["batches"] == "ok 10 updates are fed the same windows"
    assert shown["losses"] == "ok loss and gradient norm of update 1, 4, 8, 10 are equal bit for bit"
    assert shown["validation"] == "ok loss of update 10 is equal bit for bit"
    assert all(f"weights after update {update}" in shown for update in (4, 8, 10))
    assert all(line.startswith("ok ") for line in shown.values())
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_how_many_updates_are_made_again(run: Path, capsys: Output) -> None:
    assert verify(run) == 0
    assert "losses" in found(capsys)
    assert verify(run, "--updates", 1) == 0
    shown = found(capsys)
    assert shown["losses"] == "ok loss and gradient norm of update 1 are equal bit for bit"
    assert shown["weights"].startswith("- no checkpoint lies within updates 1 to 1")


def weights_of(folder: Path, update: int) -> Path:
    return next(found.path for found in list_checkpoints(folder / "checkpoints") if found.update == update)


def one_weight(folder: Path) -> None:
    """A checkpoint that is whole, with one weight other than it was."""
    checkpoint = next(found for found in list_checkpoints(folder / "checkpoints") if found.update == 4)
    weights, state = load_checkpoint(checkpoint)
    weights["embedding.weight"][3, 3] *= 1 + 1e-6
    save_checkpoint(folder / "checkpoints", update=4, tokens=checkpoint.tokens, model=weights, state=state)


def loss_of(folder: Path) -> None:
    rows = read_rows(folder / "metrics.jsonl")
    loss = rows[1]["train/loss"] * (1 + 1e-7)
    change(folder / "metrics.jsonl", 1, **{"train/loss": loss, "train/perplexity": perplexity(loss)})


def validation_of(folder: Path) -> None:
    """The last validation, changed wherever it stands."""
    loss = read_rows(folder / "metrics.jsonl")[-1]["val/loss"] * (1 + 1e-7)
    changed = {"val/loss": loss, "val/perplexity": perplexity(loss)}
    change(folder / "metrics.jsonl", -1, **changed)
    change_json(folder / "summary.json", **changed, **{"best/val/loss": loss})


def cut(path: Path, number: int) -> None:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[:number] + lines[number + 1 :]), encoding="utf-8")


def twice(path: Path, number: int) -> None:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[: number + 1] + lines[number:]), encoding="utf-8")


def edit(path: Path, before: str, after: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert before in text
    path.write_text(text.replace(before, after), encoding="utf-8")


DAMAGES: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "a bit of a weight": (
        lambda run: flip(weights_of(run, 8) / "model.safetensors"),
        "checkpoints",
        "model.safetensors is not what",
    ),
    "a moment": (lambda run: flip(weights_of(run, 10) / "state.safetensors", 0.9), "checkpoints", "state.safetensors is not what"),
    "a manifest": (lambda run: flip(weights_of(run, 4) / "manifest.json"), "checkpoints", "manifest.json is not what was saved"),
    "a lost file": (lambda run: (weights_of(run, 4) / "config.yaml").unlink(), "checkpoints", "config.yaml is missing"),
    "a weight under a new checksum": (one_weight, "weights after update 4", "1 of 11 tensors differ, first embedding.weight by"),
    "a batch": (lambda run: change(run / "batches.jsonl", 6, hash="0" * 16), "batches", "update 7 recorded 0000000000000000, and"),
    "a lost batch": (lambda run: cut(run / "batches.jsonl", 6), "rows", "batches.jsonl lacks update 7"),
    "lost batches": (lambda run: cut(run / "batches.jsonl", 9), "rows", "batches.jsonl ends with update 9, metrics.jsonl with 10"),
    "a version": (
        lambda run: change_json(run / "meta.json", versions={"torch": "1.0"}),
        "code, versions",
        "torch's version was 1.0,",
    ),
    "the code": (
        lambda run: change_json(run / "meta.json", code={"sha256": "0" * 64}),
        "code, versions",
        "the source code was 0000",
    ),
    "a loss": (
        lambda run: change(run / "metrics.jsonl", 4, **{"train/loss": 5.0}),
        "rows",
        "train/loss and train/perplexity of upd",
    ),
    "a loss and its perplexity": (loss_of, "losses", "train/loss of update 4 was "),
    "a validation and its perplexity": (validation_of, "validation", "val/loss of update 10 was "),
    "a validation's bytes": (
        lambda run: change_json(run / "summary.json", **{"val/bits_per_byte": 1.0}),
        "rows",
        "summary.json says that val/bits_per_byte is 1.0, the last row that it is ",
    ),
    "the best": (
        lambda run: change_json(run / "summary.json", **{"best/val/loss": 1.0}),
        "rows",
        "summary.json says that best/val/loss is 1.0, the best row that it is ",
    ),
    "a norm": (
        lambda run: change(run / "metrics.jsonl", 0, **{"train/grad_norm": 1.0}),
        "losses",
        "train/grad_norm of update 1 was 1.0",
    ),
    "a lost loss": (
        lambda run: change(run / "metrics.jsonl", 0, **{"train/loss": None}),
        "losses",
        "train/loss of update 1 was None",
    ),
    "a rate": (
        lambda run: change(run / "metrics.jsonl", 1, **{"train/lr": 1.0}),
        "rows",
        "train/lr of update 4 is 1.0, the schedule says",
    ),
    "tokens": (lambda run: change(run / "metrics.jsonl", 1, tokens=7), "rows", "tokens of update 4 are not 512"),
    "a lost row": (lambda run: cut(run / "metrics.jsonl", 1), "rows", "metrics.jsonl lacks the training row of update 4"),
    "a lost validation": (lambda run: cut(run / "metrics.jsonl", 2), "rows", "metrics.jsonl lacks the validation of update 5"),
    "the last row": (lambda run: cut(run / "metrics.jsonl", 4), "rows", "metrics.jsonl ends with update 8, the run has done 10"),
    "a row that comes twice": (
        lambda run: twice(run / "metrics.jsonl", 1),
        "rows",
        "train/loss of update 4 stands behind that of update 4",
    ),
    "a torn row": (lambda run: edit(run / "metrics.jsonl", '{"update": 5', '{"upd'), "rows", "line 3 of metrics.jsonl is no row"),
    "the config": (
        lambda run: edit(run / "config.yaml", "weight_decay: 0.1", "weight_decay: 0.2"),
        "config.yaml",
        "was changed: it",
    ),
    "the tokenizer": (lambda run: edit(run / "tokenizer.json", "<EOS>", "<END>"), "data", "tokenizer.json"),
    "the data": (
        lambda run: change_json(run / "meta.json", data={"data": "0" * 64}),
        "data",
        "the tokens are others: 000000000000 then",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_whatever_is_changed_is_named(run: Path, damage: str, capsys: Output) -> None:
    make, check, said = DAMAGES[damage]
    make(run)
    assert verify(run) == 1
    shown = found(capsys)
    assert shown[check].startswith("FAILED ")
    assert said in shown[check]
    assert shown["verdict"].startswith("NOT VERIFIED: ") and check in shown["verdict"]
    others = {name for name, line in shown.items() if line.startswith("FAILED ")} - {check}
    # What is altered in config or rows shows in what was trained with them, too.
    assert others <= {"losses", "data", "weights after update 4"}


def test_validations_that_take_long_are_made_again_where_that_is_asked_for(
    run: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    validation_of(run)
    monkeypatch.setattr(reproduce, "CHEAP_FLOPS", dict.fromkeys(Device, 1.0))
    assert verify(run) == 0
    assert "tokens would take long here; --validation takes them all the same" in found(capsys)["validation"]
    assert verify(run, "--validation") == 1
    assert found(capsys)["validation"].startswith("FAILED val/loss of update 10 was ")
    # `eval` may change from start to start without another identity.
    starts = json.loads((run / "meta.json").read_text(encoding="utf-8"))["starts"]
    change_json(run / "meta.json", starts=[*starts, starts[0] | {"command": ["llama-lab", "train", "eval.max_tokens=16"]}])
    assert verify(run, "--validation") == 0
    assert "several commands, perhaps with other `eval`" in found(capsys)["validation"]
    shutil.rmtree(weights_of(run, 10))
    assert verify(run) == 0
    assert found(capsys)["validation"] == "- no checkpoint lies where the run has validated"


def test_a_changed_shard_is_named(run: Path, shards: Path, capsys: Output) -> None:
    shard = shards / "train-00000.bin"
    whole, times = shard.read_bytes(), shard.stat()
    try:
        flip(shard, 0.99)
        os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
        assert verify(run, "--data") == 1
        shown = found(capsys)
        assert "has train-00000.bin, which was changed after it was prepared" in shown["data"]
        os.utime(shard)
        shard.write_bytes(shard.read_bytes()[:-2])
        assert verify(run) == 1
        shown = found(capsys)
        assert shown["data"].startswith("FAILED ") and "train-00000.bin has " in shown["data"]
        assert shown["updates"] == "- cannot be made again without the data"
    finally:
        shard.write_bytes(whole)
        os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_other_hardware_may_differ_within_float_noise(run: Path, capsys: Output) -> None:
    loss_of(run)
    change_json(run / "meta.json", machine={"host": "elsewhere"})
    assert verify(run, "--updates", 4) == 0
    shown = found(capsys)
    assert shown["hardware"].startswith("- host elsewhere then, ")
    assert "loss and gradient norm of update 1, 4 differ by 1.0e-07 and 0.0e+00 of them at most" in shown["losses"]
    assert shown["verdict"] == "Verified: the run is whole, and this machine agrees with it within float noise"
    loss = read_rows(run / "metrics.jsonl")[1]["train/loss"] * 1.01
    change(run / "metrics.jsonl", 1, **{"train/loss": loss, "train/perplexity": perplexity(loss)})
    assert verify(run, "--updates", 4) == 1
    assert "more than float noise" in found(capsys)["losses"]


def test_a_run_of_several_processes_is_made_again_by_as_many(shards: Path, capsys: Output) -> None:
    folder = train(compose([*TINY, "data=shards", f"data.path={shards}", "hardware.processes=2"])).folder
    capsys.readouterr()
    assert verify(folder, "--updates", 4) == 0
    assert found(capsys)["verdict"].endswith("reproduces it bit for bit")


def test_a_run_of_hardware_that_is_not_here_is_made_on_what_is(run: Path, capsys: Output) -> None:
    edit(run / "config.yaml", "processes: 1", "processes: 5")
    edit(run / "config.yaml", "device: cpu", "device: mps")
    change_json(run / "meta.json", machine={"device": "mps", "processes": 5})
    assert verify(run, "--updates", 1) == 0
    shown = found(capsys)
    assert "device mps then, " in shown["hardware"]
    assert "processes 5 then, " in shown["hardware"]


def test_a_run_that_is_being_trained_is_read_only_as_far_as_it_is(run: Path, capsys: Output) -> None:
    change_json(run / "summary.json", status="running")
    for number in (5, 4):
        cut(run / "metrics.jsonl", number)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"update": 10, "tok')
    shutil.rmtree(weights_of(run, 10))
    (run / "checkpoints" / ".draft-tokens-000000000001280").mkdir()
    assert verify(run, "--updates", 1) == 0
    assert found(capsys)["rows"] == "ok 4 of metrics, 10 of batches, to update 10 of 10"


def test_a_fork_is_made_again_from_where_it_began(trained: Path, capsys: Output) -> None:
    folder = fork(trained, ["optim.max_lr=0.001"], update="4").folder
    capsys.readouterr()
    assert verify(folder) == 0
    shown = found(capsys)
    assert shown["losses"] == "ok loss and gradient norm of update 8 are equal bit for bit"
    assert shown["weights after update 8"].startswith("ok ")
    shutil.rmtree(weights_of(folder, 4))
    assert verify(folder) == 0
    assert found(capsys)["losses"] == "ok loss and gradient norm of update 10 are equal bit for bit"
    with pytest.raises(ConfigError, match=r"--update 8 has no checkpoint before it that could be read: .* forked after update 4"):
        verify(folder, "--update", 8)


def test_one_update_is_shown(run: Path, capsys: Output) -> None:
    assert verify(run, "--update", 10) == 0
    out = capsys.readouterr().out
    row = read_rows(run / "metrics.jsonl")[4]
    batch = read_rows(run / "batches.jsonl")[9]
    assert "Making update 10 again on cpu" in out and "from the checkpoint after update 8" in out
    assert f"gradient norm {row['train/grad_norm']:.6g}, learning rate {row['train/lr']:.6g}" in out
    assert f"Fed: windows 72 to 79, hash {batch['hash']}" in out
    assert "Gradients: all finite; the largest " in out
    assert "embedding.weight" in out
    assert out.endswith("Batch: as recorded\nlosses: loss and gradient norm of update 10 are equal bit for bit\n")
    change(run / "batches.jsonl", 9, hash="0" * 16)
    assert verify(run, "--update", 10) == 1
    assert "Batch: recorded was 0000000000000000" in capsys.readouterr().out
    assert verify(run, "--update", 2) == 0
    assert "from the first weights" in capsys.readouterr().out


def test_an_update_that_ended_a_run_is_made_again(shards: Path, outputs: Path, capsys: Output) -> None:
    with pytest.raises(Diverged, match=r"at update 2 the loss is \S+ and the gradient norm nan") as ended:
        train(compose([*TINY, "data=shards", f"data.path={shards}", "optim.max_lr=1e30", "optim.max_grad_norm=null"]))
    (folder,) = (outputs / "tiny").glob("llama_3m*")
    assert f"llama-lab verify {folder} --update 2" in str(ended.value)
    capsys.readouterr()
    assert verify(folder, "--update", 2) == 0
    out = capsys.readouterr().out
    assert "nats a token, gradient norm nan" in out
    assert "guard.jsonl: bad in the same way" in out
    (folder / "guard.jsonl").write_text(json.dumps(read_rows(folder / "guard.jsonl")[0] | {"loss": 3.0}) + "\n")
    assert verify(folder, "--update", 2) == 1
    assert "guard.jsonl: other than recorded: the loss" in capsys.readouterr().out


def test_mistakes_are_answered(run: Path, tmp_path: Path, capsys: Output) -> None:
    with pytest.raises(ConfigError, match="holds no run itself; runs in it: "):
        verify(run.parent)
    with pytest.raises(ConfigError, match="--updates 11 is more than the run has done; try --updates 10"):
        verify(run, "--updates", 11)
    with pytest.raises(ConfigError, match=r"--update 11 is none of the updates of .*, 1 to 10"):
        verify(run, "--update", 11)
    assert verify(run, "--updates", 0) == 2
    assert "'0' is no number of updates; try 3" in capsys.readouterr().err
    assert verify(run, "--updates", 1, "--update", 1) == 2
    capsys.readouterr()
    for name in ("metrics.jsonl", "batches.jsonl"):
        (run / name).unlink()
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(ConfigError, match="has done no update that could be made again"):
        verify(run)
    (run / "meta.json").unlink()
    with pytest.raises(ConfigError, match=r"has no meta\.json"):
        verify(run)


def test_the_command(llama_lab: Any, run: Path) -> None:
    done = llama_lab("verify", str(run), "--updates", "1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("Verified: ")
    assert llama_lab("verify", "--help").stdout.startswith("usage: llama-lab verify")


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        ("verify {run} --update 11", "--update 11 is none of the updates of {run}, 1 to 10"),
        ("verify {run} --updates 11", "--updates 11 is more than the run has done; try --updates 10"),
        ("fork {run} training_tokens=20480 --update 5", "--update 5 is no checkpoint of {run}; there are 4, 8, 10"),
        ("generate {run} The --update 5", "--update 5 is no checkpoint of {run}; there are 4, 8, 10"),
        ("export {run} --to hf --out x --update 5", "--update 5 is no checkpoint of {run}; there are 4, 8, 10"),
    ],
)
def test_an_update_that_is_not_there_is_answered_without_torch(
    llama_lab: Any, run: Path, tmp_path: Path, words: str, rule: str
) -> None:
    done = llama_lab(*words.format(run=run).split(), PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 2
    assert rule.format(run=run.relative_to(tmp_path)) in done.stderr and " torch\n" not in done.stderr


def test_how_far_numbers_are_apart() -> None:
    assert apart(2.0, 2.0) == 0.0
    assert apart(2.0, 1.0) == 1.0
    assert apart(math.nan, None) == apart(math.inf, "nan") == 0.0
    assert apart(1.0, None) == apart(math.nan, 1.0) == apart(1.0, 0.0) == math.inf


def test_a_run_without_batches_has_none_to_compare(run: Path) -> None:
    (run / "batches.jsonl").unlink()
    rows = Rows.of(RunFolder(run))
    assert (rows.batches, rows.done) == ([], 10)
    assert verify(run, "--updates", 1) == 0
