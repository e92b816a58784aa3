"""C++: the sample with an ONNX Runtime of Debian's headers and the Python wheel's library."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .damage import overflow
from .handmade import write_handmade
from .language import CheckError, Run, run

__all__ = ["Cpp", "must"]

_SUITE, _PACKAGE = "trixie", "libonnxruntime-dev"
"""Headers of 1.21, which later libraries serve as well; Debian 12 has none of its own."""

_SANITIZERS = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g"

_KNOWN_DIGESTS = (
    "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",  # abc
    "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0",  # a million times a
)
"""FIPS 180-4's examples."""


def _first_input(manifest: dict[str, Any], graph: str) -> dict[str, Any]:
    entry: dict[str, Any] = manifest["graphs"][graph]["inputs"][0]
    return entry


def _widen(manifest: dict[str, Any], *graphs: str) -> None:
    for graph in graphs:
        _first_input(manifest, graph)["shape"][-1] += 1


_LIES: tuple[tuple[str, Callable[[dict[str, Any]], object]], ...] = (
    ("frames is 'time', which is none of the sizes", lambda manifest: manifest.update(frames="time")),
    ("the size sequence is 0", lambda manifest: manifest["sizes"].update(sequence=0)),
    ("the program's kind is 'service'", lambda manifest: manifest["program"].update(kind="service")),
    ("the graphs are not window, stream and prefill", lambda manifest: manifest["graphs"].pop("stream")),
    ("the prefill graph takes or gives other tensors", lambda manifest: manifest["states"].reverse()),
    ("the window graph takes or gives other tensors", lambda manifest: manifest["graphs"]["window"].update(outputs=[])),
    ("the prefill graph takes or gives other tensors", lambda manifest: _widen(manifest, "prefill")),
    ("its tensors are not those in the manifest", lambda manifest: _widen(manifest, "stream", "prefill")),
    ("a limit of batch is 0", lambda manifest: manifest["graphs"]["stream"]["limits"].update(batch=[0, None])),
    ("holds 'float64', which no tensor does", lambda manifest: manifest["states"][0].update(dtype="float64")),
    ("does not begin with the batch", lambda manifest: manifest["states"][0]["shape"].pop(0)),
    ("the values of frame float32", lambda manifest: _first_input(manifest, "stream")["values"].update(kind="ids")),
)
"""What a manifest is refused with, and how it comes to that."""


class Cpp:
    """The sample in examples/cpp: CMake, a C++ compiler, ONNX Runtime, nlohmann/json."""

    name = sample = "cpp"

    def __init__(self) -> None:
        self._root: Path | None = None

    def install(self, folder: Path) -> None:
        """Lays out what a release archive of ONNX Runtime has: include/ and lib/.

        Raises:
            CheckError: the headers could not be had, or the wheel is not installed.
        """
        root = folder / "onnxruntime"
        if not (root / "include" / "onnxruntime_cxx_api.h").is_file():
            _get_headers(folder / "headers", root / "include")
        _link_library(root / "lib")
        self._root = root

    def build(self, sample: Path) -> None:
        """Compiles DIR/cpp.

        Raises:
            CheckError: CMake or the compiler refused it.
        """
        self._compile(sample / self.name)

    def run(self, sample: Path, bundle: Path, *arguments: str) -> Run:
        """Runs the self-check."""
        return run([sample / self.name / "build" / "self_check", bundle, *arguments])

    def extra(self, sample: Path, bundle: Path) -> list[str]:
        """SHA-256, allocations, damaged and wrong input, the whole self-check under sanitizers, and a folder to ship.

        Raises:
            CheckError: one failed.
        """
        source = sample / self.name
        with tempfile.TemporaryDirectory() as temporary:
            place = Path(temporary)
            whole, extra = place / "whole", place / "extra"
            for copy in (whole, extra):
                shutil.copytree(source, copy, ignore=shutil.ignore_patterns("build"))
            shutil.copy(Path(__file__).with_name("cpp_extra.cpp"), extra / "main.cpp")
            for copy in (whole, extra):
                self._compile(copy, f"-DCMAKE_CXX_FLAGS={_SANITIZERS}", "-DCMAKE_BUILD_TYPE=RelWithDebInfo")
            lines = [_check_digests(extra), _check_allocations(extra, bundle)]
            lines += [f"a provider finds the logger: {_check_logger(extra, bundle)}"]
            lines += [_extra(extra, "magnitudes", bundle), *_check_damaged(extra, bundle, place / "bundle")]
            handmade = write_handmade(place / "handmade", prefill=False)
            with_prefill = write_handmade(place / "with_prefill", prefill=True)
            lines += [
                _extra(extra, "handmade", handmade),
                _check_lies(extra, bundle, place / "lies"),
                _check_kernel(extra, bundle),
                *(_check_sanitized(whole, each) for each in (bundle, handmade, with_prefill)),
                self._check_readme(source, bundle, place / "readme"),
                self._check_shipped(source, bundle, place),
            ]
        return lines

    def _compile(self, source: Path, *options: str) -> None:
        if self._root is None:
            raise CheckError("install was not called, so there is no ONNX Runtime to build with")
        build = source / "build"
        configure: list[str | Path] = ["cmake", "-S", source, "-B", build, f"-DONNXRUNTIME_ROOT={self._root}", *options]
        must(run(configure), "CMake could not configure the C++ sample")
        must(run(["cmake", "--build", build]), "the C++ sample does not compile")

    def _check_readme(self, source: Path, bundle: Path, place: Path) -> str:
        """The code in README.md is a program that runs."""
        blocks = re.findall(r"^```cpp\n(.*?)^```$", (source / "README.md").read_text(encoding="utf-8"), re.M | re.S)
        shutil.copytree(source, place / "cpp", ignore=shutil.ignore_patterns("build"))
        shutil.copytree(bundle, place / "bundle")
        (place / "cpp" / "main.cpp").write_text("\n".join(blocks), encoding="utf-8")
        self._compile(place / "cpp")
        must(run([place / "cpp" / "build" / "self_check"], place / "cpp"), "the code in README.md does not run")
        return f"the code in README.md runs: {len(blocks)} blocks"

    def _check_shipped(self, source: Path, bundle: Path, place: Path) -> str:
        """The installed folder, moved elsewhere, finds its library."""
        must(run(["cmake", "--install", source / "build", "--prefix", place / "dist"]), "cmake --install failed")
        shipped = (place / "dist").rename(place / "elsewhere")
        # The library is a link to the wheel's here; a copy shows that nothing else is needed.
        copy = Path(shutil.copytree(shipped, place / "shipped"))
        result = run([copy / "self_check", bundle, "--frames", "20"], environment={"PATH": os.environ["PATH"]})
        must(result, "the installed folder does not run elsewhere")
        return f"installed folder runs after it was moved: {', '.join(sorted(path.name for path in copy.iterdir()))}"


