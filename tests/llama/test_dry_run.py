"""What a dry run says before a load is what llama.cpp takes after it, to the byte; and no file gets further than the child.

See also: `test_estimator.py`, which answers are kept and when the formula steps in.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conductor.backend.dry_run import DryRun
from conductor.backend.file_identity import file_identity
from conductor.backend.llama import Llama, LlamaError
from conductor.core.estimate import MAX_CONTEXT_TOKENS, MAX_SLOTS, Footprint, ModelPlan
from conductor.errors import BadModelFile, ModelLoadFailed
from conductor.types import ContextSpec, DeviceKind, ModelId
from tests.conftest import Start
from tests.support.breakdown import breakdown, decode_slots, measure, opened_context, opened_model
from tests.support.plans import plan_of
from tests.support.tiny_gguf import write_tiny_gguf

SHIPPED = sorted((Path(__file__).resolve().parents[2] / "models").glob("*.gguf"))


@pytest.fixture(scope="module")
def dry_run() -> Iterator[DryRun]:
    with contextlib.closing(DryRun()) as dry_run:
        yield dry_run


def said(dry_run: DryRun, plan: ModelPlan, spec: ContextSpec) -> Footprint:
    return dry_run.measure(plan, file_identity(plan), [spec])[0]


def taken(path: Path, spec: ContextSpec) -> Footprint:
    """What llama.cpp takes when it allocates in earnest."""
    model = Llama.instance().load(str(path), DeviceKind.HOST)
    try:
        footprint = model.footprint(spec)
    finally:
        model.close()
    assert footprint is not None
    return footprint


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_shipped_models_take_what_was_said(dry_run: DryRun, path: Path) -> None:
    spec = ContextSpec(window=2048)
    assert said(dry_run, plan_of(path), spec) == taken(path, spec)


def random_geometry(chance: random.Random, architecture: str) -> dict[str, Any]:
    n_kv_head = chance.choice((1, 2, 4))
    return {
        "architecture": architecture,
        "n_layer": chance.choice((6, 7)) if architecture == "gemma3" else chance.randint(1, 5),
        "n_embd": 64 * chance.randint(1, 4),
        "n_head": 4,
        "n_kv_head": n_kv_head,
        "n_ff": 32 * chance.randint(2, 12),
        "tied": chance.random() < 0.5,
        "seed": chance.randint(0, 1000),
    }


def random_spec(chance: random.Random, geometry: dict[str, Any]) -> ContextSpec:
    flash = chance.random() < 0.7
    whole_blocks = geometry["architecture"] == "mamba" or geometry["n_embd"] // geometry["n_head"] % 32 == 0
    return ContextSpec(
        window=chance.choice((1, 200, 256, 1000, 2048, 5000)),
        slots=chance.randint(1, 8),
        n_batch=chance.choice((1, 32, 256, 512, 1024)),
        n_ubatch=chance.choice((1, 8, 16, 128, 512)),
        kv_type=chance.choice(("f16", "f32", "q8_0", "q4_0") if flash and whole_blocks else ("f16", "f32")),
        flash_attention=flash,
    )


ARCHITECTURES = ("llama", "qwen2", "gemma3", "mamba")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_twenty_five_random_geometries_and_parameters_take_what_was_said(
    dry_run: DryRun, architecture: str, tmp_path: Path
) -> None:
    chance = random.Random(architecture)
    for i in range(25):
        geometry = random_geometry(chance, architecture)
        path = write_tiny_gguf(tmp_path / f"{i}.gguf", **geometry)
        spec = random_spec(chance, geometry)
        assert said(dry_run, plan_of(path), spec) == taken(path, spec), (geometry, spec)
        path.unlink()


@pytest.mark.parametrize("spec", [ContextSpec(window=1024, n_batch=2), ContextSpec(window=1024, slots=5, n_batch=8)], ids=str)
def test_generating_may_take_more_than_reading_and_is_asked_about_too(dry_run: DryRun, spec: ContextSpec, tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "model.gguf", n_vocab=3000)
    with opened_model(path, dry=True) as model:
        reading = measure(model, spec).compute_bytes
    assert reading < said(dry_run, plan_of(path), spec).compute_bytes == taken(path, spec).compute_bytes


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_a_context_takes_stays_the_same_however_its_slots_fill(architecture: str, tmp_path: Path) -> None:
    chance = random.Random(architecture)
    path = write_tiny_gguf(tmp_path / "model.gguf", architecture=architecture, n_layer=7 if architecture == "gemma3" else 2)
    with opened_model(path) as model:
        for _ in range(8):
            slots = chance.randint(1, 8)
            spec = ContextSpec(512, slots, n_batch=256, n_ubatch=chance.choice((16, 100)), flash_attention=chance.random() < 0.5)
            with opened_context(model, spec) as context:
                empty = breakdown(context)
                decode_slots(context, {0: 240})  # a prompt as long as several steps
                decode_slots(context, dict.fromkeys(range(slots), 1))
                decode_slots(context, {slot: chance.randint(1, 30) for slot in range(slots)})
                assert breakdown(context) == empty, spec


def test_several_contexts_are_asked_about_in_one_question(dry_run: DryRun, tmp_path: Path) -> None:
    plan = plan_of(write_tiny_gguf(tmp_path / "model.gguf"))
    specs = [ContextSpec(window=256 * n, slots=1 + n % 3) for n in range(1, 20)]
    assert dry_run.measure(plan, file_identity(plan), specs) == [said(dry_run, plan, spec) for spec in specs]


def test_another_file_under_the_same_path_is_not_taken_for_the_one_before(dry_run: DryRun, tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "model.gguf", n_layer=2)
    before = said(dry_run, plan_of(path), ContextSpec(window=256))
    plan = plan_of(write_tiny_gguf(path, n_layer=4))
    after = said(dry_run, plan, ContextSpec(window=256))
    assert after.kv_bytes == 2 * before.kv_bytes


@pytest.mark.parametrize(
    "spec",
    [
        ContextSpec(window=256, n_batch=0),
        ContextSpec(window=256, n_ubatch=0),
        ContextSpec(window=256, kv_type="i32"),
        ContextSpec(window=256, slots=0),
        ContextSpec(window=256, slots=MAX_SLOTS + 1),
        ContextSpec(window=0),
        ContextSpec(window=2**31, slots=2),
    ],
    ids=str,
)
def test_parameters_that_llama_would_not_survive_do_not_reach_it(dry_run: DryRun, spec: ContextSpec, tmp_path: Path) -> None:
    plan = plan_of(write_tiny_gguf(tmp_path / "model.gguf", architecture="mamba"))
    with pytest.raises(ModelLoadFailed):
        said(dry_run, plan, spec)
    assert said(dry_run, plan, ContextSpec(window=256)).weights_bytes > 0
    model = Llama.instance().load(plan.path, DeviceKind.HOST)
    with pytest.raises(LlamaError):
        model.context(spec, n_threads=1)
    model.close()


def test_the_largest_that_is_let_through_is_survived(dry_run: DryRun, tmp_path: Path) -> None:
    plan = plan_of(write_tiny_gguf(tmp_path / "model.gguf", architecture="mamba"))  # a window costs it nothing
    few = ContextSpec(window=256, slots=MAX_SLOTS, n_batch=1, n_ubatch=1)
    assert said(dry_run, plan, few) == taken(Path(plan.path), few)
    whole = ContextSpec(window=MAX_CONTEXT_TOKENS)
    shared = ContextSpec(window=MAX_CONTEXT_TOKENS // MAX_SLOTS // 256 * 256, slots=MAX_SLOTS)
    assert said(dry_run, plan, shared).kv_bytes == MAX_SLOTS * said(dry_run, plan, whole).kv_bytes


def test_a_file_that_makes_llama_abort_ends_the_child_only(dry_run: DryRun, tmp_path: Path) -> None:
    good = plan_of(write_tiny_gguf(tmp_path / "good.gguf"))
    bad = write_tiny_gguf(tmp_path / "bad.gguf", n_layer=2)
    blocks = b"llama.block_count"
    raw = bytearray(bad.read_bytes())
    at = raw.index(blocks) + len(blocks) + 4
    raw[at : at + 4] = (0).to_bytes(4, "little")  # the header's check refuses it; llama.cpp itself does not survive it
    bad.write_bytes(raw)
    hostile = replace(good, id=ModelId("hostile"), path=str(bad))
    with pytest.raises(BadModelFile, match="does not survive"):
        said(dry_run, hostile, ContextSpec(window=256))
    assert said(dry_run, good, ContextSpec(window=256)).weights_bytes > 0


def test_what_llama_refuses_is_a_load_that_failed_with_its_reason(dry_run: DryRun, tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "model.gguf")
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_ap.weight"))
    with pytest.raises(ModelLoadFailed, match="ffn_up"):
        said(dry_run, plan_of(path), ContextSpec(window=256))


def test_a_child_that_was_killed_is_replaced(dry_run: DryRun, tmp_path: Path) -> None:
    plan = plan_of(write_tiny_gguf(tmp_path / "model.gguf"))
    before = said(dry_run, plan, ContextSpec(window=256))
    assert dry_run.child_pid is not None
    os.kill(dry_run.child_pid, signal.SIGKILL)
    again = said(dry_run, plan, ContextSpec(window=512))
    assert again.weights_bytes == before.weights_bytes
    assert again.kv_bytes == 2 * before.kv_bytes


async def test_what_is_booked_at_admission_is_what_is_taken_and_nothing_is_corrected(start: Start) -> None:
    conductor = await start({path.stem: path for path in SHIPPED})
    for path in SHIPPED:
        await conductor.register(path.stem, path.stem)
    booked = (await conductor.status()).ledger.allocated_bytes
    for path in SHIPPED:
        await conductor.decode(path.stem, "import os\n", max_tokens=2)
    assert (await conductor.status()).ledger.allocated_bytes == booked
