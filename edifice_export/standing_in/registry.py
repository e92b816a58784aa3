"""The modules that are stood for, and what stands in each."""

from __future__ import annotations

__all__ = ["MODULES", "VERSIONS", "parents"]

VERSIONS = {"causal_conv1d": "1.7.0", "mamba_ssm": "2.3.2.post1"}
"""The packages, in the versions that they are stood for as."""


def _of(home: str, *names: str) -> dict[str, str]:
    return dict.fromkeys(names, home)


_CONV = _of("causal_conv1d", "causal_conv1d_fn", "causal_conv1d_update")
_SCAN = _of("selective_scan", "selective_scan_fn", "mamba_inner_fn")
_NORMS = _of("layer_norm", "RMSNorm", "layer_norm_fn", "rms_norm_fn")
_MODEL = _of("language_model", "MambaLMHeadModel")

MODULES: dict[str, dict[str, str]] = {
    "causal_conv1d": _CONV,
    "causal_conv1d.causal_conv1d_interface": _CONV,
    "mamba_ssm": _SCAN | _of("mamba", "Mamba") | _of("mamba2", "Mamba2") | _MODEL,
    "mamba_ssm.models.config_mamba": _of("language_model", "MambaConfig"),
    "mamba_ssm.models.mixer_seq_simple": _MODEL | _of("language_model", "MambaConfig", "MixerModel", "create_block"),
    "mamba_ssm.modules.block": _of("block", "Block"),
    "mamba_ssm.modules.mamba2": _of("mamba2", "Mamba2"),
    "mamba_ssm.modules.mamba_simple": _of("mamba", "Mamba") | _of("block", "Block"),
    "mamba_ssm.modules.mlp": _of("block", "GatedMLP"),
    "mamba_ssm.ops.selective_scan_interface": _SCAN
    | _of("selective_scan", "selective_scan_ref", "mamba_inner_ref", "mamba_inner_fn_no_out_proj"),
    "mamba_ssm.ops.triton.layer_norm": _NORMS,
    "mamba_ssm.ops.triton.layernorm": _NORMS,
    "mamba_ssm.ops.triton.layernorm_gated": _of("gated_norm", "LayerNorm", "RMSNorm", "layernorm_fn", "rmsnorm_fn"),
    "mamba_ssm.ops.triton.selective_state_update": _of("selective_state_update", "selective_state_update"),
    "mamba_ssm.ops.triton.ssd_combined": _of(
        "ssd_combined", "mamba_chunk_scan_combined", "mamba_split_conv1d_scan_combined"
    ),
    "mamba_ssm.utils.generation": _of("block", "InferenceParams"),
}
"""By name of the module what is in it: each name, and the file of this room that it comes from."""


def parents(name: str) -> list[str]:
    """The packages that a module is in, the outermost first."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]
