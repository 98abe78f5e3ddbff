"""Whether a model's graph lets its layers stream: each layer's weights are used between two known nodes, and nowhere else."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import llama_cpp.llama_cpp as ll

from conductor.backend.llama.layer_ring import layer_that_ends
from conductor.backend.llama.tensors import Unmovable, Weight, struct_at


def survey(model: Any, layers: Iterable[Iterable[Weight]]) -> None:
    """Look at the graph of one token, which is computed where the weights are. Raises Unmovable if the layers cannot stream."""
    owner = {weight.address: layer for layer, weights in enumerate(layers) for weight in weights}
    n_layers = max(owner.values(), default=-1) + 1
    ends: list[int] = []
    astray: list[str] = []

    def look(node: int, asks: bool, _: object) -> bool:
        if asks:
            ending = layer_that_ends(node)
            if ending is not None:
                ends.append(ending)
            # A layer's last node may itself use its weights.
            current = ending if ending is not None else len(ends)
            used = {owner[source] for source in _sources(node) if source in owner}
            astray.extend(f"layer {layer} in layer {current}" for layer in used if layer != current)
        return False

    callback = ll.ggml_backend_sched_eval_callback(look)
    params = ll.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = 256, 1, 1, 1
    params.offload_kqv = params.op_offload = False
    params.flash_attn_type = 1
    params.cb_eval = callback
    context = ll.llama_init_from_model(model, params)
    if not context:
        raise Unmovable("no context could be made to look at its layers")
    try:
        token = (ll.llama_token * 1)(0)  # the batch only points to it
        if ll.llama_decode(context, ll.llama_batch_get_one(token, 1)):
            raise Unmovable("its layers could not be looked at")
    finally:
        ll.llama_free(context)
    if ends != list(range(n_layers)):
        raise Unmovable(f"its graph does not tell where its {n_layers} layers end")
    if astray:
        raise Unmovable(f"its graph uses weights outside of their layer: {astray[0]}")


def _sources(node: int) -> Iterator[int]:
    """The tensors that it reads, and those that they are views of."""
    for source in struct_at(node).src:
        if source:
            yield source
            if viewed := struct_at(source).view_src:
                yield viewed
