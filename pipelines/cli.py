"""The command line: `conductor`. Each command is a thin layer over `actors`; results are tables, or JSON with --json."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

import actors
from actors import service
from actors.naming import call_of
from conductor import __version__
from conductor.errors import ConductorError, InternalError, InvalidRequest, NotRunning, UnknownAgent
from conductor.types import Admission, Chunk, DecodeResult, ServiceClass
from pipelines import board, logs, monitor, run, stream_demo, tables, timeline, top
from pipelines.console import Exit, err, errors, out, print_json, print_text, show
from pipelines.session import connected, settings
from pipelines.session import result_of as _get
from pipelines.session import session as _session

app = typer.Typer(
    name="conductor",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="VRAM Conductor: many LLM agents on one GPU, admitted only if their bytes fit.",
    epilog="Start with [bold]conductor demo[/], or [bold]conductor up[/] and [bold]conductor chat coder[/]. "
    "Exit codes: 1 failed, 2 bad input, 3 refused, 4 model error.",
)

ConfigOption = Annotated[
    Path | None, typer.Option("--config", "-c", help="Configuration file (default: $CONDUCTOR_CONFIG, else the built-in one).")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
WindowOption = Annotated[int | None, typer.Option(help="Tokens the conversation may hold (default: the model's).")]
PriorityOption = Annotated[int, typer.Option(help="Larger goes first, in the waitlist and for turns.")]
ClassOption = Annotated[
    ServiceClass,
    typer.Option("--class", help="What is promised: the whole window on the device, a turn with weights that stay, or a turn."),
]
TurnWaitOption = Annotated[
    float | None, typer.Option("--wait", help="Seconds it may wait for its seat, and for room to grow (default: as configured).")
]
TimeoutOption = Annotated[float | None, typer.Option("--timeout", help="Seconds after which it ends with what it made.")]
WaitOption = Annotated[float, typer.Option("--wait", help="Seconds to wait for room before being refused.")]
MaxTokensOption = Annotated[int, typer.Option(help="The most tokens to make.")]
TemperatureOption = Annotated[float, typer.Option(help="0 is greedy.")]
TopKOption = Annotated[int, typer.Option(help="Sample among the K likeliest; 0 is off.")]
TopPOption = Annotated[float, typer.Option(help="Sample among the likeliest that make up P; 1 is off.")]
MinPOption = Annotated[float, typer.Option(help="Sample among those at least P times as likely as the likeliest; 0 is off.")]
SeedOption = Annotated[int | None, typer.Option(help="Makes sampling repeatable.")]
StopOption = Annotated[list[str] | None, typer.Option(help="Stop at this text; may be given several times.")]


@app.callback(invoke_without_command=True)
def _global(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        out.print(f"vram-conductor {__version__}")
        raise typer.Exit


# --- the service --------------------------------------------------------------------------------------------------------


@app.command()
def up(config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Start Ray and the conductor, and leave them running.

    Example: conductor up --config configs/8gb.yaml
    """
    with errors(as_json=as_json):
        from conductor.config import ENVIRONMENT, load_config

        asked = config or os.environ.get(ENVIRONMENT)
        address, running = service.users_address(), service.running()
        chosen = load_config(config if asked or running is None else running.config)
        began = running is None and address is None
        if began:
            err.print("starting Ray …", style="dim")
        import ray

        if address is None:
            running = service.start(str(Path(asked).resolve()) if asked else None)
        try:
            handle = actors.connect(chosen)
            status = ray.get(handle.status.remote())
        except BaseException:
            if began and running is not None:
                service.stop(running)
            raise
        show(status, tables.status(status), as_json=as_json)
        if not as_json:
            where = running.address if address is None and running else address
            out.print(f"\nRay at [bold]{where}[/]. Next: [bold]conductor chat coder[/]; stop with [bold]conductor down[/].")
        ray.shutdown()


@app.command()
def env() -> None:
    """Shell commands that let Ray's own tools in: ray status, ray list actors, the dashboard's token.

    Example: eval "$(conductor env)" && ray status
    """
    with errors():
        running = service.running()
        if running is None:
            raise NotRunning
        addresses = {"RAY_ADDRESS": running.address, service.OUR_ADDRESS: running.address}
        for name, value in (addresses | running.environment).items():
            out.print(f"export {name}={shlex.quote(value)}", markup=False, soft_wrap=True)


@app.command()
def down() -> None:
    """Stop the conductor, and Ray if `up` started it."""
    with errors():
        running = service.running()
        if service.users_address() is None and running is None:
            raise NotRunning
        # A Ray of our own ends in any case, with all that runs in it: even if its conductor cannot be found or answers no more.
        harmless = NotRunning if running is None else ConductorError
        with contextlib.suppress(harmless), connected(settings(None)) as conductor:
            actors.stop(conductor)
        if running is not None:
            service.stop(running)
        out.print("stopped")


