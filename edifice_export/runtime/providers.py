"""Execution providers by short name: which are usable here, and if not, why; never another one in their place."""

from __future__ import annotations

import ctypes
import dataclasses
import difflib
import functools
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as _state

from ..arguments import text, whole_number
from ..errors import CheckError, ExportError, RequestError, brief
from .version import refuse_old_runtime, why_too_old

__all__ = [
    "MAX_THREADS",
    "OPTIMIZATION_LEVELS",
    "ORT_ERRORS",
    "all_providers",
    "device_of",
    "failed",
    "open_session",
    "placement",
    "short_name",
    "why_not_usable",
]

OPTIMIZATION_LEVELS = {
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "none": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
}
"""ONNX Runtime's graph optimisation, by name."""

_BUILT_IN = frozenset(ort.get_available_providers())
"""Providers of this build of ONNX Runtime; the list itself grows when a plug-in is registered."""

ORT_ERRORS: tuple[type[Exception], ...] = (
    RuntimeError,
    ValueError,
    *(kind for kind in vars(_state).values() if isinstance(kind, type) and issubclass(kind, Exception)),
)
"""What ONNX Runtime raises: classes of its own without a common base, and Python's from its Python layer."""

_PROBE_ERRORS: tuple[type[Exception], ...] = (ExportError, *ORT_ERRORS)

MAX_THREADS = 1024
"""More only cost memory: ONNX Runtime starts them all."""

_FATAL = 4


@dataclasses.dataclass(frozen=True)
class _Provider:
    """How to get a provider, and how to make it compute in the precision of the graph.

    Attributes:
        name: ONNX Runtime's own name.
        package: what to install.
        plugin: module of a package that carries it as a plug-in library, if there is one.
        not_built_in: why an ONNX Runtime that was built with it is not used, if so.
        libraries: its shared libraries, to find out what a broken installation lacks.
        device: what it needs, if more than any processor.
        options: provider options without which it would round more coarsely than the graph says.
    """

    name: str
    package: str
    plugin: str = ""
    not_built_in: str = ""
    libraries: tuple[str, ...] = ()
    device: str = ""
    options: tuple[tuple[str, str], ...] = ()


_PROVIDERS = {
    "cpu": _Provider("CPUExecutionProvider", "onnxruntime"),
    "cuda": _Provider(
        "CUDAExecutionProvider",
        "onnxruntime-gpu",
        libraries=("libonnxruntime_providers_cuda.so", "onnxruntime_providers_cuda.dll"),
        device="an NVIDIA GPU with its driver",
        options=(("use_tf32", "0"),),
    ),
    "tensorrt": _Provider(
        "TensorrtExecutionProvider",
        "onnxruntime-gpu and tensorrt",
        libraries=("libonnxruntime_providers_tensorrt.so", "onnxruntime_providers_tensorrt.dll"),
        device="an NVIDIA GPU with its driver",
    ),
    "dml": _Provider("DmlExecutionProvider", "onnxruntime-directml, on Windows", device="a DirectX 12 GPU"),
    "openvino": _Provider(
        "OpenVINOExecutionProvider",
        "onnxruntime-ep-openvino",
        plugin="onnxruntime_ep_openvino",
        not_built_in="the OpenVINO of onnxruntime-openvino computes some graphs wrongly; uninstall that package, and "
        "install onnxruntime and onnxruntime-ep-openvino",
        device="an Intel processor or GPU",
    ),
    "web": _Provider(
        "WebGpuExecutionProvider",
        "onnxruntime-ep-webgpu",
        plugin="onnxruntime_ep_webgpu",
        device="a GPU with a Vulkan, Metal or DirectX 12 driver",
    ),
    "coreml": _Provider("CoreMLExecutionProvider", "onnxruntime, on macOS"),
}


def short_name(name: str) -> str:
    """The short name of a provider that ONNX Runtime calls `name`."""
    for short, provider in _PROVIDERS.items():
        if provider.name == name:
            return short
    return name.removesuffix("ExecutionProvider").lower()


def all_providers() -> list[str]:
    """Short names of every provider that this ONNX Runtime knows of, the named ones of this module first."""
    known = [short_name(name) for name in ort.get_all_providers()]
    return [name for name in _PROVIDERS if name in known] + sorted(set(known) - set(_PROVIDERS))


