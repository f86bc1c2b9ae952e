"""What can be imported: for each module its names, as "room:name" of this package; ":value" is the value."""

_SCAN = {
    name: f"scan:{name}"
    for name in (
        "selective_scan_fn", "selective_scan_ref", "mamba_inner_fn", "mamba_inner_ref",
        "mamba_inner_fn_no_out_proj", "bimamba_inner_fn", "bimamba_inner_ref", "rms_norm_forward",
    )
}  # fmt: skip
_NORM = {name: f"norm:{name}" for name in ("RMSNorm", "layer_norm_fn", "rms_norm_fn")}
_CONV = {name: f"conv:{name}" for name in ("causal_conv1d_fn", "causal_conv1d_update")}
_CONV_REF = {name: f"conv:{name}" for name in ("causal_conv1d_ref", "causal_conv1d_update_ref")}
_STATES = "causal_conv1d_varlen_states"
_MODEL = {name: f"model:{name}" for name in ("MambaLMHeadModel", "MixerModel", "create_block")}

MODULES: dict[str, dict[str, str]] = {
    "mamba_ssm": {
        "__version__": ":2.3.2", "selective_scan_fn": "scan:selective_scan_fn",
        "mamba_inner_fn": "scan:mamba_inner_fn", "Mamba": "mamba:Mamba",
        "MambaLMHeadModel": "model:MambaLMHeadModel",
    },
    "mamba_ssm.ops": {},
    "mamba_ssm.ops.selective_scan_interface": _SCAN,
    "mamba_ssm.ops.triton": {},
    "mamba_ssm.ops.triton.layer_norm": _NORM,
    "mamba_ssm.ops.triton.layernorm": _NORM,
    "mamba_ssm.ops.triton.selective_state_update": {
        "selective_state_update": "scan:selective_state_update",
        "selective_state_update_ref": "scan:selective_state_update_ref",
    },
    "mamba_ssm.modules": {},
    "mamba_ssm.modules.mamba_simple": {"Mamba": "mamba:Mamba", "Block": "model:Block"},
    "mamba_ssm.modules.block": {"Block": "model:Block"},
    "mamba_ssm.modules.mlp": {"GatedMLP": "model:GatedMLP"},
    "mamba_ssm.models": {},
    "mamba_ssm.models.config_mamba": {"MambaConfig": "model:MambaConfig"},
    "mamba_ssm.models.mixer_seq_simple": _MODEL,
    "mamba_ssm.utils": {},
    "mamba_ssm.utils.generation": {
        name: f"generation:{name}" for name in ("InferenceParams", "GenerationMixin", "decode")
    },
    "mamba_ssm.utils.hf": {name: f"generation:{name}" for name in ("load_config_hf", "load_state_dict_hf")},
    "causal_conv1d": {"__version__": ":1.7.0", **_CONV},
    "causal_conv1d.causal_conv1d_interface": _CONV | _CONV_REF,
    "causal_conv1d.causal_conv1d_varlen": {_STATES: f"conv:{_STATES}", f"{_STATES}_ref": f"conv:{_STATES}"},
    "selective_scan_cuda": {"fwd": "extensions:scan_fwd", "bwd": "extensions:scan_bwd"},
    "selective_scan_cuda_oflex": {"fwd": "extensions:oflex_fwd", "bwd": "extensions:oflex_bwd"},
    "causal_conv1d_cuda": {
        name: f"extensions:{name}"
        for name in ("causal_conv1d_fwd", "causal_conv1d_bwd", "causal_conv1d_update")
    },
}  # fmt: skip

OUT_OF_SCOPE = {
    (
        "Mamba2", "Mamba2Simple", "mamba2", "mamba2_simple", "ssd_minimal", "ssd_combined", "ssd_chunk_scan",
        "ssd_chunk_state", "ssd_state_passing", "ssd_bmm", "layernorm_gated", "mamba_chunk_scan_combined",
        "mamba_split_conv1d_scan_combined", "k_activations",
    ): "it is Mamba-2, which is out of projecta's scope",
    ("Mamba3", "mamba3", "cute", "tilelang"): "it is Mamba-3, which is out of projecta's scope",
    ("MHA", "mha", "distributed"): "it is not a part of Mamba-1",
}  # fmt: skip
