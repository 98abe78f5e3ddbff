"""What is promised outside the code: dependencies pinned, one version, no machine's address, files of a size to read."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import conductor

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
MAX_LINES = 400

#: Put together from parts, so that this file is not its own first finding.
ADDRESSES = re.compile(
    "|".join(
        (
            r"pypi" + r"\.org",
            r"python" + r"hosted",
            r"registry\." + r"npmjs",
            r"(?<![\w.~-])/(?:work|root|farm)/",
            r"(?<![\w.~-])/(?:home|Users)/\w",
            r"/tmp/" + r"(?:[a-z]+-venv|dev/)",
        )
    )
)


def declared() -> list[Requirement]:
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    return [Requirement(text) for group in groups for text in group]


def constraint_lines() -> list[str]:
    lines = (line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines())
    return [line for line in lines if line]


def pins(python: str) -> dict[str, list[str]]:
    """Distribution → the versions that constraints.txt names for it on `python`."""
    found: dict[str, list[str]] = {}
    for pin in map(Requirement, constraint_lines()):
        if pin.marker is None or pin.marker.evaluate({"python_version": python}):
            found.setdefault(canonicalize_name(pin.name), []).append(str(pin.specifier).removeprefix("=="))
    return found


def tracked_files() -> list[Path]:
    """Everything git knows or would add. A file that is about to be committed is checked before it is."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout")
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True
    )
    return [path for name in listing.stdout.decode().split("\0") if name and (path := ROOT / name).is_file()]


@pytest.mark.parametrize("python", PYTHONS)
def test_each_dependency_has_exactly_one_pin_that_satisfies_it(python: str) -> None:
    pinned = pins(python)
    for requirement in declared():
        versions = pinned.get(canonicalize_name(requirement.name), [])
        assert len(versions) == 1, f"{requirement.name} on Python {python}: {versions or 'not in constraints.txt'}"
        assert requirement.specifier.contains(versions[0]), f"{requirement} is pinned to {versions[0]}"


def test_constraints_are_exact_versions_without_addresses() -> None:
    pin = re.compile(r'[a-z0-9-]+==[0-9][0-9a-z.]*( ; python_version (<|>=) "3\.\d+")?')
    assert [line for line in constraint_lines() if pin.fullmatch(line) is None] == []


def test_the_version_is_said_once() -> None:
    assert "version" in PROJECT["dynamic"]
    try:
        installed = importlib.metadata.version("vram-conductor")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("vram-conductor runs from the checkout without being installed")
    assert installed == conductor.__version__


def test_the_changelog_has_the_version_or_is_collecting_it() -> None:
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert len(headings) == 1 or headings[1] == conductor.__version__


def test_no_file_names_a_package_registry_or_a_path_of_somebodys_machine() -> None:
    found = []
    for path in tracked_files():
        content = path.read_bytes()
        if b"\0" not in content[:8192]:
            found += [f"{path.relative_to(ROOT)}: {match[0]}" for match in ADDRESSES.finditer(content.decode("utf-8"))]
    assert found == []


def test_every_python_file_can_be_read_in_one_sitting() -> None:
    lengths = {path: len(path.read_text("utf-8").splitlines()) for path in tracked_files() if path.suffix == ".py"}
    assert {str(path.relative_to(ROOT)): lines for path, lines in lengths.items() if lines >= MAX_LINES} == {}


def test_no_text_holds_a_gap_to_be_filled() -> None:
    gaps = [path.name for path in tracked_files() if path.suffix == ".md" and "@@" in path.read_text("utf-8")]
    assert gaps == []
