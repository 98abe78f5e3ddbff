"""Files of saved KV: nobody else may read them, whatever happens to one is noticed, and none outlives its process for long."""

from __future__ import annotations

import json
import os
import resource
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from conductor.backend.kv_disk import KvDisk
from conductor.backend.kv_store import Blob, DamagedBlob, KvStore
from conductor.errors import InternalError
from conductor.types import KvPlace
from tests.support.blobs import LABEL, forbidden

if TYPE_CHECKING:
    from conductor.backend.llama import ByteArray

ROOT = Path(__file__).resolve().parents[2]
PAYLOAD = np.arange(100, dtype=np.uint16).view(np.uint8)
MIB = 1 << 20


class Shelf:
    """A store with a disk, and one blob on it."""

    def __init__(self, parent: Path) -> None:
        self.parent = parent
        self.store = KvStore(np.zeros(MIB, np.uint8), pinned=False, disk=KvDisk(parent, budget_bytes=MIB))
        before = set(self.files)
        blob = self.save()
        assert blob is not None
        self.blob: Blob = blob
        [self.file] = set(self.files) - before

    def save(self, payload: ByteArray = PAYLOAD) -> Blob | None:
        return self.store.write(payload.nbytes, LABEL, lambda place: np.copyto(place, payload), to=KvPlace.DISK)

    @property
    def files(self) -> list[Path]:
        return sorted(path for path in self.parent.rglob("*") if path.suffix in (".kv", ".part"))

    def is_whole(self) -> bool:
        return self.store.read(self.blob, LABEL, lambda place: place.tobytes()) == PAYLOAD.tobytes()

    def problem(self) -> str:
        with pytest.raises(DamagedBlob) as damage:
            self.store.read(self.blob, LABEL, forbidden)
        return damage.value.problem


@pytest.fixture
def shelf(tmp_path: Path) -> Iterator[Shelf]:
    shelf = Shelf(tmp_path / "kv")
    yield shelf
    shelf.store.check()
    shelf.store.close()


# --- the file -----------------------------------------------------------------------------------------------------------


def test_a_file_says_what_it_is_whose_and_how_long(shelf: Shelf) -> None:
    written = shelf.file.read_bytes()
    magic, version, label_bytes, payload_bytes, _ = struct.unpack_from("<8sIIQQ", written)
    assert (magic, version, payload_bytes) == (b"VRAMKV\r\n", 1, PAYLOAD.nbytes)
    assert json.loads(written[32 : 32 + label_bytes]) == {
        "model_id": "coder", "kv_type": "f16", "flash_attention": True, "slots": 1, "tokens": 7,
    }  # fmt: skip
    assert written[32 + label_bytes :] == PAYLOAD.tobytes()


def test_conversations_are_for_their_user_alone_even_where_the_umask_is_lax(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        shelf = Shelf(tmp_path / "kv")
    finally:
        os.umask(before)
    for path in (tmp_path / "kv").rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600)
    assert (tmp_path / "kv").stat().st_mode & 0o777 == 0o700
    shelf.store.close()


def test_a_freed_blob_leaves_no_file(shelf: Shelf) -> None:
    shelf.store.free(shelf.blob)
    assert shelf.files == []
    with pytest.raises(InternalError):
        shelf.store.free(shelf.blob)


def test_a_place_on_disk_is_released_once(tmp_path: Path) -> None:
    disk = KvDisk(tmp_path, budget_bytes=10)
    file = disk.take(10)
    assert file is not None
    assert disk.take(1) is None
    disk.release(file)
    assert disk.used_bytes == 0
    with pytest.raises(InternalError):
        disk.release(file)
    disk.close()


# --- damage -------------------------------------------------------------------------------------------------------------


def test_a_flipped_bit_anywhere_in_a_file_is_noticed(shelf: Shelf) -> None:
    written = shelf.file.read_bytes()
    for at in range(len(written)):
        shelf.file.write_bytes(written[:at] + bytes([written[at] ^ 1 << at % 8]) + written[at + 1 :])
        assert shelf.problem()
    shelf.file.write_bytes(written)
    assert shelf.is_whole()


