"""A model larger than the device, through the actor: admitted, answered, told, and gone again without a trace."""

from __future__ import annotations

from pathlib import Path

import pytest

from conductor.errors import AdmissionRefused, RefusalCode
from conductor.types import Kind, ModelState
from tests.support.conducting import Conduct
from tests.support.tiny_gguf import write_tiny_gguf


def test_agents_of_a_model_larger_than_the_device_are_answered_and_leave_nothing(conduct: Conduct, tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "large.gguf", n_layer=8, n_embd=128, n_ff=512)
    device = {"kind": "host", "host_bytes": "6MiB"}
    conductor = conduct({"large": path}, device=device, context={"n_batch": 64, "n_ubatch": 16})
    with pytest.raises(AdmissionRefused) as refused:
        conductor.call("register", "sue", "large")
    assert refused.value.code is RefusalCode.NEVER
    for agent in ("ada", "bob"):
        admission = conductor.call("register", agent, "large", service_class="best_effort")
        assert not admission.model_loaded
    said = [conductor.call("decode", agent, "hello world", max_tokens=8).tokens for agent in ("ada", "bob")]
    assert said[0] == said[1]
    assert len(said[0]) == 8
    status = conductor.status()
    [model] = status.models
    assert model.state is ModelState.RESIDENT
    assert (model.residency.startswith("streamed "), model.residency.endswith("/8")) == (True, True)
    assert model.weights is not None
    assert model.weights.home_bytes > status.ledger.max_bytes >= status.ledger.allocated_bytes
    assert model.weights.moved_bytes > model.weights.home_bytes
    [ring] = [reserved for reserved in status.ledger.reservations if reserved.kind is Kind.RING]
    assert ring.bytes == model.ring_bytes > 0
    for agent in ("ada", "bob"):
        conductor.call("unregister", agent)
    assert conductor.is_empty()
