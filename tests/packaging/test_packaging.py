"""The wheel that is built here works in another environment and another folder; an editable install reads the checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
pytest.importorskip("hatchling", reason="building the wheel needs hatchling, part of the test extra")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built without a network from the checkout."""
    target = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(target)], cwd=ROOT, check=True, capture_output=True
    )
    (path,) = target.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the programs of a fresh environment with the wheel in it.

    The dependencies are those of this environment, seen through a path file, so that nothing is downloaded; this project's own
    editable install is not seen, because path files inside such a folder are not read.
    """
    folder = tmp_path_factory.mktemp("fresh") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    paths = {"base": str(folder), "platbase": str(folder)}
    packages = Path(sysconfig.get_path("purelib", vars=paths))
    scripts = Path(sysconfig.get_path("scripts", vars=paths))
    python = scripts / Path(sys.executable).name
    # Written by its installer's own hand: pip runs from this environment and installs into the other.
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index", str(wheel)],
        check=True,
    )
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return scripts


def run(program: Path, *words: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [str(program), *words], cwd=cwd, env=environment, capture_output=True, text=True, encoding="utf-8", timeout=170
    )


def test_the_wheel_carries_options_and_presets(wheel: Path):
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        f"llama_lab/{path.relative_to(ROOT).as_posix()}"
        for folder in ("conf", "experiments")
        for path in (ROOT / folder).rglob("*.yaml")
    }
    assert len(expected) > 20
    assert expected <= names
    assert "llama_lab/py.typed" in names
    strangers = [name for name in names if not name.startswith(("llama_lab/", "llama_lab-"))]
    assert strangers == []


def test_the_wheel_works_from_any_folder(installed: Path, tmp_path: Path):
    for name in ("conf", "experiments", "llama_lab"):
        (tmp_path / name).mkdir()  # what happens to lie in the working directory must not matter
    program = installed / "llama-lab"
    where = run(installed / "python", "-P", "-c", "import llama_lab.cli; print(llama_lab.cli.__file__)", cwd=tmp_path)
    assert Path(where.stdout.strip()).is_relative_to(installed.parent), where.stderr
    shown = run(program, "--help", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    options = run(program, "train", "--help", cwd=tmp_path)
    assert "llama_3m" in options.stdout
    assert "smoke" in options.stdout
    config = run(program, "train", "--cfg", "experiment=smoke", cwd=tmp_path)
    assert config.returncode == 0, config.stderr
    assert "training_tokens:" in config.stdout


def test_an_editable_install_reads_the_checkout(wheel: Path, tmp_path: Path):
    """Built as editable from a copy, so that a YAML can be changed and the change seen."""
    checkout = tmp_path / "checkout"
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("llama_lab", "conf", "experiments"):
        shutil.copytree(ROOT / name, checkout / name, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout / name)
    build = "import sys; from hatchling.build import build_editable; print(build_editable(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=checkout, check=True, capture_output=True)
    (editable,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(editable).namelist()
    assert not [name for name in names if name.endswith(".yaml")], "a copy in site-packages would go stale"
    path_file = next(name for name in names if name.endswith(".pth"))
    assert Path(zipfile.ZipFile(editable).read(path_file).decode().strip()) == checkout
    option = checkout / "conf" / "model" / "llama_3m.yaml"
    lines = [line for line in option.read_text(encoding="utf-8").splitlines() if not line.startswith("dropout:")]
    option.write_text("\n".join([*lines, "dropout: 0.125"]) + "\n", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-P", "-m", "llama_lab", "train", "--cfg"],
        env=os.environ | {"PYTHONPATH": str(checkout)}, cwd=tmp_path, capture_output=True, text=True, encoding="utf-8",
    )  # fmt: skip
    assert "dropout: 0.125" in done.stdout, done.stderr


def test_constraints_pin_every_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [text for extra in project["optional-dependencies"].values() for text in extra]
    wanted = [text for text in [*project["dependencies"], *extras] if not text.startswith(project["name"])]
    pinned = dict(
        line.split("#")[0].split(";")[0].strip().split("==")
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    )
    for text in wanted:
        requirement = Requirement(text)
        name = requirement.name.replace(".", "-")
        assert name in pinned, f"{name} is not in constraints.txt"
        assert requirement.specifier.contains(pinned[name]), f"{text} forbids the pinned {pinned[name]}"


def test_ci_runs_the_readme_command():
    command = "pip install -c constraints.txt -e '.[test]' && pytest"
    assert command in (ROOT / "README.md").read_text(encoding="utf-8")
    assert command in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