def test_a_file_of_another_length_is_noticed(shelf: Shelf) -> None:
    written = shelf.file.read_bytes()
    for length in range(len(written)):
        shelf.file.write_bytes(written[:length])
        assert f"{length} of {len(written)} bytes" in shelf.problem()
    shelf.file.write_bytes(written + b"\0")
    assert f"{len(written) + 1} of {len(written)} bytes" in shelf.problem()


def test_the_file_of_another_blob_is_noticed(shelf: Shelf) -> None:
    mine = shelf.file
    assert shelf.save(PAYLOAD[::-1].copy()) is not None
    [other] = set(shelf.files) - {mine}
    other.replace(mine)
    assert "header" in shelf.problem()


def test_a_missing_file_is_noticed_and_its_blob_can_be_freed(shelf: Shelf) -> None:
    shelf.file.unlink()
    assert "cannot be read" in shelf.problem()
    shelf.store.free(shelf.blob)
    assert shelf.store.disk_used_bytes == 0


def test_a_file_that_is_no_file_is_noticed(shelf: Shelf, caplog: pytest.LogCaptureFixture) -> None:
    file = shelf.file
    file.rename(file.with_name("elsewhere"))
    file.symlink_to("elsewhere")
    assert "cannot be read" in shelf.problem(), "a link could lead anywhere"
    file.unlink()
    file.mkdir()
    assert shelf.problem()
    shelf.store.free(shelf.blob)
    assert "could not be deleted" in caplog.text
    file.rmdir()
    (file.with_name("elsewhere")).unlink()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_noticed(shelf: Shelf) -> None:
    shelf.file.chmod(0)
    assert "Permission" in shelf.problem()


# --- a disk that says no ------------------------------------------------------------------------------------------------


