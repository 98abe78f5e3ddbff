"""Sizes as people write them, and as people read them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conductor.units import GIB, KIB, MIB, format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (0, 0),
        (4096, 4096),
        ("4096", 4096),
        ("4096B", 4096),
        ("1KiB", KIB),
        ("1K", KIB),
        ("1kB", 1000),
        ("512MiB", 512 * MIB),
        ("512 mib", 512 * MIB),
        (" 7.5 GiB ", 7 * GIB + GIB // 2),
        ("7.5GB", 7_500_000_000),
        ("8g", 8 * GIB),
        ("1TiB", 1 << 40),
        ("1tb", 10**12),
        ("0.5B", 0),
    ],
)
def test_a_size_is_a_number_with_or_without_a_unit(text: str | int, count: int) -> None:
    assert parse_bytes(text) == count
    assert isinstance(parse_bytes(text), int)


@pytest.mark.parametrize(
    "value",
    ["", " ", "MiB", "-1", "-1MiB", "1e3", "1,5GiB", "1.5.5GiB", "12 parsecs", "GiB 1", "1 Gi B", "0x10", "nan", "inf",
     -1, True, False, 1.5, None, [], {}, b"1"],
)  # fmt: skip
def test_anything_else_is_no_size(value: Any) -> None:
    with pytest.raises(ValueError):
        parse_bytes(value)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (1023, "1023 B"),
        (KIB, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (100 * KIB, "100 KiB"),
        (64 * MIB, "64.0 MiB"),
        (512 * MIB, "512 MiB"),
        (7 * GIB + GIB // 2, "7.5 GiB"),
        (141 * GIB, "141 GiB"),
        (1 << 40, "1.0 TiB"),
        (5000 << 40, "5000 TiB"),
        (-3 * MIB, "-3.0 MiB"),
    ],
)
def test_a_count_is_told_in_the_unit_that_reads_best(count: int, text: str) -> None:
    assert format_bytes(count) == text


@given(st.integers(0, 1 << 45))
def test_what_is_told_can_be_read_back_within_its_precision(count: int) -> None:
    assert abs(parse_bytes(format_bytes(count)) - count) <= max(1, count // 18)
