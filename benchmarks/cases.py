"""Cases: what ops.py measures, the edifice ops with arguments of the models' default sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import onnx
import torch
from rivals import Arguments, diagonal_scan_attention, discretised_outside, linear_scan_attention
from torch import Tensor

from edifice_export.lowerings import LOWERINGS
from edifice_reference import ops

Calls = dict[str, Callable[[], Tensor]]


def draw(*shape: int, seed: int) -> Tensor:
    """Of values that float32 has."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def causal_attention(length: int) -> Arguments:
    """Of Hymba's default sizes, without meta tokens."""
    frames = {name: draw(1, length, 256, seed=seed) for seed, name in enumerate(("query", "key", "value"))}
    return {**frames, "num_heads": 4, "epsilon": 1e-8}


def fft_conv(length: int) -> Arguments:
    """Of Hyena's default width; a window as long as the sequence."""
    return {"x": draw(1, length, 256, seed=0), "kernel": draw(length, 256, seed=1)}


def selective_scan(length: int, reads: int | None = None) -> Arguments:
    """Of Hymba's default sizes, with the rates that it starts from and steps of all sizes."""
    return {
        "x": draw(1, length, 512, seed=0),
        "delta": torch.exp(draw(1, length, 512, seed=1) - 3).clamp(1e-3, 1e-1),
        "a": -torch.arange(1.0, 17).expand(512, -1).contiguous(),
        "b": draw(1, length, 16, seed=2),
        "c": draw(1, reads or length, 16, seed=3),
    }


def linear_scan(length: int, decays: int = 1) -> Arguments:
    """Of SSTransformer's default width."""
    return {"x": draw(1, length, 256, seed=0), "log_decay": -torch.exp(draw(1, length, decays, seed=1) - 3)}


def diagonal_scan(length: int, reads: int | None = None) -> Arguments:
    """Of H3's default sizes."""
    return {
        "x": draw(1, length, 256, seed=0),
        "log_decay": -torch.exp(draw(2, 64, seed=1) - 3),
        "b": draw(1, length, 2, 64, seed=2),
        "c": draw(1, reads or length, 2, 64, seed=3),
    }


def linear_attention(length: int, decays: int = 1) -> Arguments:
    """Four heads, keys and values 64 wide, as small RetNets and GLAs have."""
    frames = {name: draw(1, length, 4, 64, seed=seed) for seed, name in enumerate(("query", "key", "value"))}
    return {**frames, "log_decay": -torch.exp(draw(1, length, 4, decays, seed=3) - 3)}


def mamba2(length: int) -> Arguments:
    """Of Mamba-2 with 130 million parameters: one group, so that all heads share queries and keys."""
    return {
        "query": draw(1, length, 1, 128, seed=0),
        "key": draw(1, length, 1, 128, seed=1),
        "value": draw(1, length, 24, 64, seed=2),
        "log_decay": -torch.exp(draw(1, length, 24, 1, seed=3) - 3),
    }


def transformed(given: Arguments) -> Calls:
    """A convolution by torch.fft, the kernel's spectrum made beforehand: along time as the frames lie, and with each
    channel's frames put beside each other before and taken apart after.
    """
    x, kernel = given["x"], given["kernel"]
    length = x.shape[1]
    spectrum = torch.fft.rfft(kernel, 2 * length, dim=0)
    turned = spectrum.T.contiguous()

    @torch.inference_mode()
    def as_it_lies() -> Tensor:
        y = torch.fft.irfft(torch.fft.rfft(x, 2 * length, dim=1) * spectrum, 2 * length, dim=1)
        return y[:, :length].contiguous()

    @torch.inference_mode()
    def turned_first() -> Tensor:
        channels = x.transpose(1, 2).contiguous()
        y = torch.fft.irfft(torch.fft.rfft(channels, 2 * length) * turned, 2 * length)
        return y[:, :, :length].transpose(1, 2).contiguous()

    return {"torch.fft": as_it_lies, "torch.fft, turned": turned_first}


