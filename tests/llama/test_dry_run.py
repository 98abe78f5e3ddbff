"""What a dry run says before a load is what llama.cpp takes after it, to the byte; and no file gets further than the child."""

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

from conductor.backend.catalog import Catalog
from conductor.backend.dry_run import DryRun
from conductor.backend.estimator import Estimator
from conductor.backend.llama import Llama
from conductor.config import parse_config
from conductor.core.estimate import Footprint, ModelPlan
from conductor.errors import BadModelFile, ConductorError, ModelLoadFailed
from conductor.types import ContextSpec, DeviceKind, ModelId
from tests.conftest import Start
from tests.support.tiny_gguf import write_tiny_gguf

SHIPPED = sorted((Path(__file__).resolve().parents[2] / "models").glob("*.gguf"))


@pytest.fixture(scope="module")
def dry_run() -> Iterator[DryRun]:
    with contextlib.closing(DryRun()) as dry_run:
        yield dry_run


def plan_of(path: Path) -> ModelPlan:
    config = parse_config({"model_dirs": [str(path.parent)]}, source="test", directory=path.parent)
    return Catalog(config).plan(str(path), DeviceKind.HOST)


def taken(path: Path, spec: ContextSpec) -> Footprint | None:
    """What llama.cpp takes when it allocates in earnest."""
    model = Llama.instance().load(str(path), DeviceKind.HOST)
    try:
        return model.footprint(spec)
    finally:
        model.close()


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_shipped_models_take_what_was_said(dry_run: DryRun, path: Path) -> None:
    spec = ContextSpec(window=2048)
    assert dry_run.measure(plan_of(path), spec) == taken(path, spec)


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


def random_spec(chance: random.Random) -> ContextSpec:
    flash = chance.random() < 0.7
    n_batch = chance.choice((32, 256, 512, 1024))
    return ContextSpec(
        window=chance.choice((1, 200, 256, 1000, 2048, 5000)),
        n_batch=n_batch,
        n_ubatch=min(n_batch, chance.choice((16, 128, 512))),
        kv_type=chance.choice(("f16", "f32")),
        flash_attention=flash,
    )


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3", "mamba"])
def test_twenty_five_random_geometries_and_parameters_take_what_was_said(
    dry_run: DryRun, architecture: str, tmp_path: Path
) -> None:
    chance = random.Random(architecture)
    for i in range(25):
        path = write_tiny_gguf(tmp_path / f"{i}.gguf", **random_geometry(chance, architecture))
        spec = random_spec(chance)
        assert dry_run.measure(plan_of(path), spec) == taken(path, spec), (path, spec)
        path.unlink()


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
        dry_run.measure(hostile, ContextSpec(window=256))
    assert dry_run.measure(good, ContextSpec(window=256)).weights_bytes > 0


def test_what_llama_refuses_is_a_load_that_failed_with_its_reason(dry_run: DryRun, tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "model.gguf")
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_ap.weight"))
    with pytest.raises(ModelLoadFailed, match="ffn_up"):
        dry_run.measure(plan_of(path), ContextSpec(window=256))


def test_a_child_that_was_killed_is_replaced(dry_run: DryRun, tmp_path: Path) -> None:
    plan = plan_of(write_tiny_gguf(tmp_path / "model.gguf"))
    before = dry_run.measure(plan, ContextSpec(window=256))
    assert dry_run.child_pid is not None
    os.kill(dry_run.child_pid, signal.SIGKILL)
    again = dry_run.measure(plan, ContextSpec(window=512))
    assert again.weights_bytes == before.weights_bytes
    assert again.kv_bytes == 2 * before.kv_bytes


def test_absurd_windows_are_priced_without_asking_llama(tmp_path: Path) -> None:
    plan = plan_of(write_tiny_gguf(tmp_path / "model.gguf"))
    with contextlib.closing(Estimator()) as estimator:
        priced = estimator.estimate(plan, ContextSpec(window=2**31 - 1), at_most=1 << 30)
        assert priced.kv_bytes > 1 << 30


async def test_what_is_booked_at_admission_is_what_is_taken_and_nothing_is_corrected(start: Start) -> None:
    conductor = await start({path.stem: path for path in SHIPPED})
    for path in SHIPPED:
        await conductor.register(path.stem, path.stem)
    booked = (await conductor.status()).ledger.allocated_bytes
    for path in SHIPPED:
        await conductor.decode(path.stem, "import os\n", max_tokens=2)
    assert (await conductor.status()).ledger.allocated_bytes == booked


async def test_fifty_mutants_of_a_model_are_admitted_or_refused_and_nothing_is_left(start: Start, tmp_path: Path) -> None:
    raw = write_tiny_gguf(tmp_path / "model.gguf", n_vocab=300).read_bytes()
    header = raw.index(b"blk.1.") + 600
    chance = random.Random(11)
    conductor = await start()
    outcomes = {"admitted": 0, "refused": 0}
    for i in range(50):
        mutant = bytearray(raw)
        if i % 5 == 0:
            del mutant[chance.randrange(len(mutant)) :]
        else:
            for _ in range(chance.choice((1, 1, 4))):
                mutant[chance.randrange(header)] ^= 1 << chance.randrange(8)
        path = tmp_path / f"mutant-{i}.gguf"
        path.write_bytes(mutant)
        try:
            await conductor.register("mutant", str(path), window=256)
        except ConductorError:
            outcomes["refused"] += 1
        else:
            outcomes["admitted"] += 1
            await conductor.unregister("mutant")
        conductor.check()
        assert (await conductor.status()).ledger.allocated_bytes == 0
    assert outcomes["refused"] >= 10
    assert outcomes["admitted"] >= 5, outcomes
