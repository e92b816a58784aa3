"""The README, CONTRIBUTING and docs/ say what is true."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path

import pytest

from edifice_export.cli.app import COMMANDS
from edifice_export.defaults import TARGETS
from edifice_reference.models.config import describe_range
from edifice_reference.models.registry import ARCHITECTURES, Architecture

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
ARCHITECTURES_PAGE = (ROOT / "docs/architectures.md").read_text()
COMMANDS_PAGE = (ROOT / "docs/commands.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
ROOMS = sorted(path.parent.relative_to(ROOT).as_posix() for path in ROOT.glob("edifice_export/*/**/__init__.py"))


@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=lambda known: known.name)
def test_the_table_of_options_is_the_config(architecture: Architecture) -> None:
    table = ARCHITECTURES_PAGE.split(f"### Options of `build {architecture.name}`")[1].split("\n\n")[1]
    rows = re.findall(r"^\| `--([a-z-]+)` \| (.+?) \| (.+?) \| (.+?) \|$", table, re.MULTILINE)
    expected = [
        (
            field.name.replace("_", "-"),
            str(field.default).lower(),
            describe_range(field),
            field.metadata["help"],
        )
        for field in dataclasses.fields(architecture.config_class)
    ]
    assert rows == expected


def test_the_commands_for_a_fresh_machine_are_there() -> None:
    for name, holds in (("build", "edifice-export build hymba"), ("test", "-m pytest")):
        command = re.search(rf"<!-- command: {name} -->\n```sh\n(.+?)\n```", README, re.DOTALL)
        assert command is not None
        assert "-c constraints.txt" in command[1]
        assert holds in command[1]
        assert command[1].replace("\\\n", "").count("\n") == 0


def test_every_link_leads_somewhere() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*/README.md")]
    assert len(pages) >= 9
    for page in pages:
        for target in re.findall(r"\]\((?!http)([^)]+)\)", page.read_text(encoding="utf-8")):
            path, _, anchor = target.partition("#")
            place = page.parent / path if path else page
            assert place.exists(), f"{page} leads to {target}"
            assert not anchor or anchor in anchors(place), f"{page} leads to {target}"


def anchors(page: Path) -> set[str]:
    """What links into a page can be to: its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_read_in_one_sitting() -> None:
    assert len(README.split()) < 1500


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_has_a_sentence_and_is_in_the_house(room: str) -> None:
    assert (ast.get_docstring(ast.parse((ROOT / room / "__init__.py").read_text())) or "").strip()
    assert f"| `{room}/` |" in CONTRIBUTING
    assert f'"{room.replace("/", ".")}"' in (ROOT / "pyproject.toml").read_text()


def test_every_file_that_contributors_are_told_of_is_there() -> None:
    spans = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", CONTRIBUTING)
    named = {word for span in spans for word in span.split() if "/" in word}
    assert len(named) > 30
    for name in named:
        # NAME is what is being added.
        assert "NAME" in name or (ROOT / name).exists(), name


@pytest.mark.parametrize("command", ["build", *COMMANDS])
def test_every_command_is_in_the_docs(command: str) -> None:
    assert f"| `edifice-export {command}" in COMMANDS_PAGE


def test_every_target_is_in_the_docs() -> None:
    assert f"`--target {'|'.join(TARGETS)}`" in COMMANDS_PAGE
