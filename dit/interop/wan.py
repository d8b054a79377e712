"""Weights and configs of the Wan family, as diffusers' `WanTransformer3DModel` stores them, lossless in both directions; and under the
names of Wan's own code, which ComfyUI reads.

Works on names, shapes and layouts of tensors only. The patch embedding is a 3-D convolution there and a linear layer on channel-last
patch vectors here: the same numbers in another order.
"""

from collections.abc import Mapping
from math import prod
from typing import Any

from einops import rearrange
from torch import Tensor

from data_pipelines.errors import UserError
from dit.config import SpatioTemporalDiTConfig
from dit.config.objective import ObjectiveConfig

State = dict[str, Tensor]

PATCH_WEIGHT = "patch_embedder.weight"
EPSILON = 1e-6
MAX_POSITION = 1024
"""diffusers tabulates its rotary embedding up to this length of an axis."""

_ENDS = {
    "patch_embedder": "patch_embedding",
    "text_embedder.0": "condition_embedder.text_embedder.linear_1",
    "text_embedder.2": "condition_embedder.text_embedder.linear_2",
    "time_embedder.mlp.0": "condition_embedder.time_embedder.linear_1",
    "time_embedder.mlp.2": "condition_embedder.time_embedder.linear_2",
    "time_projection": "condition_embedder.time_proj",
    "final_layer.linear": "proj_out",
}
_BLOCK = {"cross_norm": "norm2", "mlp.0": "ffn.net.0.proj", "mlp.2": "ffn.net.2"}
_ATTENTION = {"self_attention": "attn1", "cross_attention": "attn2"}
_PROJECTIONS = {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}
_NORMS = {"q_norm": "norm_q", "k_norm": "norm_k"}
_ORIGINAL = {
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "proj_out": "head.head",
    **{"attn1": "self_attn", "attn2": "cross_attn", ".to_q.": ".q.", ".to_k.": ".k.", ".to_v.": ".v.", ".to_out.0.": ".o."},
    **{"norm2": "norm3", "ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2", ".scale_shift_table": ".modulation"},
}
"""Parts of diffusers' names -> those of Wan's own code (Wan-Video/Wan2.1, wan/modules/model.py)."""
COMFYUI = {"patch_size": (1, 2, 2), "head size": 128, "frequency_size": 256, "text width": 4096, "latent channels": 16}
"""What ComfyUI takes for granted of a Wan file: it reads the other sizes from the shapes of the tensors."""


def to_diffusers(state: Mapping[str, Tensor], config: SpatioTemporalDiTConfig) -> State:
    """Our state dict under diffusers' names and shapes.

    Raises UserError if the config has what Wan has not, or if the names of `state` do not fit the config.
    """
    check_exportable(config)
    names = _names(config.depth)
    _check_names(state, set(names), config)
    out = {theirs: state[ours] for ours, theirs in names.items()}
    pt, ph, pw = config.patch_size
    weight = rearrange(state[PATCH_WEIGHT], "d (pt ph pw c) -> d c pt ph pw", pt=pt, ph=ph, pw=pw)
    out[names[PATCH_WEIGHT]] = weight.contiguous()
    return {name: tensor[None] if name.endswith("scale_shift_table") else tensor for name, tensor in out.items()}


def to_original(state: Mapping[str, Tensor], config: SpatioTemporalDiTConfig) -> State:
    """Our state dict under the names of Wan's own code. Raises UserError as `to_diffusers` does."""
    return {_original_name(name): tensor for name, tensor in to_diffusers(state, config).items()}


def original_config(config: SpatioTemporalDiTConfig, *, channels: int, text_width: int) -> dict[str, Any]:
    """The fields of config.json of Wan's own code. Raises UserError if the config has what Wan has not."""
    fields = diffusers_config(config, channels=channels, text_width=text_width)
    names = {"ffn_dim": "ffn_dim", "freq_dim": "freq_dim", "in_dim": "in_channels", "out_dim": "out_channels", "eps": "eps"}
    names |= {"num_heads": "num_attention_heads", "num_layers": "num_layers", "patch_size": "patch_size", "text_dim": "text_dim"}
    own = {"_class_name": "WanModel", "model_type": "t2v", "dim": config.hidden_size, "text_len": 512}
    return own | {name: fields[theirs] for name, theirs in names.items()}


def unlike_comfyui(config: SpatioTemporalDiTConfig, *, channels: int, text_width: int) -> list[str]:
    """What ComfyUI takes for granted of a Wan file and this one has not."""
    head = config.hidden_size // config.num_heads
    own = dict(zip(COMFYUI, (config.patch_size, head, config.frequency_size, text_width, channels), strict=True))
    return [f"{name} {value}, not {COMFYUI[name]}" for name, value in own.items() if value != COMFYUI[name]]


def from_diffusers(state: Mapping[str, Tensor], config: SpatioTemporalDiTConfig) -> State:
    """diffusers' state dict under our names and shapes. Raises UserError as `to_diffusers` does."""
    check_exportable(config)
    names = _names(config.depth)
    _check_names(state, set(names.values()), config)
    out = {ours: state[theirs] for ours, theirs in names.items()}
    patch = out[PATCH_WEIGHT]
    if tuple(patch.shape[2:]) != config.patch_size:
        raise UserError(f"backbone.patch_size: got {list(config.patch_size)}, the weights have {list(patch.shape[2:])}")
    out[PATCH_WEIGHT] = rearrange(patch, "d c pt ph pw -> d (pt ph pw c)").contiguous()
    return {name: tensor[0] if name.endswith("modulation.table") else tensor for name, tensor in out.items()}


