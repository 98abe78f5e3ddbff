"""A directory of this process alone inside the configured one, deleted when it closes; those of the dead are swept.

Who lives is told by a lock on a file in it, which the kernel drops with its process. The process's number, which is in the
name for people, would not tell: in containers the next conductor often has the same one, and the files would stay for ever.
Covers directories and what may be deleted in them; the files' contents are `kv_disk`'s.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import secrets
import tempfile
from pathlib import Path

_log = logging.getLogger(__name__)

_PREFIX = "vram-conductor-kv."
_DIRECTORY = re.compile(re.escape(_PREFIX) + r"\d+\.[0-9a-f]{16}")  # process, token
_LOCK = "alive"
_OURS = re.compile(rf"\d+\.(kv|part)|{_LOCK}")


class KvDirectory:
    def __init__(self, parent: Path) -> None:
        """Raises OSError if `parent` cannot be made, written or locked in."""
        parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _sweep(parent)
        fresh = Path(tempfile.mkdtemp(prefix=f".{_PREFIX}", dir=parent))  # 0700: it will hold conversations
        with contextlib.ExitStack() as undo:
            undo.callback(_remove, fresh)
            lock = os.open(fresh / _LOCK, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
            undo.callback(os.close, lock)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # It gets the name that a sweep looks for only now that it is locked.
            self.path = fresh.rename(parent / f"{_PREFIX}{os.getpid()}.{secrets.token_hex(8)}")
            undo.pop_all()
        self._lock: int | None = lock

    def close(self) -> None:
        """Delete what this process wrote, and the directory."""
        _remove(self.path)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def delete(path: Path) -> None:
    """Delete a file of ours; one that is gone already is as good."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        _log.warning("a saved KV could not be deleted: %s", error)


def _sweep(parent: Path) -> None:
    """Remove what dead processes of this user left. Whatever is not certainly that stays."""
    with os.scandir(parent) as entries:
        for entry in entries:
            path = Path(entry.path)
            if _DIRECTORY.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False) and _is_left_behind(path):
                _log.info("deleting the saved KV of a conductor that is gone: %s", path)
                _remove(path)


def _is_left_behind(directory: Path) -> bool:
    try:
        if directory.stat().st_uid != os.geteuid():
            return False
        lock = os.open(directory / _LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return True  # by a removal that was interrupted
    except OSError:
        return False  # cannot tell
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    else:
        return True
    finally:
        os.close(lock)


def _remove(directory: Path) -> None:
    """Delete the files that are ours by name, then the directory if that was all."""
    with contextlib.suppress(OSError):
        for name in filter(_OURS.fullmatch, os.listdir(directory)):
            delete(directory / name)
        directory.rmdir()
