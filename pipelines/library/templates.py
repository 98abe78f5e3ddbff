"""Prompts with names in braces: `{request}` is replaced by the text of that name, once, and nothing is evaluated.

`{{` and `}}` are braces. Any other brace stands for itself, so that code and JSON can be written as they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

#: what the names of steps, inputs and agents look like
NAME = r"[A-Za-z_][A-Za-z0-9_]*"
_PIECE = re.compile(rf"\{{\{{|\}}\}}|\{{(?P<name>{NAME})\}}|(?P<format>\{{{NAME}[.!:\[][^{{}}\n]*\}})")


def names_in(template: str) -> tuple[str, ...]:
    """The names, each once, as they come. Raises ValueError for what Python's `format` knows and this does not."""
    found: dict[str, None] = {}
    for piece in _PIECE.finditer(template):
        if piece["format"]:
            raise ValueError(f"only a name may stand in braces, not {piece['format']}; braces themselves are {{{{ and }}}}")
        if piece["name"]:
            found[piece["name"]] = None
    return tuple(found)


def fill(template: str, texts: Mapping[str, str]) -> str:
    """`template` with the names replaced. What is put in is not looked through again. KeyError for a name without a text."""
    replaced: Callable[[re.Match[str]], str] = lambda piece: texts[piece["name"]] if piece["name"] else piece[0][0]
    return _PIECE.sub(replaced, template)
