"""The schema against the rest of the package: no field that nobody reads, and no word that is missing."""

import ast
import inspect
import itertools
from dataclasses import fields, is_dataclass
from pathlib import Path

from omegaconf import MISSING

from llama_lab.config import schema
from llama_lab.config.compose import compose
from llama_lab.config.overrides import any_shape, known_fields
from llama_lab.config.validate import NODES

PACKAGE = Path(schema.__file__).parents[2]
NODE_TYPES = [kind for _, kind in inspect.getmembers(schema, is_dataclass) if kind is not schema.Origin]


def read_names() -> set[str]:
    """Every attribute that code outside the schema and its validation reads."""
    config = PACKAGE / "config"
    files = {*PACKAGE.rglob("*.py")} - {*config.rglob("*.py")} | {config / "resolve.py", config / "identity.py"}
    read = {name for file in files for name in attributes(ast.parse(file.read_text(encoding="utf-8")))}
    # What a node derives from its fields, `RunConfig.updates` say, reads them for whoever asks for it.
    schemas = [ast.parse(file.read_text(encoding="utf-8")) for file in (config / "schema").rglob("*.py")]
    derived = [node for tree in schemas for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name in read]
    return read | {name for node in derived if node.name != "problems" for name in attributes(node)}


def attributes(tree: ast.AST) -> set[str]:
    """Every attribute that is read in a piece of code."""
    return {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}


def test_each_field_is_read_somewhere() -> None:
    read = read_names()
    assert [key for key in any_shape() if key.rpartition(".")[2] not in read] == []


def test_each_field_and_node_is_explained() -> None:
    for kind in NODE_TYPES:
        (tree,) = ast.parse(inspect.getsource(kind)).body
        assert isinstance(tree, ast.ClassDef)
        lines = tree.body
        explained = {
            line.target.id
            for line, after in itertools.pairwise(lines)
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and isinstance(after, ast.Expr)
        }
        own = {name for name in kind.__annotations__ if not is_dataclass(kind.__annotations__[name])}
        nodes = {item.name for item in fields(kind) if item.name in (*NODES, "origin")}
        assert own - nodes <= explained, kind.__name__
        assert ast.get_docstring(tree)


def test_each_node_can_say_what_is_wrong_with_it() -> None:
    run = compose([])
    assert {item.name for item in fields(schema.RunConfig) if hasattr(getattr(run, item.name), "problems")} == set(NODES)
    for shapes in schema.SHAPES.values():
        assert all(callable(getattr(shape, "problems", None)) for shape in shapes.values())


def test_no_field_has_a_number_in_the_schema() -> None:
    """Numbers live in conf/: a default here would hide a value that an option forgot."""
    for kind in NODE_TYPES:
        assert {item.name for item in fields(kind) if item.default is not MISSING and schema.BEFORE not in item.metadata} <= {
            "origin"
        }


def test_every_key_of_the_composed_run_is_a_known_field() -> None:
    run = compose([])
    known = known_fields({group: type(getattr(run, group)) for group in schema.SHAPES})
    assert {f"optim.{item.name}" for item in fields(run.optim)} <= set(known)
    assert "origin" not in known
