"""Statuses, admissions, results and refusals as views: what is said of each, in which order."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from conductor.errors import AdmissionRefused, Refusal
from conductor.notebook.parts import Bar, Line, Part, Stretch, Table, Verbatim, stripes
from conductor.types import (
    Admission,
    AgentStatus,
    DecodeResult,
    Kind,
    MirrorState,
    MirrorStatus,
    Reservation,
    Status,
    WaitingStatus,
)
from conductor.units import MIB, format_bytes

Showable = Status | Admission | DecodeResult | Refusal | AdmissionRefused

#: A letter, a background and a pattern for each kind.
_LOOKS = {
    Kind.WEIGHTS: ("w", "#9ecae1", stripes(45)),
    Kind.RING: ("r", "#6baed6", stripes(0)),
    Kind.CONTEXT: ("c", "#a1d99b", stripes(135)),
    Kind.HEADROOM: ("h", "#ccebc5", "none"),
    Kind.OVERHEAD: ("o", "#bcbddc", stripes(90)),
    Kind.KV: ("k", "#d9d9d9", "none"),
    Kind.EXTERNAL: ("x", "#fdd0a2", stripes(60)),
}
_RAY, _ASKED = ("R", "#d9d9d9", "none"), ("?", "#fcbba1", stripes(120))
_TURN = {"waited": ("w", "#d9d9d9", "none"), "read": ("r", "#9ecae1", stripes(45)), "made": ("m", "#a1d99b", stripes(135))}


@dataclass(frozen=True, slots=True, repr=False)
class View:
    """The same in HTML and in plain text; a notebook shows the one it can."""

    html: str
    text: str

    def _repr_html_(self) -> str:
        return self.html

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        return {"text/html": self.html, "text/plain": self.text}

    def __repr__(self) -> str:
        return self.text


def show(*what: Showable) -> View:
    """As it is best looked at; several, one below the other. TypeError for anything else."""
    parts = [part for item in what for part in _parts(item)]
    in_html, in_text = [part.html() for part in parts], [part.text() for part in parts]
    return View("\n".join(filter(None, in_html)), "\n".join(filter(None, in_text)))


def _parts(what: Showable) -> list[Part]:
    match what:
        case Status():
            return _status(what)
        case Admission():
            return _admission(what)
        case DecodeResult():
            return _result(what)
        case Refusal():
            return _refusal(what)
        case AdmissionRefused():
            return _refusal(what.refusal)
        case _:
            raise TypeError(f"a {type(what).__name__} has no view here; print its to_json()")


def _status(status: Status) -> list[Part]:
    device, ledger = status.device, status.ledger
    total, free, others = map(format_bytes, (device.total_bytes, device.free_bytes, device.others_bytes))
    head = f"{device.name} ({device.kind.value}): {total} in all, {free} free, {others} held by others"
    if device.drift_bytes:
        head += f"; {format_bytes(device.drift_bytes)} of it booked here: drift"
    booked = f"ledger: {format_bytes(ledger.allocated_bytes)} of {format_bytes(ledger.max_bytes)} booked"
    whole = max(ledger.max_bytes, ledger.allocated_bytes, status.mirror.used_mib * MIB)
    return [
        Line(head, strong=True),
        Bar(booked, _stretches(ledger.reservations), whole),
        _mirror(status.mirror, whole),
        _holders(ledger.reservations),
        Table("agents", ("agent", "model", "class", "tokens", "window", "KV"), tuple(map(_agent, status.agents))),
        Table("waiting", ("agent", "for", "position", "since", "reason"), tuple(map(_waiting, status.waiting))),
    ]


def _mirror(mirror: MirrorStatus, whole: float) -> Part:
    """Ray's figures, on the same scale."""
    used = f"{mirror.used_mib:.2f} MiB"
    said = f"Ray's books, {mirror.state.value}: {used} of {mirror.resource} used, ledger {mirror.ledger_mib:.2f} MiB"
    if mirror.state is MirrorState.UNMIRRORED:
        return Line(f"Ray's books: unmirrored, {mirror.note}")
    return Bar(said, (Stretch(_RAY, "used in Ray", mirror.used_mib * MIB, used),), whole)