# --- agents -------------------------------------------------------------------------------------------------------------


@app.command()
def register(
    agent_id: Annotated[str, typer.Argument(help="A name of your choice.")],
    model: Annotated[str, typer.Argument(help="A model's key, or a path inside model_dirs.")],
    window: WindowOption = None,
    service_class: ClassOption = ServiceClass.SHARED,
    priority: PriorityOption = 0,
    wait: WaitOption = 0,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Admit an agent; it stays until unregistered. Exit code 3 if it does not fit.

    Example: conductor register ada coder --window 2048 --class guaranteed
    """
    with _session(config, as_json=as_json) as conductor:
        terms = {"window": window, "service_class": service_class.value, "priority": priority, "wait_s": wait}
        call = call_of(conductor, "register", agent_id).remote(agent_id, _path(model), **terms)
        admission = _get(call)
        show(admission, tables.admissions([admission]), as_json=as_json)
        for warning in admission.warnings:
            err.print(f"warning: {warning}", style="yellow", markup=False, soft_wrap=True)


def _path(model: str) -> str:
    """A path as the conductor must hear it: it does not know where this command runs."""
    names_a_path = os.sep in model or model.endswith(".gguf")
    return str(Path(model).absolute()) if names_a_path and Path(model).exists() else model


@app.command()
def unregister(agent_id: str, config: ConfigOption = None) -> None:
    """Let an agent go; its bytes come back, and its model's if it was the last."""
    with _session(config) as conductor:
        import ray

        ray.get(call_of(conductor, "unregister", agent_id).remote(agent_id))
        out.print(f"unregistered {agent_id}", markup=False)


@app.command()
def decode(
    agent_id: str,
    prompt: Annotated[str, typer.Argument(help="Text to continue, or - for standard input.")],
    chat: Annotated[bool, typer.Option("--chat", help="Send it as a user's message, with the model's own template.")] = False,
    max_tokens: MaxTokensOption = 128,
    temperature: TemperatureOption = 0.0,
    top_k: TopKOption = 40,
    top_p: TopPOption = 0.95,
    min_p: MinPOption = 0.05,
    seed: SeedOption = None,
    stop: StopOption = None,
    reset: Annotated[bool, typer.Option("--reset", help="Forget the conversation first.")] = False,
    context_shift: Annotated[
        bool | None, typer.Option("--context-shift/--no-context-shift", help="At the window's end forget the oldest half.")
    ] = None,
    wait: TurnWaitOption = None,
    timeout: TimeoutOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """One turn of a registered agent, its text as it is made.

    Example: conductor decode ada --chat "Write a Python function `is_prime(n)`."
    """
    with _session(config, as_json=as_json) as conductor:
        text = _standard_input() if prompt == "-" else prompt
        what: dict[str, Any] = {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
        options: dict[str, Any] = {
            "max_tokens": max_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
            "seed": seed, "stop": stop or (), "reset": reset, "context_shift": context_shift, "wait_s": wait,
            "timeout_s": timeout,
        }  # fmt: skip
        if as_json:
            print_json(_get(call_of(conductor, "decode", agent_id).remote(agent_id, **what, **options)).to_json())
        else:
            result = _print_stream(actors.stream(conductor, agent_id, **what, **options))
            err.print(tables.cost(result), style="dim", markup=False)


@app.command()
def cancel(agent_id: str, config: ConfigOption = None) -> None:
    """End an agent's turns, running and waiting, with what they made so far.

    Example: conductor cancel ada
    """
    with _session(config) as conductor:
        turns = _get(call_of(conductor, "cancel", agent_id).remote(agent_id))
        out.print(f"{turns} turn{'' if turns == 1 else 's'} of {agent_id} ended", markup=False)


def _standard_input() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise InvalidRequest("prompt", f"standard input is no text: {error}") from None


def _print_stream(stream: Iterator[Chunk | DecodeResult]) -> DecodeResult:
    for item in stream:
        if isinstance(item, DecodeResult):
            out.print()
            return item
        print_text(item.text)
    raise InternalError("a stream did not end with its result")


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="A model's key, or a path inside model_dirs.")],
    name: Annotated[str | None, typer.Option("--as", help="The agent's id while you talk.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message to open with.")] = None,
    window: WindowOption = None,
    wait: WaitOption = 0,
    max_tokens: MaxTokensOption = 512,
    temperature: TemperatureOption = 0.0,
    config: ConfigOption = None,
) -> None:
    """Talk to a model: an agent is registered while you do, and goes when you leave (Ctrl-D).

    Example: conductor chat coder
    """
    with _session(config) as conductor:
        import ray

        agent_id = name or f"chat-{os.getpid()}"
        owner = actors.Owner.current()  # if this process is killed, the agent goes with it

        def enter() -> Admission:
            terms: dict[str, Any] = {"window": window, "wait_s": wait, "owner": owner}
            admission: Admission = _get(call_of(conductor, "register", agent_id).remote(agent_id, _path(model), **terms))
            return admission

        admission = enter()
        welcome = f"{agent_id} on {admission.model}, {admission.window:,} tokens; Ctrl-D ends, /reset begins anew"
        out.print(welcome, style="dim", markup=False)
        opening = [{"role": "system", "content": system}] if system else []
        messages = list(opening)
        try:
            while (said := _ask_person()) is not None:
                if said == "/reset":
                    messages = list(opening)
                    continue
                turn = [*messages, {"role": "user", "content": said}]
                options: dict[str, Any] = {"messages": turn, "max_tokens": max_tokens, "temperature": temperature}
                try:
                    try:
                        result = _print_stream(actors.stream(conductor, agent_id, **options))
                    except UnknownAgent:  # it idled too long, or the conductor was restarted: the messages are all here
                        enter()
                        result = _print_stream(actors.stream(conductor, agent_id, **options))
                except ConductorError as error:  # this turn failed; the messages are those before it
                    err.print(f"error: {error}; /reset begins anew", style="red", markup=False, soft_wrap=True)
                    continue
                messages = [*turn, {"role": "assistant", "content": result.text}]
                out.print(tables.cost(result), style="dim", markup=False)
        finally:
            with contextlib.suppress(UnknownAgent):
                ray.get(call_of(conductor, "unregister", agent_id).remote(agent_id))


