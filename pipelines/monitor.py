"""Prometheus and Grafana for the running conductor: started here if they are installed, or the exact steps if they are not.

Covers which configuration Prometheus gets, what Grafana is provided with, and their two processes: on loopback, with all of their
files below the runtime directory, and ended with this command. Does not cover what the metrics mean (docs/metrics.md).
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from actors.service import runtime_directory
from conductor.errors import InvalidRequest, ServiceFailed
from pipelines.console import errors, out, print_json
from pipelines.servers import Server, answers, interruption, port_for, serving, watch
from pipelines.session import connected, settings

PROMETHEUS_PORT, GRAFANA_PORT = 9090, 3000
DASHBOARD_UID = "vram-conductor"
#: Ray tells its agent every 10 s
_SCRAPE_EVERY = "10s"


@dataclass(frozen=True, slots=True)
class Scene:
    """What there is to be monitored, and where the files for it lie."""

    targets: tuple[str, ...]  #: host:port of each node's metrics
    files: Path  #: of this command, below the runtime directory
    rays_config: Path | None  #: Ray's own for Prometheus, if it is there and leads to these targets
    dashboard: Path

    @property
    def prometheus_config(self) -> Path:
        return self.rays_config or self.files / "prometheus.yml"


# --- what there is --------------------------------------------------------------------------------------------------------


def look(config: Path | None) -> Scene:
    """Raises NotRunning, ServiceFailed, ConfigError."""
    from conductor.config import default_file

    with connected(settings(config)):
        import ray

        nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
        session = ray.get_runtime_context().get_session_name()
    targets = tuple(sorted(f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}" for node in nodes))
    rays = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir(), "ray", session, "metrics", "prometheus", "prometheus.yml")
    files = runtime_directory() / "monitor"
    dashboard = default_file().parent / "grafana" / "conductor.json"
    return Scene(targets, files, rays if leads_to(rays, targets) else None, dashboard)


def leads_to(config: Path, targets: tuple[str, ...]) -> bool:
    """Whether a Prometheus with Ray's configuration finds them, by the list of nodes that it names."""
    import yaml

    try:
        jobs = yaml.safe_load(config.read_text("utf-8"))["scrape_configs"]
        lists = [Path(file) for job in jobs for found in job["file_sd_configs"] for file in found["files"]]
        named = {target for path in lists for group in json.loads(path.read_text("utf-8")) for target in group["targets"]}
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return False
    return named.issuperset(targets)


def prometheus(scene: Scene, port: int) -> Server:
    arguments = (
        f"--config.file={scene.prometheus_config}",
        f"--storage.tsdb.path={scene.files / 'prometheus'}",
        "--storage.tsdb.retention.time=7d",
        "--storage.tsdb.retention.size=512MB",
        f"--web.listen-address=127.0.0.1:{port}",
    )
    program, log = shutil.which("prometheus"), scene.files / "prometheus.log"
    return Server("prometheus", program, arguments, {}, f"http://127.0.0.1:{port}", "/-/ready", log)


def grafana(scene: Scene, port: int) -> Server:
    program = shutil.which("grafana-server") or shutil.which("grafana")
    arguments: tuple[str, ...] = () if program is None or Path(program).name == "grafana-server" else ("server",)
    home = _grafana_home(program) if program else None
    if home is not None:
        arguments += (f"--homepath={home}",)
    data = scene.files / "grafana"
    environment = {
        "GF_SERVER_HTTP_ADDR": "127.0.0.1",
        "GF_SERVER_HTTP_PORT": str(port),
        "GF_PATHS_DATA": str(data),
        "GF_PATHS_LOGS": str(data / "logs"),
        "GF_PATHS_PLUGINS": str(data / "plugins"),
        "GF_PATHS_PROVISIONING": str(scene.files / "provisioning"),
        "GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH": str(scene.dashboard),
        # whoever reaches loopback may look, nobody may log in: there is no password to be known
        "GF_AUTH_ANONYMOUS_ENABLED": "true",
        "GF_AUTH_ANONYMOUS_ORG_ROLE": "Viewer",
        "GF_AUTH_DISABLE_LOGIN_FORM": "true",
        "GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION": "true",
        "GF_ANALYTICS_REPORTING_ENABLED": "false",
        "GF_ANALYTICS_CHECK_FOR_UPDATES": "false",
        "GF_ANALYTICS_CHECK_FOR_PLUGIN_UPDATES": "false",
    }
    log = scene.files / "grafana.log"
    return Server("grafana-server", program, arguments, environment, f"http://127.0.0.1:{port}", "/api/health", log)


