"""`conductor monitor` with a real service. Prometheus and Grafana are small stand-ins on the path.

Tested is which command line, configuration and files they get, and that they come and go with the command. What they make of it
is not.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from pipelines.monitor import Scene, grafana, leads_to
from pipelines.servers import answers
from tests.support.monitor import Monitor
from tests.support.scraping import DASHBOARD
from tests.support.shell import ROOT, Shell, family, survivors

STAND_IN = f"""#!{sys.executable}
import http.server, json, os, sys
from pathlib import Path
told = {{"arguments": sys.argv[1:], "environment": {{n: v for n, v in os.environ.items() if n.startswith("GF_")}}}}
Path(__file__ + ".told").write_text(json.dumps(told))
if Path(__file__ + ".broken").exists():
    sys.exit("no such flag")
flag = next((a for a in sys.argv if a.startswith("--web.listen-address=")), "")
port = flag.rpartition(":")[2] or os.environ["GF_SERVER_HTTP_PORT"]
http.server.ThreadingHTTPServer(("127.0.0.1", int(port)), type("Ready", (http.server.BaseHTTPRequestHandler,), {{
    "do_GET": lambda self: (self.send_response(200 if self.path in ("/-/ready", "/api/health") else 404), self.end_headers()),
}})).serve_forever()
"""


def install(directory: Path, name: str) -> Path:
    program = directory / name
    program.parent.mkdir(parents=True, exist_ok=True)
    program.write_text(STAND_IN)
    program.chmod(0o755)
    return program


def told(program: Path) -> Any:
    return json.loads(Path(f"{program}.told").read_text())


def path_without(names: tuple[str, ...], others: Path) -> str:
    """This machine's path. A directory with one of these programs is replaced by one with links to all the others in it."""
    directories = []
    for n, directory in enumerate(map(Path, os.environ["PATH"].split(os.pathsep))):
        if any((directory / name).exists() for name in names):
            links = others / str(n)
            links.mkdir(parents=True)
            for program in directory.iterdir():
                if program.name not in names:
                    (links / program.name).symlink_to(program)
            directory = links
        directories.append(str(directory))
    return os.pathsep.join(directories)


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    """A service; at the end no process lives, and nothing is in the home."""
    directory = tmp_path_factory.mktemp("monitor")
    shell = Shell(directory)
    models = {"coder": {"path": str(ROOT / "models" / "coder.gguf"), "window": 512}}
    config = directory / "conductor.yaml"
    config.write_text(yaml.safe_dump({"device": {"kind": "host", "host_bytes": "64MiB"}, "threads": 1, "models": models}))
    shell.environment["PATH"] = path_without(("prometheus", "grafana-server", "grafana"), directory / "others")
    shell.ok("up", "--config", str(config))
    processes = family(shell.service_pid())
    yield shell
    shell.ok("down")
    assert survivors([*processes, *shell.processes()]) == []
    assert shell.at_home() == []


Begin = Callable[..., Monitor]


@pytest.fixture
def begin(shell: Shell, tmp_path: Path) -> Iterator[Begin]:
    begun: list[Monitor] = []

    def begin(*options: str) -> Monitor:
        path = os.pathsep.join([str(tmp_path / "bin"), shell.environment["PATH"]])
        begun.append(Monitor(shell, *options, PATH=path))
        return begun[-1]

    yield begin
    for monitor in begun:
        if monitor.process.poll() is None:
            monitor.end()


# --- nothing installed ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_where_nothing_is_installed_it_says_what_to_do_with_paths_that_are_there(shell: Shell) -> None:
    said = shell.ok("monitor")
    for page in ("https://prometheus.io/download/", "https://grafana.com/grafana/download"):
        assert page in said
    [command] = [line.partition(": ")[2].split() for line in said.splitlines() if "started by yourself" in line]
    assert command[0] == "prometheus"
    [config] = [argument.partition("=")[2] for argument in command if argument.startswith("--config.file=")]
    [target] = [line.removeprefix("metrics at ") for line in said.splitlines() if line.startswith("metrics at ")]
    assert leads_to(Path(config), (target.removeprefix("http://").removesuffix("/metrics"),))
    assert f"upload {DASHBOARD}" in said
    assert answers(target)


@pytest.mark.slow
def test_no_start_starts_nothing_even_if_it_is_installed(shell: Shell, tmp_path: Path) -> None:
    program = install(tmp_path / "bin", "prometheus")
    path = os.pathsep.join([str(program.parent), shell.environment["PATH"]])
    report = json.loads(shell.ok("monitor", "--no-start", "--json", PATH=path))
    assert {server["name"]: server["program"] for server in report["servers"]} == {
        "prometheus": str(program),
        "grafana-server": None,
    }
    assert [server["pid"] for server in report["servers"]] == [None, None]
    assert all(step.startswith("Grafana") for step in report["steps"])
    assert not Path(f"{program}.told").exists()


