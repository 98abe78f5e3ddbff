"""The only import of llama_cpp: models, contexts, sampling, all through the low-level C API.

    movable    weights at home in host memory, and a part of them on the device: see also tensors, transfers, survey
    layer_ring layers that pass through the device while it decodes
    library    llama.cpp in this process: the log, loading, page-locked memory
    model      weights and vocabulary
    context    a live context: sequences side by side, decoded together
    sequence   one slot of it: cut, moved, saved, restored
    streams    what it saves, in a form that any context of the model takes
    batch      the tokens of one decode
    sampler    how the next token is drawn
    binding    the library's functions by name

Validates whatever would make llama.cpp abort the process. Knows nothing of agents, ledgers or queues.
"""

from conductor.backend.llama.batch import Batch
from conductor.backend.llama.binding import KV_TYPES, ByteArray, LlamaError
from conductor.backend.llama.context import Context, NoRoom
from conductor.backend.llama.layer_ring import Passage
from conductor.backend.llama.library import Llama
from conductor.backend.llama.model import Model
from conductor.backend.llama.sampler import Sampler
from conductor.backend.llama.sequence import Sequence
from conductor.backend.llama.streams import Form
from conductor.backend.llama.tensors import Unmovable
from conductor.backend.llama.transfers import measure_link

__all__ = [
    "KV_TYPES", "Batch", "ByteArray", "Context", "Form", "Llama", "LlamaError", "Model", "NoRoom", "Passage", "Sampler",
    "Sequence", "Unmovable", "measure_link",
]  # fmt: skip