def _grafana_home(program: str) -> Path | None:
    """Where its own files are: beside `bin` in an archive, in `share` in a distribution's package."""
    beside = Path(program).resolve().parent.parent
    homes = (beside, beside / "share" / "grafana")
    return next((home for home in homes if (home / "conf" / "defaults.ini").exists()), None)


def write_files(scene: Scene, prometheus_url: str) -> None:
    """The configuration of both, anew."""
    import yaml

    scene.files.mkdir(mode=0o700, parents=True, exist_ok=True)
    targets = scene.files / "targets.json"
    targets.write_text(json.dumps([{"labels": {"job": "ray"}, "targets": list(scene.targets)}]), "utf-8")
    source = {
        "name": "Prometheus of VRAM Conductor", "uid": "vram-conductor-prometheus", "type": "prometheus", "access": "proxy",
        "url": prometheus_url, "isDefault": True, "jsonData": {"timeInterval": _SCRAPE_EVERY},
    }  # fmt: skip
    provider = {"name": "VRAM Conductor", "type": "file", "options": {"path": str(scene.dashboard.parent)}}
    documents = {
        "prometheus.yml": {
            "global": {"scrape_interval": _SCRAPE_EVERY},
            "scrape_configs": [{"job_name": "ray", "file_sd_configs": [{"files": [str(targets)]}]}],
        },
        "provisioning/datasources/prometheus.yml": {"apiVersion": 1, "datasources": [source]},
        "provisioning/dashboards/conductor.yml": {"apiVersion": 1, "providers": [provider]},
    }
    for name, document in documents.items():
        path = scene.files / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(document, sort_keys=False), "utf-8")
    for name in ("plugins", "alerting"):  # Grafana complains of those that are not there
        (scene.files / "provisioning" / name).mkdir(exist_ok=True)


# --- what to do without them ----------------------------------------------------------------------------------------------


def steps(scene: Scene, servers: tuple[Server, ...], prometheus_url: str) -> list[str]:
    """For each server that is not installed, what to do about it."""
    missing = {server.name: server for server in servers if server.program is None}
    told = []
    if (server := missing.get("prometheus")) is not None:
        told.append("Prometheus: download it from https://prometheus.io/download/ and unpack it.")
        told.append("Prometheus: put the directory with `prometheus` on the PATH and run `conductor monitor` again.")
        told.append(f"Prometheus, started by yourself: {shlex.join(server.command)}")
        if scene.rays_config is not None:
            told.append("Prometheus, by Ray: `ray metrics launch-prometheus` fetches one and starts it, open to the network.")
    if "grafana-server" in missing:
        told.append("Grafana: download it from https://grafana.com/grafana/download and unpack it.")
        told.append("Grafana: put its `bin` directory on the PATH and run `conductor monitor` again.")
        source = f"add a data source of type Prometheus with the URL {prometheus_url}"
        told.append(f"Grafana, one that you have: {source}, then Dashboards, New, Import: upload {scene.dashboard}")
    return told


# --- the command ----------------------------------------------------------------------------------------------------------


