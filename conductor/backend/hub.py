"""Models from a public hub, through huggingface_hub where it is installed."""

from __future__ import annotations

from pathlib import Path

from conductor.errors import BadModelFile


def fetch(repo: str, file: str, directory: Path) -> Path:
    """Download `file` of `repo` into `directory`, with the library's own progress bar; returns its path. Raises BadModelFile."""
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise BadModelFile(
            str(directory / file),
            f"is not here; it can be fetched from {repo} if the extra 'hub' is installed (pip install 'vram-conductor[hub]'), "
            "or put the file there yourself",
        ) from None
    try:
        return Path(hf_hub_download(repo_id=repo, filename=file, local_dir=directory))
    except Exception as error:  # the library raises its own, requests' and the operating system's errors
        raise BadModelFile(str(directory / file), f"could not be fetched from {repo}: {error}") from error
