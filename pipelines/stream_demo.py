"""`conductor stream-demo`: does bringing layers to the device hide behind computing on them? Figures, a table and a picture."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from actors import service
from actors._ray_private import authenticate
from actors.layers.spec import DEFAULTS, Compute, LayerStreamSpec
from actors.layers.times import LayerStreamResult, LayerSweep
from conductor.errors import AdmissionRefused, InternalError, NotRunning
from conductor.types import DeviceKind
from conductor.units import format_bytes, parse_bytes
from pipelines import plots
from pipelines.console import Exit, err, errors, out, print_json
from pipelines.session import connected, settings

if TYPE_CHECKING:
    from actors.layer_stream import Opening, Place
    from conductor.config import Config

_HOST, _CUDA = DEFAULTS[DeviceKind.HOST], DEFAULTS[DeviceKind.CUDA]
_OR_ALONE = "or run it without one, on a Ray of its own: conductor stream-demo --alone"
_OR_LESS = "or stream less at once (--bytes-per-layer, --buffers), or book nothing, where nobody needs it: --alone"
_BAR_CELLS = 12


def _size(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def command(
    n_layers: Annotated[int, typer.Option(help="Layers, all in host memory.")] = _CUDA.n_layers,
    bytes_per_layer: Annotated[
        int | None,
        typer.Option(
            parser=_size,
            metavar="SIZE",
            help=f"Whole MiB (default: {_CUDA.bytes_per_layer >> 20}MiB, {_HOST.bytes_per_layer >> 20}MiB without a GPU).",
        ),
    ] = None,
    compute_iters: Annotated[
        int | None,
        typer.Option(
            help="Multiply-adds for each element of a layer "
            f"(default: {_CUDA.compute_iters}, {_HOST.compute_iters} without a GPU)."
        ),
    ] = None,
    buffers: Annotated[int, typer.Option(help="Layers that the device has room for.")] = _CUDA.buffers,
    compute: Annotated[
        Compute, typer.Option(help="Each element by itself, or the layer as a matrix times COMPUTE_ITERS columns.")
    ] = Compute.SWEEP,
    sweep: Annotated[bool, typer.Option("--sweep", help="With more and more to compute, around the balance point.")] = False,
    repeats: Annotated[int, typer.Option(help="Of each loop; what is shown are medians.")] = _CUDA.repeats,
    alone: Annotated[bool, typer.Option("--alone", help="Without a conductor, and so without booking.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw it into this file: .png, .svg or .pdf.")] = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", help="Configuration file (default: $CONDUCTOR_CONFIG, else the built-in one)."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Stream layers through a few buffers on the device: copying and computing by turns, then side by side.

    It books its bytes with the running conductor like any tenant. Exit code 0 only if all results are right.

    Example: conductor stream-demo --alone --plot overlap.png

    Example: conductor stream-demo --sweep --bytes-per-layer 32MiB --compute matmul
    """
    if plot is not None:
        _refuse_a_picture_that_cannot_be(plot)

    def spec(kind: DeviceKind) -> LayerStreamSpec:
        usual = DEFAULTS[kind]
        return LayerStreamSpec(
            n_layers, usual.bytes_per_layer if bytes_per_layer is None else bytes_per_layer,
            usual.compute_iters if compute_iters is None else compute_iters, buffers, compute, repeats,
        )  # fmt: skip

    with _errors(as_json=as_json):
        spec(DeviceKind.HOST)  # what is wrong with it is said before anything is started
        if plot is not None:
            plots.refuse_unless_installed()
        with _running(settings(config), alone=alone) as (place, conductor):
            opening, found = run(spec(place.kind), place, conductor=conductor, sweeping=sweep)
        if as_json:
            print_json(opening.to_json() | found.to_json())
        else:
            out.print(shown(opening, found))
        if plot is not None:
            plots.save(found, plot)
    points = found.points if isinstance(found, LayerSweep) else (found,)
    raise typer.Exit(Exit.OK if all(point.correct for point in points) else Exit.FAILED)


def run(
    spec: LayerStreamSpec, place: Place, *, conductor: Any = None, sweeping: bool = False
) -> tuple[Opening, LayerStreamResult | LayerSweep]:
    """The experiment with a bar on standard error. Raises what `stream_layers` raises."""
    from actors.layer_stream import Opening, stream_layers
    from actors.layers import loops

    opening: Opening | None = None
    with _progress() as bar, contextlib.closing(stream_layers(spec, place, conductor=conductor, sweeping=sweeping)) as items:
        task = bar.add_task("opening the device", total=None)
        for item in items:
            if isinstance(item, loops.Progress):
                bar.update(task, description=item.what, completed=item.done, total=item.of)
            elif isinstance(item, Opening):
                opening = item
            elif opening is not None and isinstance(item, LayerSweep if sweeping else LayerStreamResult):
                return opening, item
    raise InternalError("the experiment did not end with its result")


@contextlib.contextmanager
def alone_in_ray() -> Iterator[None]:
    """A Ray for this command only, with a token for as long, so that Ray writes none to the home directory."""
    import ray

    from actors.connection import init_ray

    service.users_address()  # for what it forgets: the token of a service that may end before this does
    if "RAY_AUTH_MODE" not in os.environ:
        authenticate({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)})
    init_ray("local", include_dashboard=False)
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _running(config: Config, *, alone: bool) -> Iterator[tuple[Place, Any]]:
    """Where to run, and whom to book with."""
    if alone:
        with alone_in_ray():
            from actors.layer_stream import place_alone

            yield place_alone(config), None
    else:
        with connected(config) as conductor:
            import ray

            from actors.layer_stream import place_beside

            yield place_beside(ray.get(conductor.status.remote()), config), conductor


