"""C++ on Windows: the sample cross-compiled by MinGW, and run by Wine with the library of a Windows wheel."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from .cpp import Cpp, must
from .damage import OF_BROWSERS
from .downloads import pip, unpack, unpacked
from .language import CheckError, Run, run

__all__ = ["Windows"]

_WHEEL = (
    "onnxruntime==1.31.1",
    "onnxruntime-1.31.1-cp311-cp311-win_amd64.whl",
    "c3d91b5de31e2fc82d71bd65b2b22bddee8b49057a3a36338e9a868e0ea90c05",
)

_COMPILER = "x86_64-w64-mingw32-g++-posix"
_WINE = "/usr/lib/wine/wine64"
_SERVER = "/usr/lib/wine/wineserver"

_NOISE = "Failed to create DXGI factory."
"""A line that onnxruntime.dll writes to standard error on Wine, which has no graphics here."""

_LIBRARIES = ("DirectML.dll", "onnxruntime.dll", "onnxruntime_providers_shared.dll")


class Windows(Cpp):
    """The sample in examples/cpp, for Windows."""

    name, sample = "windows", "cpp"

    def install(self, folder: Path) -> None:
        """Lays out what a release archive for Windows has, and a folder of nlohmann/json without the system's headers.

        Raises:
            CheckError: the headers or the library could not be had.
        """
        super().install(folder)
        root = folder / "onnxruntime-windows"
        pip(_WHEEL, folder, "--platform", "win_amd64", "--python-version", "3.11")
        unpack(folder / _WHEEL[1], "onnxruntime/capi/")
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(folder / "onnxruntime" / "include", root / "include")
        (root / "lib").mkdir()
        for library in unpacked(folder / _WHEEL[1]).glob("onnxruntime/capi/*.dll"):
            shutil.copy(library, root / "lib")
        (root / "lib" / "DirectML.dll").touch()  # as the package of DirectML has one
        definition = root / "onnxruntime.def"
        definition.write_text("LIBRARY onnxruntime.dll\nEXPORTS\nOrtGetApiBase\n", encoding="utf-8")
        archive = root / "lib" / "libonnxruntime.dll.a"
        must(run(["x86_64-w64-mingw32-dlltool", "-d", definition, "-l", archive]), "no import library")
        for part in ("include/nlohmann", "share/cmake/nlohmann_json"):
            shutil.copytree(f"/usr/{part}", root / part, dirs_exist_ok=True)
        self._root = root
        self._environment = {**os.environ, "WINEDEBUG": "-all", "WINEPREFIX": str(folder / "wine")}
        # One that stays for a while, and has none of the pipes of a program: each would start another and wait for it.
        quiet = subprocess.DEVNULL
        subprocess.run([_SERVER, "-p60"], env=self._environment, stdout=quiet, stderr=quiet, check=False)

    def build(self, sample: Path) -> None:
        """Compiles DIR/cpp for Windows.

        Raises:
            CheckError: CMake or the compiler refused it.
        """
        json = f"{self._root}/share/cmake/nlohmann_json"
        compiler = f"-DCMAKE_CXX_COMPILER={_COMPILER}"
        self._compile(sample / self.sample, "-DCMAKE_SYSTEM_NAME=Windows", compiler, f"-Dnlohmann_json_DIR={json}")

    def run(self, sample: Path, bundle: Path, *arguments: str) -> Run:
        """Runs the self-check."""
        return self._run(sample / self.sample / "build" / "self_check.exe", str(bundle), *arguments)

    def extra(self, sample: Path, bundle: Path) -> list[str]:
        """Paths of Windows, a provider that there is not, and the libraries beside the program.

        Raises:
            CheckError: one failed.
        """
        with tempfile.TemporaryDirectory() as temporary:
            place = Path(temporary)
            named = place / "spaced gr\u00f6\u00dfe \U0001f3ae"
            shutil.copytree(bundle, named)
            for name in OF_BROWSERS:
                (named / "stream" / name).touch()
            below = str(named).replace("/", "\\")
            program = sample / self.sample / "build" / "self_check.exe"
            for path in (str(named), f"Z:{below}", f"\\\\?\\Z:{below}", f"\\\\.\\Z:{below}"):
                must(self._run(program, path, "--frames", "20"), f"{path} is not taken")
            (named / "stream" / "weights.bin").touch()
            long = Path(place, *("long" * 25 for _ in range(3)), "bundle")
            shutil.copytree(bundle, long)
            self._refuses(
                program, 1, f"{named.name}: manifest.json: 'stream/weights.bin' is beside a model", str(named)
            )
            self._refuses(program, 2, "characters, and Windows takes 259; move the bundle", str(long))
            self._refuses(program, 2, "'webgpu' is not in this build", str(bundle), "--provider", "webgpu")
            build = sample / self.sample / "build"
            must(run(["cmake", "--install", build, "--prefix", place / "dist"]), "cmake --install failed")
            for folder in (build, place / "dist"):
                found = tuple(sorted(path.name for path in folder.glob("*.dll")))
                if found != _LIBRARIES:
                    raise CheckError(f"beside the program are {found}, expected {_LIBRARIES}")
            must(
                self._run(place / "dist" / "self_check.exe", str(bundle), "--frames", "20"), "the shipped folder fails"
            )
        version = must(run([_WINE, "--version"], environment=self._environment), "Wine does not run").stdout.strip()
        return [
            f"{version}: paths with spaces, umlauts and emoji, and those that begin with \\\\?\\ and \\\\.\\",
            "windows refuses a path that is too long, a foreign file and a provider that there is not",
            f"beside the program: {', '.join(_LIBRARIES)}",
        ]

    def _run(self, program: Path, *arguments: str) -> Run:
        done = run([_WINE, program, *arguments], environment=self._environment)
        lines = done.stderr.splitlines(keepends=True)
        done.stderr = "".join(line for line in lines if line.strip() != _NOISE)
        return done

    def _refuses(self, program: Path, status: int, words: str, *arguments: str) -> None:
        done = self._run(program, *arguments)
        if done.returncode != status or words not in done.stderr or len(done.stderr.splitlines()) != 1:
            said = done.stderr or done.stdout
            raise CheckError(f"windows: expected exit status {status} and {words!r}, got {done.returncode}: {said}")
