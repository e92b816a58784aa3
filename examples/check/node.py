"""The sample in examples/node, and what it shares with the web's in examples/javascript."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from .damage import overflow
from .handmade import write_handmade
from .language import CheckError, Run, run
from .npm import install_packages, link_packages

__all__ = ["Node"]


class Node:
    """Node with onnxruntime-node."""

    name = sample = "node"

    def __init__(self) -> None:
        self._modules: Path | None = None

    def install(self, folder: Path) -> None:
        """Gets the packages that the sample pins.

        Raises:
            CheckError: they could not be had.
        """
        package = Path(__file__).parents[1] / self.name / "package.json"
        self._modules = install_packages(package, folder / self.name)

    def build(self, sample: Path) -> None:
        """Gives DIR/node its packages.

        Raises:
            CheckError: they were not installed.
        """
        link_packages(self._modules, sample / self.name)

    def run(self, sample: Path, bundle: Path, *arguments: str) -> Run:
        """Runs the self-check."""
        return run(["node", "main.mjs", bundle.absolute(), *arguments], sample / self.name)

    def extra(self, sample: Path, bundle: Path) -> list[str]:
        """What the library promises beyond the self-check: node_extra.mjs and, for modules, node_generic.mjs.

        Raises:
            CheckError: it does not hold.
        """
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(shutil.copytree(bundle, Path(folder) / "bundle"))
            overflow(copy)
            handmade = write_handmade(Path(folder) / "handmade", prefill=False)
            checked = self.run(sample, handmade, "--frames", "20")
            done = self._script("node_extra.mjs", sample, bundle.absolute(), copy)
            modules = self._script("node_generic.mjs", sample, handmade)
        for each in (checked, done, modules):
            if each.returncode != 0:
                raise CheckError(f"node: {each.stderr.strip() or each.stdout.strip()}")
        asked = run(["node", "main.mjs", bundle.absolute(), "--bogus"], sample / self.name)
        missing = run(["node", "main.mjs", bundle.absolute(), "--provider", "nonsense"], sample / self.name)
        for refused, says in ((asked, "'--bogus'"), (missing, "provider 'nonsense' can't be had")):
            lines = refused.stderr.strip().splitlines()
            if refused.returncode != 2 or len(lines) != 1 or says not in lines[0]:
                raise CheckError(f"node: expected exit status 2 and one line with {says}, got {refused}")
        return [
            *done.stdout.strip().splitlines(),
            *modules.stdout.strip().splitlines(),
            "node: refuses an unknown option, and a provider that is not there",
        ]

    def _script(self, name: str, sample: Path, *bundles: Path) -> Run:
        return run(["node", Path(__file__).with_name(name), sample.absolute(), *bundles])
