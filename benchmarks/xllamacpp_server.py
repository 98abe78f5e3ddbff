"""llama.cpp's server out of the wheel `xllamacpp`, in a process of its own: started by `peer.py`.

    python benchmarks/xllamacpp_server.py '{"path": …, "slots": 16, …}'

Imports nothing of the project: two builds of llama.cpp must not meet in one process. Says its address and its build in one
line of JSON, and ends when its standard input does.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys

import xllamacpp


def main() -> None:
    wanted = json.loads(sys.argv[1])
    params = xllamacpp.CommonParams()
    params.model.path = wanted["path"]
    params.n_parallel, params.n_ctx = wanted["slots"], wanted["slots"] * wanted["window"]
    params.n_batch, params.n_ubatch = wanted["n_batch"], wanted["n_ubatch"]
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = wanted["threads"]
    params.flash_attn_type = (
        xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED
        if wanted["flash_attention"]
        else xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    )
    params.cache_type_k = params.cache_type_v = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{wanted['kv_type'].upper()}")
    params.n_gpu_layers, params.fit_params = 0, False
    # Nothing of an answer is kept for the next one: that would only cost it time here.
    params.cache_prompt, params.cache_ram_mib, params.n_ctx_checkpoints, params.slot_prompt_similarity = False, 0, 0, 0.0
    params.ui, params.verbosity = False, 0
    server = xllamacpp.Server(params)
    said = {"address": server.listening_address, "version": importlib.metadata.version("xllamacpp")}
    print(json.dumps(said | {"built_for": xllamacpp.get_system_info().strip()}), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
