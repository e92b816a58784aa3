"""Bundle: a folder with verified graphs, their test data and a manifest."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import mmap
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from ..arguments import check_name, path_of
from ..errors import CheckError, RequestError, brief
from ..specification import PAST, TensorSpec
from .manifest import MANIFEST, FileEntry, Manifest
from .manifest_reader import read_manifest

if TYPE_CHECKING:
    import numpy as np
    import onnx

__all__ = [
    "Bundle",
    "check_file",
    "hash_file",
    "hash_files",
    "open_bundle",
    "save_model",
    "write_tensor",
    "write_test_data",
]


@dataclasses.dataclass(frozen=True)
class Bundle:
    """A bundle on disk; each file is checked against the manifest when it is used, if not before."""

    path: Path
    manifest: Manifest

    def file(self, name: str) -> Path:
        """Where a file of the bundle is."""
        return self.path / name

    def check(self, name: str) -> None:
        """Checks that a file is what the manifest says, and so those that it reads. What is no model a runtime refuses.

        Raises:
            CheckError: a file is missing or was changed, or a model reads one that is not of the bundle.
            RequestError: it can't be read.
        """
        for other in self._check_alone(name):
            self._check_alone(other)

    def test_data(self, graph: str) -> Iterator[tuple[str, dict[str, np.ndarray], dict[str, np.ndarray]]]:
        """Each test data set of a graph: its folder, its inputs and its outputs, by tensor name.

        Raises:
            CheckError: a tensor can't be read, or is not what the graph takes or gives.
        """
        entry = self.manifest.graphs[graph]
        for folder in entry.test_data:
            inputs = {s.name: self._tensor(f"{folder}/input_{i}.pb", s) for i, s in enumerate(entry.inputs)}
            outputs = {s.name: self._tensor(f"{folder}/output_{i}.pb", s) for i, s in enumerate(entry.outputs)}
            yield folder, inputs, outputs

    def test_sequence(self) -> tuple[str, dict[str, np.ndarray], dict[str, np.ndarray]] | None:
        """The stream graph's longer test: its folder, and by tensor name the frames and the outputs at each; or None.

        Raises:
            CheckError: a tensor can't be read, or is not what the manifest says.
        """
        entry = self.manifest.graphs["stream"].test_sequence
        if entry is None:
            return None
        frames = {s.name: self._tensor(f"{entry.folder}/input_{i}.pb", s) for i, s in enumerate(entry.inputs)}
        outputs = {s.name: self._tensor(f"{entry.folder}/output_{i}.pb", s) for i, s in enumerate(entry.outputs)}
        return entry.folder, frames, outputs

    def initial_state(self, batch: int) -> dict[str, np.ndarray]:
        """What a stream's states are before its first frame, by name.

        Raises:
            CheckError: a value can't be read, or is not what the manifest says.
        """
        import numpy as np

        state = {}
        for spec in self.manifest.states:
            shape = spec.of(batch)
            if isinstance(spec.initial, str):
                one = self._tensor(spec.initial, TensorSpec(spec.name, spec.dtype, (1, *shape[1:])))
                state[spec.name] = np.repeat(one, batch, axis=0)
            else:
                state[spec.name] = np.full(shape, spec.initial, spec.dtype)
        return state

    def _check_alone(self, name: str) -> set[str]:
        """Checks a file, and gives those that it reads."""
        try:
            return _check_file(self.path, name, self.manifest)
        except OSError as error:
            raise _unreadable(self.path, error) from error

    def _check_all(self) -> None:
        """Checks every file: sizes before any is read, and models, which say whose the others are, before the rest."""
        try:
            for name, entry in self.manifest.files.items():
                _check_size(self.path, name, entry)
        except OSError as error:
            raise _unreadable(self.path, error) from error
        models = dict.fromkeys(graph.model for graph in self.manifest.graphs.values())
        # Hashing leaves the interpreter to others, so several files take the time of the largest.
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(self._check_alone, models))
            list(pool.map(self._check_alone, self.manifest.files.keys() - models.keys()))

    def _tensor(self, name: str, spec: TensorSpec) -> np.ndarray:
        self.check(name)
        return _read_tensor(self.file(name), spec)


def open_bundle(path: str | Path, whole: bool = True) -> Bundle:
    """Opens a bundle.

    Args:
        path: its folder.
        whole: check every file against the manifest now. If not, those that are not used may be missing.

    Raises:
        RequestError: this is not a bundle, or one of a newer schema.
        CheckError: the manifest is damaged, a file is missing or was changed, or a path leaves the bundle.
    """
    folder = path_of("bundle", path)
    check_name(folder, "bundle")
    try:
        bundle = Bundle(folder, read_manifest(folder))
    except OSError as error:
        raise _unreadable(folder, error) from error
    if whole:
        bundle._check_all()
    return bundle


def save_model(model: onnx.ModelProto, path: Path) -> None:
    """Writes a model; the bytes depend on the model alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.SerializeToString(deterministic=True))