def diffusers_config(config: SpatioTemporalDiTConfig, *, channels: int, text_width: int) -> dict[str, Any]:
    """The fields of diffusers' config.json. Raises UserError if the config has what Wan has not."""
    check_exportable(config)
    return {
        "_class_name": "WanTransformer3DModel",
        "patch_size": list(config.patch_size),
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.hidden_size // config.num_heads,
        "in_channels": channels,
        "out_channels": channels,
        "text_dim": text_width,
        "freq_dim": config.frequency_size,
        "ffn_dim": config.ffn_size,
        "num_layers": config.depth,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": EPSILON,
        "image_dim": None,
        "added_kv_proj_dim": None,
        "rope_max_seq_len": MAX_POSITION,
        "pos_embed_seq_len": None,
    }


def backbone_config(fields: Mapping[str, Any]) -> SpatioTemporalDiTConfig:
    """The backbone that a diffusers config.json describes. Raises UserError where it is none of ours."""
    needed = ("num_attention_heads", "attention_head_dim", "num_layers", "ffn_dim", "freq_dim", "patch_size", "in_channels", "text_dim")
    if lacking := [key for key in needed if key not in fields]:
        raise UserError(f"config.json describes no Wan transformer: it lacks {', '.join(lacking)}")
    fields = {**fields, "patch_size": list(fields["patch_size"]), "out_channels": fields.get("out_channels") or fields["in_channels"]}
    heads, head_size = fields["num_attention_heads"], fields["attention_head_dim"]
    config = SpatioTemporalDiTConfig(
        hidden_size=heads * head_size,
        depth=fields["num_layers"],
        num_heads=heads,
        ffn_size=fields["ffn_dim"],
        patch_size=tuple(fields["patch_size"]),
        frequency_size=fields["freq_dim"],
    )
    expected = diffusers_config(config, channels=fields["in_channels"], text_width=fields["text_dim"])
    differing = [key for key, value in expected.items() if key in fields and fields[key] != value]
    if differing:
        got = ", ".join(f"{key}: {fields[key]!r} (expected {expected[key]!r})" for key in differing)
        raise UserError(f"config.json describes a variant of Wan that the backbone does not have: {got}")
    return config


def check_exportable(config: SpatioTemporalDiTConfig) -> None:
    """Raise UserError that names every key of the backbone that the Wan layout has no place for."""
    needed = {"modulation": "shared", "attention": "full", "num_classes": None, "learned_variance": False, "jumps": False, "guided": False}
    wrong = [
        f"backbone.{key}: got {getattr(config, key)!r}, Wan needs {value!r}"
        for key, value in needed.items()
        if getattr(config, key) != value
    ]
    if wrong:
        raise UserError("this backbone is not in the Wan layout: " + "; ".join(wrong))


def check_velocity(objective: ObjectiveConfig) -> None:
    """Raise UserError unless the network itself answers with the velocity of rectified flow, as Wan's does."""
    path = objective.path.name
    if (path, objective.prediction) != ("rectified_flow", "velocity"):
        what = f"objective.name={objective.name}, path={path}, prediction={objective.prediction}"
        raise UserError(f"{what}: Wan's transformers and pipelines know the velocity of rectified flow alone")


def channels_of(state: Mapping[str, Tensor], config: SpatioTemporalDiTConfig) -> int:
    """Latent channels of our weights `state`."""
    return state[PATCH_WEIGHT].shape[1] // prod(config.patch_size)


def _names(depth: int) -> dict[str, str]:
    """Our name -> diffusers' name, of every tensor."""
    modules = dict(_ENDS)
    weights = {"final_layer.modulation.table": "scale_shift_table"}
    for i in range(depth):
        block = f"blocks.{i}."
        modules |= {block + ours: block + theirs for ours, theirs in _BLOCK.items()}
        weights[f"{block}modulation.table"] = f"{block}scale_shift_table"
        for ours, theirs in _ATTENTION.items():
            modules |= {f"{block}{ours}.{a}": f"{block}{theirs}.{b}" for a, b in _PROJECTIONS.items()}
            weights |= {f"{block}{ours}.{a}.weight": f"{block}{theirs}.{b}.weight" for a, b in _NORMS.items()}
    return weights | {f"{ours}.{kind}": f"{theirs}.{kind}" for ours, theirs in modules.items() for kind in ("weight", "bias")}


def _original_name(name: str) -> str:
    if name == "scale_shift_table":
        return "head.modulation"
    for part, theirs in _ORIGINAL.items():
        name = name.replace(part, theirs)
    return name


def _check_names(state: Mapping[str, Tensor], expected: set[str], config: SpatioTemporalDiTConfig) -> None:
    missing, unknown = sorted(expected - state.keys()), sorted(state.keys() - expected)
    if missing or unknown:
        raise UserError(
            f"the weights do not fit backbone.depth: {config.depth} and its Wan layout: "
            f"{len(missing)} tensors missing {missing[:3]}, {len(unknown)} not expected {unknown[:3]}"
        )
