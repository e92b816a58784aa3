"""The sample in examples/web, in Debian's Chromium."""

from __future__ import annotations

import contextlib
import functools
import http.server
import json
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from .handmade import write_handmade
from .language import CheckError, Run, run
from .npm import install_packages, link_packages

__all__ = ["Web"]

_LONGEST = 1800
"""Seconds that a page may take: on a software adapter a frame of a large model takes hundreds of milliseconds."""

_STREAMED = 4
"""Seconds that the page streams at 60 Hz before it is rewound."""


class Web:
    """A page with onnxruntime-web; WebGPU runs on a software adapter."""

    name = sample = "web"

    def __init__(self) -> None:
        self._modules: Path | None = None
        self._driver = Path()
        self._chromium = ""

    def install(self, folder: Path) -> None:
        """Gets the packages that the sample and the browser's driver pin; Chromium is the machine's.

        Raises:
            CheckError: they could not be had, or there is no Chromium.
        """
        chromium = shutil.which("chromium")
        if chromium is None:
            raise CheckError("chromium is not installed; .ci/embedding installs what the checks need")
        self._chromium = chromium
        here = Path(__file__).parent
        self._modules = install_packages(here.parent / self.name / "package.json", folder / self.name)
        self._driver = install_packages(here / "web_package.json", folder / "web_driver").parent

    def build(self, sample: Path) -> None:
        """Gives DIR/web its packages.

        Raises:
            CheckError: they were not installed.
        """
        link_packages(self._modules, sample / self.name)

    def run(self, sample: Path, bundle: Path, *arguments: str) -> Run:
        """Opens the page; what it shows comes back as the other programs' output and exit status."""
        query = {"provider": "wasm"} | _parse(arguments)
        with _serve(sample, bundle) as address:
            found = self._drive(address, query)
        result = found["result"]
        if found["errors"] and result["status"] == 0:
            raise CheckError(f"web: errors in the console: {found['errors']}")
        report = json.dumps(result["reports"][0]) + "\n" if result.get("reports") else ""
        error = f"error: {result['error']}\n" if "error" in result else ""
        return Run(["web", str(bundle), *arguments], result["status"], report, error)

    def extra(self, sample: Path, bundle: Path) -> list[str]:
        """The stream at 60 Hz on both providers and of a module, folders that are chosen or dropped, threads, refusals.

        Raises:
            CheckError: one failed.
        """
        lines = []
        with _serve(sample, bundle) as address:
            for provider, place in (("wasm", "CPU"), ("webgpu", "GPU")):
                lines.append(self._check_stream(address, provider, place))
            for way in ("choose", "drop"):
                found = self._drive(address, {"bundle": "nowhere", "provider": "wasm", "frames": "20"}, **{way: bundle})
                _expect(found["result"]["status"] == 0 and not found["errors"], f"a folder to {way}", found)
                lines.append(f"web: takes a folder to {way}")
            for query, says in (
                ({"threads": "2"}, "2 threads can't be had"),
                ({"provider": "nonsense"}, "provider 'nonsense' can't be had"),
                ({"provider": "webgpu"}, "this browser gives no WebGPU adapter"),
                ({"bogus": ""}, "unknown option 'bogus'"),
                ({"frames": "none"}, "frames takes a number from 1, got 'none'"),
            ):
                found = self._drive(address, query, webgpu=False)
                refused = found["result"]["status"] == 2 and says in found["result"].get("error", "")
                _expect(refused, f"status 2 and {says!r}", found)
                lines.append(f"web: refuses {urlencode(query)}: {found['result']['error']}")
        with _serve(sample, bundle, isolated=True) as address:
            found = self._drive(address, {"provider": "wasm", "threads": "2", "frames": "20"})
            _expect(found["result"]["status"] == 0 and not found["errors"], "two threads when isolated", found)
        lines.append("web: two threads where the server isolates the page")
        with tempfile.TemporaryDirectory() as folder:
            handmade = write_handmade(Path(folder) / "handmade", prefill=False)
            with _serve(sample, handmade) as address:
                lines.append(f"{self._check_stream(address, 'wasm', 'CPU')} (a module of two inputs and two outputs)")
        return lines

    def screenshot(self, sample: Path, bundle: Path, path: Path, scheme: str = "light", width: int = 1280) -> None:
        """Writes a picture of the page as it streams.

        Raises:
            CheckError: the page failed.
        """
        with _serve(sample, bundle) as address:
            query = {"provider": "wasm", "frames": "600"}
            picture = {"screenshot": path.absolute(), "scheme": scheme, "width": width}
            found = self._drive(address, query, webgpu=False, stream=10, **picture)
        _expect(found["result"]["status"] == 0, "a picture", found)

    def _check_stream(self, address: str, provider: str, place: str) -> str:
        found = self._drive(address, {"provider": provider, "frames": "20"}, stream=_STREAMED)
        numbers = found["numbers"]
        _expect(found["result"]["status"] == 0 and not found["errors"], f"a stream on {provider}", found)
        _expect(found["state"] == f"states on the {place}", f"states on the {place}", found)
        same = numbers["replayed, same bits"].split(" of ")
        _expect(len(same) == 2 and same[0] == same[1], "the same bits when frames are replayed", found)
        return (
            f"web: {provider}: streamed {numbers['frame']} frames with {found['state']}, p50 {numbers['p50 ms']} ms, "
            f"p99 {numbers['p99 ms']} ms, {numbers['over the budget']} over the budget; "
            f"{numbers['replayed, same bits']} replayed frames bitwise the same"
        )

    def _drive(self, address: str, query: dict[str, str], **job: Any) -> dict[str, Any]:
        """Opens the page and does what web_driver.mjs can; WebGPU is there unless told otherwise."""
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
            job = {"webgpu": True, "seconds": _LONGEST} | job
            job |= {"url": f"{address}/web/?{urlencode(query)}", "chromium": self._chromium, "profile": profile}
            driver = Path(__file__).with_name("web_driver.mjs")
            done = run(["node", driver, self._driver.absolute(), json.dumps(job, default=str)], seconds=2 * _LONGEST)
        if done.returncode != 0:
            raise CheckError(f"web: the browser's driver failed: {' / '.join(done.stderr.strip().splitlines()[:6])}")
        found: dict[str, Any] = json.loads(done.stdout)
        return found


