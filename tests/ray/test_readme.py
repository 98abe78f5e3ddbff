"""The README's Python runs as it stands there, against a conductor of the test's own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

import actors
from tests.conftest import ROOT
from tests.support.conducting import document_of
from tests.support.talk import SHIPPED

_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def test_the_readme_does_what_it_says(
    vram_resource: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "conductor.yaml"
    config.write_text(yaml.safe_dump(document_of(vram_resource, tmp_path, SHIPPED)))
    monkeypatch.setenv("CONDUCTOR_CONFIG", str(config))
    blocks = _BLOCK.findall((ROOT / "README.md").read_text("utf-8"))
    assert len(blocks) == 2
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    conductor = names["conductor"]
    status = ray.get(conductor.status.remote())
    assert (status.agents, status.models, status.ledger.allocated_bytes) == ((), (), 0)
    actors.stop(conductor)

    shown = capsys.readouterr().out
    answer = names["result"].text
    assert shown.count(answer) == 2, "once as a result, once as a stream"
    assert "VRAM_LEDGER_DENY code=NEVER " in shown
