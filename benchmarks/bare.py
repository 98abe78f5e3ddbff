"""llama.cpp's low-level API and nothing else: what the conductor is measured against, and its limit.

Covers a model and the parameters of its contexts, as the conductor makes them. The loops are `overhead.BareLoop`, one
sequence, and `bare_batch.BareBatch`, many.
"""

from __future__ import annotations

import ctypes
from typing import Any

import llama_cpp.llama_cpp as llama

from conductor.backend.llama import KV_TYPES, Llama
from conductor.core.estimate import ModelPlan
from conductor.types import ContextSpec, DeviceKind


class BareModel:
    """Weights and vocabulary; close it."""

    def __init__(self, plan: ModelPlan) -> None:
        Llama.instance()  # takes llama.cpp's log away from the terminal
        self.kind, self.path = plan.device, plan.path
        params = llama.llama_model_default_params()
        nothing = (ctypes.c_void_p * 1)(None)
        if self.kind is DeviceKind.CUDA:
            params.n_gpu_layers = -1
        else:
            params.n_gpu_layers, params.devices = 0, ctypes.cast(nothing, ctypes.c_void_p)
            params.load_mode = llama.LLAMA_LOAD_MODE_NONE
        self.handle = llama.llama_model_load_from_file(plan.path.encode(), params)
        assert self.handle, "the model cannot be loaded"
        self.vocab = llama.llama_model_get_vocab(self.handle)
        self.n_vocab = int(llama.llama_vocab_n_tokens(self.vocab))

    def close(self) -> None:
        llama.llama_model_free(self.handle)

    def tokenize(self, text: str) -> list[int]:
        raw = text.encode()
        ids = (llama.llama_token * (len(raw) + 8))()
        return list(ids[: llama.llama_tokenize(self.vocab, raw, len(raw), ids, len(ids), True, True)])

    def context(self, spec: ContextSpec, *, n_threads: int) -> Any:
        """A context for `spec.slots` sequences, each with a cache and one row of logits of its own."""
        cp = llama.llama_context_default_params()
        cp.n_ctx, cp.n_batch, cp.n_ubatch = spec.slots * spec.window, spec.n_batch, spec.n_ubatch
        cp.n_seq_max = cp.n_outputs_max = spec.slots
        cp.kv_unified = False
        cp.n_threads = cp.n_threads_batch = n_threads
        cp.flash_attn_type, cp.type_k, cp.type_v = int(spec.flash_attention), KV_TYPES[spec.kv_type], KV_TYPES[spec.kv_type]
        cp.swa_full = False
        cp.offload_kqv = cp.op_offload = self.kind is DeviceKind.CUDA
        context = llama.llama_init_from_model(self.handle, cp)
        assert context, "the context cannot be made"
        return context
