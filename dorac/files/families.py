"""Names of modules in one library, and the modules of another that they are: SDXL's UNet, Flux, Llama-like models.

A module there can be several here (q, k and v in one matrix): its rows are then theirs.
"""

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

# From row sizes of the targets to the rows of the source that each takes; None: one after the other.
Rows = Callable[[list[int]], list[Tensor]]


class Heads(NamedTuple):
    """How the rows of q, k and v are divided."""

    queries: int
    keys: int
    size: int

    @classmethod
    def of(cls, config: Mapping[str, object]) -> "Heads | None":
        """From a model's ``config.json``; None where that does not say it."""
        nested = config.get("text_config")
        config = nested if isinstance(nested, Mapping) else config
        queries, hidden = config.get("num_attention_heads"), config.get("hidden_size")
        keys = config.get("num_key_value_heads") or queries
        size = config.get("head_dim") or (
            hidden // queries if isinstance(queries, int) and isinstance(hidden, int) else None
        )
        numbers = (queries, keys, size)
        return cls(*numbers) if all(isinstance(n, int) and n > 0 for n in numbers) else None


class Translation(NamedTuple):
    """The modules that a module is, with ``_`` for dots, and how its rows are divided among them."""

    targets: tuple[str, ...]
    rows: Rows | None = None


_LLAMA = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}


def from_torchtune(name: str) -> str | None:
    """transformers' name of a module of torchtune's Llama-like models."""
    if name in ("output", "tok_embeddings"):
        return {"output": "lm_head", "tok_embeddings": "model.embed_tokens"}[name]
    match = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
    return f"model.layers.{match[1]}.{_LLAMA[match[2]]}" if match and match[2] in _LLAMA else None


def from_megatron(name: str, heads: Heads | None) -> Translation | None:
    """What a layer of Megatron's decoder is in transformers' Llama-like models.

    Raises:
        ValueError: q, k and v in one, and the heads are not known.
    """
    match = re.fullmatch(r"(?:.*\.)?decoder\.layers\.(\d+)\.(.+)", name)
    if match is None:
        return None
    block = f"model_layers_{match[1]}"
    if match[2] == "self_attention.linear_qkv":
        if heads is None:
            raise ValueError(
                f"{name} holds q, k and v by groups of heads: the model's config must say num_attention_heads, "
                "num_key_value_heads and hidden_size or head_dim"
            )
        return Translation(tuple(f"{block}_self_attn_{p}_proj" for p in "qkv"), lambda sizes: grouped_rows(heads))
    simple = {
        "self_attention.linear_proj": ("self_attn_o_proj",),
        "mlp.linear_fc1": ("mlp_gate_proj", "mlp_up_proj"),
        "mlp.linear_fc2": ("mlp_down_proj",),
    }.get(match[2])
    return Translation(tuple(f"{block}_{own}" for own in simple)) if simple else None


def grouped_rows(heads: Heads) -> list[Tensor]:
    """The rows of q, k and v where each group of heads has its queries, then its key, then its value."""
    per_group = heads.queries // heads.keys
    rows = torch.arange(heads.keys * (per_group + 2) * heads.size).view(heads.keys, per_group + 2, heads.size)
    return [rows[:, :per_group].flatten(), rows[:, per_group].flatten(), rows[:, per_group + 1].flatten()]


def rotary_rows(heads: int, size: int) -> Tensor:
    """The rows in Meta's order that transformers' order takes: pairs of a rotation side by side there, halves here."""
    return torch.arange(heads * size).view(heads, size // 2, 2).transpose(1, 2).flatten()


_RESNET = {
    "in_layers_0": "norm1",
    "in_layers_2": "conv1",
    "out_layers_0": "norm2",
    "out_layers_3": "conv2",
    "emb_layers_1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
_UNET_ENDS = {
    "input_blocks_0_0": "conv_in",
    "out_2": "conv_out",
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
}


def from_ldm(name: str) -> Translation | None:
    """What a module of Stability's UNet (kohya's names for SDXL) is in diffusers' ``UNet2DConditionModel``."""
    if name in _UNET_ENDS:
        return Translation((_UNET_ENDS[name],))
    match = re.fullmatch(r"(input|output)_blocks_(\d+)_(\d+)_(.+)|middle_block_(\d+)_(.+)", name)
    if match is None:
        return None
    if match[5] is not None:
        place, part, rest = "mid_block", int(match[5]), match[6]
        kind, number = ("attentions", 0) if part == 1 else ("resnets", part // 2)
    else:
        index, part, rest = int(match[2]), int(match[3]), match[4]
        down = match[1] == "input"
        block, number = divmod(index - 1 if down else index, 3)
        place = f"{'down' if down else 'up'}_blocks_{block}"
        if rest in ("op", "conv"):
            return Translation((f"{place}_{'downsamplers' if down else 'upsamplers'}_0_conv",))
        kind = "resnets" if part == 0 else "attentions"
    if kind == "resnets":
        if rest not in _RESNET:
            return None
        rest = _RESNET[rest]
    return Translation((f"{place}_{kind}_{number}_{rest}",))


_DOUBLE = {
    "img_attn_qkv": ("attn_to_q", "attn_to_k", "attn_to_v"),
    "txt_attn_qkv": ("attn_add_q_proj", "attn_add_k_proj", "attn_add_v_proj"),
    "img_attn_proj": ("attn_to_out_0",),
    "txt_attn_proj": ("attn_to_add_out",),
    "img_mlp_0": ("ff_net_0_proj",),
    "img_mlp_2": ("ff_net_2",),
    "txt_mlp_0": ("ff_context_net_0_proj",),
    "txt_mlp_2": ("ff_context_net_2",),
    "img_mod_lin": ("norm1_linear",),
    "txt_mod_lin": ("norm1_context_linear",),
}
_SINGLE = {
    "linear1": ("attn_to_q", "attn_to_k", "attn_to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation_lin": ("norm_linear",),
}
_FLUX_ENDS = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in_in_layer": "time_text_embed_timestep_embedder_linear_1",
    "time_in_out_layer": "time_text_embed_timestep_embedder_linear_2",
    "vector_in_in_layer": "time_text_embed_text_embedder_linear_1",
    "vector_in_out_layer": "time_text_embed_text_embedder_linear_2",
    "guidance_in_in_layer": "time_text_embed_guidance_embedder_linear_1",
    "guidance_in_out_layer": "time_text_embed_guidance_embedder_linear_2",
    "final_layer_linear": "proj_out",
}


def from_flux(name: str) -> Translation | None:
    """What a module of Black Forest Labs' Flux is in diffusers' ``FluxTransformer2DModel``."""
    if name in _FLUX_ENDS:
        return Translation((_FLUX_ENDS[name],))
    if name == "final_layer_adaLN_modulation_1":  # shift and scale there, scale and shift here
        return Translation(("norm_out_linear",), lambda sizes: [torch.arange(sizes[0]).roll(sizes[0] // 2)])
    match = re.fullmatch(r"(double|single)_blocks_(\d+)_(.+)", name)
    if match is None:
        return None
    table, place = (_DOUBLE, "transformer_blocks") if match[1] == "double" else (_SINGLE, "single_transformer_blocks")
    targets = table.get(match[3])
    return Translation(tuple(f"{place}_{match[2]}_{target}" for target in targets)) if targets else None
