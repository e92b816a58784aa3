"""What the mixers of mamba_ssm have in common: states as the originals hold them, in place of their ops'."""

from __future__ import annotations

import abc
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import RequestError
from .block import InferenceParams, State

__all__ = ["StatefulMixer"]


class StatefulMixer(nn.Module, abc.ABC):
    """A short convolution and a scan, in one piece or frame by frame.

    A state is {"conv", "ssm"} as the ops of edifice_reference take it. The originals' conv_state holds the last d_conv
    frames before the convolution, channels first, where the op's holds one less; their ssm_state has the
    op's last two axes the other way.

    Attributes:
        d_conv: frames that the convolution sees.
        layer_idx: of this mixer in inference_params.
    """

    d_conv: int
    layer_idx: int | None
    conv1d: nn.Conv1d

    def initial_state(self, batch: int) -> dict[str, Tensor]:
        """The state before the first frame, of so many entries."""
        conv, ssm = self.allocate_inference_cache(batch, 1)
        return {"conv": conv[..., 1:].transpose(1, 2).contiguous(), "ssm": ssm.mT.contiguous()}

    def advance(self, hidden_states: Tensor, state: State) -> tuple[Tensor, dict[str, Tensor]]:
        """Frames [batch, sequence, d_model], or one [batch, d_model], from a state; and the state after them."""
        mixed, after, _ = self._mix(hidden_states, state)
        return mixed, after

    extend = advance

    @overload
    def step(self, hidden_states: Tensor, conv_state: State) -> tuple[Tensor, dict[str, Tensor]]: ...

    @overload
    def step(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]: ...

    def step(self, hidden_states: Tensor, conv_state: Tensor | State, ssm_state: Tensor | None = None) -> Any:
        """One frame, as the original has it; or from a state as initial_state gives it, see advance.

        Args:
            hidden_states: [batch, 1, d_model].
            conv_state: see allocate_inference_cache; is changed in place.
            ssm_state: likewise.

        Returns:
            [batch, 1, d_model], and both states.

        Raises:
            RequestError: more than one frame.
        """
        if not isinstance(conv_state, Tensor):
            return self.advance(hidden_states, conv_state)
        assert ssm_state is not None
        if hidden_states.shape[1] != 1:
            raise RequestError(f"step takes one frame at a time, got {hidden_states.shape[1]}; call forward for more")
        before = {"conv": conv_state[..., 1:].transpose(1, 2), "ssm": ssm_state.mT}
        mixed, after, frames = self._mix(hidden_states, before)
        conv_state.copy_(torch.cat([conv_state[..., 1:], frames.transpose(1, 2).to(conv_state.dtype)], dim=-1))
        ssm_state.copy_(after["ssm"].mT)
        return mixed, conv_state, ssm_state

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """conv_state [batch, channels, d_conv] and ssm_state before the first frame, zeros."""
        del max_seqlen, kwargs
        like = self.conv1d.weight
        conv = torch.zeros(batch_size, like.shape[0], self.d_conv, device=like.device, dtype=dtype or like.dtype)
        return conv, conv.new_zeros(batch_size, *self._state_shape())

    def _forward(self, hidden_states: Tensor, inference_params: InferenceParams | None) -> Tensor:
        """A sequence from its start, or where inference_params have seen tokens, one frame more."""
        if inference_params is None:
            mixed, _, _ = self._mix(hidden_states, None)
            return mixed
        conv_state, ssm_state = self._cached(inference_params, hidden_states.shape[0])
        if inference_params.seqlen_offset > 0:
            return self.step(hidden_states, conv_state, ssm_state)[0]
        mixed, after, frames = self._mix(hidden_states, None)
        conv_state.copy_(functional.pad(frames.transpose(1, 2), (self.d_conv - frames.shape[1], 0)))
        ssm_state.copy_(after["ssm"].mT)
        return mixed

    def _cached(self, inference_params: InferenceParams, batch: int) -> tuple[Tensor, Tensor]:
        if self.layer_idx is None:
            raise RequestError(f"{type(self).__name__}: inference_params need a layer_idx; give it one")
        states = inference_params.key_value_memory_dict
        if self.layer_idx not in states:
            states[self.layer_idx] = self.allocate_inference_cache(batch, inference_params.max_seqlen)
        return states[self.layer_idx]

    @abc.abstractmethod
    def _mix(self, hidden_states: Tensor, state: State | None) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """What comes out, the state after, and what was convolved."""

    @abc.abstractmethod
    def _state_shape(self) -> tuple[int, ...]:
        """Of an entry's ssm_state, as the original holds it."""
