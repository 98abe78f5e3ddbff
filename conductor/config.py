"""The configuration file: pydantic models over YAML, every problem named by file and key.

The docstring below an option says what it means, for `docs/configuration.md`, which is made from this module;
`configs/default.yaml` has each option's default and its reason. Tests hold both files against this module.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt, PrivateAttr, ValidationError

from conductor.core.estimate import MAX_SLOTS
from conductor.errors import ConfigError
from conductor.types import ContextSpec
from conductor.units import parse_bytes

#: the environment variable that names the file where no argument does
ENVIRONMENT = "CONDUCTOR_CONFIG"
#: llama.cpp keeps token counts in 32 bits
MAX_WINDOW = 2**31 - 1

Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(ge=0, json_schema_extra={"format": "size"})]
Size = Annotated[Bytes, Field(gt=0)]
Window = Annotated[int, Field(gt=0, le=MAX_WINDOW)]
Slots = Annotated[int, Field(gt=0, le=MAX_SLOTS)]
Seconds = Annotated[float, Field(ge=0, le=86_400)]
KvType = Literal["f32", "f16", "q8_0", "q4_0"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class DeviceConfig(_Section):
    """What is shared out: a GPU, or a slice of RAM."""

    kind: Literal["auto", "cuda", "host"] = "auto"
    """The GPU, RAM (`host`), or whichever there is."""
    index: Annotated[int, Field(ge=0)] = 0
    """Which GPU, as CUDA counts them."""
    limit: Size | None = None
    """Use no more of the device than this; null: all of it."""
    host_bytes: Size = 64 << 20
    """The size of the host device."""
    reread_s: Annotated[float, Field(gt=0, le=3600)] = 1.0
    """How often the device is read again, so that what other programs take and give back is seen."""


class ContextConfig(_Section):
    """llama.cpp's contexts, unless a model says otherwise."""

    window: Window | None = None
    """Tokens of the conversation of an agent that asks for no window; null: what the model was trained with."""
    first_window: Window | None = 4096
    """Tokens that an agent's context begins with, before it grows; null: the whole window."""
    slots: Slots = 8
    """The most agents of a model that decode in one batch."""
    n_batch: PositiveInt = 512
    """Tokens decoded in one call while a prompt is read."""
    n_ubatch: PositiveInt = 512
    """Tokens computed at once."""
    kv_type: KvType = "f16"
    """The numbers of the KV cache; the quantised ones need `flash_attention`."""
    flash_attention: bool = True
    """Whether attention is computed by llama.cpp's flash attention."""
    context_shift: bool = False
    """At the window's end: forget the oldest half of the conversation and go on, instead of ending there."""


class ModelConfig(_Section):
    """A model under the key that agents name it by. What it leaves out or sets to null is as in `context`."""

    path: str
    """Its GGUF file."""
    repo: str | None = None
    """The repository on a public hub that a missing file is fetched from."""
    file: str | None = None
    """Its name there."""
    window: Window | None = None
    first_window: Window | None = None
    slots: Slots | None = None
    n_batch: PositiveInt | None = None
    n_ubatch: PositiveInt | None = None
    kv_type: KvType | None = None
    flash_attention: bool | None = None
    context_shift: bool | None = None


class DiskConfig(_Section):
    """Where saved KV goes that host memory has no room for."""

    directory: str | None = None
    """Made if need be; null: none, and such KV is recomputed from its tokens."""
    budget: Bytes = 4 << 30
    """The most that the files may take."""


class RayConfig(_Section):
    """Where Ray finds the conductor and its books."""

    namespace: str = "conductor"
    """The actor's namespace."""
    name: str = "gpu-conductor"
    """The actor's name, and the label `conductor` of its metrics."""
    resource: str = "vram_mib"
    """The custom resource, in MiB, that repeats the ledger."""
    mirror: bool = True
    """Whether the ledger is repeated in Ray at all."""


