"""Pipelines as YAML files: read with safe_load's rules, every problem named by file and key.

Nothing in a file is executed: prompts have names in braces, conditions compare texts. Those that come along are in
`pipelines/examples`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from conductor.config import UniqueKeyLoader
from conductor.errors import ConfigError, InvalidRequest
from pipelines.library.plan import plan
from pipelines.library.steps import KINDS, Agent, Condition, Options, Pipeline, kind_of

_MAX_BYTES = 1 << 20
_EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
_ENDINGS = (".yaml", ".yml")


def examples() -> dict[str, Path]:
    """The files of those that come along, by name."""
    return {path.stem: path for path in sorted(_EXAMPLES.glob("*.yaml"))}


def load(source: str | os.PathLike[str]) -> Pipeline:
    """A pipeline from its file, or one that comes along, by its name. Raises ConfigError, InvalidRequest."""
    path = _path(source)
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
        text = content.decode("utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(str(path), "", f"cannot be read: {error}") from error
    if len(content) > _MAX_BYTES:
        raise ConfigError(str(path), "", "is larger than 1 MiB")
    return parse(text, source=str(path), name=path.stem)


def _path(source: str | os.PathLike[str]) -> Path:
    path = Path(source)
    if isinstance(source, str) and len(path.parts) == 1 and path.suffix not in _ENDINGS and not path.is_file():
        known = examples()
        if source not in known:
            raise InvalidRequest("pipeline", f"no file {source!r}, and none that comes along; those are: {', '.join(known)}")
        return known[source]
    return path


def parse(text: str, *, source: str, name: str) -> Pipeline:
    """A pipeline from the text of its file; `name` is its name unless it says another. Raises ConfigError that names `source`."""
    try:
        document = yaml.load(text, Loader=UniqueKeyLoader)
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        raise ConfigError(source, f"line {mark.line + 1}" if mark else "", f"is not valid YAML: {problem or error}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(source, "", f"holds a value that no option takes: {error}") from error
    if not isinstance(document, dict):
        raise ConfigError(source, "", f"a mapping with agents and steps is expected, not {type(document).__name__}")
    try:
        # Through JSON: YAML has lists only, where strict validation would ask for tuples.
        pipeline = Pipeline.model_validate_json(json.dumps({"name": name, **document}, allow_nan=False))
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(source, _key(first["loc"]), _explain(first, document)) from error
    except (TypeError, ValueError, RecursionError) as error:  # a date, a set, a number that is none, a list within itself
        raise ConfigError(source, "", f"holds a value that no option takes: {error}") from error
    plan(pipeline, source=source)
    return pipeline


def _key(location: tuple[str | int, ...]) -> str:
    """Without what pydantic adds: the kind of a step, the members of a union."""
    keys = [*location[:2], *location[3:]] if location[:1] == ("steps",) else list(location)
    return ".".join(str(key) for key in keys if not str(key).startswith(("tuple[", "str", "constrained-")))


def _explain(problem: Any, document: dict[Any, Any]) -> str:
    kind, location = problem["type"], problem["loc"]
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"unknown key; known here: {', '.join(_known(location, document))}"
    if kind == "union_tag_invalid":
        return f"a step says first what it does: {', '.join(KINDS)}"
    if kind == "missing":
        return "is missing"
    message = str(problem["msg"]).removeprefix("Value error, ")
    return message[:1].lower() + message[1:]


def _known(location: tuple[str | int, ...], document: dict[Any, Any]) -> list[str]:
    """The keys that may stand where an unknown one does."""
    parts = [part for part in location[:-1] if isinstance(part, str)]
    of: type[Any] = Pipeline
    if parts[-1:] == ["options"]:
        of = Options
    elif parts[-1:] in (["when"], ["unless"]):
        of = Condition
    elif parts[:1] == ["agents"]:
        of = Agent
    elif parts[:1] == ["steps"]:
        of = KINDS[kind_of(document["steps"][parts[1]])]
    return sorted(of.model_fields if issubclass(of, BaseModel) else of.__dataclass_fields__)