def _ask_person() -> str | None:
    while True:
        try:
            said = input("> ").strip()
        except EOFError:
            return None
        except UnicodeDecodeError as error:
            raise InvalidRequest("messages", f"standard input is no text: {error}") from None
        if said:
            return said


# --- looking ------------------------------------------------------------------------------------------------------------


@app.command()
def status(config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """The device, the ledger, models, agents, and Ray's figures beside the ledger's."""
    with _session(config, as_json=as_json) as conductor:
        import ray

        now = ray.get(conductor.status.remote())
        show(now, tables.status(now), as_json=as_json)


@app.command("list")
def list_(config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """The registered agents."""
    with _session(config, as_json=as_json) as conductor:
        import ray

        agents = ray.get(conductor.list.remote())
        show([agent.to_json() for agent in agents], tables.agents(agents), as_json=as_json)


@app.command()
def estimate(
    model: Annotated[str, typer.Argument(help="A model's key, or a path inside model_dirs.")],
    window: Annotated[list[int] | None, typer.Option(help="Tokens of each agent; may be given several times.")] = None,
    slots: Annotated[int, typer.Option(help="Agents that share one context, each with a window of its own: 1 to 256.")] = 1,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """What a model will take on this machine, for several windows, and how many agents fit. Loads nothing, needs no conductor.

    Example: conductor estimate coder --window 2048 --window 8192 --slots 4
    """
    with errors(as_json=as_json):
        from conductor.config import load_config

        chosen = load_config(config)
        from pipelines import estimates

        result = estimates.estimate(chosen, _path(model), window or (), slots=slots)
        show(result, estimates.table(result), as_json=as_json)


@app.command()
def demo(
    config: ConfigOption = None,
    request: Annotated[str | None, typer.Option(help="What the code crew is to write.")] = None,
    save: Annotated[Path | None, typer.Option(help="Write everything shown, with the claims checked, to this JSON file.")] = None,
) -> None:
    """Three agents, three models, one device: admission, swap, refusal, a crew at work. Starts its own Ray and ends it.

    Exit code 0 only if every claim it shows was checked and holds.
    """
    if save is not None and not save.absolute().parent.is_dir():
        raise typer.BadParameter(f"there is no directory {save.parent}", param_hint="--save")
    with errors():
        from conductor.config import load_config

        chosen = load_config(config)
        from pipelines import demo as pipeline

        holds = pipeline.run(chosen, request=request, save=save)
    raise typer.Exit(Exit.OK if holds else Exit.FAILED)


app.command("stream-demo")(stream_demo.command)
app.command("board")(board.command)
app.command("top")(top.command)
app.command("monitor")(monitor.command)
app.command("logs")(logs.command)
app.command("timeline")(timeline.command)
app.command("run")(run.command)


def main() -> None:
    app()