class LogConfig(_Section):
    """What the conductor writes down, a line for each decision: see [its fields](ray.md#the-log)."""

    format: Literal["json", "text"] = "json"
    """Lines for programs, or for people."""
    level: Literal["debug", "info", "warning", "error"] = "info"
    """The least that is written: `warning` leaves refusals, lost KV, drift and failures."""
    directory: str | None = None
    """Made if need be; null: Ray's session directory, where its dashboard and `ray logs` find it."""
    file_bytes: Size = 16 << 20
    """Where a new file is begun."""
    keep: Annotated[int, Field(ge=0, le=100)] = 4
    """How many older files are kept."""


class Config(_Section):
    """The options that stand at the top of the file; its sections are below."""

    device: DeviceConfig = DeviceConfig()
    admission_percent: Annotated[int, Field(ge=1, le=100)] = 90
    """The share of the device's total that may be booked, in percent."""
    live_contexts: PositiveInt | None = None
    """The most pools that are live at once; null: as many as there is room for."""
    host_budget: Bytes = 512 << 20
    """Host memory for the saved KV of agents that are not live; taken at start."""
    home_budget: Bytes = 8 << 30
    """Host memory for the weights of models that best-effort agents alone use; taken as needed. 0: none."""
    disk: DiskConfig = DiskConfig()
    threads: PositiveInt | None = None
    """CPU threads of all pools together; null: the physical cores."""
    threads_per_context: PositiveInt | None = None
    """CPU threads of each pool; null: all of them."""
    waitlist_limit: Annotated[int, Field(ge=0)] = 256
    """Registrations that may wait for room."""
    turn_queue_limit: PositiveInt = 1024
    """Turns that may wait, of all agents together."""
    min_turn_ms: PositiveInt = 1000
    """How long a turn keeps its seat, and a pool stays, while others could use them."""
    max_stall_ms: PositiveInt = 100
    """The longest that reading one agent's prompt may hold up the others' answers, as far as a step can be cut."""
    ageing_s: Annotated[float, Field(gt=0)] = 60.0
    """Waiting this long counts as one priority more."""
    turn_wait_s: Seconds | None = None
    """How long a turn may wait for its seat, unless the call says so; null: as long as it takes."""
    growth_wait_s: Seconds | None = 10.0
    """How long a turn may wait for room when its conversation outgrows its context; null: as long as it takes."""
    idle_shrink_s: Seconds | None = 30.0
    """Pools and weights beyond the promise that idled this long are given back; null: only when somebody needs their room."""
    idle_ttl_s: Seconds | None = None
    """Agents whose last turn ended this long ago are unregistered; null: never."""
    stream_interval_ms: Annotated[int, Field(ge=0)] = 20
    """The least time between two pieces of a stream."""
    context: ContextConfig = ContextConfig()
    models: dict[str, ModelConfig] = {}
    model_dirs: tuple[str, ...] = ()
    """Directories whose models may be named by path; no file outside of them can be named."""
    ray: RayConfig = RayConfig()
    log: LogConfig = LogConfig()

    #: where the file lies: relative paths in it start there
    _directory: Path = PrivateAttr(default_factory=Path.cwd)
    _source: str = PrivateAttr(default="built-in defaults")

    @property
    def source(self) -> str:
        return self._source

    def resolve(self, path: str) -> Path:
        """A path of this file as an absolute one, symlinks kept."""
        return self._directory / Path(path).expanduser()

    def allowed_directories(self) -> tuple[Path, ...]:
        """Where models may be named by path: `model_dirs` and nothing else."""
        return tuple(self.resolve(directory).resolve() for directory in self.model_dirs)

    def context_spec(self, key: str | None, window: int) -> ContextSpec:
        """The context parameters of a model's agents: its own, else the defaults."""
        own = self.models[key] if key is not None and key in self.models else None

        def option(name: str) -> Any:
            value = getattr(own, name) if own is not None else None
            return getattr(self.context, name) if value is None else value

        n_batch = option("n_batch")
        return ContextSpec(
            window=window,
            n_batch=n_batch,
            n_ubatch=min(option("n_ubatch"), n_batch),
            kv_type=option("kv_type"),
            flash_attention=option("flash_attention"),
        )

    def context_shift(self, key: str) -> bool:
        own = self.models[key].context_shift if key in self.models else None
        return self.context.context_shift if own is None else own

    def slots(self, key: str) -> int:
        """The most slots of the model's pool."""
        own = self.models[key].slots if key in self.models else None
        return own or self.context.slots

    def first_window(self, key: str, window: int) -> int:
        """What a context of `window` tokens begins with."""
        own = self.models[key].first_window if key in self.models else None
        return min(window, own or self.context.first_window or window)

    def window(self, key: str, trained: int) -> int:
        """The window of an agent that asks for none."""
        own = self.models[key].window if key in self.models else None
        return own or self.context.window or trained


