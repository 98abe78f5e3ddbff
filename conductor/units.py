"""Byte counts as people write them (`7.5GiB`) and as the ledger keeps them (`int`)."""

from __future__ import annotations

import re
from decimal import Decimal

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

_FACTOR = {
    "": 1, "b": 1,
    "k": KIB, "kib": KIB, "kb": 1000,
    "m": MIB, "mib": MIB, "mb": 1000**2,
    "g": GIB, "gib": GIB, "gb": 1000**3,
    "t": 1 << 40, "tib": 1 << 40, "tb": 1000**4,
}  # fmt: skip
_SIZE = re.compile(r"\s*(\d{1,18}(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_bytes(text: str | int) -> int:
    """Bytes in `text`: `4096`, `"512MiB"`, `"7.5 GiB"`, `"8GB"` (decimal). Raises ValueError for anything else."""
    if isinstance(text, bool) or not isinstance(text, (str, int)):
        raise ValueError(f"expected a size such as 512MiB, got {text!r}")
    if isinstance(text, int):
        if text < 0:
            raise ValueError(f"a size cannot be negative: {text}")
        return text
    match = _SIZE.fullmatch(text)
    if match is None or match[2].lower() not in _FACTOR:
        raise ValueError(f"expected a size such as 512MiB or 7.5GiB, got {text!r}")
    return int(Decimal(match[1]) * _FACTOR[match[2].lower()])


def format_bytes(count: int) -> str:
    """`count` bytes for a person: three significant digits and a binary unit, `-` kept for differences."""
    size = float(abs(count))
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1023.5 or unit == "TiB":  # what rounds to 1024 is one of the next unit
            break
        size /= 1024
    digits = f"{size:.0f}" if unit == "B" or size >= 100 else f"{size:.1f}"
    return f"{'-' if count < 0 else ''}{digits} {unit}"
