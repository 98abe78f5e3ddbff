"""Rich views for notebooks: what the conductor says as HTML with plain text beside it, and plots of what it did.

    from conductor import notebook
    notebook.show(ray.get(conductor.status.remote()))

After `%load_ext conductor.notebook` a Status, an Admission, a DecodeResult or a Refusal that ends a cell is shown so by itself.
Does not cover terminals (`pipelines.tables`) and what the streaming experiment found (`pipelines.plots`, whose figures `picture`
takes).
"""

from __future__ import annotations

from typing import Any

from conductor.errors import Refusal
from conductor.notebook.costs import CostLine, SwapPoint, fitted
from conductor.notebook.pictures import Picture, ledger_over_time, picture, swap_costs
from conductor.notebook.views import View, show
from conductor.types import Admission, DecodeResult, Status

__all__ = ["CostLine", "Picture", "SwapPoint", "View", "fitted", "ledger_over_time", "picture", "show", "swap_costs"]

_BY_THEMSELVES = (Status, Admission, DecodeResult, Refusal)


def load_ipython_extension(shell: Any) -> None:
    """`%load_ext conductor.notebook`: what `show` takes is shown without it."""
    formatters = shell.display_formatter.formatters
    for kind in _BY_THEMSELVES:
        formatters["text/html"].for_type(kind, lambda what: show(what).html)
        formatters["text/plain"].for_type(kind, lambda what, printer, cycle: printer.text(show(what).text))


def unload_ipython_extension(shell: Any) -> None:
    for kind in _BY_THEMSELVES:
        for mime in ("text/html", "text/plain"):
            shell.display_formatter.formatters[mime].pop(kind, None)
