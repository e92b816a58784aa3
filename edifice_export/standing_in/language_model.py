"""mamba_ssm.models: the language model of Mamba's authors, with their names of parameters."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import RequestError
from .block import Block, GatedMLP, InferenceParams, State, add_norm
from .layer_norm import RMSNorm
from .mamba import Mamba
from .mamba2 import Mamba2

__all__ = ["MambaConfig", "MambaLMHeadModel", "MixerModel", "create_block"]

Device = torch.device | str | None

_MIXERS: dict[str, type[nn.Module]] = {"Mamba1": Mamba, "Mamba2": Mamba2}
"""By what `layer` of ssm_cfg says."""


@dataclasses.dataclass
class MambaConfig:
    """See mamba_ssm.models.config_mamba.MambaConfig."""

    d_model: int = 2560
    d_intermediate: int = 0
    n_layer: int = 64
    vocab_size: int = 50277
    ssm_cfg: dict[str, Any] = dataclasses.field(default_factory=dict)
    attn_layer_idx: list[int] = dataclasses.field(default_factory=list)
    attn_cfg: dict[str, Any] = dataclasses.field(default_factory=dict)
    rms_norm: bool = True
    residual_in_fp32: bool = True
    fused_add_norm: bool = True
    pad_vocab_size_multiple: int = 8
    tie_embeddings: bool = True


class CausalLMOutput(NamedTuple):
    """What the language model gives: logits [batch, sequence, vocabulary]."""

    logits: Tensor


def create_block(
    d_model: int,
    d_intermediate: int,
    ssm_cfg: Mapping[str, Any] | None = None,
    attn_layer_idx: list[int] | None = None,
    attn_cfg: Mapping[str, Any] | None = None,
    norm_epsilon: float = 1e-5,
    rms_norm: bool = False,
    residual_in_fp32: bool = False,
    fused_add_norm: bool = False,
    layer_idx: int | None = None,
    device: Device = None,
    dtype: torch.dtype | None = None,
) -> Block:
    """See mamba_ssm.models.mixer_seq_simple.create_block.

    Raises:
        RequestError: the layer is of attention, or its ssm_cfg of a kind that is not covered.
    """
    del attn_cfg
    if layer_idx in (attn_layer_idx or []):
        raise RequestError(f"layer {layer_idx} is of attention (attn_layer_idx), which has no stand-in")
    options = dict(ssm_cfg or {})
    kind = options.pop("layer", "Mamba1")
    if kind not in _MIXERS:
        raise RequestError(f"layer of ssm_cfg is {kind!r:.80}, and there are stand-ins for {', '.join(_MIXERS)}")
    where: dict[str, Any] = {"device": device, "dtype": dtype}
    mlp: Any = nn.Identity
    if d_intermediate:
        mlp = functools.partial(GatedMLP, hidden_features=d_intermediate, out_features=d_model, **where)
    block = Block(
        d_model,
        functools.partial(_MIXERS[kind], layer_idx=layer_idx, **options, **where),
        mlp,
        norm_cls=functools.partial(RMSNorm if rms_norm else nn.LayerNorm, eps=norm_epsilon, **where),
        fused_add_norm=fused_add_norm,
        residual_in_fp32=residual_in_fp32,
    )
    block.layer_idx = layer_idx
    return block


class MixerModel(nn.Module):
    """See mamba_ssm.models.mixer_seq_simple.MixerModel: token ids to frames, and the blocks."""

    def __init__(
        self,
        d_model: int,
        n_layer: int,
        d_intermediate: int,
        vocab_size: int,
        ssm_cfg: Mapping[str, Any] | None = None,
        attn_layer_idx: list[int] | None = None,
        attn_cfg: Mapping[str, Any] | None = None,
        norm_epsilon: float = 1e-5,
        rms_norm: bool = False,
        initializer_cfg: Mapping[str, Any] | None = None,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.residual_in_fp32, self.fused_add_norm = residual_in_fp32, fused_add_norm
        self.embedding = nn.Embedding(vocab_size, d_model, device=device, dtype=dtype)
        how = (norm_epsilon, rms_norm, residual_in_fp32, fused_add_norm)
        blocks = [
            create_block(d_model, d_intermediate, ssm_cfg, attn_layer_idx, attn_cfg, *how, index, device, dtype)
            for index in range(n_layer)
        ]
        self.layers = nn.ModuleList(blocks)
        norm: Any = RMSNorm if rms_norm else nn.LayerNorm
        self.norm_f = norm(d_model, eps=norm_epsilon, device=device, dtype=dtype)
        _initialize(self, n_layer, 2 if d_intermediate else 1, **(initializer_cfg or {}))

    def forward(
        self, input_ids: Tensor, inference_params: InferenceParams | None = None, **mixer_kwargs: Any
    ) -> Tensor:
        """Token ids [batch, sequence] to frames [batch, sequence, d_model]."""
        hidden, residual = self.embedding(input_ids), None
        for layer in self.layers:
            hidden, residual = layer(hidden, residual, inference_params=inference_params, **mixer_kwargs)
        return self._normed(hidden, residual)

    def initial_state(self, batch: int) -> dict[str, Tensor]:
        """What the layers carry before the first token, by layer and kind."""
        states = [layer.mixer.initial_state(batch) for layer in self.layers]  # type: ignore[union-attr, operator]
        return {f"{index}.{kind}": value for index, state in enumerate(states) for kind, value in state.items()}

    def advance(self, input_ids: Tensor, state: State) -> tuple[Tensor, dict[str, Tensor]]:
        """Token ids [batch, sequence], or one of each [batch], from a state; and the state after them."""
        hidden, residual = self.embedding(input_ids), None
        after: dict[str, Tensor] = {}
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, Block)
            own = {kind: state[f"{index}.{kind}"] for kind in ("conv", "ssm")}
            hidden, residual, own = layer.advance(hidden, residual, own)
            after |= {f"{index}.{kind}": value for kind, value in own.items()}
        return self._normed(hidden, residual), after

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> dict[int, tuple[Tensor, Tensor]]:
        """The states of each layer before the first token, as the originals hold them."""
        return {
            index: layer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)  # type: ignore[operator]
            for index, layer in enumerate(self.layers)
        }

    def _normed(self, hidden: Tensor, residual: Tensor | None) -> Tensor:
        return add_norm(self.norm_f, hidden, residual, self.fused_add_norm, self.residual_in_fp32)[0]


class MambaLMHeadModel(nn.Module):
    """See mamba_ssm.models.mixer_seq_simple.MambaLMHeadModel.

    With step and extend, which the original has not, its stream and prefill graphs are exported as well.
    """

    def __init__(
        self,
        config: MambaConfig,
        initializer_cfg: Mapping[str, Any] | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        padded = -(-config.vocab_size // config.pad_vocab_size_multiple) * config.pad_vocab_size_multiple
        self.backbone = MixerModel(
            d_model=config.d_model,
            n_layer=config.n_layer,
            d_intermediate=config.d_intermediate,
            vocab_size=padded,
            ssm_cfg=config.ssm_cfg,
            attn_layer_idx=config.attn_layer_idx,
            attn_cfg=config.attn_cfg,
            rms_norm=config.rms_norm,
            initializer_cfg=initializer_cfg,
            fused_add_norm=config.fused_add_norm,
            residual_in_fp32=config.residual_in_fp32,
            device=device,
            dtype=dtype,
        )
        self.lm_head = nn.Linear(config.d_model, padded, bias=False, device=device, dtype=dtype)
        _initialize(self, config.n_layer, 1, **(initializer_cfg or {}))
        self.tie_weights()

    def tie_weights(self) -> None:
        """Gives the head the embedding's weight, if the config says so."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        inference_params: InferenceParams | None = None,
        num_last_tokens: int = 0,
        **mixer_kwargs: Any,
    ) -> CausalLMOutput:
        """Token ids [batch, sequence] to logits at each, or at the last num_last_tokens."""
        del position_ids
        hidden = self.backbone(input_ids, inference_params=inference_params, **mixer_kwargs)
        return CausalLMOutput(self.lm_head(hidden[:, -num_last_tokens:] if num_last_tokens > 0 else hidden))

    def initial_state(self, batch: int) -> dict[str, Tensor]:
        """What the layers carry before the first token."""
        return self.backbone.initial_state(batch)

    def step(self, input_ids: Tensor, state: State) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits of token ids [batch, sequence], or of one of each [batch], from a state; and the state after them."""
        hidden, after = self.backbone.advance(input_ids, state)
        return self.lm_head(hidden), after

    extend = step

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> dict[int, tuple[Tensor, Tensor]]:
        """The states of each layer before the first token, as the originals hold them."""
        return self.backbone.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name: str, device: Device = None, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> MambaLMHeadModel:
        """The model of a folder with config.json and pytorch_model.bin.

        Raises:
            RequestError: it is no such folder; nothing is downloaded.
        """
        folder = Path(pretrained_model_name)
        missing = [name for name in ("config.json", "pytorch_model.bin") if not (folder / name).is_file()]
        if missing:
            raise RequestError(f"{folder}: has no {missing[0]}; give the folder of a downloaded model")
        config = MambaConfig(**json.loads((folder / "config.json").read_text()))
        model = cls(config, device=device, dtype=dtype, **kwargs)
        weights = torch.load(folder / "pytorch_model.bin", map_location=device or "cpu", weights_only=True)
        model.load_state_dict(weights)
        return model

    def save_pretrained(self, save_directory: str) -> None:
        """Writes config.json and pytorch_model.bin."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(self.state_dict(), folder / "pytorch_model.bin")
        (folder / "config.json").write_text(json.dumps(dataclasses.asdict(self.config), indent=4))


def _initialize(model: nn.Module, n_layer: int, residuals: int, initializer_range: float = 0.02) -> None:
    """As the originals: what a block adds to the residual is smaller the more blocks there are (GPT-2)."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=initializer_range)
        if isinstance(module, nn.Linear):
            if module.bias is not None and not getattr(module.bias, "_no_reinit", False):
                nn.init.zeros_(module.bias)
            if name.endswith(("out_proj", "fc2")):
                nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5))
                with torch.no_grad():
                    module.weight /= math.sqrt(residuals * n_layer)
