"""The Python reference against the code: what is public is on it, and what it says of a turn's options is so."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from conductor.gpu_conductor import GpuConductor
from conductor.types import DecodeRequest

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT / "docs" / "reference"

#: page, what it says before each name, and the file that has them
PAGES = [
    ("actors.md", "actors", "actors/__init__.py"),
    ("types.md", "conductor.types", "conductor/types.py"),
    ("types.md", "conductor.happenings", "conductor/happenings.py"),
    ("errors.md", "conductor.errors", "conductor/errors.py"),
    ("notebook.md", "conductor.notebook", "conductor/notebook/__init__.py"),
    ("pipelines.md", "pipelines.library", "pipelines/library/__init__.py"),
]


def shown(page: str) -> list[str]:
    return re.findall(r"^::: (\S+)$", (REFERENCE / page).read_text("utf-8"), re.MULTILINE)


def public(file: str) -> set[str]:
    """`__all__`, else the module's own classes, functions and ids."""
    found: set[str] = set()
    for node in ast.parse((ROOT / file).read_text("utf-8")).body:
        match node:
            case ast.Assign(targets=[ast.Name("__all__")], value=value):
                return set(ast.literal_eval(value))
            case ast.Assign(targets=[ast.Name(name)], value=ast.Call(func=ast.Name("NewType"))):
                found.add(name)
            case ast.ClassDef(name=name) | ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                found.add(name)
    return {name for name in found if not name.startswith("_")}


@pytest.mark.parametrize(("page", "module", "file"), PAGES)
def test_each_public_name_has_its_place(page: str, module: str, file: str) -> None:
    names = [path.rpartition(".")[2] for path in shown(page) if path.startswith(module + ".")]
    assert public(file) <= set(names)
    assert len(names) == len(set(names)), "a name stands there twice"


def test_each_call_of_the_conductor_has_its_place() -> None:
    module = ast.parse((ROOT / "actors" / "conductor_actor.py").read_text("utf-8"))
    [actor] = [node for node in module.body if isinstance(node, ast.ClassDef) and node.name == "GpuConductorActor"]
    calls = {node.name for node in actor.body if isinstance(node, ast.AsyncFunctionDef) and not node.name.startswith("_")}
    assert {path.rpartition(".")[2] for path in shown("conductor.md")} == calls


def test_each_section_of_the_configuration_has_its_place() -> None:
    sections = {name for name in public("conductor/config.py") if name.endswith("Config")}
    assert sections <= {path.rpartition(".")[2] for path in shown("config.md")}


def test_the_options_of_a_turn_are_the_fields_of_its_request_and_two_times() -> None:
    options = dict(GpuConductor.decode.__kwdefaults__ or {})
    assert (options.pop("wait_s"), options.pop("timeout_s")) == (None, None)
    assert options | {"prompt": None} == DecodeRequest().to_json() | {"stop": ()}
