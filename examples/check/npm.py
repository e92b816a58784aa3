"""Packages of npm, at the versions and with the hashes of a sample's package-lock.json."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from .language import CheckError, run

__all__ = ["install_packages", "link_packages"]

_NODE = 20
"""The oldest version of Node that the samples are for."""


def install_packages(package: Path, folder: Path) -> Path:
    """Installs what a package.json and the lock beside it pin, or finds it installed.

    Scripts of packages don't run: those of onnxruntime-node would download libraries for GPUs.

    Args:
        package: the package.json.
        folder: where node_modules goes.

    Returns:
        node_modules.

    Raises:
        CheckError: no Node, or one that is too old, or a package could not be had at its version.
    """
    found = run(["node", "--version"]).stdout.strip()
    version = re.match(r"v(\d+)\.", found)
    if version is None or int(version[1]) < _NODE:
        raise CheckError(f"the samples take Node {_NODE} or newer, found {found or 'none'}")
    modules = folder / "node_modules"
    lock = package.with_name(package.name.replace("package.json", "package-lock.json"))
    pinned: dict[str, str] = json.loads(package.read_text(encoding="utf-8"))["dependencies"]
    if all(_version(modules / name) == number for name, number in pinned.items()):
        return modules
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(package, folder / "package.json")
    shutil.copyfile(lock, folder / "package-lock.json")
    done = run(["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"], folder)
    if done.returncode != 0:
        raise CheckError(
            f"npm could not install {', '.join(pinned)}: {' / '.join(done.stderr.strip().splitlines()[:3])}"
        )
    for name, number in pinned.items():
        if _version(modules / name) != number:
            raise CheckError(f"npm installed {name} {_version(modules / name)}, expected {number}")
    return modules


def link_packages(modules: Path | None, program: Path) -> None:
    """Gives a program's folder the packages that were installed for it elsewhere.

    Raises:
        CheckError: none were.
    """
    if modules is None:
        raise CheckError("install was not called, so there are no packages of npm")
    place = program / "node_modules"
    place.unlink(missing_ok=True)
    place.symlink_to(modules.absolute())


def _version(package: Path) -> str | None:
    try:
        return str(json.loads((package / "package.json").read_text(encoding="utf-8"))["version"])
    except (OSError, ValueError, KeyError):
        return None
