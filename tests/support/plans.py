"""A model file's plan, as the catalog makes it."""

from __future__ import annotations

from pathlib import Path

from conductor.backend.catalog import Catalog
from conductor.config import parse_config
from conductor.core.estimate import ModelPlan
from conductor.types import DeviceKind


def plan_of(path: Path, kind: DeviceKind = DeviceKind.HOST) -> ModelPlan:
    config = parse_config({"model_dirs": [str(path.parent)]}, source="test", directory=path.parent)
    return Catalog(config).plan(str(path), kind)
