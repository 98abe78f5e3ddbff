"""The command line through real processes: one service for the stories that need one, then what happens without."""

from __future__ import annotations

import json
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from ray.exceptions import ActorDiedError
from typer.testing import CliRunner

import conductor
from pipelines.cli import app
from pipelines.console import Exit, errors
from tests.support.eventually import eventually
from tests.support.loading import loaded_by
from tests.support.parrot import write_parrot
from tests.support.shell import CONDUCTOR, ROOT, Shell, family, survivors

TASK = "Write a Python function `add(a, b)` that returns the sum of two numbers."
DENIAL = re.compile(
    r"^VRAM_LEDGER_DENY code=NEVER ledger_max_bytes=(\d+) ledger_allocated_bytes=(\d+) requested_bytes=(\d+)$", re.MULTILINE
)
COMMANDS = (
    "up", "env", "down", "register", "unregister", "decode", "cancel", "chat", "status", "list", "estimate", "demo",
    "stream-demo", "board", "top", "monitor", "logs", "timeline", "run",
)  # fmt: skip


def write_config(directory: Path) -> Path:
    """A small host device with the shipped models, and a directory to name others from."""
    models = directory / "models"
    models.mkdir()
    (models / "link").symlink_to(ROOT / "models" / "coder.gguf")
    (models / "truncated.gguf").write_bytes((ROOT / "models" / "coder.gguf").read_bytes()[:100_000])
    document = {
        "device": {"kind": "host", "host_bytes": "64MiB"},
        "host_budget": "16MiB",
        "threads": 1,
        "models": {key: {"path": str(ROOT / "models" / f"{key}.gguf"), "window": 512} for key in ("coder", "reviewer")},
        "model_dirs": [str(models), str(ROOT / "models")],
    }
    path = directory / "conductor.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