def command(
    prometheus_url: Annotated[
        str | None,
        typer.Option("--prometheus", envvar="RAY_PROMETHEUS_HOST", help="A Prometheus that runs already (default: start one)."),
    ] = None,
    prometheus_port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = PROMETHEUS_PORT,
    grafana_port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = GRAFANA_PORT,
    start: Annotated[
        bool, typer.Option("--start/--no-start", help="Without: write the files, print commands, start nothing.")
    ] = True,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="Configuration that names the conductor.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, once all is up.")] = False,
) -> None:
    """Prometheus and Grafana with the conductor's dashboard: started if installed, until Ctrl-C; otherwise the steps to take.

    Exit code 0 also where nothing is installed and the steps were printed. Example: conductor monitor --grafana-port 3001
    """
    with errors(as_json=as_json):
        if prometheus_url is not None:
            _refuse_the_absent(prometheus_url)
        scene = look(config)
        servers: tuple[Server, ...] = (_at_a_port(grafana, scene, grafana_port, GRAFANA_PORT, start=start),)
        if prometheus_url is None:
            servers = (_at_a_port(prometheus, scene, prometheus_port, PROMETHEUS_PORT, start=start), *servers)
        url = prometheus_url or servers[0].url
        write_files(scene, url)
        installed = tuple(server for server in servers if server.program is not None and start)
        with interruption() as stop, serving(installed, stop) as processes:
            report = _report(scene, servers, url, {name: process.pid for name, process in processes.items()})
            if as_json:
                print_json(report)
                sys.stdout.flush()
            else:
                _print(report, servers)
            if installed:
                watch(installed, processes, stop)


def _at_a_port(make: Callable[[Scene, int], Server], scene: Scene, asked: int, usual: int, *, start: bool) -> Server:
    """What is to be started needs a port that is free. Raises ServiceFailed."""
    server = make(scene, asked or usual)
    option = f"--{server.name.partition('-')[0]}-port"
    return make(scene, port_for(asked, option)) if start and server.program is not None else server


def _refuse_the_absent(url: str) -> None:
    if not url.startswith(("http://", "https://")):
        raise InvalidRequest("prometheus", f"{url!r} is no http:// or https:// address")
    if not answers(url.rstrip("/") + "/-/ready"):
        raise ServiceFailed(f"no Prometheus answers at {url}")


def _report(scene: Scene, servers: tuple[Server, ...], prometheus_url: str, pids: dict[str, int]) -> dict[str, Any]:
    return {
        "targets": list(scene.targets),
        "prometheus_url": prometheus_url,
        "prometheus_config": str(scene.prometheus_config),
        "dashboard": str(scene.dashboard),
        "dashboard_url": f"{servers[-1].url}/d/{DASHBOARD_UID}" if servers[-1].name in pids else None,
        "servers": [
            {
                "name": server.name, "program": server.program, "pid": pids.get(server.name), "url": server.url,
                "command": list(server.command), "environment": server.environment, "log": str(server.log),
            }
            for server in servers
        ],
        "steps": steps(scene, servers, prometheus_url),
    }  # fmt: skip


def _print(report: dict[str, Any], servers: tuple[Server, ...]) -> None:
    lines = [f"metrics at {', '.join(f'http://{target}/metrics' for target in report['targets'])}"]
    for server, told in zip(servers, report["servers"], strict=True):
        if told["pid"] is not None:
            lines.append(f"{server.name} at {server.url} (pid {told['pid']}, log {server.log})")
        elif server.program is not None:
            shown = [f"{name}={shlex.quote(value)}" for name, value in server.environment.items()]
            lines.append(" ".join([*shown, shlex.join(server.command)]))
    if all(server.name != "prometheus" for server in servers):
        how = f"what it must scrape is in {report['prometheus_config']}"
        lines.append(f"prometheus at {report['prometheus_url']}; {how}")
    if report["dashboard_url"]:
        lines.append(f"dashboard at {report['dashboard_url']}")
    lines += [f"- {step}" for step in report["steps"]]
    if any(told["pid"] for told in report["servers"]):
        lines.append("Ctrl-C ends what was started here")
    for line in lines:
        out.print(line, markup=False, soft_wrap=True)
