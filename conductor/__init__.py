"""VRAM Conductor: one ledger for a GPU that many LLM agents share.

This package knows nothing of Ray: `conductor.core` decides, `conductor.backend` touches llama.cpp and the device,
`conductor.gpu_conductor` joins the two. The Ray actor around it is in `actors`. See docs/architecture.md.
"""

__version__ = "0.1.0"