def write_test_data(folder: Path, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> None:
    """Writes tensors as ONNX's backend tests have them: input_0.pb, ..., output_0.pb, ..."""
    for kind, tensors in (("input", inputs), ("output", outputs)):
        for index, (name, array) in enumerate(tensors.items()):
            write_tensor(folder / f"{kind}_{index}.pb", name, array)


def write_tensor(path: Path, name: str, array: np.ndarray) -> None:
    """Writes an ONNX TensorProto."""
    from onnx import numpy_helper

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(numpy_helper.from_array(array, name).SerializeToString(deterministic=True))


def hash_files(folder: Path, known: Mapping[str, FileEntry] | None = None) -> dict[str, FileEntry]:
    """The manifest's entry for every file below `folder` but the manifest itself.

    Args:
        folder: of the bundle.
        known: the entries of files that are not to be read again, such as those that were verified since.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    names = {path.relative_to(folder).as_posix(): path for path in files}
    return {name: (known or {}).get(name) or hash_file(path) for name, path in names.items()}


def hash_file(path: Path) -> FileEntry:
    """The manifest's entry for a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileEntry(path.stat().st_size, digest)


def check_file(folder: Path, name: str, expected: FileEntry) -> None:
    """Checks that a file of a bundle is what the manifest says.

    Raises:
        CheckError: it is missing or was changed.
        OSError: it can't be read.
    """
    _check_size(folder, name, expected)
    _check_hash(folder, name, expected, hash_file(folder / name))


def _unreadable(folder: Path, error: OSError) -> RequestError:
    return RequestError(f"bundle {folder}: can't be read: {error.strerror}; check the path and its rights")


def _check_file(folder: Path, name: str, manifest: Manifest) -> set[str]:
    """Checks a file, and gives those that it reads, as models may. Its size comes first, which costs nothing."""
    expected = manifest.files[name]
    if name not in {graph.model for graph in manifest.graphs.values()}:
        check_file(folder, name, expected)
        return set()
    _check_size(folder, name, expected)
    from .model_check import check_model

    # It is mapped, and read once for both: models are most of a bundle.
    with (folder / name).open("rb") as file, _mapped(file) as content:
        _check_hash(folder, name, expected, FileEntry(len(content), hashlib.sha256(content).hexdigest()))
        return check_model(folder, name, content, manifest)


@contextlib.contextmanager
def _mapped(file: BinaryIO) -> Iterator[memoryview]:
    if not os.fstat(file.fileno()).st_size:
        yield memoryview(b"")  # which can't be mapped
        return
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as content:
        yield content


def _check_size(folder: Path, name: str, expected: FileEntry) -> None:
    if not (folder / name).is_file():
        raise CheckError(f"bundle {folder}: {name} is missing; build or copy the bundle again")
    size = (folder / name).stat().st_size
    if size != expected.size:
        raise CheckError(
            f"bundle {folder}: {name} was changed since it was verified: it should have {expected.size} bytes and has "
            f"{size}; build the bundle again"
        )


def _check_hash(folder: Path, name: str, expected: FileEntry, found: FileEntry) -> None:
    if found != expected:
        raise CheckError(
            f"bundle {folder}: {name} was changed since it was verified: its SHA-256 should begin with "
            f"{expected.sha256[:12]} and begins with {found.sha256[:12]}; build the bundle again"
        )


def _read_tensor(path: Path, spec: TensorSpec) -> np.ndarray:
    import numpy as np
    import onnx
    from google.protobuf.message import DecodeError
    from onnx import numpy_helper

    from ..values import MAX_MAGNITUDE, first_beyond

    try:
        tensor = onnx.TensorProto.FromString(path.read_bytes())
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            raise CheckError(f"test data {path} keeps its values in another file; don't use this bundle")
        dims, held = list(tensor.dims), len(tensor.raw_data)
        if min(dims, default=0) < 0 or math.prod(dims) * np.dtype(spec.dtype).itemsize != held:
            raise CheckError(
                f"test data {path} should be {spec}, and is {dims} in {held} bytes; build the bundle again"
            )
        array = numpy_helper.to_array(tensor)
    except (OSError, DecodeError, ValueError, TypeError) as error:
        raise CheckError(f"test data {path} can't be read: {brief(error)}; build the bundle again") from error
    sized = len(array.shape) == len(spec.shape) and all(
        found == size if isinstance(size, int) else found > 0 or size == PAST
        for found, size in zip(array.shape, spec.shape, strict=True)
    )
    if str(array.dtype) != spec.dtype or not sized or first_beyond(array, MAX_MAGNITUDE) is not None:
        raise CheckError(
            f"test data {path} should be {spec}, finite and up to {MAX_MAGNITUDE:g}, and is {array.dtype} "
            f"{list(array.shape)}; build it again"
        )
    return array