def _get_headers(folder: Path, include: Path) -> None:
    """Downloads Debian's package of headers with an apt of its own, so that the machine's stays as it is."""
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("lists/partial", "cache/archives/partial", "package"):
        (folder / name).mkdir(parents=True)
    (folder / "sources.list").write_text(f"{_source_line()}\n")
    options = []
    for key, value in (
        ("Dir::Etc::sourcelist", folder / "sources.list"),
        ("Dir::Etc::sourceparts", "/dev/null"),
        ("Dir::Etc::preferencesparts", "/dev/null"),
        ("Dir::State::lists", folder / "lists"),
        ("Dir::Cache", folder / "cache"),
        ("Acquire::Languages", "none"),
    ):
        options += ["-o", f"{key}={value}"]
    if os.geteuid() == 0:
        options += ["-o", "APT::Sandbox::User=root"]  # which may write to this folder
    must(run(["apt-get", *options, "update"], folder), f"no package list of Debian's {_SUITE}")
    must(run(["apt-get", *options, "download", _PACKAGE], folder / "package"), f"no {_PACKAGE} of {_SUITE}")
    packages = list((folder / "package").glob("*.deb"))
    if len(packages) != 1:
        raise CheckError(f"apt-get download {_PACKAGE} gave {len(packages)} packages, expected 1")
    must(run(["dpkg-deb", "-x", packages[0], folder / "package"]), f"{packages[0].name} can't be unpacked")
    found = folder / "package" / "usr" / "include" / "onnxruntime"
    if not (found / "onnxruntime_cxx_api.h").is_file():
        raise CheckError(f"{packages[0].name} has no onnxruntime_cxx_api.h")
    include.parent.mkdir(parents=True, exist_ok=True)
    found.rename(include)


def _source_line() -> str:
    """This machine's own source of Debian packages, for the other suite."""
    codename = platform.freedesktop_os_release().get("VERSION_CODENAME", "")
    listed = run(["apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE) $(COMPONENT)", "Created-By: Packages"])
    must(listed, "apt-get does not say where packages come from")
    for line in listed.stdout.splitlines():
        uri, release, component = line.split()
        if (release, component) == (codename, "main"):
            keyring = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
            signed = f"[signed-by={keyring}] " if keyring.is_file() else ""
            return f"deb {signed}{uri} {_SUITE} main"
    raise CheckError(f"apt has no source of {codename or 'Debian'} main here; the C++ check needs a Debian machine")


def _link_library(folder: Path) -> None:
    """The wheel's library, under the names that a release archive gives it."""
    package = importlib.util.find_spec("onnxruntime")
    if package is None or package.origin is None:
        raise CheckError(f"{sys.executable} has no onnxruntime, whose library C++ needs; pip install onnxruntime")
    libraries = sorted(Path(package.origin).parent.glob("capi/libonnxruntime.so.*"))
    if len(libraries) != 1:
        raise CheckError(f"the onnxruntime wheel has {len(libraries)} files libonnxruntime.so.*, expected 1")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in (libraries[0].name, "libonnxruntime.so.1", "libonnxruntime.so"):
        (folder / name).symlink_to(libraries[0])