def default_file() -> Path:
    """`configs/default.yaml` of the checkout, or the copy inside the installed package."""
    package = Path(__file__).resolve().parent
    installed = package / "configs" / "default.yaml"
    return installed if installed.exists() else package.parent / "configs" / "default.yaml"


def load_config(source: str | os.PathLike[str] | Config | None = None) -> Config:
    """Read a configuration: the file given, else the one $CONDUCTOR_CONFIG names, else the default. Raises ConfigError."""
    if isinstance(source, Config):
        return source
    path = Path(source or os.environ.get(ENVIRONMENT) or default_file())
    try:
        text = path.read_text("utf-8")
    except (OSError, ValueError) as error:  # a path with a NUL is a ValueError, as bytes that are no text are
        raise ConfigError(str(path), "", f"cannot be read: {error}") from error
    try:
        document = yaml.load(text, Loader=UniqueKeyLoader)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or error
        raise ConfigError(str(path), _position(error), f"is not valid YAML: {problem}") from error
    except (ValueError, RecursionError) as error:  # a date that is none, a number of 5,000 digits, 3,000 brackets
        raise ConfigError(str(path), "", f"holds a value that no option takes: {error}") from error
    return parse_config({} if document is None else document, source=str(path), directory=path.resolve().parent)


def parse_config(document: object, *, source: str, directory: Path) -> Config:
    """Validate a document as read from YAML. Raises ConfigError that names `source` and the key."""
    if not isinstance(document, dict):
        raise ConfigError(source, "", f"a mapping of options is expected, not {type(document).__name__}")
    try:
        # Through JSON mode: YAML has lists only, and strict validation would ask for tuples.
        config = Config.model_validate_json(_to_json(document, source))
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(source, ".".join(map(str, first["loc"])), _explain(first)) from error
    for section, context in _contexts(config):
        if not context.flash_attention and context.kv_type in ("q8_0", "q4_0"):
            raise ConfigError(source, f"{section}.kv_type", f"{context.kv_type} needs flash_attention, which is false")
    for key in config.models:
        if not key or "/" in key or key.endswith(".gguf"):
            raise ConfigError(source, f"models.{key}", "a model's key must not look like a path")
    config._directory, config._source = directory, source
    return config


def _contexts(config: Config) -> list[tuple[str, ContextSpec]]:
    return [("context", config.context_spec(None, 1)), *((f"models.{key}", config.context_spec(key, 1)) for key in config.models)]


def _explain(problem: Any) -> str:
    if problem["type"] == "extra_forbidden":
        known = sorted(_known_keys(problem["loc"]))
        return f"unknown option; known here: {', '.join(known)}" if known else "unknown option"
    message = str(problem["msg"]).removeprefix("Value error, ")
    return message[:1].lower() + message[1:]


def _known_keys(location: tuple[str | int, ...]) -> set[str]:
    sections: dict[str, type[BaseModel]] = {
        "device": DeviceConfig, "context": ContextConfig, "disk": DiskConfig, "ray": RayConfig, "log": LogConfig,
        "models": ModelConfig,
    }  # fmt: skip
    section = Config if len(location) == 1 else sections.get(str(location[0]))
    return set(section.model_fields) if section else set()


def _to_json(document: dict[Any, Any], source: str) -> str:
    try:
        return json.dumps(document, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(source, "", f"holds a value that no option takes: {error}") from error


def _position(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return f"line {mark.line + 1}" if mark else ""


class UniqueKeyLoader(yaml.SafeLoader):
    """YAML lets a later key silently replace an earlier one; a configuration must not."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, (str, int, float, bool)) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is given twice", key_node.start_mark)
            seen.add(key if isinstance(key, (str, int, float, bool)) else id(key_node))
        return super().construct_mapping(node, deep)
