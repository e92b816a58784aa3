"""The README says what is true."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from edifice_reference.config import describe_range
from edifice_reference.registry import ARCHITECTURES, Architecture

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
    for folder, text in ((ROOT, README), (ROOT / "docs", ARCHITECTURES_PAGE)):
        for target in re.findall(r"\]\((?!http)([^)]+)\)", text):
            if target.startswith("#"):
                assert re.search(rf"^## {target[1:]}$", text, re.MULTILINE | re.IGNORECASE)
            else:
                assert (folder / target).exists()
