"""The notebooks run as they are kept, and what they print holds; what is kept of them is small and of no particular machine."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest

from notebooks.refresh import HERE, MOST_BYTES, executed
from tests.conftest import ROOT

#: By notebook and cell: what the text around it promises.
CLAIMS = {
    "1-three-agents": {
        "register": [r"(?s)ada admitted.*loaded for it.*rob admitted.*loaded for it.*dot admitted.*loaded for it"],
        "bar": [r"Ray's books, equal", r"h +headroom", r"w +weights +coder"],
        "sum": [r"the sum of its lines: True", r"less than three contexts take: True"],
        "decode": [r"def is_even\(n\)", r"ended by eos"],
        "crew": [r"(?s)rob.*dot.*evicted ada"],
        "after": [r"ada: host .*rob: slot .*dot: slot"],
        "leave": [r"booked: 0 bytes; Ray: 0 MiB, equal"],
    },
    "2-admission": {
        "fill": [r"3 were admitted, the next one was not: CAP", r"VRAM_LEDGER_DENY code=CAP ", r"\[w+c+\?+\] booked"],
        "unchanged": [r"booked as before: True", r"than is free: True", r"window would fit: True"],
        "wait": [r"late waits at position 0: .* must become free"],
        "admitted": [r"waited: True", r"late admitted to coder, guaranteed"],
        "leave": [r"are equal: 0 and 0 MiB"],
        "plot": [r"never above the cap: True", r"0\.0 in the end; \d{2,} figures of Ray's"],
    },
    "3-streaming-layers": {
        "measure": [r"results are NumPy's: True", r"booked after it ended: 0 bytes"],
        "timeline": [r"serial [\d.]+ ms, overlapped [\d.]+ ms, ideal [\d.]+ ms"],
        "sweep": [r"points, all right: True", r"faster everywhere: True"],
        "picture": [r"the most is saved with [\d,]+ multiply-adds"],
    },
    "4-swap-cost": {
        "measure": [r"every turn swapped: True"],
        "fit": [r"grows with the conversation: True", r"both ways: 1\d\.\d KiB", r"µs a token \(R² [\d.]+, 6 points\)"],
        "compare": [r"faster than reading again: True"],
    },
}
PICTURES = {"2-admission": ["plot"], "3-streaming-layers": ["timeline", "picture"], "4-swap-cost": ["fit"]}
SLOW = ("3-streaming-layers", "4-swap-cost")


def shown(cell: Any) -> str:
    """What the cell printed, and its result in words."""
    return "".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in cell.outputs)


def unkept_claims(name: str, notebook: Any) -> list[str]:
    cells = {cell.id: cell for cell in notebook.cells}
    claims = [
        f"{id}: {claim!r} is not in {shown(cells[id])!r}"
        for id, claims in CLAIMS[name].items()
        for claim in claims
        if not re.search(claim, shown(cells[id]))
    ]
    pictured = [id for id, cell in cells.items() for output in cell.get("outputs", ()) if "image/png" in output.get("data", {})]
    return claims + ([f"pictures in {pictured}"] if pictured != PICTURES.get(name, []) else [])


def complaints(notebook: Any) -> list[str]:
    outputs = (output for cell in notebook.cells for output in cell.get("outputs", ()))
    return [str(output) for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in CLAIMS])
def test_a_notebook_does_what_it_says(name: str, tmp_path: Path) -> None:
    notebook = executed(HERE / f"{name}.ipynb", scratch=tmp_path)
    assert unkept_claims(name, notebook) == []
    assert complaints(notebook) == []


def test_every_notebook_is_run_and_named_in_the_docs() -> None:
    names = sorted(path.stem for path in HERE.glob("*.ipynb"))
    assert names == sorted(CLAIMS)
    docs = (ROOT / "docs/notebooks.md").read_text("utf-8")
    assert [name for name in names if f"(../notebooks/{name}.ipynb)" not in docs] == []


@pytest.mark.parametrize("name", CLAIMS)
def test_what_is_kept_of_a_notebook_is_whole_and_small(name: str) -> None:
    path = HERE / f"{name}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path.stat().st_size <= MOST_BYTES
    assert unkept_claims(name, notebook) == []
    assert complaints(notebook) == []
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert [cell.id for cell in notebook.cells if cell.metadata] == []
    assert list(notebook.metadata) == ["kernelspec"]


@pytest.mark.parametrize("name", CLAIMS)
def test_a_notebook_ends_what_it_started(name: str) -> None:
    last = nbformat.read(HERE / f"{name}.ipynb", as_version=4).cells[-1]
    assert last.source.endswith("actors.stop(conductor)\nray.shutdown()")