@contextlib.contextmanager
def _errors(*, as_json: bool) -> Iterator[None]:
    """Errors become messages, with a way out below."""
    way_out = None
    try:
        with errors(as_json=as_json):
            try:
                yield
            except NotRunning:
                way_out = _OR_ALONE
                raise
            except AdmissionRefused:
                way_out = _OR_LESS
                raise
    except SystemExit:
        if way_out and not as_json:
            err.print(way_out, soft_wrap=True)
        raise


def _refuse_a_picture_that_cannot_be(path: Path) -> None:
    if not path.absolute().parent.is_dir():
        raise typer.BadParameter(f"there is no directory {path.parent}", param_hint="--plot")
    if path.suffix not in plots.FORMATS:
        raise typer.BadParameter(f"{path.name} ends in none of {', '.join(plots.FORMATS)}", param_hint="--plot")


def _progress() -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    return Progress(*columns, console=err, transient=True, disable=not err.is_terminal)


# --- for people ---------------------------------------------------------------------------------------------------------


def shown(opening: Opening, found: LayerStreamResult | LayerSweep) -> RenderableType:
    spec = found.points[0].spec if isinstance(found, LayerSweep) else found.spec
    booked = f"booked as {opening.reservation}" if opening.reservation else "not booked"
    head = Text.assemble(
        (opening.device, "bold"),
        f" – {opening.chosen}; {spec.n_layers} layers of {format_bytes(spec.bytes_per_layer)} through {spec.buffers} buffers; "
        f"{format_bytes(opening.taken_bytes)} of the device, {booked}",
    )
    return Group(head, _sweep(found) if isinstance(found, LayerSweep) else _loops(found))


def headline(result: LayerStreamResult) -> str:
    """One line, for people and for `grep`."""
    return (
        f"HEADLINE: serial={result.serial_ms:.2f} ms, overlapped={result.overlapped_ms:.2f} ms, "
        f"savings={100 * result.savings:.1f} %, speedup={result.speedup:.2f}x"
    )


def _loops(result: LayerStreamResult) -> RenderableType:
    table = _table("layer", "copy", "GB/s", "compute", "beside: copy", "compute", "copy hidden", title="times in ms")
    hidden = result.overlapped.hidden_ms()
    for layer, (copying, computing) in enumerate(zip(result.copy_ms, result.compute_ms, strict=True)):
        copy, compute = result.overlapped.copies[layer].ms, result.overlapped.computes[layer].ms
        table.add_row(
            str(layer), _ms(copying), f"{result.spec.bytes_per_layer / copying / 1e6:.1f}", _ms(computing),
            _ms(copy), _ms(compute), f"{hidden[layer] / copy:.0%}",
        )  # fmt: skip
    ideal = f"ideal {result.ideal_ms:.2f} ms, {result.ideal_savings:.1%} saved; {_above(result)} above it; {_verdict([result])}"
    return Group(_bold(headline(result)), Text(ideal), table)


def _sweep(found: LayerSweep) -> RenderableType:
    most = max(0.01, *(max(point.savings, point.ideal_savings) for point in found.points))
    title = "times in ms: of one layer, then of all; █ saved, │ ideal"
    table = _table("iters", "copy", "compute", "serial", "beside", "ideal", "saved", "ideal", "above", title=title)
    table.add_column("", justify="left", no_wrap=True)
    for point in found.points:
        copying, computing = (sum(each) / len(each) for each in (point.copy_ms, point.compute_ms))
        at = " ←" if point is found.at_balance else ""
        bar = _cells(point.savings / most, point.ideal_savings / most) + at
        times = map(_ms, (copying, computing, point.serial_ms, point.overlapped_ms, point.ideal_ms))
        shares = f"{point.savings:.1%}", f"{point.ideal_savings:.1%}", _above(point)
        table.add_row(f"{point.spec.compute_iters:,}", *times, *shares, bar)
    return Group(_bold(headline(found.at_balance or found.best)), balance(found), table)


def balance(found: LayerSweep) -> Text:
    """Where copying and computing take the same, or that they do nowhere."""
    verdict = _verdict(found.points)
    if found.at_balance is None:
        best = f"the most is saved with {found.best.spec.compute_iters:,} multiply-adds an element"
        return Text(f"no balance: computing takes longer than copying from the first multiply-add on; {best}; {verdict}")
    return Text(
        f"balance point (←): {found.balance_iters:,} multiply-adds an element take as long as copying it; "
        f"{found.at_balance.savings:.1%} saved there, ideally {found.at_balance.ideal_savings:.1%}; {verdict}"
    )


def _ms(ms: float) -> str:
    return f"{ms:.3f}" if ms < 10 else f"{ms:.2f}" if ms < 100 else f"{ms:,.1f}"


def _bold(line: str) -> Text:
    return Text(line, style="bold", no_wrap=True, overflow="ignore")


def _cells(saved: float, ideal: float) -> str:
    """A bar as long as what was saved, and a mark where it ideally ends."""
    cells = ["█" if cell < round(saved * _BAR_CELLS) else " " for cell in range(_BAR_CELLS + 1)]
    cells[min(_BAR_CELLS, max(0, round(ideal * _BAR_CELLS)))] = "│"
    return "".join(cells)


def _above(result: LayerStreamResult) -> str:
    return f"{result.above_ideal:+.1%}"


def _verdict(points: list[LayerStreamResult] | tuple[LayerStreamResult, ...]) -> str:
    wrong = [point for point in points if not point.correct]
    if not wrong:
        return "results are NumPy's"
    worst = max(point.largest_error for point in wrong)
    return f"RESULTS ARE WRONG: {worst:.3g} times as far from NumPy's as rounding explains"


def _table(*columns: str, title: str | None = None) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="dim")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table
