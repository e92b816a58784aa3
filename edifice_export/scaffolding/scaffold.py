"""Scaffold: a sample program in another language, with a bundle beside it, ready to build."""

from __future__ import annotations

import dataclasses
import shutil
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from ..arguments import path_of, text
from ..bundle.bundle import open_bundle
from ..bundle.manifest import MANIFEST
from ..bundle.staging import staging
from ..errors import RequestError
from ..writing.files import is_within

__all__ = ["SAMPLES", "Scaffold", "scaffold"]

SAMPLES = {
    "cpp": ("cpp", "cpp/edifice"),
    "csharp": ("csharp",),
    "node": ("node", "javascript"),
    "web": ("web", "javascript"),
}
"""Folders of examples/ that each language needs, its program's first."""


@dataclasses.dataclass(frozen=True)
class Scaffold:
    """What was written.

    Attributes:
        language: one of SAMPLES.
        output: the folder, with the program in a folder of the language's name and the bundle in `bundle`.
        files: paths in it, but for the bundle's.
        architecture: of the bundle.
    """

    language: str
    output: str
    files: list[str]
    architecture: str

    @property
    def readme(self) -> str:
        """The file that says how to build and run it."""
        return str(Path(self.output) / self.language / "README.md")


def scaffold(language: str, bundle: str | Path, output: str | Path) -> Scaffold:
    """Writes the sample of a language and a copy of a bundle to a new folder.

    Args:
        language: cpp, csharp, node or web.
        bundle: folder of the bundle; its files are checked first.
        output: folder to make; one that exists must be empty.

    Raises:
        RequestError: there is no such sample, no such bundle, or the folder holds something or can't be written.
        CheckError: the bundle is damaged.
    """
    if text("language", language) not in SAMPLES:
        raise RequestError(f"there is no sample in {language!r}; there are {', '.join(SAMPLES)}")
    source, target = open_bundle(bundle), path_of("output", output)
    if target.is_dir() and any(target.iterdir()):
        raise RequestError(f"--output {target}: holds files already; name a new folder")
    if is_within(target, source.path):
        raise RequestError(f"--output {target}: is in the bundle {source.path}; name a folder beside it")
    files = []
    with staging(target) as folder:
        for name in SAMPLES[language]:
            for file in _sample_files(name):
                files.append(f"{name}/{file.name}")
                _copy(file, folder / name / file.name)
        for name in (MANIFEST, *source.manifest.files):
            place = folder / "bundle" / name
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source.path / name, place)
    return Scaffold(language, str(output), sorted(files), source.manifest.program.name)


def _sample_files(name: str) -> list[Traversable]:
    """The files of a folder of examples/; what building makes there is in folders of its own."""
    found = [entry for entry in resources.files("edifice_examples").joinpath(name).iterdir() if entry.is_file()]
    return sorted(found, key=lambda entry: entry.name)


def _copy(file: Traversable, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(file.read_bytes())
