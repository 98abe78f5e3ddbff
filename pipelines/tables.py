"""What the conductor says, as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from conductor.errors import Refusal
from conductor.types import Admission, AgentStatus, DecodeResult, Kind, LedgerStatus, MirrorStatus, Reservation, Status
from conductor.units import format_bytes

_COLOURS = {
    Kind.WEIGHTS: "blue",
    Kind.CONTEXT: "green",
    Kind.HEADROOM: "cyan",
    Kind.OVERHEAD: "magenta",
    Kind.EXTERNAL: "yellow",
}
#: A letter for each kind, so that the bar can be read without colour.
_LETTERS = {Kind.WEIGHTS: "w", Kind.CONTEXT: "c", Kind.HEADROOM: "h", Kind.OVERHEAD: "o", Kind.EXTERNAL: "x"}


def status(status: Status) -> RenderableType:
    """Everything about a conductor at once."""
    device = status.device
    total, free, others = map(format_bytes, (device.total_bytes, device.free_bytes, device.others_bytes))
    saved, budget = format_bytes(status.host_memory.used_bytes), format_bytes(status.host_memory.budget_bytes)
    lines = (
        f"[bold]{device.name}[/] ({device.kind.value}; {device.chosen})",
        f"{total} in all, {free} free, {others} held by others; live contexts: {status.live_contexts}; waiting: {status.waiting}",
        f"saved KV: {saved} of {budget} host memory{' (page-locked)' if status.host_memory.pinned else ''}",
    )
    parts: list[RenderableType] = [*map(Text.from_markup, lines), bar(status.ledger), reservations(status.ledger.reservations)]
    if status.models:
        parts.append(models(status))
    if status.agents:
        parts.append(agents(status.agents))
    return Group(*parts, mirror(status.mirror))


def bar(ledger: LedgerStatus, width: int = 64) -> RenderableType:
    """The cap as a bar, booked bytes in true proportion: w weights, c context, h headroom, o overhead, x external."""
    line = Text("[")
    shown = 0
    for kind, letter in _LETTERS.items():
        size = sum(r.bytes for r in ledger.reservations if r.kind is kind)
        count = max(round(size * width / ledger.max_bytes), 1) if size else 0
        line.append(letter * count, style=_COLOURS[kind])
        shown += count
    line.append("·" * max(0, width - shown) + "]")
    line.append(f" {format_bytes(ledger.allocated_bytes)} of {format_bytes(ledger.max_bytes)} booked")
    return line


def reservations(items: Iterable[Reservation], title: str = "ledger") -> Table:
    table = _table(title, "id", "holder", "kind", "bytes", "")
    for r in items:
        table.add_row(r.id, r.holder, Text(r.kind.value, style=_COLOURS[r.kind]), f"{r.bytes:,}", format_bytes(r.bytes))
    return table


def models(status: Status) -> Table:
    table = _table("models", "key", "state", "agents", "weights", "file")
    for m in status.models:
        table.add_row(m.key, m.state.value, str(m.agents), format_bytes(m.bytes), m.path)
    return table


def agents(items: Sequence[AgentStatus]) -> Table:
    table = _table("agents", "id", "model", "window", "tokens", "KV", "context", "on host", "turns", "priority")
    for a in items:
        place = f"{a.kv.value}, busy" if a.busy else a.kv.value
        table.add_row(
            a.id, a.model, f"{a.window:,}", f"{a.tokens:,}", place, format_bytes(a.context_bytes),
            format_bytes(a.host_bytes), str(a.turns), str(a.priority),
        )  # fmt: skip
    return table


def admissions(items: Iterable[Admission]) -> Table:
    table = _table("admitted", "id", "model", "window", "weights", "context", "added to the ledger")
    for a in items:
        weights = format_bytes(a.weights_bytes) + ("" if a.model_loaded else ", shared")
        table.add_row(a.agent_id, a.model, f"{a.window:,}", weights, format_bytes(a.context_bytes), format_bytes(a.charged_bytes))
    return table


def decodes(items: Iterable[DecodeResult]) -> Table:
    table = _table("turns", "agent", "prompt", "made", "end", "first token", "all", "evicted", "restored", "moved")
    for d in items:
        table.add_row(
            d.agent_id, str(d.prompt_tokens), str(d.generated_tokens), d.finish_reason.value,
            f"{d.time_to_first_token_ms:.1f} ms", f"{d.elapsed_ms:.1f} ms", d.kv_swap_evicted or "–",
            "yes" if d.kv_swap_restored else "–", format_bytes(d.swap_bytes),
        )  # fmt: skip
    return table


def cost(result: DecodeResult) -> str:
    """One line about a turn."""
    rate = result.generated_tokens / max(1e-9, (result.elapsed_ms - result.time_to_first_token_ms) / 1000)
    swap = f"; evicted {result.kv_swap_evicted}" if result.kv_swap_evicted else ""
    swap += "; restored" if result.kv_swap_restored else ""
    return (
        f"{result.prompt_tokens} prompt + {result.generated_tokens} made ({result.finish_reason.value}), "
        f"first after {result.time_to_first_token_ms:.0f} ms, {rate:.0f} tok/s{swap}"
    )


def refusal(refused: Refusal) -> RenderableType:
    return Group(Text(refused.line, style="bold red"), reservations(refused.holders, "who holds the bytes"))


def mirror(status: MirrorStatus) -> RenderableType:
    """Ray's figures beside the ledger's."""
    colour = {"equal": "green", "behind": "yellow", "unmirrored": "red"}[status.state.value]
    note = f": {status.note}" if status.note else ""
    return Text.from_markup(
        f"Ray's mirror [{colour}]{status.state.value}[/]{note} — {status.resource or 'no resource'}: "
        f"{status.used_mib:.2f} of {status.total_mib:.0f} MiB used, ledger {status.ledger_mib:.2f} MiB"
    )


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="dim")
    right = {"bytes", "window", "tokens", "weights", "context", "on host", "turns", "priority", "prompt", "made", "first token",
             "all", "moved", "added to the ledger", ""}  # fmt: skip
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return table
