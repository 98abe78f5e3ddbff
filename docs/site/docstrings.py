"""For mkdocstrings: docstrings as this project writes them.

- A `#:` comment, behind an attribute or above it, is the attribute's docstring.
- The attributes of a class are one table below its docstring (templates/), not a heading each.
- The name of an error or of a value in a docstring links to it. A link in one is meant from docs/, where the options' page is.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import griffe

ROOT = Path(__file__).resolve().parents[2]
#: where the classes are that docstrings name
_LINKED = (
    "actors.agent", "conductor.errors", "conductor.happenings", "conductor.types", "pipelines.library.results",
    "pipelines.library.steps",
)  # fmt: skip
_FROM_DOCS = re.compile(r"\]\((?=[\w/-]+\.md)")
_TRAILING = re.compile(r"\s*#: ?(.*)")
#: of BaseException and of pydantic
_OF_OTHERS = ("args", "model_config")


def _classes(module: str) -> dict[str, str]:
    tree = ast.parse((ROOT / module.replace(".", "/")).with_suffix(".py").read_text("utf-8"))
    return {node.name: f"{module}.{node.name}" for node in tree.body if isinstance(node, ast.ClassDef) and node.name[0] != "_"}


_PATHS = {name: path for module in _LINKED for name, path in _classes(module).items()}
#: in backticks any of them; bare those that are no word beside: Map and Agent begin sentences too
_BARE = "|".join(sorted(name for name in _PATHS if re.search("[a-z][A-Z]", name)))
_NAMES = re.compile(rf"(?<![\w.`])(?:`({'|'.join(sorted(_PATHS))})`|({_BARE}))(?![\w`(])")


class Docstrings(griffe.Extension):
    def on_attribute_instance(
        self, *, node: ast.AST | griffe.ObjectNode, attr: griffe.Attribute, agent: griffe.Visitor | griffe.Inspector, **_: Any
    ) -> None:
        if attr.docstring is None and isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(agent, griffe.Visitor):
            comment = _comment(agent.code.splitlines(), node)
            attr.docstring = griffe.Docstring(comment, parent=attr) if comment else None

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        for found in _objects(pkg):
            if found.docstring is not None:
                found.docstring.value = _linked(found.docstring.value)
        for found in list(_objects(pkg)):
            if found.is_class and not found.name.startswith("_"):
                _tabulate(found)


def _comment(lines: list[str], node: ast.Assign | ast.AnnAssign) -> str:
    """Behind the statement, else the lines directly above it."""
    last = lines[(node.end_lineno or node.lineno) - 1].encode()[node.end_col_offset :].decode()
    if (found := _TRAILING.fullmatch(last)) is not None:
        return found[1]
    above: list[str] = []
    for line in reversed(lines[: node.lineno - 1]):
        if not line.lstrip().startswith("#:"):
            break
        above.insert(0, line.lstrip()[2:].strip())
    return " ".join(above)


def _objects(of: griffe.Object) -> Iterator[griffe.Object]:
    yield of
    for member in of.members.values():
        if isinstance(member, griffe.Object):
            yield from _objects(member)


def _linked(text: str) -> str:
    """Code is left as it is."""
    text = _FROM_DOCS.sub("](../", text)

    def link(name: re.Match[str]) -> str:
        return f'<autoref identifier="{_PATHS[name[1] or name[2]]}" optional>{name[0]}</autoref>'

    return "\n".join(line if line.startswith("    ") else _NAMES.sub(link, line) for line in text.split("\n"))


def _tabulate(cls: griffe.Object) -> None:
    """Move the public attributes into a section of the docstring."""
    rows: dict[str, griffe.DocstringAttribute] = {}
    for row in _rows(cls):
        if not row.name.startswith("_") and row.name not in _OF_OTHERS:
            rows.setdefault(row.name, row)
    for name in (*rows, *_OF_OTHERS):
        cls.members.pop(name, None)  # members get a heading each
    if rows:
        cls.docstring = cls.docstring or griffe.Docstring("", parent=cls)
        cls.docstring.parsed.append(griffe.DocstringSectionAttributes(list(rows.values())))


def _rows(cls: griffe.Object) -> Iterator[griffe.DocstringAttribute]:
    """What `__init__` keeps under the name of its argument, the class's own attributes, and those of its private bases."""
    init = cls.members.get("__init__")
    if isinstance(init, griffe.Function):
        for given in init.parameters:
            if re.search(rf"\bself\.{given.name}\b", init.source):
                yield griffe.DocstringAttribute(given.name, annotation=given.annotation, value=given.default, description="")
    for name, found in cls.members.items():
        if isinstance(found, griffe.Attribute):
            about = found.docstring.value if found.docstring else ""
            yield griffe.DocstringAttribute(name, annotation=_bare(found.annotation), value=found.value, description=about)
    for base in getattr(cls, "bases", ()):
        if str(base).startswith("_") and str(base) in cls.module.members:
            yield from _rows(cls.module[str(base)])


def _bare(annotation: Any) -> Any:
    """Without what pydantic checks beyond the type."""
    if isinstance(annotation, griffe.ExprBinOp):
        return replace(annotation, left=_bare(annotation.left), right=_bare(annotation.right))
    if isinstance(annotation, griffe.ExprTuple):
        return replace(annotation, elements=[_bare(element) for element in annotation.elements])
    if isinstance(annotation, griffe.ExprSubscript):
        inner = annotation.slice
        if annotation.canonical_path == "typing.Annotated" and isinstance(inner, griffe.ExprTuple):
            return _bare(inner.elements[0])
        return replace(annotation, slice=_bare(inner))
    return annotation
