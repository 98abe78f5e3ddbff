"""How the next token is drawn from the logits: llama.cpp's chain, for one request."""

from __future__ import annotations

from typing import TYPE_CHECKING

import llama_cpp.llama_cpp as ll

from conductor.types import DecodeRequest

if TYPE_CHECKING:
    from conductor.backend.llama.context import Context


class Sampler:
    """For a request that is not greedy; close it after use. The greedy choice is `Context.likeliest`, which needs none."""

    def __init__(self, request: DecodeRequest, seed: int) -> None:
        self.chain = ll.llama_sampler_chain_init(ll.llama_sampler_chain_default_params())
        for link in (
            ll.llama_sampler_init_top_k(request.top_k),
            ll.llama_sampler_init_top_p(request.top_p, 1),
            ll.llama_sampler_init_min_p(request.min_p, 1),
            ll.llama_sampler_init_temp(request.temperature),
            ll.llama_sampler_init_dist(seed),
        ):
            ll.llama_sampler_chain_add(self.chain, link)

    def close(self) -> None:
        ll.llama_sampler_free(self.chain)
        self.chain = None

    def draw(self, context: Context, at: int) -> int:
        """The next token after the one at that place of the last batch, whose logits were asked for."""
        return int(ll.llama_sampler_sample(self.chain, context.handle, at))
