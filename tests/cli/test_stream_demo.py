"""`conductor stream-demo` as people run it: alone, beside a conductor, with a picture, and done wrong."""

from __future__ import annotations

import json
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

from actors.layers.spec import LayerStreamSpec
from actors.layers.times import Interval, LayerStreamResult, LayerSweep, Timeline, result
from conductor.errors import InvalidRequest
from conductor.types import DeviceKind
from pipelines import plots
from pipelines.stream_demo import balance, headline
from tests.support.eventually import eventually
from tests.support.shell import CONDUCTOR, Shell, family, survivors

SMALL = ("stream-demo", "--n-layers", "3", "--bytes-per-layer", "1MiB", "--repeats", "2")
HEADLINE = re.compile(r"^HEADLINE: serial=[\d.]+ ms, overlapped=[\d.]+ ms, savings=-?[\d.]+ %, speedup=[\d.]+x$", re.MULTILINE)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    """A conductor of 64 MiB; at the end nothing is booked, and no process lives."""
    shell = Shell(tmp_path_factory.mktemp("service"))
    shell.runtime.mkdir(mode=0o700)
    config = shell.runtime / "conductor.yaml"
    config.write_text(yaml.safe_dump({"device": {"kind": "host", "host_bytes": "64MiB"}, "host_budget": "8MiB", "models": {}}))
    shell.ok("up", "--config", str(config))
    yield shell
    left = shell.json("status")["ledger"]["reservations"]
    processes = family(shell.service_pid())
    shell.ok("down")
    assert survivors([*processes, *shell.processes()]) == []
    assert left == []


@pytest.fixture
def alone(tmp_path: Path) -> Shell:
    """Nothing runs, and nothing but pictures is written."""
    return Shell(tmp_path)


# --- as it is meant -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_beside_a_conductor_it_books_and_says_so(service: Shell) -> None:
    shown = service.ok(*SMALL)
    assert "host (NumPy, 2 threads) – the conductor's device; 3 layers of 1.0 MiB through 2 buffers" in " ".join(shown.split())
    assert "booked as " in " ".join(shown.split())
    assert len(HEADLINE.findall(shown)) == 1
    assert "results are NumPy's" in shown
    assert [line.split()[0] for line in shown.splitlines()[-3:]] == ["0", "1", "2"]
    told = service.json(*SMALL)
    assert (told["correct"], told["taken_bytes"], told["spec"]["buffers"]) == (True, 5 << 20, 2)
    assert (told["reservation"] is None, len(told["copy_ms"]), len(told["overlapped"]["copies"])) == (False, 3, 3)


@pytest.mark.slow
def test_alone_it_shows_every_layer_and_draws_both_loops(alone: Shell, tmp_path: Path) -> None:
    picture = tmp_path / "overlap.png"
    shown = alone.ok(*SMALL, "--alone", "--plot", str(picture))
    assert "not booked" in " ".join(shown.split())
    assert len(HEADLINE.findall(shown)) == 1
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert [path for path in alone.at_home() if "ray" in path.name] == []


@pytest.mark.slow
def test_a_sweep_shows_its_points_and_names_the_balance(alone: Shell, tmp_path: Path) -> None:
    picture = tmp_path / "sweep.svg"
    shown = alone.ok(*SMALL, "--alone", "--sweep", "--compute", "matmul", "--plot", str(picture))
    assert len(HEADLINE.findall(shown)) == 1
    assert "balance" in shown
    assert shown.count("│") >= 5
    drawing = picture.read_text("utf-8")
    assert drawing.startswith("<?xml")
    assert alone.processes() == []


# --- done wrong ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_does_not_fit_is_refused_with_the_numbers_and_a_way_out(service: Shell) -> None:
    refused = service.conductor("stream-demo", "--bytes-per-layer", "64MiB")
    assert (refused.returncode, refused.stdout) == (3, "")
    assert f"VRAM_LEDGER_DENY code=NEVER ledger_max_bytes={57 << 20} ledger_allocated_bytes=0 requested_bytes={136 << 20}\n" in (
        refused.stderr
    )
    assert "--alone" in refused.stderr
    as_json = service.conductor("stream-demo", "--bytes-per-layer", "64MiB", "--json")
    assert (as_json.returncode, json.loads(as_json.stdout)["refusal"]["code"], as_json.stderr) == (3, "NEVER", "")


