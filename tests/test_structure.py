"""Imports point one way: config <- data, model <- training <- inference, lab <- cli."""

import ast
from pathlib import Path

import llama_lab

PACKAGE = Path(llama_lab.__file__).parent
MAY_IMPORT = {
    "config": set(),
    "data": {"config"},
    "model": {"config"},
    "training": {"config", "data", "model"},
    "inference": {"config", "data", "model", "training"},
    "formats": {"config", "data", "model", "training"},
    "api": {"config", "data", "training", "inference"},
    "lab": {"config", "data", "model", "training", "inference", "formats", "api"},
}
"""Layer -> layers that it builds on. `api` hands inference to training; the other files at the top are the command line, and may
import anything."""
TORCH_FREE = ("config", "lab")


def imports(file: Path) -> set[str]:
    """Full names of the modules that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute here"
            module = node.module or ""
            found |= {f"{module}.{name.name}" for name in node.names} if module == "llama_lab" else {module}
    return found


def test_imports_point_one_way() -> None:
    wrong = []
    for folder, below in MAY_IMPORT.items():
        for file in [PACKAGE / f"{folder}.py"] if folder == "api" else (PACKAGE / folder).rglob("*.py"):
            for module in sorted(imports(file)):
                if module.startswith("llama_lab.") and module.split(".")[1] not in below | {folder}:
                    wrong.append(f"{file.relative_to(PACKAGE)} imports {module}")
    assert wrong == []


def test_every_folder_has_its_place() -> None:
    assert {init.parent.name for init in PACKAGE.glob("*/__init__.py")} | {"api"} == set(MAY_IMPORT)


def test_what_answers_before_torch_never_imports_it() -> None:
    wrong = [
        f"{file.relative_to(PACKAGE)} imports {module}"
        for folder in TORCH_FREE
        for file in (PACKAGE / folder).rglob("*.py")
        for module in imports(file)
        if module.split(".")[0] == "torch"
    ]
    assert wrong == []


def test_no_file_is_a_drawer() -> None:
    drawers = {"utils", "util", "common", "helpers", "misc", "callbacks", "scripts"}
    assert [path for path in PACKAGE.rglob("*") if path.stem in drawers] == []


def test_every_command_says_what_a_mistyped_flag_was_meant_to_be() -> None:
    plain = [path for path in PACKAGE.rglob("*.py") if "ArgumentParser(" in path.read_text(encoding="utf-8")]
    assert plain == []
