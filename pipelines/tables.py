"""What the conductor says, as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from conductor.errors import Refusal
from conductor.types import (
    Admission,
    AgentStatus,
    DecodeResult,
    HostMemoryStatus,
    Kind,
    LedgerStatus,
    MirrorStatus,
    PoolStatus,
    Reservation,
    Status,
    WaitingStatus,
)
from conductor.units import format_bytes

_COLOURS = {
    Kind.WEIGHTS: "blue",
    Kind.RING: "bright_blue",
    Kind.CONTEXT: "green",
    Kind.HEADROOM: "cyan",
    Kind.OVERHEAD: "magenta",
    Kind.EXTERNAL: "yellow",
}
#: A letter for each kind, so that the bar can be read without colour.
_LETTERS = {
    Kind.WEIGHTS: "w", Kind.RING: "r", Kind.CONTEXT: "c", Kind.HEADROOM: "h", Kind.OVERHEAD: "o", Kind.EXTERNAL: "x"
}  # fmt: skip


def status(status: Status) -> RenderableType:
    """Everything about a conductor at once."""
    device = status.device
    total, free, others = map(format_bytes, (device.total_bytes, device.free_bytes, device.others_bytes))
    drift = f"; {format_bytes(device.drift_bytes)} of it booked here: drift" if device.drift_bytes else ""
    lines = Text.assemble(
        (device.name, "bold"),
        f" ({device.kind.value}; {device.chosen})\n",
        f"{total} in all, {free} free, {others} held by others{drift}; ",
        f"waiting: {len(status.waiting)}\n",
        f"saved KV: {_saved_kv(status.host_memory)}",
    )
    parts: list[RenderableType] = [lines, bar(status.ledger), reservations(status.ledger.reservations)]
    if status.models:
        parts.append(models(status))
    if status.pools:
        parts.append(pools(status.pools))
    if status.agents:
        parts.append(agents(status.agents))
    if status.waiting:
        parts.append(waiting(status.waiting))
    return Group(*parts, mirror(status.mirror))


def _saved_kv(memory: HostMemoryStatus) -> str:
    used, budget = format_bytes(memory.used_bytes), format_bytes(memory.budget_bytes)
    line = f"{used} of {budget} host memory{' (page-locked)' if memory.pinned else ''}"
    if memory.disk_budget_bytes:
        line += f", {format_bytes(memory.disk_used_bytes)} of {format_bytes(memory.disk_budget_bytes)} on disk"
    moves = {"moved to disk": memory.moved_to_disk, "dropped": memory.dropped, "damaged": memory.damaged}
    return line + "".join(f"; {count} {what}" for what, count in moves.items() if count)


def bar(ledger: LedgerStatus, width: int = 48) -> Text:
    """The cap as a bar, booked bytes in true proportion: w weights, r ring, c context, h headroom, o overhead, x external.

    What is booked at all has a letter; if that makes too many, the largest kind yields.
    """
    sizes = {kind: sum(r.bytes for r in ledger.reservations if r.kind is kind) for kind in _LETTERS}
    whole = max(ledger.max_bytes, ledger.allocated_bytes)  # strangers may have taken more than what is booked leaves
    letters = {kind: max(round(size * width / whole), 1) for kind, size in sizes.items() if size}
    while sum(letters.values()) > width:
        letters[max(letters, key=letters.__getitem__)] -= 1
    line = Text("[")
    for kind, count in letters.items():
        line.append(_LETTERS[kind] * count, style=_COLOURS[kind])
    line.append("·" * (width - sum(letters.values())) + "]")
    line.append(f" {format_bytes(ledger.allocated_bytes)} of {format_bytes(ledger.max_bytes)} booked")
    return line


def reservations(items: Iterable[Reservation], title: str = "ledger") -> Table:
    table = _table(title, "id", "holder", "kind", "bytes", "")
    for r in items:
        _add(table, r.id, r.holder, Text(r.kind.value, style=_COLOURS[r.kind]), f"{r.bytes:,}", format_bytes(r.bytes))
    return table


def models(status: Status) -> Table:
    table = _table("models", "key", "state", "agents", "weights", "at home", "of the link", "estimate off by", "file")
    for m in status.models:
        error = "–" if m.estimate_error is None else f"{m.estimate_error:+.2%}"
        home = format_bytes(m.weights.home_bytes) if m.weights else "–"
        link = f"{m.weights.link_share:.0%}" if m.weights and m.weights.passes else "–"
        _add(table, m.key, m.residency or m.state.value, str(m.agents), format_bytes(m.bytes), home, link, error, m.path)
    return table


def pools(items: Iterable[PoolStatus]) -> Table:
    table = _table("pools", "model", "of", "slots", "seated", "running", "window", "bytes", "")
    for p in items:
        _add(
            table, p.model, p.owner or "all", str(p.slots), str(p.seated), str(p.running), f"{p.window:,}", format_bytes(p.bytes),
            p.phase,
        )  # fmt: skip
    return table


def agents(items: Sequence[AgentStatus]) -> Table:
    table = _table("agents", "id", "model", "class", "window", "tokens", "KV", "context", "turns")
    for a in items:
        promised = a.service_class.value + (f", {a.priority:+d}" if a.priority else "")
        window = f"{a.window_in_use:,}/{a.window:,}" if a.window_in_use < a.window else f"{a.window:,}"
        place = f"{a.kv.value}, busy" if a.busy else a.kv.value
        place += f", {format_bytes(a.saved_bytes)}" if a.saved_bytes else ""
        _add(table, a.id, a.model, promised, window, f"{a.tokens:,}", place, format_bytes(a.context_bytes), str(a.turns))
    return table


def waiting(items: Sequence[WaitingStatus]) -> Table:
    table = _table("waiting", "what", "agent", "model", "position", "priority", "since", "until", "for")
    for w in items:
        until = "–" if w.expires_in_s is None else f"{w.expires_in_s:.1f} s more"
        _add(table, w.what, w.agent_id, w.model, str(w.position), str(w.priority), f"{w.waited_s:.1f} s", until, w.reason)
    return table


def admissions(items: Iterable[Admission]) -> Table:
    table = _table("admitted", "id", "model", "class", "window", "begins with", "weights", "context", "added to the ledger")
    for a in items:
        weights = format_bytes(a.weights_bytes) + ("" if a.model_loaded else ", shared")
        _add(
            table, a.agent_id, a.model, a.service_class.value, f"{a.window:,}", f"{a.first_window:,}", weights,
            format_bytes(a.context_bytes), format_bytes(a.charged_bytes),
        )  # fmt: skip
    return table


def decodes(items: Iterable[DecodeResult]) -> Table:
    table = _table("turns", "agent", "prompt", "made", "end", "first token", "all", "evicted", "restored", "moved")
    for d in items:
        _add(
            table, d.agent_id, str(d.prompt_tokens), str(d.generated_tokens), d.finish_reason.value,
            f"{d.time_to_first_token_ms:.1f} ms", f"{d.elapsed_ms:.1f} ms", d.kv_swap_evicted or "–",
            "yes" if d.kv_swap_restored else "–", format_bytes(d.swap_bytes),
        )  # fmt: skip
    return table


def cost(result: DecodeResult) -> str:
    """One line about a turn."""
    after_first, its_s = result.generated_tokens - 1, (result.elapsed_ms - result.time_to_first_token_ms) / 1000
    rate = f", {after_first / its_s:.0f} tok/s" if after_first > 0 and its_s > 0 else ""
    swap = f"; evicted {result.kv_swap_evicted}" if result.kv_swap_evicted else ""
    swap += "; restored" if result.kv_swap_restored else ""
    swap += "; window grew" if result.window_growths else ""
    swap += f"; {result.prefix_tokens_reused} tokens shared" if result.prefix_tokens_reused else ""
    swap += f"; stood still {result.pauses}×" if result.pauses else ""
    return (
        f"{result.prompt_tokens} prompt + {result.generated_tokens} made ({result.finish_reason.value}), "
        f"first after {result.time_to_first_token_ms:.0f} ms{rate}{swap}"
    )


def refusal(refused: Refusal) -> RenderableType:
    """The line, and who holds the bytes. Print it with `crop=False`: the line is for `grep` too, and stays one line."""
    line = Text(refused.line, style="bold red", no_wrap=True, overflow="ignore")
    return Group(line, reservations(refused.holders, "who holds the bytes"), Text(_ways_in(refused)))


def _ways_in(refused: Refusal) -> str:
    """What would be admitted, or when."""
    ways = []
    if refused.evictable_bytes:
        ways.append(f"{format_bytes(refused.evictable_bytes)} would be free if all that is idle went to host memory")
    if refused.largest_window:
        ways.append(f"a window of {refused.largest_window:,} tokens would fit now")
    if refused.fitting_class:
        streamed = ", with its layers streamed" if refused.streaming_fits else ""
        ways.append(f"service_class={refused.fitting_class.value} would fit now{streamed}")
    if refused.retry_after_s is not None:
        ways.append(f"try again in {refused.retry_after_s:.0f} s")
    return "; ".join(ways)


def mirror(status: MirrorStatus) -> RenderableType:
    """Ray's figures beside the ledger's."""
    colour = {"equal": "green", "behind": "yellow", "unmirrored": "red"}[status.state.value]
    note = f": {status.note}" if status.note else ""
    return Text.assemble(
        "Ray's mirror ",
        (status.state.value, colour),
        f"{note} — {status.resource or 'no resource'}: "
        f"{status.used_mib:.2f} of {status.total_mib:.0f} MiB used, ledger {status.ledger_mib:.2f} MiB",
    )


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="dim")
    right = {"bytes", "window", "tokens", "weights", "context", "turns", "priority", "prompt", "made", "first token",
             "all", "moved", "added to the ledger", "in use", "begins with", "saved", "position", "since",
             "slots", "seated", "running", ""}  # fmt: skip
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return table


def _add(table: Table, *cells: str | Text) -> None:
    """A row of plain text: an id or a path may look like Rich's markup."""
    table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in cells))
