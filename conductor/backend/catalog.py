"""From a model's name to its file and plan: configured keys, paths inside the allowed directories, header, identity."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from conductor.backend.gguf_header import GgufHeader, read_header
from conductor.backend.hub import fetch
from conductor.config import Config
from conductor.core.estimate import ModelPlan
from conductor.errors import BadModelFile, ModelLoadFailed, PathNotAllowed, UnknownModel
from conductor.types import DeviceKind, ModelId, ModelKey


class Catalog:
    """Reads files, so its methods belong on a worker thread."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._headers: dict[ModelId, GgufHeader] = {}

    def plan(self, model: str, kind: DeviceKind) -> ModelPlan:
        """Raises UnknownModel, PathNotAllowed, BadModelFile."""
        key, path = self._locate(model)
        identity = model_id(path)
        header = self._headers.get(identity)
        if header is None:
            header = self._headers[identity] = read_header(path)
        geometry = header.geometry
        weights = geometry.weights_bytes_offloaded if kind is DeviceKind.CUDA else geometry.weights_bytes_host
        moves = self._config.home_budget and not self._config.device.index  # weights move to the first GPU only
        blocks = header.blocks[kind] if moves else None
        return ModelPlan(identity, key, str(path), kind, weights, geometry, blocks)

    def _locate(self, model: str) -> tuple[ModelKey, Path]:
        configured = self._config.models.get(model)
        if configured is not None:
            path = self._config.resolve(configured.path)
            if not os.path.exists(path) and configured.repo:
                path = fetch(configured.repo, configured.file or path.name, path.parent)
            return ModelKey(model), path.resolve()
        if os.sep not in model and not model.endswith(".gguf"):
            raise UnknownModel(model, tuple(map(ModelKey, sorted(self._config.models))))
        path = self._find(model)
        allowed = self._config.allowed_directories()
        if not any(path.is_relative_to(directory) for directory in allowed):
            raise PathNotAllowed(model, tuple(map(str, allowed)))
        return ModelKey(str(path)), path

    def _find(self, name: str) -> Path:
        """A path as resolved; a relative one is looked for in the allowed directories, then where the process is.

        Raises BadModelFile if a relative one is nowhere; of others nobody is told whether they exist outside.
        """
        if os.path.isabs(name):
            return Path(os.path.realpath(name))
        places = [*self._config.allowed_directories(), Path.cwd()]
        for place in places:
            if os.path.exists(place / name):  # Path.exists() raises for names that are too long
                return (place / name).resolve()
        raise BadModelFile(name, "cannot be opened: No such file or directory")


def model_id(path: Path) -> ModelId:
    """The file itself: another path to it is the same model, another content under the same path is not."""
    try:
        stat = path.stat()
    except OSError as error:
        raise BadModelFile(str(path), f"cannot be opened: {error.strerror}") from error
    return _id(stat)


def _id(stat: os.stat_result) -> ModelId:
    return ModelId(f"{stat.st_dev}-{stat.st_ino}-{stat.st_size}-{stat.st_mtime_ns}")


@contextmanager
def pinned(plan: ModelPlan) -> Iterator[str]:
    """A path to the very file that was admitted, whatever stands under its name by then. Raises ModelLoadFailed if it is gone."""
    try:
        file = os.open(plan.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe would be waited for
    except OSError as error:
        raise ModelLoadFailed(plan.path, f"cannot be opened: {error.strerror}") from error
    try:
        if _id(os.fstat(file)) != plan.id:
            raise ModelLoadFailed(plan.path, "the file is another one than when it was admitted: unregister its agents first")
        yield f"/proc/self/fd/{file}"
    finally:
        os.close(file)