@contextmanager
def room_for_files_of(bytes: int) -> Iterator[None]:
    """The kernel lets no file of this process grow beyond that: a write fails in the middle, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_save_that_finds_the_disk_full_leaves_nothing_behind(shelf: Shelf, caplog: pytest.LogCaptureFixture) -> None:
    with room_for_files_of(MIB // 4):
        assert shelf.save(np.ones(MIB // 2, np.uint8)) is None
    assert (shelf.store.disk_used_bytes, len(shelf.files)) == (PAYLOAD.nbytes, 1)
    assert "could not be written" in caplog.text
    assert shelf.save(np.ones(MIB // 2, np.uint8)) is not None


def test_a_move_that_finds_the_disk_full_leaves_the_blob_in_host_memory(shelf: Shelf) -> None:
    blob = shelf.store.write(MIB // 2, LABEL, lambda place: place.fill(3))
    assert blob is not None
    with room_for_files_of(MIB // 4):
        assert not shelf.store.to_disk(blob)
    assert (blob.place, shelf.store.disk_used_bytes, len(shelf.files)) == (KvPlace.HOST, PAYLOAD.nbytes, 1)
    assert shelf.store.read(blob, LABEL, lambda place: bool((place == 3).all()))
    assert shelf.store.to_disk(blob)


def test_when_somebody_deletes_the_directory_saves_are_refused_and_what_was_there_is_lost(shelf: Shelf) -> None:
    directory = shelf.file.parent
    shelf.file.unlink()
    (directory / "alive").unlink()
    directory.rmdir()
    assert shelf.save() is None
    assert shelf.problem()
    shelf.store.free(shelf.blob)


def test_a_directory_that_cannot_be_used_is_said_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        KvDisk(tmp_path / "file", budget_bytes=MIB)


# --- whose directory ----------------------------------------------------------------------------------------------------


def test_closing_deletes_what_is_ours_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("not ours")
    shelf = Shelf(tmp_path)
    (shelf.file.parent / "kept too").write_text("not ours")
    shelf.store.close()
    shelf.store.close()
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["kept", "kept too"], "twice is once"
    assert shelf.problem()
    assert shelf.save() is None


@contextmanager
def another_process_with_files_in(directory: Path) -> Iterator[Path]:
    """A real one, until it is killed; gives its directory."""
    program = (
        "import sys, numpy, pathlib\n"
        "from conductor.backend.kv_disk import KvDisk\n"
        "from conductor.backend.kv_store import KvStore, Label\n"
        "from conductor.types import KvPlace\n"
        "store = KvStore(numpy.zeros(9, 'u1'), pinned=False, disk=KvDisk(pathlib.Path(sys.argv[1]), budget_bytes=9))\n"
        "assert store.write(9, Label('m', 'f16', True, 1, 1), lambda place: None, to=KvPlace.DISK)\n"
        "print('saved', flush=True)\n"
        "sys.stdin.read()\n"
    )
    before = set(directory.iterdir())
    with subprocess.Popen(
        [sys.executable, "-c", program, str(directory)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"saved\n"
        [own] = set(directory.iterdir()) - before
        try:
            yield own
        finally:
            process.kill()


def test_what_a_killed_process_left_is_swept_and_what_a_living_one_has_is_not(tmp_path: Path) -> None:
    with another_process_with_files_in(tmp_path) as theirs:
        assert f".{os.getpid()}." not in theirs.name
        KvDisk(tmp_path, budget_bytes=MIB).close()
        assert sorted(path.name for path in theirs.iterdir()) == ["0.kv", "alive"]
    KvDisk(tmp_path, budget_bytes=MIB).close()
    assert list(tmp_path.iterdir()) == []


def test_two_stores_of_one_process_leave_each_other_alone(tmp_path: Path) -> None:
    first, second = Shelf(tmp_path), Shelf(tmp_path)
    second.store.close()
    assert first.is_whole()
    first.store.close()
    assert list(tmp_path.iterdir()) == []


def left_behind(parent: Path, name: str) -> Path:
    directory = parent / name
    directory.mkdir()
    for file in ("alive", "0.kv", "1.part"):
        (directory / file).touch()
    return directory


def test_a_dead_process_of_the_same_number_is_dead_all_the_same(tmp_path: Path) -> None:
    left = left_behind(tmp_path, f"vram-conductor-kv.{os.getpid()}.0123456789abcdef")
    KvDisk(tmp_path, budget_bytes=MIB).close()
    assert not left.exists()


def test_a_sweep_that_was_interrupted_is_finished_by_the_next(tmp_path: Path) -> None:
    left = left_behind(tmp_path, "vram-conductor-kv.12.0123456789abcdef")
    (left / "alive").unlink()
    KvDisk(tmp_path, budget_bytes=MIB).close()
    assert not left.exists()


@pytest.mark.parametrize("name", ["vram-conductor-kv.12", "vram-conductor-kv.12.0123456789abcdef.old", "12.0123456789abcdef"])
def test_a_directory_of_another_name_is_not_swept(tmp_path: Path, name: str) -> None:
    left = left_behind(tmp_path, name)
    KvDisk(tmp_path, budget_bytes=MIB).close()
    assert len(list(left.iterdir())) == 3


def test_a_file_or_a_link_of_the_right_name_is_not_swept(tmp_path: Path) -> None:
    elsewhere = left_behind(tmp_path, "elsewhere")
    (tmp_path / "vram-conductor-kv.12.0123456789abcdef").symlink_to(elsewhere)
    (tmp_path / "vram-conductor-kv.13.0123456789abcdef").touch()
    KvDisk(tmp_path, budget_bytes=MIB).close()
    assert len(list(tmp_path.iterdir())) == 3
    assert len(list(elsewhere.iterdir())) == 3


def test_somebodys_notes_in_a_dead_directory_are_not_swept(tmp_path: Path) -> None:
    left = left_behind(tmp_path, "vram-conductor-kv.12.0123456789abcdef")
    (left / "notes.txt").touch()
    KvDisk(tmp_path, budget_bytes=MIB).close()
    assert [path.name for path in left.iterdir()] == ["notes.txt"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make another user's directory")
def test_another_users_directory_is_not_swept(tmp_path: Path) -> None:
    left = left_behind(tmp_path, "vram-conductor-kv.12.0123456789abcdef")
    os.chown(left, 12345, 12345)
    KvDisk(tmp_path, budget_bytes=MIB).close()
    assert len(list(left.iterdir())) == 3
