"""The commands in README and CONTRIBUTING exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_every_make_command_on_the_page_is_a_target(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", (ROOT / page).read_text(), re.M))
    assert {"check", "test"} <= named | {"check"}
    assert named <= targets, named - targets


def test_every_file_in_the_readme_map_exists():
    text = (ROOT / "README.md").read_text()
    named = re.findall(r"^(?:src/lowbit/|docs/|benchmarks/|tests/)[\w/.+-]+", text, re.M)
    assert len(named) > 20
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing
    listed = {name for name in named if name.startswith("src/lowbit/") and name.endswith(".py")}
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "src/lowbit").glob("*.py") if not p.name.startswith("__")}
    assert listed >= modules, modules - listed


def test_links_between_pages_lead_somewhere():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), (page.name, target)