def _agent(a: AgentStatus) -> tuple[str, ...]:
    window = f"{a.window_in_use:,} of {a.window:,}"
    place = f"{a.kv.value}, {format_bytes(a.saved_bytes)}" if a.saved_bytes else a.kv.value
    return a.id, a.model, a.service_class.value, f"{a.tokens:,}", window, place


def _waiting(w: WaitingStatus) -> tuple[str, ...]:
    return w.agent_id, w.what, str(w.position), f"{w.waited_s:.1f} s", w.reason


def _admission(admission: Admission) -> list[Part]:
    a = admission
    rows = [
        ("window", f"{a.window:,} tokens, begins with {a.first_window:,}"),
        ("weights", f"{format_bytes(a.weights_bytes)}, {'loaded for it' if a.model_loaded else 'there already'}"),
        ("context", f"{format_bytes(a.context_bytes)} while it is live"),
        ("added to the ledger", format_bytes(a.charged_bytes)),
        ("waited", f"{a.waited_s:.2f} s"),
        *(("warning", warning) for warning in a.warnings),
    ]
    return [Line(f"{a.agent_id} admitted to {a.model}, {a.service_class.value}", strong=True), Table("", (), tuple(rows))]


def _result(result: DecodeResult) -> list[Part]:
    r = result
    first = max(0.0, r.time_to_first_token_ms - r.queue_ms)
    times = {"waited": r.queue_ms, "read": first, "made": max(0.0, r.elapsed_ms - r.queue_ms - first)}
    stretches = tuple(Stretch(_TURN[name], name, ms, f"{ms:.1f} ms") for name, ms in times.items())
    swaps = [f"evicted {r.kv_swap_evicted}"] if r.kv_swap_evicted else []
    swaps += ["restored"] if r.kv_swap_restored else []
    swaps += [f"{format_bytes(r.swap_bytes)} moved"] if r.swap_bytes else []
    rows = [
        ("prompt", f"{r.prompt_tokens:,} read, {r.prompt_tokens_reused:,} held already, {r.prefix_tokens_reused:,} copied"),
        ("made", f"{r.generated_tokens:,} tokens, ended by {r.finish_reason.value}"),
        ("swap", ", ".join(swaps) or "none"),
        ("stood still", f"{r.pauses:,}×; window grew {r.window_growths:,}×; {r.recomputed_tokens:,} tokens recomputed"),
    ]
    took = f"{r.elapsed_ms:.1f} ms: w waited for a seat, r read the prompt to the first token, m made the rest"
    return [Line(r.agent_id, strong=True), Verbatim(r.text), Bar(took, stretches, r.elapsed_ms), Table("", (), tuple(rows))]


def _refusal(refusal: Refusal) -> list[Part]:
    r = refusal
    whole = max(r.cap_bytes, r.booked_bytes + r.requested_bytes)
    asked = Stretch(_ASKED, "asked for", r.requested_bytes, format_bytes(r.requested_bytes))
    sizes = {"booked": r.booked_bytes, "of": r.cap_bytes, "asked for": r.requested_bytes, "free": max(0, r.free_bytes)}
    said = ", ".join(f"{name} {format_bytes(size)}" for name, size in sizes.items()).replace(", of", " of")
    limit = f" (the cap is at {100 * r.cap_bytes / whole:.0f} % of the bar)" if whole > r.cap_bytes else ""
    return [
        Line(r.line, strong=True),
        Line(str(AdmissionRefused(r)).partition("\n")[2]),
        Bar(said + limit, (*_stretches(r.holders), asked), whole),
        _holders(r.holders),
    ]


def _stretches(reservations: Iterable[Reservation]) -> tuple[Stretch, ...]:
    return tuple(
        Stretch(_LOOKS[r.kind], f"{r.kind.value} of {r.holder}", r.bytes, format_bytes(r.bytes)) for r in reservations if r.bytes
    )


def _holders(reservations: Iterable[Reservation]) -> Table:
    rows = tuple((_LOOKS[r.kind][0], r.kind.value, r.holder, f"{r.bytes:,}", format_bytes(r.bytes)) for r in reservations)
    return Table("booked", ("", "kind", "holder", "bytes", ""), rows)
