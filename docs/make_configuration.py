"""Writes `configuration.md` beside this file: every option of the configuration, as `conductor.config` has it.

    python docs/make_configuration.py

What an option means is the docstring below it in `conductor/config.py`, its reason the comment in `configs/default.yaml`;
`tests/unit/test_docs.py` holds the page against both.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from conductor.config import Config, ContextConfig
from conductor.units import GIB, MIB

PAGE = Path(__file__).with_name("configuration.md")
DEFAULTS = PAGE.parents[1] / "configs" / "default.yaml"

_HEAD = """\
<!-- made by docs/make_configuration.py from conductor/config.py and configs/default.yaml: change those, and run it again -->

# Configuration

A YAML file: the one of `--config`, else the one that `$CONDUCTOR_CONFIG` names, else the built-in one, which stands at
[the end of this page](#the-default-file) with the reason for each default. What a file leaves out keeps its default; `models` and
`model_dirs` are empty unless it gives them. Which option to turn when is in [operating](operating.md#choosing-a-configuration).

- A size is a number of bytes or a text such as `512MiB`, `7.5GiB` (binary) or `8GB` (decimal).
- A path is relative to the file it stands in; `~` is the home directory.
- A mistake (an unknown option, a key given twice, a value out of bounds) is a `ConfigError` that names file and key.
- Options are read when the conductor starts: `conductor down` and `conductor up` take up a change.
"""
_TABLE = """\
| option | value | default | allowed | meaning |
| --- | --- | --- | --- | --- |
"""
_TAIL = """\
## The default file

`configs/default.yaml` of a checkout, `conductor/configs/default.yaml` of an installed package.
"""


def page() -> str:
    schema = Config.model_json_schema()
    top = {key: option for key, option in schema["properties"].items() if "$ref" not in option and key != "models"}
    parts = [_HEAD, _section("At the top", _told("Config", schema), top, required=())]
    for heading, name in _sections(schema):
        section = schema["$defs"][name]
        parts.append(_section(heading, _told(name, section), section["properties"], required=section.get("required", ())))
    return "\n".join([*parts, _TAIL, f"```yaml\n{DEFAULTS.read_text('utf-8')}```\n"])


def _sections(schema: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(heading, name of its schema), in the order of `Config`."""
    for key, option in schema["properties"].items():
        if "$ref" in option:
            yield key, option["$ref"].rpartition("/")[2]
        elif key == "models":
            yield "models.KEY", option["additionalProperties"]["$ref"].rpartition("/")[2]


def _section(heading: str, about: str, options: dict[str, Any], *, required: tuple[str, ...]) -> str:
    rows = (_row(key, option, heading=heading, required=key in required) for key, option in options.items())
    title = heading if heading == "At the top" else f"`{heading}`"
    return f"## {title}\n\n{about}\n\n{_TABLE}{''.join(rows)}"


def _row(key: str, option: dict[str, Any], *, heading: str, required: bool) -> str:
    value = next((choice for choice in option.get("anyOf", []) if choice["type"] != "null"), option)
    kinds = [*_kinds(key, value), *(["null"] if value is not option else [])]
    kind = " or ".join(filter(None, (", ".join(kinds[:-1]), kinds[-1])))
    default = "required" if required else f"`{_default(option['default'], value)}`"
    overrides = heading == "models.KEY" and key in ContextConfig.model_fields
    meaning = "as in [`context`](#context)" if overrides else _told(f"{heading}: {key}", option)
    return f"| `{key}` | {kind} | {default} | {_allowed(value)} | {meaning} |\n"


def _told(what: str, schema: dict[str, Any]) -> str:
    if "description" not in schema:
        raise LookupError(f"{what} has no docstring in conductor/config.py")
    return str(schema["description"]).replace("\n", " ")


def _kinds(key: str, value: dict[str, Any]) -> list[str]:
    if "enum" in value:
        return [f"`{choice}`" for choice in value["enum"]]
    units = {"_s": "seconds", "_ms": "whole milliseconds"}
    unit = next((unit for suffix, unit in units.items() if key.endswith(suffix)), None)
    words = {
        "integer": ["whole number"], "number": ["number"], "boolean": ["`true`", "`false`"], "string": ["text"],
        "array": ["list of texts"],
    }  # fmt: skip
    return [value["format"]] if "format" in value else [unit] if unit else words[value["type"]]


def _allowed(value: dict[str, Any]) -> str:
    # of sizes, which are validated before they are numbers, pydantic hands the bounds on under their own names
    least, most = value.get("minimum", value.get("ge")), value.get("maximum", value.get("le"))
    above = value.get("exclusiveMinimum", value.get("gt"))
    if above is not None and value["type"] == "integer":
        least, above = above + 1, None
    if above is not None:
        return f"more than {above}" + (f", up to {most:,}" if most is not None else "")
    if most is not None:
        return f"{least} to {most:,}"
    return "" if least is None else f"{least} or more"


def _default(default: Any, value: dict[str, Any]) -> str:
    """As it is written in the file."""
    if value.get("format") == "size" and default:
        unit, name = next((unit, name) for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (1, "")) if default % unit == 0)
        return f"{default // unit}{name}"
    return default if isinstance(default, str) else json.dumps(default)


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
