"""What the conductor's answers are held against: llama.cpp's plain loop through llama-cpp-python, one conversation, nobody else.

Shares no code with `conductor.backend`, and never saves, restores or truncates anything.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as llama


def bare_loop(
    path: str | Path,
    prompts: Sequence[str],
    *,
    max_tokens: int,
    window: int,
    n_batch: int = 512,
    n_ubatch: int = 512,
    flash_attention: bool = True,
    n_threads: int = 1,
    gpu: bool = False,
) -> list[list[int]]:
    """Generated token ids of each turn, greedy; each prompt continues what was said before it.

    A turn ends with `max_tokens` or with an end-of-generation token, which is part of it. Its last token is decoded with
    the next prompt, as in llama.cpp's own examples.
    """
    with _opened(path, window, n_batch, n_ubatch, flash_attention, n_threads, gpu) as (vocab, context):
        sampler = llama.llama_sampler_init_greedy()
        turns: list[list[int]] = []
        pending: list[int] = []
        for prompt in prompts:
            pending += tokenize(vocab, prompt, add_special=not turns)
            made: list[int] = []
            while len(made) < max_tokens:
                _decode(context, pending, n_batch)
                token = llama.llama_sampler_sample(sampler, context, -1)
                made.append(token)
                pending = [token]
                if llama.llama_vocab_is_eog(vocab, token):
                    break
            turns.append(made)
        llama.llama_sampler_free(sampler)
    return turns


def tokenize(vocab: Any, text: str, *, add_special: bool) -> list[int]:
    """With control strings as control tokens."""
    raw = text.encode()
    tokens = (llama.llama_token * (len(raw) + 2))()
    count = llama.llama_tokenize(vocab, raw, len(raw), tokens, len(tokens), add_special, True)
    assert count >= 0
    return list(tokens[:count])


def _decode(context: Any, tokens: list[int], n_batch: int) -> None:
    for start in range(0, len(tokens), n_batch):
        part = tokens[start : start + n_batch]
        array = (llama.llama_token * len(part))(*part)  # the batch only points at it
        assert llama.llama_decode(context, llama.llama_batch_get_one(array, len(part))) == 0


@contextmanager
def _opened(
    path: str | Path, window: int, n_batch: int, n_ubatch: int, flash_attention: bool, n_threads: int, gpu: bool
) -> Iterator[tuple[Any, Any]]:
    of_model = llama.llama_model_default_params()
    nothing = (ctypes.c_void_p * 1)(None)
    of_model.n_gpu_layers = -1 if gpu else 0
    if not gpu:
        of_model.devices = ctypes.cast(nothing, ctypes.c_void_p)
        of_model.load_mode = llama.LLAMA_LOAD_MODE_NONE  # mapped weights are not repacked, and round differently
    model = llama.llama_model_load_from_file(str(path).encode(), of_model)
    assert model
    of_context = llama.llama_context_default_params()
    of_context.n_ctx, of_context.n_batch, of_context.n_ubatch = window, n_batch, n_ubatch
    of_context.n_threads = of_context.n_threads_batch = n_threads
    of_context.flash_attn_type = int(flash_attention)
    of_context.n_outputs_max = 1  # as the conductor has it: a batch shape of its own on a GPU
    of_context.swa_full = False  # as llama-server has it; the library's default keeps what no sliding layer looks at
    context = llama.llama_init_from_model(model, of_context)
    assert context
    try:
        yield llama.llama_model_get_vocab(model), context
    finally:
        llama.llama_free(context)
        llama.llama_model_free(model)