@functools.cache
def why_not_usable(short: str) -> str | None:
    """What is missing for a provider to run a graph here, or None if it runs one.

    The answer comes from running a small graph: what ONNX Runtime lists as available says only what it was built with.

    Raises:
        RequestError: there is no such provider.
    """
    provider = _get(short)
    if (problem := why_too_old()) is not None:
        return problem
    if provider.name in _BUILT_IN and provider.not_built_in:
        return provider.not_built_in
    if provider.name not in _BUILT_IN:
        if not provider.plugin:
            return f"this ONNX Runtime was built without it; install {provider.package}"
        if importlib.util.find_spec(provider.plugin) is None:
            return f"its package is not installed; install {provider.package}"
    try:
        session = _create_session(_probe_model(), [short], ort.SessionOptions())
        (sums,) = session.run(None, {"x": np.array([[[1, 2], [4, 3]]], np.float32)})
    except _PROBE_ERRORS as error:
        return _missing_library(provider) or _missing_device(provider) or brief(error)
    if not placement(session).get(short):
        return "it takes no node of a graph of standard operators"
    if not np.allclose(sums.sum(-1), [[1, 2]], atol=1e-5):
        return f"it gives wrong numbers: two sums that should be 1 and 2 are {sums.sum(-1).ravel().tolist()}"
    return None


def open_session(
    model: Path,
    providers: Sequence[str],
    threads: int | None = None,
    optimization: str = "all",
    optimized: Path | None = None,
) -> ort.InferenceSession:
    """Opens a session on the first usable providers of a list in order of preference.

    Args:
        model: the .onnx file.
        providers: short names. A single one must be usable; of several, those that are not are passed over.
        threads: threads within an operator; ONNX Runtime's choice if None.
        optimization: one of OPTIMIZATION_LEVELS.
        optimized: where to write the graph that ONNX Runtime makes of the model, its weights beside it; if not None.

    Raises:
        RequestError: an ONNX Runtime that is too old, an unknown name, no provider of the list is usable (with the
            reason for each), a provider that takes no node of this graph, or settings out of range.
        CheckError: ONNX Runtime can't open the model.
    """
    refuse_old_runtime()
    if not providers:
        raise RequestError("providers: the list is empty; name at least one, such as cpu")
    if threads is not None:
        threads = whole_number("threads", threads, 1, MAX_THREADS)
    text("optimization", optimization, OPTIMIZATION_LEVELS)
    reasons = {short: why_not_usable(short) for short in providers}
    usable = [short for short, reason in reasons.items() if reason is None]
    if not usable:
        details = "; ".join(f"{short}: {reason}" for short, reason in reasons.items())
        raise RequestError(
            f"no provider that was asked for is usable here: {details}. `edifice-export doctor` shows all"
        )
    options = ort.SessionOptions()
    options.graph_optimization_level = OPTIMIZATION_LEVELS[optimization]
    if threads is not None:
        options.intra_op_num_threads = threads
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", f"{optimized.name}.data"
        )
    session = _create_session(model, usable, options)
    if placement(session).get(usable[0], 0) == 0:
        raise RequestError(f"provider {usable[0]}: takes no node of {model.name}; use another, such as cpu")
    return session


def placement(session: ort.InferenceSession) -> dict[str, int]:
    """How many nodes each provider really runs, by short name, after ONNX Runtime's own fusions."""
    counts: dict[str, int] = {}
    for part in session.get_provider_graph_assignment_info():
        short = short_name(part.ep_name)
        counts[short] = counts.get(short, 0) + len(part.get_nodes())
    return counts


def device_of(session: ort.InferenceSession) -> str:
    """Where a session's first provider keeps its tensors, as ONNX Runtime names it: cpu, cuda or dml."""
    first = short_name(session.get_providers()[0])
    return {"cuda": "cuda", "tensorrt": "cuda", "dml": "dml"}.get(first, "cpu")


