"""A stranger's modules, none like ours: what `edifice-export export` is for."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

import edifice_export as ee
from edifice_reference import ops


class TokenModel(nn.Module):
    """Tokens in, logits at every position out; the head is the embedding's own weight."""

    def __init__(self, vocabulary: int = 5, width: int = 12, state: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.step = nn.Linear(width, width)
        self.read = nn.Linear(width, 2 * state)
        self.log_rates = nn.Parameter(torch.linspace(-1.0, 1.0, state).repeat(width, 1))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        delta = functional.softplus(self.step(x))
        b, c = self.read(x).chunk(2, dim=-1)
        y, _ = ops.selective_scan(delta * x, delta, -torch.exp(self.log_rates), b, c)
        return self.head(self.norm(y + x))


class BothWays(nn.Module):
    """An image of any height and width, scanned along its rows, forwards and backwards."""

    def __init__(self, channels: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.decay = nn.Conv2d(channels, channels, 1)
        self.out = nn.Conv2d(2 * channels, 4, 1)

    def forward(self, image: Tensor) -> Tensor:
        x = functional.silu(self.stem(image))
        height, width = x.shape[2:]
        decay = functional.logsigmoid(self.decay(x)).flatten(2).transpose(1, 2)
        pixels = x.flatten(2).transpose(1, 2)
        there, _ = ops.linear_scan(pixels, decay)
        back, _ = ops.linear_scan(pixels.flip(1), decay.flip(1))
        both = torch.cat([there, back.flip(1)], dim=2).transpose(1, 2)
        return self.out(both.unflatten(2, (height, width)))


class TwoAndTwo(nn.Module):
    """Numbers and kinds in; one output at every position and one of the whole out."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.kind = nn.Embedding(7, width)
        self.dense = nn.utils.parametrizations.weight_norm(nn.Linear(5, width))
        self.score = nn.Linear(width, 1)

    def forward(self, signal: Tensor, kinds: Tensor) -> tuple[Tensor, Tensor]:
        x = self.dense(signal) + self.kind(kinds)
        h, last = ops.linear_scan(x, functional.logsigmoid(x))
        return self.score(h).squeeze(-1), torch.tanh(last)


def token_model() -> ee.Source:
    torch.manual_seed(0)
    ids = torch.randint(5, (2, 9))
    return ee.Source(TokenModel(), (ids,), {"input_ids": {0: "batch", 1: "seq_len"}}, output_names=["logits"])


def both_ways() -> ee.Source:
    torch.manual_seed(0)
    free = {0: "batch", 2: torch.export.Dim("height", min=1, max=64), 3: "width"}
    return ee.Source(BothWays(), (torch.randn(2, 3, 8, 8),), {"image": free})


def two_and_two() -> ee.Source:
    torch.manual_seed(0)
    args = (torch.randn(2, 6, 5), torch.randint(7, (2, 6), dtype=torch.int32))
    return ee.Source(TwoAndTwo(), args, ({0: "batch", 1: "time"}, {0: "batch", 1: "time"}))


class Live(nn.Module):
    """Numbers and kinds, frame by frame: a running average of each, and how often each kind was seen."""

    def __init__(self, width: int = 5, kinds: int = 3) -> None:
        super().__init__()
        self.kind = nn.Embedding(kinds, width)
        self.mix = nn.Linear(2 * width, width)
        self.gate = nn.Linear(width, width)

    def initial_state(self, batch: int) -> dict[str, Tensor]:
        average = torch.linspace(-1.0, 1.0, self.gate.in_features)
        return {"average": average.repeat(batch, 1), "frames": torch.zeros(batch, dtype=torch.int64)}

    def step(
        self, numbers: Tensor, kind: Tensor, state: dict[str, Tensor]
    ) -> tuple[tuple[Tensor, Tensor], dict[str, Tensor]]:
        x = torch.tanh(self.mix(torch.cat([numbers, self.kind(kind)], dim=-1)))
        average = state["average"] + torch.sigmoid(self.gate(x)) * (x - state["average"])
        frames = state["frames"] + 1
        return (average, average.norm(dim=-1) / frames), {"average": average, "frames": frames}

    def forward(self, numbers: Tensor, kind: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.tanh(self.mix(torch.cat([numbers, self.kind(kind)], dim=-1)))
        decay = functional.logsigmoid(-self.gate(x))
        start = self.initial_state(1)["average"].expand(x.shape[0], -1)
        average, _ = ops.linear_scan(x * (1 - torch.exp(decay)), decay, start)
        return average, average.norm(dim=-1) / (1 + torch.arange(x.shape[1]))


def live() -> ee.Source:
    torch.manual_seed(0)
    args = (torch.randn(2, 6, 5), torch.randint(3, (2, 6)))
    return ee.Source(Live(), args, ({0: "batch", 1: "time"}, {0: "batch", 1: "time"}), output_names=["average", "size"])


class Recurrent(nn.Module):
    """A recurrence whose forward takes and gives the state."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.rate = nn.Linear(width, width)

    def initial_state(self, batch: int) -> dict[str, Tensor]:
        return {"h": torch.zeros(batch, self.rate.in_features)}

    def step(self, x: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        h = torch.sigmoid(self.rate(x)) * state["h"] + x
        return h, {"h": h}

    def forward(self, x: Tensor, state: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        before = self.initial_state(x.shape[0])["h"] if state is None else state["h"]
        y, after = ops.linear_scan(x, functional.logsigmoid(self.rate(x)), before)
        return y, {"h": after}


def recurrent() -> ee.Source:
    torch.manual_seed(0)
    return ee.Source(Recurrent(), (torch.randn(2, 6, 4),), {"x": {0: "n", 1: "t"}})


class Recall(nn.Module):
    """Full attention with rotary positions over all that came, after a short average: keys and values grow, and the
    frames that the average still sees don't."""

    def __init__(self, width: int = 8, heads: int = 2, seen: int = 3) -> None:
        super().__init__()
        self.mix = nn.Conv1d(width, width, seen, groups=width)
        self.inner = nn.Linear(width, 3 * width)
        self.outer = nn.Linear(width, width)
        self.heads = heads
        self.register_buffer("rates", 10.0 ** -torch.arange(0, width // heads, 2) / 2)

    def initial_state(self, batch: int) -> dict[str, Tensor]:
        nothing = torch.zeros(batch, self.heads, 0, 2 * len(self.rates))
        frames = torch.zeros(batch, self.mix.kernel_size[0] - 1, self.mix.in_channels)
        return {"0.conv": frames, "1.key": nothing, "1.value": nothing}

    def extend(self, x: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        y, conv = ops.causal_conv1d(x, self.mix.weight, self.mix.bias, self.mix.groups, state["0.conv"])
        query, key, value = self.inner(y).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        past, frames = state["1.key"].shape[2], x.shape[1]
        places = torch.arange(past, past + frames)
        key = torch.cat([state["1.key"], self.turned(key, places)], dim=2)
        value = torch.cat([state["1.value"], value], dim=2)
        seen = torch.arange(past + frames) <= places[:, None]
        y = functional.scaled_dot_product_attention(self.turned(query, places), key, value, seen)
        return self.outer(y.transpose(1, 2).flatten(2)), {"0.conv": conv, "1.key": key, "1.value": value}

    def turned(self, x: Tensor, places: Tensor) -> Tensor:
        angles = places[:, None] * self.rates
        one, two = x.chunk(2, dim=-1)
        return torch.cat([one * angles.cos() - two * angles.sin(), one * angles.sin() + two * angles.cos()], dim=-1)

    def step(self, x: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        y, after = self.extend(x[:, None], state)
        return y[:, 0], after

    def forward(self, x: Tensor) -> Tensor:
        return self.extend(x, self.initial_state(x.shape[0]))[0]


def recall() -> ee.Source:
    torch.manual_seed(0)
    return ee.Source(Recall(), (torch.randn(2, 6, 8),), {"x": {0: "batch", 1: "time"}})
