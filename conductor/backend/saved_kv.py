"""The KV of agents that have no seat: whose is where, and what became of those that could not be kept.

Covers the way from a slot into the store and back. Where the bytes lie and how they are checked is `kv_store`'s,
what a lost cache means for a session is `conversation`'s. Every method is about one agent; those of different agents may
run at the same time.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from conductor.backend.kv_seal import DamagedBlob, Label
from conductor.backend.kv_store import Blob, KvStore
from conductor.backend.llama import ByteArray, Form, LlamaError, Sequence
from conductor.types import AgentId, HostMemoryStatus, KvPlace

log = logging.getLogger("conductor")


class SavedKv:
    def __init__(self, store: KvStore) -> None:
        self._store = store
        self._blobs: dict[AgentId, Blob] = {}
        self._fates: Counter[str] = Counter()
        self._fates_lock = threading.Lock()

    def close(self) -> None:
        self._store.close()

    def status(self) -> HostMemoryStatus:
        store, fates = self._store, self._fates
        return HostMemoryStatus(
            budget_bytes=store.budget_bytes,
            used_bytes=store.used_bytes,
            pinned=store.pinned,
            disk_budget_bytes=store.disk_budget_bytes,
            disk_used_bytes=store.disk_used_bytes,
            moved_to_disk=fates["moved"],
            dropped=fates["dropped"],
            damaged=fates["damaged"],
        )

    def count_dropped(self) -> None:
        self._count("dropped")

    def _count(self, fate: str) -> None:
        with self._fates_lock:
            self._fates[fate] += 1

    def save(self, agent_id: AgentId, sequence: Sequence, label: Label, *, to: KvPlace) -> Callable[[], Blob | None]:
        """Copy the sequence's KV. What is left to do, in any thread, says where it is: None if it could not be kept."""
        try:
            rest = self._store.begin(sequence.state_bytes(), label, sequence.save, to=to)
        except LlamaError as error:
            log.warning("the KV of %s could not be saved: %s", agent_id, error)
            rest = None
        return lambda: self._saved(agent_id, rest() if rest else None)

    def _saved(self, agent_id: AgentId, blob: Blob | None) -> Blob | None:
        if blob is None:
            self.count_dropped()
        else:
            self._blobs[agent_id] = blob
        return blob

    def restore(self, agent_id: AgentId, sequence: Sequence, label: Label, *, purge: Callable[[], None]) -> int:
        """Bring the agent's KV back, and free its place. Returns its bytes; 0 if there is none that can be used.

        It stays where it is if anything unforeseen is raised. `purge`: wipes the sequence, if it was given damaged bytes.
        """
        blob = self._blobs.get(agent_id)
        if blob is None:
            return 0
        restored, given = 0, False

        def use(state: ByteArray) -> bool:
            nonlocal given
            given = True
            return sequence.restore(state, blob.form)

        try:
            if self._read(blob, label, use):
                restored = blob.bytes
            else:
                self.count_dropped()
        except DamagedBlob as damage:
            if given:  # before it was known
                purge()
            log.warning("the saved KV of %s is not used: %s", agent_id, damage)
            self._count("damaged")
        self.forget(agent_id)
        return restored

    def _read(self, blob: Blob, label: Label, use: Callable[[ByteArray], bool]) -> bool:
        if blob.form is None and blob.label.slots != label.slots:
            return False  # of a layout that nobody knows how to change
        return self._store.read(blob, replace(label, slots=blob.label.slots), use, unchecked=True)

    def copy(self, source: AgentId, new: AgentId) -> Blob | None:
        """The same KV for another agent, in host memory. None if there is none, no room for it, or it is damaged."""
        blob = self._blobs.get(source)
        if blob is None:
            return None
        try:
            payload: ByteArray = self._store.read(blob, blob.label, np.copy)

            def fill(place: ByteArray) -> Form | None:
                np.copyto(place, payload)
                return blob.form

            copy = self._store.write(payload.nbytes, blob.label, fill)
        except (DamagedBlob, MemoryError) as error:
            log.warning("the saved KV of %s is not copied: %s", source, error)
            return None
        if copy is not None:
            self._blobs[new] = copy
        return copy

    def move_to_disk(self, agent_id: AgentId) -> bool:
        """False if the disk would not have it; then it is gone."""
        if self._store.to_disk(self._blobs[agent_id]):
            self._count("moved")
            return True
        self.drop(agent_id)
        return False

    def drop(self, agent_id: AgentId) -> None:
        """Give the place of the agent's KV to others; the session is recomputed."""
        if self.forget(agent_id):
            self.count_dropped()

    def forget(self, agent_id: AgentId) -> bool:
        """Free whatever is kept for an agent that needs it no more; False if there was nothing."""
        blob = self._blobs.pop(agent_id, None)
        if blob is not None:
            self._store.free(blob)
        return blob is not None
