"""Run the notebooks here anew and keep what they show: `python notebooks/refresh.py [NAME …]`.

What they keep tells nothing of the machine they ran on but the device's name and its speed. The kernel is this interpreter's, and
nothing is written to the home directory. `tests/ray/test_notebooks.py` runs them too, and keeps nothing.
"""

from __future__ import annotations

import os
import secrets
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent
MOST_BYTES = 100 << 10
_CELL_WITHIN_S = 120


def executed(path: Path, *, scratch: Path) -> Any:
    """The notebook with fresh outputs. `scratch`: where it runs, and where Jupyter writes. Raises CellExecutionError."""
    notebook = nbformat.read(path, as_version=4)
    # No directory is searched: what remains is the kernel of this interpreter's own ipykernel.
    specs = KernelSpecManager(kernel_dirs=[], ensure_native_kernel=True)
    with tempfile.TemporaryDirectory(prefix="nb-") as sockets:  # a socket's path must be short
        connection = f"{sockets}/k.json"
        manager = AsyncKernelManager(
            kernel_name="python3", kernel_spec_manager=specs, connection_file=connection, transport="ipc"
        )
        resources = {"metadata": {"path": str(scratch)}}
        client = NotebookClient(notebook, km=manager, timeout=_CELL_WITHIN_S, resources=resources)
        client.execute(cleanup_kc=True, env=environment(scratch))
    return tidied(notebook)


def environment(scratch: Path) -> dict[str, str]:
    """What the kernel sees: this checkout first, and no home to write to."""
    places = {name: str(scratch) for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "MPLCONFIGDIR")}
    places["PYTHONPATH"] = os.pathsep.join(filter(None, (str(HERE.parent), os.environ.get("PYTHONPATH"))))
    # a token for the length of the run: Ray would write one to the home directory
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)} if "RAY_AUTH_MODE" not in os.environ else {}
    return _without(os.environ, "CONDUCTOR_CONFIG", "RAY_ADDRESS") | places | token


def _without(variables: Mapping[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in variables.items() if name not in names}


def tidied(notebook: Any) -> Any:
    """Without versions and times of day, which differ from machine to machine and tell a reader nothing."""
    notebook.metadata = nbformat.from_dict({"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}})
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    return notebook


def main(names: list[str]) -> None:
    for path in sorted(HERE.glob("*.ipynb")):
        if names and path.name not in names:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            text = nbformat.writes(executed(path, scratch=Path(scratch)))
        size = len(text.encode())
        if size > MOST_BYTES:
            sys.exit(f"{path.name} would have {size:,} bytes, more than {MOST_BYTES:,}: show less")
        path.write_text(text + "\n", "utf-8")
        print(f"{path.name}: {size:,} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
