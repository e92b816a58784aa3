"""The contract of a reference model: what exporting, verifying and measuring ask of an architecture."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol, Self

from .config import Config, Numerics
from .state import State

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["ReferenceModel"]


class ReferenceModel(Protocol):
    """A torch module that computes a window at once, or frame by frame with a state. Backbone has all of it.

    Shapes: B batch, T frames, E embed_dim, D hidden_size.
    """

    config: Config
    numerics: Numerics

    def __call__(self, state_sequence: Tensor) -> Tensor:
        """The output at the last frame of a window: [B, T, E] -> [B, D]."""

    def forward_prefixes(self, state_sequence: Tensor) -> Tensor:
        """The output at every frame, each that of the window which ends there: [B, T, E] -> [B, T, D]."""

    def forward_stream(self, sequence: Tensor) -> Tensor:
        """The output at every frame of a stream of any length from its start: [B, T, E] -> [B, T, D]."""

    def initial_state(self, batch: int = 1) -> State:
        """The state before the first frame. OptionError where there is no stream."""

    def step(self, frame: Tensor, state: State) -> tuple[Tensor, State]:
        """One frame on: [B, E] -> [B, D], and the state after it."""

    def extend(self, frames: Tensor, state: State) -> tuple[Tensor, State]:
        """Several frames on, [B, T, E] -> [B, T, D], or one, and the state after the last."""

    @property
    def why_no_stream(self) -> str | None:
        """Why it can't go frame by frame, or None where it can."""

    def with_exact_recurrence(self) -> ReferenceModel | None:
        """A copy that differs in its recurrence alone, which is exact; None if this one's is exact already."""

    def double(self) -> Self:
        """Itself in float64, as any torch module."""

    def eval(self) -> Self:
        """Itself in inference mode."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Its parameters."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The same with their names, which weights files have."""

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """It and all of its parts, with their paths."""

    def modules(self) -> Iterator[nn.Module]:
        """It and all of its parts, itself first."""
