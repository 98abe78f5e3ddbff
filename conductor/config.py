"""The configuration file: pydantic models over YAML, every problem named by file and key.

`configs/default.yaml` shows each option with its default and its reason; a test holds it against this module.
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

Bytes = Annotated[int, BeforeValidator(parse_bytes)]
Size = Annotated[int, BeforeValidator(parse_bytes), Field(gt=0)]
Window = Annotated[int, Field(gt=0, le=MAX_WINDOW)]
Slots = Annotated[int, Field(gt=0, le=MAX_SLOTS)]
Seconds = Annotated[float, Field(ge=0, le=86_400)]
KvType = Literal["f32", "f16", "q8_0", "q4_0"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class DeviceConfig(_Section):
    kind: Literal["auto", "cuda", "host"] = "auto"
    index: Annotated[int, Field(ge=0)] = 0
    limit: Size | None = None
    host_bytes: Size = 64 << 20
    reread_s: Annotated[float, Field(gt=0, le=3600)] = 1.0


class ContextConfig(_Section):
    """Defaults for contexts; a model may override each."""

    window: Window | None = None
    first_window: Window | None = 4096
    slots: Slots = 8
    n_batch: PositiveInt = 512
    n_ubatch: PositiveInt = 512
    kv_type: KvType = "f16"
    flash_attention: bool = True
    context_shift: bool = False


class ModelConfig(_Section):
    path: str
    repo: str | None = None
    file: str | None = None
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
    budget: Bytes = 4 << 30


class RayConfig(_Section):
    namespace: str = "conductor"
    name: str = "gpu-conductor"
    resource: str = "vram_mib"
    mirror: bool = True


class Config(_Section):
    device: DeviceConfig = DeviceConfig()
    admission_percent: Annotated[int, Field(ge=1, le=100)] = 90
    live_contexts: PositiveInt | None = None
    host_budget: Bytes = 512 << 20
    home_budget: Bytes = 8 << 30
    disk: DiskConfig = DiskConfig()
    threads: PositiveInt | None = None
    threads_per_context: PositiveInt | None = None
    waitlist_limit: Annotated[int, Field(ge=0)] = 256
    turn_queue_limit: PositiveInt = 1024
    min_turn_ms: PositiveInt = 1000
    max_stall_ms: PositiveInt = 100
    ageing_s: Annotated[float, Field(gt=0)] = 60.0
    turn_wait_s: Seconds | None = None
    growth_wait_s: Seconds | None = 10.0
    idle_shrink_s: Seconds | None = 30.0
    idle_ttl_s: Seconds | None = None
    stream_interval_ms: Annotated[int, Field(ge=0)] = 20
    context: ContextConfig = ContextConfig()
    models: dict[str, ModelConfig] = {}
    model_dirs: tuple[str, ...] = ()
    ray: RayConfig = RayConfig()

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
        "device": DeviceConfig, "context": ContextConfig, "disk": DiskConfig, "ray": RayConfig, "models": ModelConfig
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
