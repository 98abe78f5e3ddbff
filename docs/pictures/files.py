"""How pictures are kept: small, and with nothing from elsewhere in them."""

from __future__ import annotations

import io
import re
from pathlib import Path

from PIL import Image
from rich.console import Console, RenderableType

from tests.support.chromium import Tab

_MOST_BYTES = 250_000
Box = tuple[int, int, int, int]  #: left, top, right, bottom


async def photograph(page: Tab, path: Path, box: Box | None = None) -> None:
    """What is in view, or the part of it that is in the box."""
    keep(Image.open(io.BytesIO(await page.screenshot())).crop(box), path)


def keep(picture: Image.Image, path: Path) -> None:
    """In 256 colours. ValueError if it is too large for a page."""
    picture.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE).save(path, optimize=True)
    if path.stat().st_size > _MOST_BYTES:
        raise ValueError(f"{path.name} takes {path.stat().st_size:,} bytes")


def draw(shown: RenderableType, path: Path, *, width: int) -> None:
    """A terminal of that many columns as SVG, in the fonts of whoever looks."""
    console = Console(record=True, width=width, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(shown)
    picture = console.export_svg(title=f"conductor {path.stem}", unique_id=path.stem)
    path.write_text(re.sub(r"\s*@font-face \{.*?\}", "", picture, flags=re.DOTALL), "utf-8")
