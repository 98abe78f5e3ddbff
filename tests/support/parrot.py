"""A real model file that says what it was told to: each byte of a text is followed by the next one, for certain.

One-hot embeddings pass through layers that add nothing, and the output layer is a permutation. For tests of what happens
to text on its way: endings, stop strings, characters of several tokens (each token is one byte).
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from tests.support.tiny_gguf import END_OF_TURN, write_tiny_gguf

_WIDTH = 320  #: more than the vocabulary of 300, one dimension for each token
_VOCABULARY = 300


def write_parrot(path: Path, says: str, *, ends: bool = True, trained_window: int = 4096) -> Path:
    """`says` follows any byte that is not in it, then the end of the turn or, unless it `ends`, `says` again.

    No byte may be in it twice. A prompt that ends in one of its bytes is continued from there.
    """
    script = says.encode()
    assert len(set(script)) == len(script), "each byte decides what follows it, so it can be there only once"
    write_tiny_gguf(path, n_layer=1, n_embd=_WIDTH, n_vocab=_VOCABULARY, trained_window=trained_window)
    after = np.full(_VOCABULARY, script[0])
    after[list(script)] = [*script[1:], END_OF_TURN if ends else script[0]]
    reader = gguf.GGUFReader(path, "r+")
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    for name in ("blk.0.attn_output.weight", "blk.0.ffn_down.weight", "token_embd.weight", "output.weight"):
        tensors[name][:] = 0
    tokens = np.arange(_VOCABULARY)
    tensors["token_embd.weight"][tokens, tokens] = 1
    tensors["output.weight"][after, tokens] = 1
    reader.data.flush()
    return path
