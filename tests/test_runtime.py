"""Running: providers that are what they say, inputs that are checked, settings that arrive."""

from __future__ import annotations

import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from cli_helpers import Capture, refused
from conftest import TINY, any_architecture

import edifice_export as ee
from edifice_export.errors import RequestError
from edifice_export.runtime import doctor, providers
from edifice_export.runtime.providers import all_providers, open_session, short_name, why_not_usable
from edifice_export.runtime.version import OLDEST, why_too_old

WIDTH, HIDDEN = TINY["embed_dim"], TINY["hidden_size"]


def frames(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((*shape, WIDTH)).astype(np.float32)


def test_one_window_and_a_batch_of_them(bundle: ee.Bundle) -> None:
    model = ee.load(bundle.path)
    x = frames(3, 7)
    assert model(x).shape == (3, HIDDEN)
    for entry in range(3):
        np.testing.assert_allclose(model(x[entry]), model(x)[entry], atol=1e-6)
    assert model(x).dtype == np.float32
    assert (model.window_size, model.inputs[0].name, model.outputs[0].name) == (7, "state_sequence", "output")


@any_architecture
def test_a_view_of_an_array_gives_what_a_copy_gives(bundle: ee.Bundle) -> None:
    model = ee.load(bundle)
    wide = frames(7, 2, seed=1).swapaxes(0, 1)[:, ::2]
    np.testing.assert_array_equal(model(wide), model(wide.copy()))


@pytest.mark.parametrize(
    ("x", "says"),
    [
        (frames(7)[:, :-1], "[7, 5]"),
        (frames(1, 1, 7), "[1, 1, 7, 6]"),
        (frames(), "[6]"),
        (frames(2, 7).astype(np.float64), "float64"),
        (frames(2, 7).astype(np.float16), ".astype(np.float32)"),
        (np.zeros((2, 7, WIDTH), np.int32), "int32"),
        (frames(0), "[0, 6], which holds nothing"),
        (frames(0, 7), "[0, 7, 6], which holds nothing"),
        (np.where(np.arange(7)[:, None] == 3, np.float32("nan"), frames(7)), "nan at [3, 0]"),
        (np.where(np.arange(WIDTH) == 2, np.float32("-inf"), frames(2, 7)), "-inf at [0, 0, 2]"),
        ([[0.0] * WIDTH], "list"),
    ],
)
@any_architecture
def test_wrong_inputs_are_refused_by_name_and_shape(bundle: ee.Bundle, x: Any, says: str) -> None:
    with pytest.raises(ee.RequestError) as caught:
        ee.load(bundle)(x)
    assert "state_sequence" in str(caught.value)
    assert says in str(caught.value)


@any_architecture
def test_threads_and_optimization_arrive(bundle: ee.Bundle) -> None:
    plain = ee.load(bundle, threads=1, optimization="none")
    options = plain.session.get_session_options()
    assert options.intra_op_num_threads == 1
    assert options.graph_optimization_level == ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    best = ee.load(bundle)
    assert sum(best.placement.values()) < sum(plain.placement.values())
    np.testing.assert_allclose(plain(frames(2, 7)), best(frames(2, 7)), atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"threads": 0},
        {"threads": -1},
        {"threads": 1025},
        {"threads": 1.5},
        {"threads": True},
        {"optimization": "fast"},
        {"providers": []},
    ],
)
@any_architecture
def test_wrong_settings_are_refused(bundle: ee.Bundle, settings: dict[str, Any]) -> None:
    with pytest.raises(ee.RequestError, match=next(iter(settings))):
        ee.load(bundle, **settings)


@any_architecture
def test_what_was_used_is_reported(bundle: ee.Bundle) -> None:
    assert ee.load(bundle).providers == ["cpu"]
    assert ee.load(bundle, providers="cpu").placement["cpu"] > 10


def unusable() -> list[str]:
    return [name for name in all_providers() if why_not_usable(name) is not None]


def test_there_is_something_unusable_to_test_with() -> None:
    assert "dml" in unusable()


@pytest.mark.parametrize("provider", unusable())
@any_architecture
def test_a_provider_that_is_not_usable_is_an_error_that_says_why(bundle: ee.Bundle, provider: str) -> None:
    reason = why_not_usable(provider)
    assert reason
    with pytest.raises(ee.RequestError) as caught:
        ee.load(bundle, providers=provider)
    assert f"{provider}: {reason}" in str(caught.value)


@any_architecture
def test_a_list_is_an_order_of_preference(bundle: ee.Bundle) -> None:
    assert ee.load(bundle, providers=["dml", "cpu"]).providers == ["cpu"]
    with pytest.raises(ee.RequestError, match=r"dml: .*; tensorrt: "):
        ee.load(bundle, providers=["dml", "tensorrt"])