# --- stand-ins installed --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_both_are_started_on_loopback_with_their_files_and_end_with_it(
    shell: Shell, begin: Begin, tmp_path: Path, number: signal.Signals
) -> None:
    programs = {name: install(tmp_path / "bin", name) for name in ("prometheus", "grafana-server")}
    monitor = begin()
    report = monitor.report()
    servers = {server["name"]: server for server in report["servers"]}
    assert report["steps"] == []
    for name, server in servers.items():
        assert Path(server["program"]) == programs[name]
        assert server["url"].startswith("http://127.0.0.1:")
        assert psutil.Process(server["pid"]).ppid() == monitor.process.pid
        assert told(programs[name])["arguments"] == server["command"][1:]
    assert report["dashboard_url"] == f"{servers['grafana-server']['url']}/d/vram-conductor"
    of_prometheus, of_grafana = told(programs["prometheus"]), told(programs["grafana-server"])
    assert f"--config.file={report['prometheus_config']}" in of_prometheus["arguments"]
    assert f"--storage.tsdb.path={shell.runtime / 'monitor' / 'prometheus'}" in of_prometheus["arguments"]
    assert leads_to(Path(report["prometheus_config"]), tuple(report["targets"]))
    environment = of_grafana["environment"]
    assert environment["GF_SERVER_HTTP_ADDR"] == "127.0.0.1"
    for name in ("GF_PATHS_DATA", "GF_PATHS_LOGS", "GF_PATHS_PLUGINS", "GF_PATHS_PROVISIONING"):
        assert Path(environment[name]).is_relative_to(shell.runtime)
    provisioned = Path(environment["GF_PATHS_PROVISIONING"])
    [source] = yaml.safe_load((provisioned / "datasources" / "prometheus.yml").read_text())["datasources"]
    assert (source["type"], source["url"]) == ("prometheus", servers["prometheus"]["url"])
    [provider] = yaml.safe_load((provisioned / "dashboards" / "conductor.yml").read_text())["providers"]
    assert Path(provider["options"]["path"]) == DASHBOARD.parent
    assert monitor.end(number) == (0, "")


@pytest.mark.slow
def test_a_prometheus_that_runs_already_is_used_and_not_started_again(shell: Shell, begin: Begin, tmp_path: Path) -> None:
    install(tmp_path / "bin", "prometheus")
    url = next(server["url"] for server in begin().report()["servers"] if server["name"] == "prometheus")
    install(tmp_path / "bin", "grafana-server")
    report = begin("--prometheus", url).report()
    assert [server["name"] for server in report["servers"]] == ["grafana-server"]
    assert report["prometheus_url"] == url


@pytest.mark.slow
def test_one_that_does_not_start_is_told_with_the_end_of_its_log_and_the_other_ends(begin: Begin, tmp_path: Path) -> None:
    install(tmp_path / "bin", "prometheus")
    program = install(tmp_path / "bin", "grafana-server")
    Path(f"{program}.broken").touch()
    stdout, stderr = begin().process.communicate(timeout=60)
    assert "grafana-server ended (exit code 1)" in json.loads(stdout)["message"]
    assert "no such flag" in json.loads(stdout)["message"]
    assert stderr == ""


@pytest.mark.slow
def test_one_that_ends_by_itself_ends_it_all(begin: Begin, tmp_path: Path) -> None:
    install(tmp_path / "bin", "prometheus")
    install(tmp_path / "bin", "grafana-server")
    monitor = begin()
    pids = {server["name"]: server["pid"] for server in monitor.report()["servers"]}
    other = psutil.Process(pids["grafana-server"])
    psutil.Process(pids["prometheus"]).kill()
    stdout, _ = monitor.process.communicate(timeout=60)
    assert monitor.process.returncode == 1
    assert "prometheus ended (exit code -9)" in json.loads(stdout)["message"]
    assert survivors([other]) == []


# --- without a service ------------------------------------------------------------------------------------------------------


def test_without_a_conductor_there_is_nothing_to_monitor(tmp_path: Path) -> None:
    failed = Shell(tmp_path).conductor("monitor")
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr == "error: no conductor is running; start one with: conductor up\n"


@pytest.mark.parametrize(("url", "code"), [("localhost:9090", 2), ("http://127.0.0.1:1", 1)])
def test_an_address_without_a_prometheus_is_refused(tmp_path: Path, url: str, code: int) -> None:
    failed: subprocess.CompletedProcess[str] = Shell(tmp_path).conductor("monitor", "--prometheus", url)
    assert failed.returncode == code
    assert url in failed.stderr


def test_rays_list_of_nodes_is_trusted_only_if_it_names_ours(tmp_path: Path) -> None:
    nodes, config = tmp_path / "nodes.json", tmp_path / "prometheus.yml"
    config.write_text(yaml.safe_dump({"scrape_configs": [{"file_sd_configs": [{"files": [str(nodes)]}]}]}))
    assert not leads_to(config, ("a:1",))
    nodes.write_text(json.dumps([{"targets": ["a:1", "a:2"]}]))
    assert leads_to(config, ("a:1",))
    assert not leads_to(config, ("a:1", "b:1"))
    config.write_text("scrape_configs: 5")
    assert not leads_to(config, ("a:1",))


def test_grafana_is_told_where_its_own_files_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(("a:1",), tmp_path / "files", None, DASHBOARD)
    program = install(tmp_path / "grafana" / "bin", "grafana")
    monkeypatch.setenv("PATH", str(program.parent))
    assert grafana(scene, 1).command == (str(program), "server")
    (tmp_path / "grafana" / "conf").mkdir()
    (tmp_path / "grafana" / "conf" / "defaults.ini").touch()
    assert grafana(scene, 1).command == (str(program), "server", f"--homepath={tmp_path / 'grafana'}")
