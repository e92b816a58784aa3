"""Verification of somebody's module: its whole outputs, at many sizes, most of which were never traced."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from ..bundle.bundle import Bundle
from ..runtime.arrays import check_sizes
from ..runtime.model import Model
from ..specification import Sizes
from ..values import Arrays, draw
from .report import LEAST, Given, Trial, attempt, compare

if TYPE_CHECKING:
    from ..programs.module_program import ModuleProgram
    from .reference import Reference

__all__ = ["count_calls", "run_calls"]

MAGNITUDES = (1e-3, 1e2)
"""Of inputs that may be any numbers, where the module bears them; they are run at the sizes of the example."""


@dataclasses.dataclass(frozen=True)
class _Call:
    """One random input."""

    sizes: Sizes
    seed: int
    magnitude: float = 1.0


def count_calls(bundle: Bundle, reference: Reference | None, every_size: bool) -> int:
    """How many comparisons run_calls makes for each provider."""
    drawn = _calls(_program_of(reference), every_size) if reference is not None else []
    return len(bundle.manifest.graphs["window"].test_data) + len(drawn)


def run_calls(
    bundle: Bundle, models: Mapping[str, Model], reference: Reference | None, every_size: bool, tolerance: float
) -> Iterator[Iterator[Trial]]:
    """Every comparison of a module's window graph, as jobs that only run ONNX Runtime: the module runs before each.

    Args:
        bundle: with a window graph.
        models: by provider.
        reference: the module, or None to compare with the test data only.
        every_size: up to the example's, see ModuleProgram.verified_sizes.
        tolerance: see defaults.TOLERANCE.
    """
    for provider, model in models.items():
        yield _run_test_data(bundle, model, provider, tolerance)
    if reference is None:
        return
    program = _program_of(reference)
    for call in _calls(program, every_size):
        inputs = _inputs_of(program, call)
        expected = program.run(inputs)
        for provider, model in models.items():
            yield _run(model, inputs, expected, _Judge(provider, tolerance, "reference", call))


def _program_of(reference: Reference) -> ModuleProgram:
    from .reference import ModuleReference

    assert isinstance(reference, ModuleReference), "only modules are called"
    return reference.program


def _calls(program: ModuleProgram, every_size: bool) -> list[_Call]:
    calls = [_Call(sizes, seed) for seed, sizes in enumerate(program.verified_sizes(every_size))]
    if any(spec.values.kind == "normal" for spec in program.inputs("window")):
        larger = [_Call(program.example_sizes, index, size) for index, size in enumerate(MAGNITUDES, len(calls))]
        calls += [call for call in larger if _is_finite(program, call)]
    return calls


def _is_finite(program: ModuleProgram, call: _Call) -> bool:
    """Whether the module itself bears so large numbers in float32."""
    outputs = program.run(_inputs_of(program, call), module=program.private)
    return all(bool(np.isfinite(value).all()) for value in outputs.values())


def _inputs_of(program: ModuleProgram, call: _Call) -> Arrays:
    generator = np.random.default_rng(call.seed)
    return {spec.name: draw(spec, call.sizes, generator, call.magnitude) for spec in program.inputs("window")}


@dataclasses.dataclass(frozen=True)
class _Judge:
    provider: str
    tolerance: float
    source: str
    call: _Call

    def __call__(self, inputs: Arrays, found: Arrays, expected: Arrays) -> Trial:
        """The case of every output; the trial's is the worst."""
        sizes = self.call.sizes
        cases = {
            name: compare(
                found[name],
                value,
                self.tolerance,
                floor=LEAST,
                graph="window",
                provider=self.provider,
                source=self.source,
                batch=0,
                length=0,
                seed=self.call.seed,
                magnitude=self.call.magnitude,
                sizes=", ".join(f"{symbol} {size}" for symbol, size in sizes.items()) or "fixed sizes",
            )
            for name, value in expected.items()
        }
        return max(cases.values(), key=lambda case: case.severity), Given(inputs, whole=True, outputs=cases)


def _run(model: Model, inputs: Arrays, expected: Arrays, judge: _Judge) -> Iterator[Trial]:
    yield judge(inputs, attempt(model, [*inputs.values()], expected), expected)


def _run_test_data(bundle: Bundle, model: Model, provider: str, tolerance: float) -> Iterator[Trial]:
    specs = bundle.manifest.graphs["window"].inputs
    for folder, inputs, outputs in bundle.test_data("window"):
        sizes = check_sizes([*inputs.values()], specs, {})
        yield from _run(model, inputs, outputs, _Judge(provider, tolerance, folder, _Call(sizes, 0)))