@pytest.mark.slow
def test_whoever_ends_it_gets_the_bytes_back(service: Shell) -> None:
    with service.begin(CONDUCTOR, *SMALL[:-1], "1000", "--compute-iters", "200") as demo:
        eventually(lambda: len(service.json("status")["ledger"]["reservations"]) == 1, within_s=60)
        demo.send_signal(signal.SIGINT)
        _, stderr = demo.communicate(timeout=60)
    assert (demo.returncode, "Traceback" in stderr) == (130, False), stderr
    eventually(lambda: service.json("status")["ledger"]["reservations"] == [], within_s=60)


def test_without_a_conductor_it_says_how_to_do_without(alone: Shell) -> None:
    failed = alone.conductor(*SMALL)
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr == (
        "error: no conductor is running; start one with: conductor up\n"
        "or run it without one, on a Ray of its own: conductor stream-demo --alone\n"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--buffers", "1"), "buffers: 1 is outside 2 to 64"),
        (("--bytes-per-layer", "lots"), "expected a size such as 512MiB"),
        (("--plot", "nowhere/at.png"), "there is no directory nowhere"),
        (("--plot", "picture.jpeg"), "picture.jpeg ends in none of .png, .svg, .pdf"),
    ],
)
def test_bad_input_is_exit_code_2(alone: Shell, options: tuple[str, ...], message: str) -> None:
    failed = alone.conductor(*SMALL, "--alone", *options, COLUMNS="200")
    assert (failed.returncode, failed.stdout) == (2, "")
    assert message in failed.stderr


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InvalidRequest, match=r"vram-conductor\[plot\]"):
        plots.refuse_unless_installed()


# --- pictures and lines -------------------------------------------------------------------------------------------------


def measured(*, copy_ms: float = 2, compute_ms: float = 2, iters: int = 64, error: float = 0.5) -> LayerStreamResult:
    """Two layers, serial and side by side."""
    both = copy_ms + compute_ms
    serial = Timeline(
        (Interval(0, copy_ms), Interval(both, both + copy_ms)),
        (Interval(copy_ms, both), Interval(both + copy_ms, 2 * both)),
    )
    longer = max(copy_ms, compute_ms)
    beside = Timeline(
        (Interval(0, copy_ms), Interval(copy_ms, 2 * copy_ms)),
        (Interval(copy_ms, both), Interval(copy_ms + longer, both + longer)),
    )
    spec = LayerStreamSpec(2, compute_iters=iters)
    return result(spec, [serial], [beside], device="Paper GPU", kind=DeviceKind.CUDA, largest_error=error)


def test_the_picture_has_two_lanes_for_each_loop_and_says_its_units() -> None:
    figure = plots.timeline(measured())
    serial, beside = figure.axes
    for axes in (serial, beside):
        assert [label.get_text() for label in axes.get_yticklabels()] == ["transfer", "compute"]
        assert len(axes.collections) == 2
        assert axes.collections[0].get_hatch() == "///", "lanes are told apart without colour"
    assert (serial.get_title("left"), beside.get_xlabel()) == ("serial: 8.00 ms", "time since the first copy began, ms")
    assert beside.get_title("left") == "overlapped: 6.00 ms (ideal 6.00 ms, dashed)"
    assert figure.get_suptitle() == (
        "Paper GPU: 2 layers of 64.0 MiB, 2 buffers, FMA sweep, 64 multiply-adds an element\n25.0% of the time saved, 1.33×"
    )


def test_the_picture_of_a_sweep_has_the_ideal_beside_what_was_measured() -> None:
    points = tuple(measured(compute_ms=ms, iters=iters) for ms, iters in ((1, 32), (2, 64), (4, 128)))
    figure = plots.sweep(LayerSweep(points, 64))
    above, below = figure.axes
    lines = {str(line.get_label()): np.asarray(line.get_ydata()).tolist() for line in above.lines}
    assert lines["measured"] == [100 * point.savings for point in points]
    assert lines[next(label for label in lines if label.startswith("ideal"))] == [100 * point.ideal_savings for point in points]
    assert above.get_title("left") == "balance: 64 multiply-adds, 25.0% saved"
    assert (above.get_ylabel(), below.get_ylabel()) == ("time saved, %", "one layer, ms")


def test_lines_for_people() -> None:
    assert headline(measured()) == "HEADLINE: serial=8.00 ms, overlapped=6.00 ms, savings=25.0 %, speedup=1.33x"
    said = balance(LayerSweep((measured(),), 64)).plain
    assert said.startswith("balance point (←): 64 multiply-adds an element take as long as copying it; 25.0% saved there")
    assert said.endswith("results are NumPy's")
    assert "no balance" in balance(LayerSweep((measured(),), None)).plain
    assert "RESULTS ARE WRONG: 3 times" in balance(LayerSweep((measured(), measured(error=3)), 64)).plain
