"""The models that the benchmarks run with: files, directories of files, or a known model's true geometry, made here.

A made model has the named one's tensors in its usual quantisation, filled at random: the same bytes and the same speed, no
meaning. It takes seconds and a tool that is no part of this repository (`--synth`).
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from conductor.config import Config, ModelConfig, parse_config
from conductor.core.estimate import CELL_MULTIPLE
from pipelines.console import out

ROOT = Path(__file__).resolve().parent.parent

#: the article's three, in the order in which it starts them, and a larger one
PUBLIC = ("llama-3.2-1b", "qwen2-0.5b", "smollm2-360m")
LARGER = "llama-3.1-8b"
#: what comes with the repository
SHIPPED = ("coder", "reviewer", "documenter")

#: of the host device, where a benchmark is not about room
_HOST_BYTES = 4 << 30

Models = Annotated[list[str] | None, typer.Option(help="Files, directories or shapes; repeat it, or separate by commas.")]
Directory = Annotated[Path, typer.Option(help="Where models of a shape are made, and looked for first.")]
Synth = Annotated[Path, typer.Option(help="The program that makes them: SHAPE FILE.")]
DIRECTORY, SYNTH = Path("/tmp/shapes"), ROOT / ".gpu" / "synth_gguf.py"


def find(names: Sequence[str], *, directory: Path, synth: Path) -> dict[str, Path]:
    """{name: file}, in the order asked for. Raises typer.BadParameter."""
    found: dict[str, Path] = {}
    for name in (part for each in names for part in each.split(",")):
        path = Path(name)
        if path.is_dir():
            found |= {file.stem: file for file in sorted(path.glob("*.gguf"))}
        elif path.is_file():
            found[path.stem] = path
        elif name in SHIPPED:
            found[name] = ROOT / "models" / f"{name}.gguf"
        else:
            found[name] = _made(name, directory, synth)
    return found


def _made(shape: str, directory: Path, synth: Path) -> Path:
    path = directory / f"{shape}.gguf"
    if path.exists():
        return path
    if not synth.exists():
        raise typer.BadParameter(f"{shape} is no file, and {synth} is not here to make it")
    directory.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    with out.status(f"making {shape}"):
        run = subprocess.run([sys.executable, str(synth), shape, str(unfinished)], capture_output=True, text=True, check=False)
    if run.returncode:
        raise typer.BadParameter(f"{synth.name} cannot make {shape}: {run.stderr.strip().splitlines()[-1:]}")
    unfinished.rename(path)
    return path


def configured(models: Mapping[str, Path], **options: object) -> Config:
    """A configuration with these models and nothing else but `options`."""
    document = {"models": {name: {"path": str(path.resolve())} for name, path in models.items()}, **options}
    return parse_config(document, source="benchmark", directory=ROOT)


def key(name: str) -> str:
    """What a model given to a benchmark is called in its configuration."""
    return Path(name).stem if Path(name).is_file() else name


def added(settings: Config, names: Sequence[str], *, directory: Path, synth: Path) -> Config:
    """The configuration with these models in it: those that it has, and files and shapes beside them."""
    missing = [name for name in names if name not in settings.models]
    files = find(missing, directory=directory, synth=synth) if missing else {}
    further = {name: ModelConfig(path=str(path.resolve())) for name, path in files.items()}
    return settings.model_copy(update={"models": {**settings.models, **further}})


def roomy(settings: Config, *, slots: int) -> Config:
    """As wide as a benchmark needs that is not about room: slots for all its agents, and a host device that holds them."""
    device = settings.device.model_copy(update={"host_bytes": max(settings.device.host_bytes, _HOST_BYTES)})
    context = settings.context.model_copy(update={"slots": max(settings.context.slots, slots)})
    return settings.model_copy(update={"device": device, "context": context})


def window_for(tokens: int) -> int:
    """The window that so many tokens need: llama.cpp rounds it up to this anyway."""
    return -(-tokens // CELL_MULTIPLE) * CELL_MULTIPLE
