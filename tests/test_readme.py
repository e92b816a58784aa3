"""The README says what is true."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from edifice_reference.models.config import describe_range
from edifice_reference.models.registry import ARCHITECTURES, Architecture

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
ARCHITECTURES_PAGE = (ROOT / "docs/architectures.md").read_text()


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
    pages = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*/README.md")]
    assert len(pages) >= 9
    for page in pages:
        text = page.read_text(encoding="utf-8")
        headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
        anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
        for target in re.findall(r"\]\((?!http)([^)]+)\)", text):
            if target.startswith("#"):
                assert target[1:] in anchors, f"{page} leads to {target}"
            else:
                assert (page.parent / target).exists(), f"{page} leads to {target}"
