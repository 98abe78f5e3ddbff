"""`conductor demo` as people run it, and that it fails when a claim does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conductor.config import Config
from pipelines import cli, demo
from pipelines.demo import Transcript
from tests.support.shell import Shell

#: What is shown, in this order, and the name of its step in the transcript.
STEPS = {
    "the device": "device",
    "three agents, three models": "register",
    "status and list": "status",
    "turns: documenter-1 → coder-1 → documenter-1": "turns",
    "coder-1 and two clones of it, in one batch": "together",
    "a fourth agent that does not fit": "refusal",
    "a code crew": "crew",
    "Ray's view, while three agents are registered": "ray",
    "everybody leaves": None,
    "Ray's view, after the last has left": "ray",
}


def test_the_demo_shows_every_step_in_order_and_every_claim_holds(tmp_path: Path) -> None:
    shell, transcript = Shell(tmp_path), tmp_path / "demo.json"
    shown = shell.ok("demo", "--save", str(transcript), "--request", "Write a Python function `last(items)`. [/b]")
    assert shell.at_home() == []

    places = [shown.index(f" {title}") for title in STEPS]
    assert places == sorted(places)
    saved = json.loads(transcript.read_text("utf-8"))
    assert [step["step"] for step in saved["steps"]] == [step for step in STEPS.values() if step]
    assert all(claim["holds"] for claim in saved["claims"])
    assert shown.count("✓") == len(saved["claims"]) >= 15
    assert "✗" not in shown
    assert shown.splitlines()[-1] == f"all {len(saved['claims'])} claims shown were checked and hold"

    steps = {step["step"]: step for step in saved["steps"]}
    first, second, third = steps["turns"]["turns"]
    assert (first["kv_swap_evicted"], first["kv_swap_restored"]) == (None, False)
    assert (second["kv_swap_evicted"], second["kv_swap_restored"]) == ("documenter-1", False)
    assert (third["kv_swap_evicted"], third["kv_swap_restored"]) == ("coder-1", True)
    assert steps["refusal"]["line"].startswith("VRAM_LEDGER_DENY code=CAP ")
    assert steps["refusal"]["line"] in shown.splitlines()
    assert {holder["holder"] for holder in steps["refusal"]["refusal"]["holders"]} >= {"coder", "documenter", "reviewer"}
    assert str(Path.home()) not in transcript.read_text("utf-8")


def test_one_claim_that_does_not_hold_is_exit_code_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    transcript = Transcript()
    transcript.claim("two and two is four", True)
    assert transcript.holds
    transcript.claim("two and two is [b]five[/b]", False)
    assert not transcript.holds
    shown = capsys.readouterr().out
    assert "✓ two and two is four" in shown
    assert "✗ two and two is [b]five[/b]" in shown

    def run(config: Config, *, request: str | None, save: Path | None) -> bool:
        return transcript.holds

    monkeypatch.setattr(demo, "run", run)
    with pytest.raises(SystemExit) as ended:
        cli.app(["demo"])
    assert ended.value.code == 1
