"""Doctor: what works on this machine, found out by running it."""

from __future__ import annotations

import dataclasses
import platform
from importlib.metadata import PackageNotFoundError, version

from ..machine import why_no_torch
from .providers import all_providers, why_not_usable

__all__ = ["Diagnosis", "ProviderState", "diagnose", "installed"]

_PACKAGES = ("edifice-export", "onnxruntime", "onnx", "numpy", "torch", "onnxscript", "safetensors")
_PROVIDER_PACKAGES = ("onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-ep-openvino", "onnxruntime-ep-webgpu")


@dataclasses.dataclass(frozen=True)
class ProviderState:
    """Whether a provider runs a graph here, and if not, what is missing."""

    name: str
    usable: bool
    missing: str | None


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """The machine as this tool sees it: versions of the packages (None if absent) and every provider."""

    python: str
    platform: str
    packages: dict[str, str | None]
    can_build: bool
    providers: list[ProviderState]


def diagnose() -> Diagnosis:
    """Runs a small graph on every provider that ONNX Runtime knows, and tries to import torch."""
    states = []
    for name in all_providers():
        reason = why_not_usable(name)
        states.append(ProviderState(name, reason is None, reason))
    packages = {package: installed(package) for package in _PACKAGES}
    packages |= {package: found for package in _PROVIDER_PACKAGES if (found := installed(package)) is not None}
    return Diagnosis(platform.python_version(), platform.platform(), packages, why_no_torch() is None, states)


def installed(package: str) -> str | None:
    """The version of a package, or None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