@any_architecture
def test_an_unknown_provider_is_an_error_even_beside_a_good_one(bundle: ee.Bundle) -> None:
    with pytest.raises(ee.RequestError, match=r"'gpu' is unknown: .*There are cpu, cuda"):
        ee.load(bundle, providers=["cpu", "gpu"])


@any_architecture
def test_a_provider_that_onnxruntime_lists_and_then_drops_is_not_used(
    bundle: ee.Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What happens with CUDA where there is no GPU: the session opens, on the CPU."""

    class Pretender(ort.InferenceSession):
        def __init__(self, model: Any, options: Any, **_: Any) -> None:
            super().__init__(model, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(providers, "_BUILT_IN", frozenset({"CPUExecutionProvider", "CUDAExecutionProvider"}))
    monkeypatch.setattr(providers.ort, "InferenceSession", Pretender)
    why_not_usable.cache_clear()
    try:
        with pytest.raises(ee.RequestError, match="cuda: no device was found; it needs an NVIDIA GPU"):
            ee.load(bundle, providers="cuda")
        assert ee.load(bundle, providers=["cuda", "cpu"]).providers == ["cpu"]
    finally:
        why_not_usable.cache_clear()


def test_a_library_that_lacks_another_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "capi").mkdir()
    (tmp_path / "capi/libonnxruntime_providers_cuda.so").write_bytes(b"not a library")
    monkeypatch.setattr(providers.ort, "__file__", str(tmp_path / "__init__.py"))
    reason = providers._missing_library(providers._PROVIDERS["cuda"])
    assert reason is not None
    assert "libonnxruntime_providers_cuda.so" in reason


def test_short_names_are_unique_and_go_both_ways() -> None:
    names = [short_name(name) for name in ort.get_all_providers()]
    assert len(set(names)) == len(names)
    assert {"cpu", "cuda", "dml", "openvino", "tensorrt", "web"} <= set(names)


def test_cuda_computes_in_float32_not_tf32() -> None:
    assert dict(providers._PROVIDERS["cuda"].options)["use_tf32"] == "0"


def test_the_doctor_tries_every_provider() -> None:
    diagnosis = doctor.diagnose()
    assert [state.name for state in diagnosis.providers] == all_providers()
    assert len(diagnosis.providers) == len(ort.get_all_providers())
    assert {state.name: state.usable for state in diagnosis.providers}["cpu"]
    assert all(state.usable == (state.missing is None) for state in diagnosis.providers)
    assert diagnosis.can_build


def test_the_doctor_sees_wrong_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "_PROBE", providers._PROBE.replace("Add (h", "Mul (h"))
    why_not_usable.cache_clear()
    try:
        assert "wrong numbers" in str(why_not_usable("cpu"))
    finally:
        why_not_usable.cache_clear()


def test_many_threads_share_a_model(bundle: ee.Bundle) -> None:
    model = ee.load(bundle, threads=1)
    inputs = [frames(1 + index % 3, 1 + index % 7, seed=index) for index in range(16)]
    expected = [model(x) for x in inputs]
    found: dict[int, list[np.ndarray]] = {}

    def work(thread: int) -> None:
        found[thread] = [model(x) for _ in range(5) for x in inputs]

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for outputs in found.values():
        for output, wanted in zip(outputs, expected * 5, strict=True):
            np.testing.assert_array_equal(output, wanted)
    assert len(found) == 4


def test_what_a_program_ships_is_enough(bundle: ee.Bundle, tmp_path: Path) -> None:
    manifest = bundle.manifest
    used = {graph.model for graph in manifest.graphs.values()}
    used |= {state.initial for state in manifest.states if isinstance(state.initial, str)}
    for name in ("manifest.json", *used):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(bundle.file(name), tmp_path / name)
    whole, shipped, x = ee.load(bundle), ee.load(tmp_path), frames(7)
    np.testing.assert_array_equal(shipped(x), whole(x))
    assert shipped.has_stream == ("stream" in manifest.graphs)
    if not shipped.has_stream:
        return
    np.testing.assert_array_equal(shipped.stream().prefill(x), whole.stream().prefill(x))
    # What is missing is told when it is wanted, and stops nothing else.
    for name in sorted(used - {"window/model.onnx"}):
        kept = (tmp_path / name).read_bytes()
        (tmp_path / name).unlink()
        without = ee.load(tmp_path)
        np.testing.assert_array_equal(without(x), whole(x))
        with pytest.raises(ee.CheckError, match=f"{name} is missing"):
            without.stream()
        (tmp_path / name).write_bytes(kept)


@pytest.mark.parametrize("given", ["CPU", "CPUExecutionProvider", "cdua"])
@any_architecture
def test_an_unknown_provider_is_told_the_nearest(bundle: ee.Bundle, given: str) -> None:
    near = "cuda" if given == "cdua" else "cpu"
    with pytest.raises(ee.RequestError, match=f"did you mean {near}"):
        ee.load(bundle, providers=given)


@any_architecture
def test_what_was_passed_over_is_said(bundle: ee.Bundle) -> None:
    assert ee.load(bundle).passed_over == {}
    assert ee.load(bundle, providers=["dml", "cpu"]).passed_over == {"dml": why_not_usable("dml")}


@any_architecture
def test_onnxruntimes_own_errors_become_ours(bundle: ee.Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its classes have no base in common with Python's RuntimeError."""
    failure = providers._state.EPFail
    assert not issubclass(failure, RuntimeError)
    model = ee.load(bundle)

    class Fails:
        def run(self, *_: Any) -> None:
            raise failure("out of device memory")

    model.session = Fails()  # type: ignore[assignment]
    with pytest.raises(ee.CheckError, match="out of device memory"):
        model(frames(7))

    def refuse(*_: Any, **__: Any) -> None:
        raise failure("driver is too old")

    monkeypatch.setattr(providers, "_BUILT_IN", frozenset({"CPUExecutionProvider", "TensorrtExecutionProvider"}))
    monkeypatch.setattr(providers.ort, "InferenceSession", refuse)
    why_not_usable.cache_clear()
    try:
        assert "needs an NVIDIA GPU" in str(why_not_usable("tensorrt"))
        assert "driver is too old" in str(why_not_usable("cpu"))
    finally:
        why_not_usable.cache_clear()


@pytest.fixture
def on_version(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Has ONNX Runtime say that it is of another version."""

    def say(version: str) -> None:
        monkeypatch.setattr(ort, "__version__", version)
        why_not_usable.cache_clear()

    yield say
    why_not_usable.cache_clear()


@pytest.mark.parametrize("version", ["1.23.2", "1.21.1", "1.9.0", "0.25.0", "1.23.0.dev20260114", "unknown"])
def test_an_old_runtime_is_refused(
    bundle: ee.Bundle,
    on_version: Callable[[str], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: Capture,
    version: str,
) -> None:
    """By everything that runs a graph, in one error: what was found, what is needed, what to do."""
    monkeypatch.chdir(tmp_path)
    on_version(version)
    expected = f"ONNX Runtime {version} is older than 1.24, the first that is right on every graph of a bundle; install"
    for run in (
        lambda: ee.load(bundle.path),
        lambda: ee.load(bundle.path, providers=["cuda", "cpu"]),
        lambda: ee.verify(bundle.path),
        lambda: ee.bench(bundle.path),
        lambda: open_session(bundle.file("window/model.onnx"), ["cpu"]),
    ):
        with pytest.raises(RequestError, match=re.escape(expected)):
            run()
    np.save(tmp_path / "x.npy", frames(7))
    arguments = ("run", bundle.path, "--input", tmp_path / "x.npy", "--output", tmp_path / "y.npy")
    assert refused(capfd, *arguments).startswith(f"error: {expected}")
    assert not (tmp_path / "y.npy").exists()
    assert all(state.missing == why_too_old() for state in doctor.diagnose().providers)


@pytest.mark.parametrize("version", ["1.24.1", "1.100.0", "2.0.0", "1.31.0.dev20260914"])
def test_newer_runtimes_are_taken(bundle: ee.Bundle, on_version: Callable[[str], None], version: str) -> None:
    on_version(version)
    assert ee.load(bundle.path)(frames(7)).shape == (HIDDEN,)


def test_all_readers_refuse_the_same_runtimes() -> None:
    """Each has a number of its own, as each is to be copied; and the package asks for no older one."""
    root = Path(__file__).parents[1]
    oldest = ".".join(map(str, OLDEST))
    for path, pattern in (
        ("examples/cpp/edifice/runtime.hpp", r"kOldestRuntime = (\d+);"),
        ("examples/csharp/EdificeModel.cs", r"OldestRuntime = new Version\((\d+, \d+)\);"),
        ("examples/javascript/edifice.mjs", r"OLDEST_RUNTIME = '([\d.]+)';"),
        ("pyproject.toml", r'"onnxruntime>=(\d+\.\d+)'),
        ("docs/embedding.md", r"ONNX Runtime (\d+\.\d+) or newer"),
    ):
        (found,) = set(re.findall(pattern, (root / path).read_text(encoding="utf-8")))
        assert found.replace(", ", ".") in (oldest, oldest.removeprefix("1.")), path


def test_the_openvino_that_is_built_in_is_refused(bundle: ee.Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one of onnxruntime-openvino 1.24.1 computes a window of the State Space Transformer wrongly."""
    monkeypatch.setattr(providers, "_BUILT_IN", providers._BUILT_IN | {"OpenVINOExecutionProvider"})
    why_not_usable.cache_clear()
    with pytest.raises(RequestError, match="OpenVINO of onnxruntime-openvino computes some graphs wrongly; uninstall"):
        ee.load(bundle.path, providers="openvino")
    why_not_usable.cache_clear()