def must(result: Run, problem: str) -> Run:
    """A run that has to succeed.

    Raises:
        CheckError: it did not.
    """
    if result.returncode != 0:
        detail = (result.stderr.strip() or result.stdout.strip()).splitlines()
        raise CheckError(f"{problem}: exit status {result.returncode}: {' | '.join(detail[-12:])}")
    return result


def _extra(source: Path, *arguments: str | Path) -> str:
    result = run([source / "build" / "self_check", *arguments])
    return must(result, f"{arguments[0]} failed").stdout.strip()


def _check_logger(source: Path, bundle: Path) -> str:
    # A status of ONNX Runtime's own is made by an operator new that the sanitizer stands in for, and freed without.
    environment = {**os.environ, "ASAN_OPTIONS": "alloc_dealloc_mismatch=0"}
    result = run([source / "build" / "self_check", "webgpu", bundle], environment=environment)
    return must(result, "webgpu failed").stdout.strip()


def _check_digests(source: Path) -> str:
    found = _extra(source, "sha256").splitlines()
    data = bytes(i * 7 % 256 for i in range(300))
    expected = [hashlib.sha256(data[:length]).hexdigest() for length in range(301)] + list(_KNOWN_DIGESTS)
    if found != expected:
        wrong = [index for index, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1]]
        raise CheckError(f"SHA-256 is wrong in {len(wrong)} of {len(expected)} cases, the first {wrong[:1]}")
    return f"SHA-256: right for {len(expected)} messages, FIPS 180-4's examples among them"


def _check_allocations(source: Path, bundle: Path) -> str:
    ours, of_runtime, steps = map(int, _extra(source, "allocations", bundle).split())
    if ours != 0:
        raise CheckError(f"{steps} steps called operator new {ours} times outside of ONNX Runtime, expected none")
    each = of_runtime / steps
    return f"{steps} steps with snapshots, rewinds and restores: no operator new, but {each:g} a step in ONNX Runtime"


def _check_damaged(source: Path, bundle: Path, copy: Path) -> list[str]:
    shutil.copytree(bundle, copy)
    tensor = min(copy.rglob("input_*.pb"), key=lambda path: path.stat().st_size)
    _extra(source, "runtimes")
    lines = [
        "an ONNX Runtime below 1.24 is refused",
        f"sanitized, tensors: {_extra(source, 'tensors', tensor)}",
        f"sanitized, manifests: {_extra(source, 'manifests', copy)}",
    ]
    model, foreign = copy / "stream" / "model.onnx", copy / "stream" / "weights.bin"
    foreign.touch()
    _extra(source, "opening", copy, "'stream/weights.bin' is beside a model")
    foreign.unlink()
    content = bytearray(model.read_bytes())
    content[1000] ^= 1
    model.write_bytes(content)
    _extra(source, "opening", copy, "'stream/model.onnx' was changed")
    model.unlink()
    _extra(source, "opening", copy, "'stream/model.onnx' is missing")
    shutil.rmtree(copy)
    shutil.copytree(bundle, copy)
    overflow(copy)
    _extra(source, "overflow", copy)
    lines += ["an output that is not finite is not handed out, and the stream stays where it was"]
    return [*lines, "a model that was changed, is missing or has a foreign file beside it is not opened"]


def _check_lies(source: Path, bundle: Path, copy: Path) -> str:
    """A manifest that promises what can't be, or what its models are not, is refused before a stream is made."""
    shutil.copytree(bundle, copy)
    manifest = copy / "manifest.json"
    whole = manifest.read_text(encoding="utf-8")
    for words, change in _LIES:
        lying = json.loads(whole)
        change(lying)
        manifest.write_text(json.dumps(lying), encoding="utf-8")
        _extra(source, "opening", copy, words)
    return f"{len(_LIES)} manifests that promise what can't be are refused"


def _check_kernel(source: Path, bundle: Path) -> str:
    """The bundle's layers call the kernel that is registered under their body's name, and it makes their states."""
    found = _extra(source, "kernel", bundle / "stream" / "model.onnx")
    if found != "2 2":
        raise CheckError(f"a kernel for SelectiveScan_frame_6to2 should run in 2 layers and make 2 states, got {found}")
    return "a kernel that is registered as edifice::SelectiveScan_frame_6to2 goes before that function"


def _check_sanitized(source: Path, bundle: Path) -> str:
    result = run([source / "build" / "self_check", bundle, "--frames", "200", "--json"])
    must(result, "the self-check fails under AddressSanitizer and UBSan")
    if result.stderr or json.loads(result.stdout)["ok"] is not True:
        raise CheckError(f"the self-check under AddressSanitizer and UBSan: {result.stderr or result.stdout}")
    return f"sanitized, self-check of {bundle.name}: no finding of AddressSanitizer, LeakSanitizer or UBSan"
