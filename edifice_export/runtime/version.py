"""Which versions of ONNX Runtime bundles are run on."""

from __future__ import annotations

import re

import onnxruntime as ort

from ..errors import RequestError

__all__ = ["OLDEST", "refuse_old_runtime", "why_too_old"]

OLDEST = (1, 24)
"""The first that computes every graph: `python -m examples.check.runtimes` tries them all, and docs/embedding.md has
its table. The readers in other languages refuse older ones as well."""


def why_too_old() -> str | None:
    """What is wrong with the version of ONNX Runtime that is installed, or None."""
    found = re.match(r"(\d+)\.(\d+)", ort.__version__)
    if found is not None and (int(found[1]), int(found[2])) >= OLDEST:
        return None
    return (
        f"ONNX Runtime {ort.__version__} is older than {'.'.join(map(str, OLDEST))}, the first that is right on every "
        "graph of a bundle; install a newer one, such as with `pip install --upgrade onnxruntime`"
    )


def refuse_old_runtime() -> None:
    """Nothing is run on a runtime that may be wrong, or fail, on some graphs.

    Raises:
        RequestError: what was found, what is needed, what to do.
    """
    if (problem := why_too_old()) is not None:
        raise RequestError(problem)
