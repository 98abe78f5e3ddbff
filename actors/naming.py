"""Names by which Ray's views show what is the conductor's, all beginning with `vram:`; docs/ray.md lists them."""

from __future__ import annotations

import re
from typing import Any


def agent_name(agent_id: str, model: str) -> str:
    return f"vram:{readable(agent_id)}:{readable(str(model).rpartition('/')[2])}"


def lease_name(label: str, id: str) -> str:
    """`vram:<what>:<whose>:<id>`, unique by its id."""
    return ":".join(("vram", *map(readable, label.split(":", 1)), id))


def call_of(conductor: Any, name: str, agent_id: str) -> Any:
    """The conductor's call of that name, as one of the agent's: `call_of(conductor, "decode", "ada").remote("ada", …)`."""
    return getattr(conductor, name).options(name=f"vram:{readable(agent_id)}:{name}")


def readable(text: object) -> str:
    """Of what somebody chose as much as a name may have in it."""
    return re.sub(r"[^\w.@/+-]+", "-", str(text), flags=re.ASCII)[:60]
