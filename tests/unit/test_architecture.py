"""Imports go one way: pipelines → actors → conductor shell → core, and shell → backend. Each foreign library has its room.

The rules are the tables at the top; the walk reads the syntax tree of every file, imports inside functions and under
TYPE_CHECKING included. That `conductor.core` is light at run time is proved in a fresh interpreter.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("conductor", "actors", "pipelines")

#: Where a foreign library may be imported: a file, or a folder with its slash. A new room is a decision, made here.
ROOMS = {
    "ray": ("actors/", "pipelines/"),
    "llama_cpp": (
        "conductor/backend/llama/",
        "conductor/backend/dry_run.py",
        "conductor/backend/layer_ring.py",
    ),
    "cupy": ("conductor/backend/layer_ring.py", "actors/layers/cuda_lanes.py"),
    "matplotlib": ("pipelines/plots.py", "conductor/notebook/pictures.py"),
    "pynvml": ("conductor/backend/device.py",),
    "aiohttp": ("pipelines/board_server.py",),
}

#: What a folder may not import, and what of that it may after all.
FORBIDDEN = {
    "conductor/": (("actors", "pipelines"), ()),
    "actors/": (("pipelines",), ()),
    "conductor/backend/": (
        ("conductor.core", "conductor.gpu_conductor"),
        ("conductor.core.estimate", "conductor.core.pool", "conductor.core.streaming"),
    ),
}

#: The core is pure policy: of the project it knows these, of the standard library anything that does no I/O, nothing else.
CORE_KNOWS = ("conductor.core", "conductor.types", "conductor.errors", "conductor.units")
IMPURE = (
    "asyncio", "concurrent", "ctypes", "datetime", "io", "logging", "multiprocessing", "os", "pathlib", "queue", "random",
    "secrets", "select", "shutil", "signal", "socket", "sqlite3", "subprocess", "tempfile", "threading", "time", "uuid",
)  # fmt: skip

#: Neither `import conductor.core` nor any module of it may load one of these.
HEAVY = ("ray", "numpy", "llama_cpp", "cupy", "pydantic", "pynvml")


def imports_of(source: str, *, package: str = "") -> Iterator[tuple[int, str]]:
    """(line, dotted name) of each import in `source`; `from a import b` is `a.b`. `package` resolves relative ones."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def within(name: str, *modules: str) -> bool:
    return any(name == module or name.startswith(module + ".") for module in modules)


def edges() -> Iterator[tuple[str, int, str]]:
    """(file, line, imported name) for every import of the three packages."""
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            file = path.relative_to(ROOT).as_posix()
            for line, name in imports_of(path.read_text("utf-8"), package=".".join(Path(file).parent.parts)):
                yield file, line, name


EDGES = list(edges())


def violations(folder: str, *modules: str, except_for: tuple[str, ...] = ()) -> list[str]:
    return [
        f"{file}:{line} imports {name}"
        for file, line, name in EDGES
        if file.startswith(folder) and within(name, *modules) and not within(name, *except_for)
    ]


def test_the_walk_sees_every_way_to_import() -> None:
    source = "import a.b\nfrom c import d, e\nfrom . import f\nfrom ..g import h\ndef lazy():\n    import i as j\n"
    assert list(imports_of(source, package="x.y")) == [
        (1, "a.b"), (2, "c.d"), (2, "c.e"), (3, "x.y.f"), (4, "x.g.h"), (6, "i"),
    ]  # fmt: skip


def test_the_walk_finds_the_core() -> None:
    assert any(file.startswith("conductor/core/") and within(name, "conductor.types") for file, _, name in EDGES)


@pytest.mark.parametrize("library", ROOMS)
def test_a_foreign_library_stays_in_its_room(library: str) -> None:
    strays = [stray for stray in violations("", library) if not stray.startswith(ROOMS[library])]
    assert strays == []


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_imports_go_one_way(folder: str) -> None:
    modules, except_for = FORBIDDEN[folder]
    assert violations(folder, *modules, except_for=except_for) == []


def test_the_core_knows_only_itself_and_the_shared_words() -> None:
    foreign = {
        f"{file}:{line} imports {name}"
        for file, line, name in EDGES
        if file.startswith("conductor/core/")
        and not within(name, *CORE_KNOWS)
        and name.split(".")[0] not in sys.stdlib_module_names
    }
    assert foreign == set()


def test_the_core_has_no_clock_no_threads_no_files_and_no_chance() -> None:
    assert violations("conductor/core/", *IMPURE) == []


def test_importing_the_core_loads_no_heavy_library() -> None:
    modules = [path.relative_to(ROOT).with_suffix("").parts for path in sorted((ROOT / "conductor/core").rglob("*.py"))]
    names = [".".join(parts).removesuffix(".__init__") for parts in modules]
    program = (
        "import importlib, json, sys\n"
        "for name in json.loads(sys.argv[1]): importlib.import_module(name)\n"
        "print(json.dumps(sorted(set(json.loads(sys.argv[2])) & set(sys.modules))))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, json.dumps(names), json.dumps(HEAVY)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == []
