"""The conductor as Ray users meet it: a real actor in a real cluster, real llama.cpp inside."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import RayTaskError, WorkerCrashedError

import actors
from conductor import errors
from conductor.backend.catalog import Catalog
from conductor.backend.dry_run import DryRun
from conductor.backend.file_identity import file_identity
from conductor.config import Config
from conductor.errors import AdmissionRefused, RefusalCode, ServiceFailed
from conductor.types import Admission, Chunk, DecodeResult, DeviceKind, FinishReason, Kind, KvPlace, MirrorState
from conductor.units import MIB
from tests.support.conducting import Conduct, Conductor, config_of
from tests.support.eventually import eventually
from tests.support.talk import ENDLESS, SHIPPED, TASK
from tests.support.tiny_gguf import write_tiny_gguf

# --- starting ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_conductor_that_finds_every_gpu_taken_says_so_and_leaves_nothing(vram_resource: str, tmp_path: Path) -> None:
    config = config_of(vram_resource, tmp_path, {}, device={"kind": "auto"})
    holder = ray.remote(num_cpus=0, num_gpus=1)(Bystander).remote()
    ray.get(holder.name.remote())
    with pytest.raises(ServiceFailed, match="all GPUs of this Ray cluster are taken"):
        actors.connect(config)
    assert actors.find(config) is None
    ray.kill(holder)


class Bystander:
    def name(self) -> str:
        return "bystander"


# --- calls ------------------------------------------------------------------------------------------------------------


def test_errors_arrive_as_the_projects_own_with_their_fields(conduct: Conduct, tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"nonsense")
    write_tiny_gguf(tmp_path / "strange.gguf", architecture="nonesuch")
    write_tiny_gguf(tmp_path / "mute.gguf", chat_template=None)
    conductor = conduct({**SHIPPED, "bad": tmp_path / "bad.gguf", "strange": tmp_path / "strange.gguf"})
    conductor.call("register", "ada", "coder", window=64)
    conductor.call("register", "mute", str(tmp_path / "mute.gguf"))

    def raised(method: str, *arguments: Any, **options: Any) -> Any:
        with pytest.raises(errors.ConductorError) as caught:
            conductor.call(method, *arguments, **options)
        assert isinstance(caught.value, RayTaskError)
        return caught.value

    assert raised("register", "bob", "coda").known == ("bad", "coder", "documenter", "reviewer", "strange")
    assert raised("register", "bob", "/etc/passwd").allowed == (str(tmp_path),)
    assert raised("register", "ada", "coder").agent_id == "ada"
    assert raised("register", "", "coder").argument == "agent_id"
    assert raised("register", "bob", "coder", window=-1).argument == "window"
    assert raised("register", "bob", "coder", service_class="best").argument == "service_class"
    refused = raised("register", "bob", "coder", window=100_000, service_class="guaranteed")
    assert (refused.code, refused.refusal.cap_bytes) == (RefusalCode.NEVER, conductor.status().ledger.max_bytes)
    assert refused.line.startswith("VRAM_LEDGER_DENY code=NEVER ledger_max_bytes=")
    assert raised("register", "bob", "bad").path == str(tmp_path / "bad.gguf")
    assert raised("register", "bob", "strange").problem
    assert raised("unregister", "bob").agent_id == "bob"
    assert raised("decode", "bob", "hello").agent_id == "bob"
    assert raised("decode", "ada", "hello", temperature=float("nan")).argument == "temperature"
    assert raised("decode", "ada", "hello", beams=3).argument == "beams"
    full = raised("decode", "ada", "hello " * 100)
    assert (full.window, full.held_tokens) == (64, 0)
    assert raised("decode", "mute", messages=[{"role": "user", "content": "hello"}]).model == "mute.gguf"
    assert raised("release", "r-17").reservation_id == "r-17"
    assert raised("reserve", "cupy", 2**40).code is RefusalCode.NEVER
    kinds = [errors.UnknownModel, errors.PathNotAllowed, errors.DuplicateAgent, errors.InvalidRequest, errors.AdmissionRefused]
    calls = [("x", "coda"), ("x", "/etc/passwd"), ("ada", "coder"), ("", "coder"), ("x", "coder")]
    for kind, call in zip(kinds, calls, strict=True):
        assert isinstance(raised("register", *call, window=100_000, service_class="guaranteed"), kind)


def test_fifty_who_come_at_once_for_room_that_holds_twenty(conduct: Conduct, tmp_path: Path) -> None:
    """Fifty files, so fifty models; each takes more than a MiB, in which caps are counted, so that one number lies between."""
    files = [tmp_path / f"model{n}.gguf" for n in range(50)]
    write_tiny_gguf(files[0], n_embd=128, n_ff=512, n_vocab=300)
    for file in files[1:]:
        file.write_bytes(files[0].read_bytes())
    probe = config_of("probe", tmp_path, {})
    plan = Catalog(probe).plan(str(files[0]), DeviceKind.HOST)
    with contextlib.closing(DryRun()) as dry_run:
        (took,) = dry_run.measure(plan, file_identity(plan), [probe.context_spec(None, 256)])
    context = took.context_bytes
    room = -(-(20 * plan.weights_bytes + context) // MIB) * MIB
    assert room < 21 * plan.weights_bytes + context
    conductor = conduct(device={"kind": "host", "host_bytes": room}, admission_percent=100)

    calls = [conductor.handle.register.remote(f"agent {n}", str(file), window=256) for n, file in enumerate(files)]
    answers = [answer_to(call) for call in calls]
    admitted = [answer for answer in answers if isinstance(answer, Admission)]
    refused = [answer for answer in answers if isinstance(answer, AdmissionRefused)]
    assert (len(admitted), len(refused)) == (20, 30)
    assert {refusal.code for refusal in refused} == {RefusalCode.CAP}
    ledger = conductor.status().ledger
    assert ledger.max_bytes == room
    assert sum(reserved.bytes for reserved in ledger.reservations if reserved.kind is Kind.WEIGHTS) == 20 * plan.weights_bytes
    assert ledger.allocated_bytes == 20 * plan.weights_bytes + context
    mirror = conductor.call("mirrored", 1.0)
    assert mirror.state is MirrorState.EQUAL
    assert mirror.used_mib == pytest.approx(ledger.allocated_bytes / MIB, abs=0.01)
    assert conductor.free_mib() == pytest.approx((room - ledger.allocated_bytes) / MIB, abs=0.01)

    ray.get([conductor.handle.unregister.remote(admission.agent_id) for admission in admitted])
    assert conductor.is_empty()
    mirror = conductor.call("mirrored", 1.0)
    assert (mirror.state, mirror.used_mib) == (MirrorState.EQUAL, 0)
    assert conductor.free_mib() == room / MIB


def answer_to(call: Any) -> Any:
    try:
        return ray.get(call)
    except AdmissionRefused as refused:
        return refused


def test_status_answers_while_a_turn_runs(conduct: Conduct, endless: Path) -> None:
    conductor = conduct({"endless": endless})
    conductor.call("register", "ada", "endless")
    turn = conductor.handle.decode.remote("ada", "x", **ENDLESS)
    eventually(lambda: conductor.is_busy("ada"), within_s=20)
    assert conductor.status().agents[0].kv is KvPlace.SLOT
    assert ray.wait([turn], timeout=0)[1] == [turn]
    ray.cancel(turn)
    eventually(lambda: not conductor.is_busy("ada"), within_s=20)
    assert conductor.call("decode", "ada", "x", reset=True, max_tokens=3).text == "abc"


def test_help_tells_every_public_call(conduct: Conduct) -> None:
    text = conduct().call("help")
    for call in ("register", "unregister", "decode", "stream", "reserve", "release", "status", "list", "help"):
        assert f"\n{call}(" in f"\n{text}"
    assert "window: int | None = None" in text.replace("'", "")


# --- streams ----------------------------------------------------------------------------------------------------------


def test_a_stream_yields_chunks_and_then_the_result(conduct: Conduct) -> None:
    conductor = conduct({"coder": SHIPPED["coder"]}, stream_interval_ms=0)
    conductor.call("register", "ada", "coder")
    messages = [{"role": "user", "content": TASK}]
    *chunks, result = actors.stream(conductor.handle, "ada", messages=messages)
    assert isinstance(result, DecodeResult)
    assert len(chunks) > 1
    assert all(isinstance(chunk, Chunk) for chunk in chunks)
    assert "".join(chunk.text for chunk in chunks) == result.text == conductor.call("decode", "ada", messages=messages).text
    with pytest.raises(errors.UnknownAgent):
        list(actors.stream(conductor.handle, "nobody", "hello"))


def test_a_reader_who_stops_reading_ends_the_turn(conduct: Conduct, endless: Path) -> None:
    conductor = conduct({"endless": endless}, stream_interval_ms=0)
    conductor.call("register", "ada", "endless")
    reading = actors.stream(conductor.handle, "ada", "x", **ENDLESS)
    assert next(reading).text
    assert conductor.is_busy("ada")
    reading.close()
    eventually(lambda: not conductor.is_busy("ada"), within_s=20)


@ray.remote(num_cpus=0, max_retries=0)
def read_for_ever(conductor: Any, agent: str, pid_file: str) -> None:
    for _ in actors.stream(conductor, agent, "x", **ENDLESS):
        Path(f"{pid_file}.new").write_text(str(os.getpid()))
        os.replace(f"{pid_file}.new", pid_file)


def test_a_reader_who_is_killed_frees_its_turn(conduct: Conduct, endless: Path, tmp_path: Path) -> None:
    conductor = conduct({"endless": endless})
    for agent in ("ada", "bob"):
        conductor.call("register", agent, "endless")
    pid_file = tmp_path / "pid"
    reader = read_for_ever.remote(conductor.handle, "ada", str(pid_file))
    eventually(pid_file.exists, within_s=30)
    assert conductor.is_busy("ada")
    queued = conductor.handle.decode.remote("bob", "x", max_tokens=3)
    os.kill(int(pid_file.read_text()), signal.SIGKILL)
    assert ray.get(queued, timeout=30).text == "abc"
    assert conductor.call("decode", "ada", "x", reset=True, max_tokens=3).text == "abc"
    with pytest.raises(WorkerCrashedError):
        ray.get(reader)


# --- finding, starting, ending ----------------------------------------------------------------------------------------


def test_whoever_connects_gets_the_same_conductor(conduct: Conduct) -> None:
    conductor = conduct()
    assert actors.connect(conductor.config) == conductor.handle
    elsewhere = ray.remote(num_cpus=0)(lambda config: actors.connect(config)._actor_id.hex())
    ids = ray.get([elsewhere.remote(conductor.config) for _ in range(3)])
    assert set(ids) == {conductor.handle._actor_id.hex()}


def test_a_configuration_that_does_not_work_out_is_told_and_leaves_no_actor(vram_resource: str, tmp_path: Path) -> None:
    config = config_of(vram_resource, tmp_path, {}, device={"kind": "cuda", "index": 99})
    with pytest.raises(errors.ConfigError) as failed:
        actors.connect(config)
    assert not isinstance(failed.value, RayTaskError)
    assert failed.value.key == "device.kind"
    eventually(lambda: _is_gone(config), within_s=10)


def _is_gone(config: Config) -> bool:
    with contextlib.suppress(ValueError):
        ray.get_actor(config.ray.name, namespace=config.ray.namespace)
        return False
    return True


def test_a_stopped_conductor_is_gone_with_its_resource(vram_resource: str, tmp_path: Path) -> None:
    conductor = Conductor(config_of(vram_resource, tmp_path, SHIPPED))
    conductor.call("register", "ada", "coder")
    assert conductor.call("mirrored").state is MirrorState.EQUAL
    actors.stop(conductor.handle)
    eventually(lambda: _is_gone(conductor.config), within_s=10)
    eventually(lambda: vram_resource not in ray.cluster_resources(), within_s=5)


def test_a_conductor_that_dies_comes_back_empty(conduct: Conduct) -> None:
    conductor = conduct(SHIPPED)
    total = conductor.call("mirrored").total_mib
    conductor.call("register", "ada", "coder")
    conductor.call("reserve", "cupy", 4 * MIB)
    assert conductor.call("mirrored").used_mib > 4
    ray.kill(conductor.handle, no_restart=False)
    eventually(lambda: _has_come_back_empty(conductor), within_s=30)
    mirror = conductor.call("mirrored", 5.0)
    assert (mirror.state, mirror.total_mib, mirror.used_mib) == (MirrorState.EQUAL, total, 0)
    eventually(lambda: conductor.free_mib() == total, within_s=2)
    conductor.call("register", "ada", "coder")
    assert conductor.call("decode", "ada", "def", max_tokens=2).finish_reason is FinishReason.LENGTH


def _has_come_back_empty(conductor: Conductor) -> bool:
    with contextlib.suppress(ray.exceptions.RayActorError):  # it is on its way out, or in
        return conductor.is_empty()
    return False