def _get(short: str) -> _Provider:
    if short in _PROVIDERS:
        return _PROVIDERS[short]
    for name in ort.get_all_providers():
        if short_name(name) == short:
            return _Provider(name, f"an ONNX Runtime built with {name}")
    near = difflib.get_close_matches(short_name(short).lower(), all_providers(), n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise RequestError(f"provider {short!r} is unknown: {hint}There are {', '.join(all_providers())}")


def _create_session(model: Path | bytes, shorts: Sequence[str], options: ort.SessionOptions) -> ort.InferenceSession:
    """A session that has each of these providers, or an error."""
    options.log_severity_level = _FATAL
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    wanted = [_get(short) for short in shorts]
    plugged = [provider for provider in wanted if provider.name not in _BUILT_IN]
    source = model if isinstance(model, bytes) else str(model)
    ort.set_default_logger_severity(_FATAL)
    try:
        if plugged:
            _add_plugins(plugged, options)
            others = [provider for provider in wanted if provider not in plugged and provider.name != _CPU]
            if others:
                raise RequestError(
                    f"providers {' and '.join(shorts)} can't be combined: the first is a plug-in; name one"
                )
            session = ort.InferenceSession(source, options)
        else:
            providers = [(provider.name, dict(provider.options)) for provider in wanted]
            session = ort.InferenceSession(source, options, providers=providers, enable_fallback=False)
    except ORT_ERRORS as error:
        shown = "a probe" if isinstance(model, bytes) else model
        raise CheckError(f"ONNX Runtime can't open {shown}: {brief(error)}; build it again") from error
    finally:
        ort.set_default_logger_severity(_DEFAULT_SEVERITY)
    absent = [provider.name for provider in wanted if provider.name not in session.get_providers()]
    if absent:
        raise RequestError(f"ONNX Runtime left out {', '.join(absent)}")
    return session


_CPU = "CPUExecutionProvider"
_DEFAULT_SEVERITY = 2


def _add_plugins(providers: Sequence[_Provider], options: ort.SessionOptions) -> None:
    for provider in providers:
        module = importlib.import_module(provider.plugin)
        if not any(device.ep_name == provider.name for device in ort.get_ep_devices()):
            ort.register_execution_provider_library(provider.plugin, module.get_library_path())
        devices = [device for device in ort.get_ep_devices() if device.ep_name == provider.name]
        if not devices:
            raise RequestError(f"no device for {provider.name}")
        options.add_provider_for_devices(devices[:1], _plugin_options(provider, devices[0]))


def _plugin_options(provider: _Provider, device: Any) -> dict[str, str]:
    if provider.name == "OpenVINOExecutionProvider":
        # Without it OpenVINO computes in bfloat16 where the processor can, with errors of 1e-2.
        name = dict(device.ep_metadata).get("ov_device", "CPU")
        return {"load_config": json.dumps({name: {"INFERENCE_PRECISION_HINT": "f32"}})}
    return dict(provider.options)


def _missing_library(provider: _Provider) -> str | None:
    """What the loader says of a provider's own library, which ONNX Runtime keeps to itself."""
    folder = Path(ort.__file__).parent / "capi"
    for library in provider.libraries:
        if (folder / library).is_file():
            try:
                ctypes.CDLL(str(folder / library))
            except OSError as error:
                return f"a library it needs can't be loaded: {brief(error)}; install what {provider.package} needs"
    return None


def _missing_device(provider: _Provider) -> str | None:
    return f"no device was found; it needs {provider.device}" if provider.device else None


def failed(given: str, error: Exception) -> CheckError:
    """The error for a run that ONNX Runtime gave up, given so many frames."""
    return CheckError(
        f"ONNX Runtime failed on {given}: {brief(error)}; give a smaller batch or fewer frames, or see what "
        "`edifice-export verify` says"
    )


def _probe_model() -> bytes:
    """A small graph of what bundles are made of: a product, a norm, a softmax, and a function with a Scan in it."""
    import onnx

    return bytes(onnx.parser.parse_model(_PROBE).SerializeToString())


_PROBE = """
<ir_version: 10, opset_import: ["": 18, "edifice": 1]>
probe (float[1, t, 2] x) => (float[1, t, 2] y)
<float[2] ones = {1, 1}, float[2] zeros = {0, 0}, float[2, 2] weight = {1, 2, 3, 4}>
{
    normed = LayerNormalization <axis = -1> (x, ones, zeros)
    product = MatMul (normed, weight)
    weights = Softmax <axis = -1> (product)
    y = edifice.Accumulate (weights)
}
<domain: "edifice", opset_import: ["": 18]>
Accumulate (x) => (y)
{
    start = Constant <value = float[1, 2] {0, 0}> ()
    last, y = Scan <num_scan_inputs = 1, scan_input_axes = [1], scan_output_axes = [1], body = step
        (float[1, 2] h, float[1, 2] x_t) => (float[1, 2] h_next, float[1, 2] y_t)
        { h_next = Add (h, x_t)  y_t = Identity (h_next) }> (start, x)
}
"""