@dataclasses.dataclass(frozen=True)
class Case:
    """An op with sizes, a way to call it, and the lengths to measure.

    Attributes:
        title: what it is.
        op: its name in edifice_reference.ops.
        make: arguments of a length in the op's order, float32 tensors and attributes; it starts from zeros.
        lengths: of the sequences.
        constants: the arguments that no input of the graph changes.
        state: the shape of what the op leaves besides y, without the batch; none if None.
        longest: of bodies whose memory grows with the square of the length, the longest that they are given.
        alternatives: what else computes the op in torch; the definition itself if None.
        rivals: graphs that compute the op, by name, see rivals.py.
    """

    title: str
    op: str
    make: Callable[[int], Arguments]
    lengths: Sequence[int]
    constants: Sequence[str] = ()
    state: Sequence[int] | None = None
    longest: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alternatives: Callable[[Arguments], Calls] | None = None
    rivals: Mapping[str, Callable[[Arguments], onnx.ModelProto]] = dataclasses.field(default_factory=dict)

    @property
    def node(self) -> str:
        """The op's name in a graph."""
        return "".join(part.capitalize() for part in self.op.split("_"))

    @property
    def bodies(self) -> list[str]:
        """Names of all bodies of the op for sequences."""
        return list(
            dict.fromkeys(each.name for each in LOWERINGS[f"edifice::{self.node}"].lowerings if not each.is_frame)
        )

    def define(self, given: Arguments) -> Tensor:
        """What the definition gives."""
        found = getattr(ops, self.op)(*given.values())
        return found[0] if isinstance(found, tuple) else found

    def torch_calls(self, given: Arguments) -> Calls:
        """What torch is asked for."""
        if self.alternatives is not None:
            return self.alternatives(given)

        @torch.inference_mode()
        def eager() -> Tensor:
            return self.define(given)

        return {"torch": eager}


SHORT = (16, 60, 128, 256, 512, 1024)
LONG = (2048, 4096, 8192, 16384)

CASES = (
    Case("causal_attention", "causal_attention", causal_attention, (*SHORT, 2048), longest={"masked": 2048}),
    Case(
        "fft_conv", "fft_conv", fft_conv, (*SHORT, *LONG), ["kernel"], longest={"taps": 512}, alternatives=transformed
    ),
    Case("fft_conv, a kernel that is no constant", "fft_conv", fft_conv, (*SHORT, *LONG[:2]), longest={"taps": 256}),
    Case(
        "selective_scan",
        "selective_scan",
        selective_scan,
        (*SHORT, 2048),
        ["a"],
        (16, 512),
        rivals={"outside": discretised_outside},
    ),
    Case(
        "selective_scan, the last frame's read-out",
        "selective_scan",
        lambda length: selective_scan(length, 1),
        (*SHORT, 2048),
        ["a"],
        (16, 512),
    ),
    Case("linear_attention", "linear_attention", linear_attention, SHORT, (), (4, 64, 64)),
    Case("linear_attention, of Mamba-2", "linear_attention", mamba2, SHORT, (), (24, 128, 64)),
    Case(
        "linear_attention, a decay for each channel of a key",
        "linear_attention",
        lambda length: linear_attention(length, 64),
        SHORT,
        (),
        (4, 64, 64),
    ),
    Case(
        "linear_scan",
        "linear_scan",
        linear_scan,
        (*SHORT, 2048),
        (),
        (256,),
        {"masked": 1024},
        rivals={"LinearAttention": linear_scan_attention},
    ),
    Case(
        "linear_scan, decays of each channel's own",
        "linear_scan",
        lambda length: linear_scan(length, 256),
        (*SHORT, 2048),
        (),
        (256,),
    ),
    Case(
        "diagonal_scan",
        "diagonal_scan",
        diagonal_scan,
        (*SHORT, 2048),
        ["log_decay"],
        (2, 64, 256),
        {"direct": 256, "masked": 1024},
        rivals={"LinearAttention": diagonal_scan_attention},
    ),
    Case(
        "diagonal_scan, the last frame's read-out",
        "diagonal_scan",
        lambda length: diagonal_scan(length, 1),
        (*SHORT, 2048),
        ["log_decay"],
        (2, 64, 256),
    ),
)
