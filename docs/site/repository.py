"""For mkdocs: what pages link to outside docs/ is on the site too, so links work on it as they do in a checkout.

A Markdown file becomes a page under repository/, code a page that shows it, a directory its README or else a list of its files;
anything else is copied. A link to nothing is left alone, and ends the strict build.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
#: always there, because the navigation has them
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "models/README.md", "benchmarks/README.md")
#: shown as code, in this language
CODE = {".json": "json", ".py": "python", ".toml": "toml", ".yaml": "yaml"}
_SHOWN_BYTES = 64 << 10
_LINK = re.compile(r"""(?P<before>\]\(|\bsrc=")(?P<target>[^\s)"#:]+)(?P<after>(?:#[^\s)"]*)?[)"])""")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add what is linked, and what that links to."""
    wanted = [*PAGES, *(path for file in files.documentation_pages() for path in _outside(file))]
    while wanted:
        path = wanted.pop()
        if files.get_file_from_path(_on_site(path)) is None:
            file = _file(config, path)
            files.append(file)
            if file.src_uri.endswith(".md"):
                wanted += _outside(file)
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links that leave docs/, or come from outside of it, at the site's pages."""
    here = page.file.src_uri

    def pointed(link: re.Match[str]) -> str:
        path = _path(here, link["target"])
        if path is None:
            return link[0]
        return f"{link['before']}{posixpath.relpath(_on_site(path), posixpath.dirname(here) or '.')}{link['after']}"

    return _LINK.sub(pointed, markdown)


def _outside(file: File) -> Iterator[str]:
    """What a page links to that is not in docs/ itself, from the top of the repository."""
    for link in _LINK.finditer(file.content_string):
        path = _path(file.src_uri, link["target"])
        if path is not None and _on_site(path).startswith("repository/"):
            yield path


def _path(here: str, target: str) -> str | None:
    """What a link means, from the top of the repository; None if there is nothing."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(_in_repository(here)), target))
    if (ROOT / path / "README.md").is_file():
        path = f"{path}/README.md"
    return None if path.startswith("..") or not (ROOT / path).exists() else path


def _in_repository(here: str) -> str:
    """Where a page of the site lies in the repository."""
    return here.removeprefix("repository/") if here.startswith("repository/") else f"docs/{here}"


def _on_site(path: str) -> str:
    """Where something of the repository is on the site."""
    if (ROOT / path).is_dir():
        return f"repository/{path}/index.md"
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"repository/{path}.md" if _shown(path) else f"repository/{path}"


def _shown(path: str) -> bool:
    return Path(path).suffix in CODE and (ROOT / path).stat().st_size <= _SHOWN_BYTES


def _file(config: MkDocsConfig, path: str) -> File:
    source, text = ROOT / path, ""
    if source.is_dir():
        names = sorted(item.name for item in source.iterdir() if item.name[0] not in "._")
        text = "\n".join(f"- [{name}]({name})" if name.endswith(".md") else f"- `{name}`" for name in names)
    elif _shown(path):
        code = source.read_text("utf-8")
        fence = "`" * (1 + max([2, *map(len, re.findall("`+", code))]))
        text = f"{fence}{CODE[source.suffix]}\n{code.rstrip()}\n{fence}"
    if text:
        return File.generated(config, _on_site(path), content=f"# {path}\n\n{text}\n")
    return File.generated(config, _on_site(path), abs_src_path=str(source))