def _parse(arguments: tuple[str, ...]) -> dict[str, str]:
    """Arguments of a command line as those of the page's address."""
    query = {}
    waiting = list(arguments)
    while waiting:
        name, equals, value = waiting.pop(0).removeprefix("--").partition("=")
        if name == "json":
            continue
        query[name] = value if equals or not waiting or waiting[0].startswith("--") else waiting.pop(0)
    return query


def _expect(condition: bool, what: str, found: dict[str, Any]) -> None:
    if not condition:
        raise CheckError(f"web: expected {what}, found {json.dumps(found)[:2000]}")


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a scaffolded folder, and in it any bundle as `bundle`."""

    protocol_version = "HTTP/1.1"

    def __init__(self, *args: Any, bundle: Path, isolated: bool, **kwargs: Any) -> None:
        self._bundle, self._isolated = bundle, isolated
        super().__init__(*args, **kwargs)

    def translate_path(self, path: str) -> str:
        """The file that an address stands for."""
        place = Path(super().translate_path(path))
        inside = place.relative_to(self.directory)
        return str(self._bundle.joinpath(*inside.parts[1:]) if inside.parts[:1] == ("bundle",) else place)

    def end_headers(self) -> None:
        """Adds what gives a page threads, if asked to."""
        if self._isolated:
            self.send_header("Cross-Origin-Opener-Policy", "same-origin")
            self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        super().end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


@contextlib.contextmanager
def _serve(sample: Path, bundle: Path, isolated: bool = False) -> Iterator[str]:
    handler = functools.partial(_Handler, directory=str(sample.absolute()), bundle=bundle.absolute(), isolated=isolated)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://localhost:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