class Service(Shell):
    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.config = write_config(directory)
        self.models = directory / "models"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Two people say `up` at the same moment; at the end nobody is registered, no process lives, nothing is in the home."""
    service = Service(tmp_path_factory.mktemp("service"))
    both = [service.begin(CONDUCTOR, "up", "--json", "--config", str(service.config)) for _ in range(2)]
    answers = [process.communicate(timeout=180) for process in both]
    assert [process.returncode for process in both] == [0, 0], answers
    assert {json.loads(stdout)["ledger"]["allocated_bytes"] for stdout, _ in answers} == {0}
    pid = service.service_pid()
    yield service
    left = service.json("list")
    assert service.service_pid() == pid
    processes = family(pid)
    stopped = service.conductor("down")
    assert (stopped.returncode, stopped.stdout) == (0, "stopped\n"), stopped.stderr
    assert survivors([*processes, *service.processes()]) == []
    assert left == []
    assert service.at_home() == []
    assert not (service.runtime / "service.json").exists()
    assert not (service.runtime / "token").exists()


# --- with a service -----------------------------------------------------------------------------------------------------


def test_an_agent_is_registered_seen_asked_and_let_go(service: Service) -> None:
    admitted = service.json("register", "ada", "coder", "--window", "1024")
    assert (admitted["agent_id"], admitted["model"], admitted["window"], admitted["warnings"]) == ("ada", "coder", 1024, [])

    result = service.json("decode", "ada", TASK, "--chat", "--max-tokens", "200")
    assert result.keys() >= {
        "text", "prompt_tokens", "generated_tokens", "stopped_on_eos", "finish_reason", "elapsed_ms", "time_to_first_token_ms",
        "kv_swap_evicted", "kv_swap_restored", "swap_bytes",
    }  # fmt: skip
    assert "def add(a, b)" in result["text"]
    assert (result["stopped_on_eos"], result["finish_reason"], result["kv_swap_evicted"]) == (True, "eos", None)

    streamed = service.conductor("decode", "ada", TASK, "--chat", "--max-tokens", "200")
    assert streamed.stdout == result["text"] + "\n"
    assert f"{result['generated_tokens']} made (eos)" in streamed.stderr
    assert service.ok("decode", "ada", "-", "--chat", "--max-tokens", "200", stdin=TASK) == streamed.stdout

    again = service.json("up")  # harmless: what runs stays, with whom it holds
    assert [agent["id"] for agent in again["agents"]] == ["ada"]
    [listed] = service.json("list")
    status = service.json("status")
    assert_status_has_what_was_promised(status)
    assert [agent | {"idle_s": 0} for agent in status["agents"]] == [listed | {"idle_s": 0}]
    assert (listed["id"], listed["model"], listed["window"], listed["kv"]) == ("ada", "coder", 1024, "slot")
    assert listed["tokens"] == result["prompt_tokens"] + result["generated_tokens"]
    assert (status["device"]["kind"], status["device"]["total_bytes"]) == ("host", 64 << 20)
    assert [(model["key"], model["state"], model["agents"]) for model in status["models"]] == [("coder", "resident", 1)]

    assert service.ok("unregister", "ada") == "unregistered ada\n"
    after = service.json("status")
    assert (after["agents"], after["models"], after["ledger"]["allocated_bytes"]) == ([], [], 0)


def test_who_talks_to_a_running_conductor_loads_ray_but_not_llama_cpp(service: Service) -> None:
    talk = "up|register eve coder|status|decode eve Hi --max-tokens 4|unregister eve|top --once|logs|timeline --ray -o /dev/null"
    told = loaded_by(map(str.split, talk.split("|")), watched=("ray", "llama_cpp"), environment=service.environment)
    assert [(code, loaded) for _, code, loaded, _ in told[1:]] == [(0, ["ray"])] * 8


def assert_status_has_what_was_promised(status: Any) -> None:
    assert status["device"].keys() >= {"name", "kind", "total_bytes", "free_bytes"}
    assert status["ledger"].keys() >= {"max_bytes", "allocated_bytes", "reservations"}
    assert status["mirror"].keys() >= {"state", "resource", "total_mib", "used_mib"}
    for key, fields in {
        "models": {"key", "path", "state", "agents", "bytes"},
        "agents": {"id", "model", "window", "tokens", "kv"},
    }.items():
        assert status[key]
        assert all(item.keys() >= fields for item in status[key])
    reservations = status["ledger"]["reservations"]
    assert all(item.keys() == {"id", "holder", "kind", "bytes"} for item in reservations)
    assert sum(item["bytes"] for item in reservations) == status["ledger"]["allocated_bytes"] > 0


def test_a_turn_ends_when_its_time_is_up_or_another_terminal_says_so(service: Service) -> None:
    service.json("register", "polly", str(write_parrot(service.models / "endless.gguf", "abcdefghij", ends=False)))
    endless = ("decode", "polly", "x", "--max-tokens", "1000000000", "--context-shift")
    result = service.json(*endless, "--timeout", "1")
    assert (result["finish_reason"], result["text"][:3]) == ("timeout", "abc")

    with service.begin(CONDUCTOR, *endless) as turn:
        eventually(lambda: service.json("list")[0]["busy"], within_s=60)
        assert service.ok("cancel", "polly") == "1 turn of polly ended\n"
        stdout, stderr = turn.communicate(timeout=60)
    assert (turn.returncode, set(stdout.strip()) <= set("abcdefghij")) == (0, True)
    assert "made (cancelled)" in stderr
    assert service.ok("cancel", "polly") == "0 turns of polly ended\n"
    service.ok("unregister", "polly")


def test_a_chat_registers_its_agent_and_takes_it_along(service: Service) -> None:
    said = f"{TASK}\n\n{'too long ' * 1000}\n/reset\n{TASK}\n"
    talk = service.conductor("chat", "coder", "--as", "eve", "--max-tokens", "200", stdin=said)
    assert talk.returncode == 0
    assert talk.stdout.startswith("eve on coder, 512 tokens")
    assert talk.stdout.count("def add(a, b)") == 2
    assert talk.stderr.startswith("error: window of 'eve' is 512 tokens")
    assert talk.stderr.endswith("; /reset begins anew\n")
    assert service.json("list") == []


def test_what_does_not_fit_is_refused_with_the_numbers(service: Service) -> None:
    refused = service.conductor("register", "ada", "coder", "--window", "100000", "--class", "guaranteed")
    assert (refused.returncode, refused.stdout) == (3, "")
    denial = DENIAL.search(refused.stderr)
    assert denial, f"one line, even where 80 columns are shown: {refused.stderr}"
    assert "A window of " in refused.stderr
    as_json = service.conductor("register", "ada", "coder", "--window", "100000", "--class", "guaranteed", "--json")
    body = json.loads(as_json.stdout)
    assert (as_json.returncode, body["error"], body["refusal"]["code"]) == (3, "AdmissionRefused", "NEVER")
    assert DENIAL.search(body["message"])
    assert body["refusal"]["requested_bytes"] == int(denial[3])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("coda", "no model 'coda' in the configuration; there are: coder, reviewer"),
        ("missing.gguf", "missing.gguf"),
        ("truncated.gguf", "truncated.gguf: "),
        ("../models", "models: is a directory"),
        ("/etc/passwd", "'/etc/passwd' is outside the directories that models may be named from"),
    ],
)
def test_a_model_that_cannot_be_used_is_exit_code_4(service: Service, model: str, message: str) -> None:
    failed = service.conductor("register", "ada", model, cwd=service.models)
    assert (failed.returncode, failed.stdout) == (4, "")
    assert message in failed.stderr


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("cancel", "nobody"), "no agent 'nobody' is registered"),
        (("decode", "nobody", "hello"), "no agent 'nobody' is registered"),
        (("register", "ada", "coder", "--window", "0"), "window: 0 is outside"),
        (("register", "", "coder"), "agent_id: "),
        (("decode", "nobody", "-"), "prompt: "),
    ],
)
def test_bad_input_is_exit_code_2(service: Service, command: tuple[str, ...], message: str) -> None:
    failed = service.conductor(*command, stdin="\udcff no UTF-8")
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr.startswith("error: ")
    assert message in failed.stderr


@pytest.mark.slow
def test_whoever_ends_a_command_that_waits_for_room_waits_no_longer(service: Service) -> None:
    whole_device = service.conductor("register", "ada", "coder", "--window", "100000", "--class", "guaranteed", "--json")
    window = json.loads(whole_device.stdout)["refusal"]["largest_window"]
    service.ok("register", "ada", "coder", "--window", str(window), "--class", "guaranteed")
    with service.begin(CONDUCTOR, "register", "ghost", "reviewer", "--window", "4096", "--wait", "100") as ghost:
        eventually(lambda: [waiting["agent_id"] for waiting in service.json("status")["waiting"]] == ["ghost"], within_s=60)
        ghost.send_signal(signal.SIGINT)
        _, stderr = ghost.communicate(timeout=60)
    assert (ghost.returncode, stderr) == (130, "")
    assert service.json("status")["waiting"] == []
    service.ok("unregister", "ada")
    assert service.json("list") == []


@pytest.mark.slow
def test_an_id_that_looks_like_markup_is_shown_as_it_is(service: Service) -> None:
    assert "[/red]x" in service.ok("register", "[/red]x", "coder")
    assert "[/red]x" in service.ok("status")
    assert service.ok("unregister", "[/red]x") == "unregistered [/red]x\n"


@pytest.mark.slow
def test_another_path_to_a_file_is_the_same_model(service: Service) -> None:
    service.ok("register", "ada", "coder")
    service.ok("register", "bob", "./link", cwd=service.models)  # relative to where the command runs, and a symlink
    [model] = service.json("status")["models"]
    assert (model["key"], model["agents"], model["path"]) == ("coder", 2, str(ROOT / "models" / "coder.gguf"))
    for agent in ("ada", "bob"):
        service.ok("unregister", agent)


def test_env_lets_rays_own_tools_in_and_nobody_else(service: Service) -> None:
    ray_status = (sys.executable, "-m", "ray.scripts.scripts", "status")
    names = service.exports()
    assert names.keys() == {"RAY_ADDRESS", "CONDUCTOR_RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"}
    assert Path(names["RAY_AUTH_TOKEN_PATH"]).stat().st_mode & 0o777 == 0o600
    shown = service.run(*ray_status, **names)
    assert (shown.returncode, "vram_mib" in shown.stdout) == (0, True), shown.stderr
    with service.begin(*ray_status, RAY_ADDRESS=names["RAY_ADDRESS"]) as stranger:
        stdout, _ = stranger.communicate(timeout=180)
    assert stranger.returncode != 0
    assert "vram_mib" not in stdout


# --- starting and stopping ----------------------------------------------------------------------------------------------


def test_up_that_is_interrupted_leaves_no_process(tmp_path: Path) -> None:
    shell = Service(tmp_path)
    with shell.begin(CONDUCTOR, "up", "--config", str(shell.config)) as up:
        # Ray, and the first process that it started; before that imports may start some, and swallow a Ctrl-C
        eventually(lambda: (shell.runtime / "ray.log").exists() and len(family(up.pid)) > 2, within_s=60)
        processes = family(up.pid)
        up.send_signal(signal.SIGINT)
        _, stderr = up.communicate(timeout=180)
    assert (up.returncode, "Traceback" in stderr) == (130, False), stderr
    assert survivors([*processes, *shell.processes()]) == []
    assert not (shell.runtime / "service.json").exists()


@pytest.mark.slow
def test_a_shell_that_took_up_env_can_go_down_and_up_again_and_down_without_the_configuration(tmp_path: Path) -> None:
    shell = Service(tmp_path)
    shell.ok("up", CONDUCTOR_CONFIG=str(shell.config))
    names = shell.exports()
    assert shell.ok("down", **names) == "stopped\n"
    again = shell.ok("up", "--config", str(shell.config), **names)
    assert names["RAY_ADDRESS"] not in again
    assert shell.ok("up", **names) == again
    other = shell.conductor("up", "--config", str(ROOT / "configs" / "host.yaml"), **names)
    assert (other.returncode, other.stdout) == (1, "")
    assert other.stderr == f"error: a conductor is already running with {shell.config}; run `conductor down` first\n"
    shell.config.unlink()
    processes = family(shell.service_pid())
    assert shell.ok("down", **names) == "stopped\n"
    assert survivors([*processes, *shell.processes()]) == []


# --- without a service --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    shell = Service(tmp_path_factory.mktemp("alone"))
    yield shell
    assert shell.at_home() == []
    assert not shell.runtime.exists()


@pytest.mark.parametrize(
    "command",
    ["down", "env", "register ada coder", "unregister ada", "decode ada hello", "chat coder", "status", "list"],
)
def test_a_command_that_needs_a_conductor_says_how_to_start_one(alone: Service, command: str) -> None:
    failed = alone.conductor(*command.split())
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr == "error: no conductor is running; start one with: conductor up\n"


def test_programs_are_told_in_json_that_nothing_runs(alone: Service) -> None:
    failed = alone.conductor("status", "--json")
    assert (failed.returncode, json.loads(failed.stdout)["error"]) == (1, "NotRunning")


def test_the_version_is_told(alone: Service) -> None:
    assert alone.ok("--version") == f"vram-conductor {conductor.__version__}\n"


def test_every_command_explains_itself() -> None:
    assert tuple(typer.main.get_command(app).commands) == COMMANDS  # type: ignore[attr-defined]
    for command in COMMANDS:
        shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "120"})
        assert shown.exit_code == 0
        text = shown.output.partition("Usage: ")[2].partition("╭")[0].splitlines()[1:]
        assert len(" ".join(text).split()) >= 3, f"{command} --help says nothing: {shown.output}"


def test_a_shell_is_told_how_to_complete_commands(alone: Service) -> None:
    script = alone.conductor(_CONDUCTOR_COMPLETE="source_bash")
    assert "complete -o default -F _conductor_completion conductor" in script.stdout


def test_an_estimate_adds_up_without_a_service(alone: Service) -> None:
    config = str(alone.config)
    estimate = alone.json("estimate", "coder", "--window", "512", "--window", "100000", "--config", config)
    assert (estimate["architecture"], estimate["device_kind"], estimate["cap_bytes"]) == ("llama", "host", 57 << 20)
    small, large = estimate["windows"]
    for row in (small, large):
        assert row["kv_bytes"] + row["compute_bytes"] + row["pool_bytes"] == row["context_bytes"]
        assert estimate["weights_bytes"] + row["context_bytes"] == row["total_bytes"]
        assert row["fits"] == (row["total_bytes"] <= estimate["cap_bytes"]) == (row["contexts"] > 0)
        assert row["agents"] == row["contexts"] == (estimate["cap_bytes"] - estimate["weights_bytes"]) // row["context_bytes"]
    assert (small["window"], small["fits"], large["window"], large["fits"]) == (512, True, 100000, False)
    assert (estimate["exact"], estimate["slots"], estimate["once"], small["host_bytes"]) == (True, 1, None, 0)
    refused = alone.conductor("estimate", "coder", "--slots", "257", "--config", config)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "slots: 257 is outside 1 to 256" in refused.stderr


@pytest.mark.slow
def test_an_estimate_for_slots_counts_their_agents_and_searches_the_largest_window(alone: Service) -> None:
    asked = ("estimate", "coder", "--slots", "4", "--config", str(alone.config))
    estimate = alone.json(*asked, "--window", "512", "--window", "100000")
    small, _ = estimate["windows"]
    assert small["contexts"] > 1
    assert small["agents"] == 4 * small["contexts"]
    largest = estimate["largest_window"]
    assert 512 < largest < 100000
    fits, not_any_more = alone.json(*asked, "--window", str(largest), "--window", str(largest + 1))["windows"]
    assert (fits["fits"], not_any_more["fits"]) == (True, False)
    shown = " ".join(alone.ok(*asked, "--window", str(largest)).split())
    assert "fits alone how many" in shown
    assert f"largest window that fits alone, by dry runs: {largest:,} tokens" in shown


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("device: {kind: host\nthreads: 1", "line 2"),
        ("device: {kind: host, hots_bytes: 1MiB}", "device.hots_bytes: unknown option; known here: host_bytes"),
        (None, "cannot be read"),
    ],
    ids=["malformed", "unknown key", "missing"],
)
def test_a_wrong_configuration_is_named_by_file_and_key(alone: Service, tmp_path: Path, text: str | None, named: str) -> None:
    path = tmp_path / "wrong.yaml"
    if text is not None:
        path.write_text(text)
    failed = alone.conductor("up", "--config", str(path))
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr.startswith(f"error: {path}: ")
    assert named in failed.stderr


def test_a_conductor_that_dies_during_a_call_is_a_message(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, errors():
        raise ActorDiedError
    assert ended.value.code is Exit.FAILED
    assert "the conductor ended during this call" in capsys.readouterr().err


def test_the_demo_does_not_begin_if_its_transcript_has_nowhere_to_go(alone: Service, tmp_path: Path) -> None:
    failed = alone.conductor("demo", "--save", str(tmp_path / "nowhere" / "demo.json"))
    assert (failed.returncode, failed.stdout) == (2, "")
