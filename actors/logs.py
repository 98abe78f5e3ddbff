"""Where a conductor's log is: in the directory of its configuration, else with Ray's own logs on its node."""

from __future__ import annotations

import logging
from pathlib import Path

from actors import _ray_private
from conductor.config import Config
from conductor.log_file import LogFile

_log = logging.getLogger(__name__)


def log_directory(config: Config) -> Path:
    """Needs Ray unless the configuration names one. Whatever Ray raises where it does not tell."""
    own = config.log.directory
    return Path(_ray_private.log_directory()) if own is None else config.resolve(own)


def open_log(config: Config) -> LogFile | None:
    """None, and a warning, where Ray does not tell: everything else goes on."""
    try:
        return LogFile(config, log_directory(config))
    except Exception:
        _log.warning("there is no log file", exc_info=True)
        return None
