"""Files of every family: what each is read as, against the formula of the trainer that writes it, in float64.

The formulas and the writers are written here, from the trainers' sources, and share nothing with dorac.
"""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dorac import files
from dorac.files.layers import completed

R, S = 3, 1.75
ALPHA = R * S
F64 = torch.float64
LINEAR = {"linear": (5, 7), "square": (6, 6), "one row": (1, 4), "rank above the sizes": (2, 2)}
CONV = {"conv": (5, 4, 3, 2), "square conv": (6, 6, 3, 3), "conv1d": (4, 4, 3), "1x1 conv": (6, 6, 1, 1)}
NAME = "model.layers.0.self_attn.q_proj"


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64)


def off_norm(norm: Tensor) -> Tensor:
    return norm * (0.6 + 0.8 * torch.rand(norm.shape, dtype=F64))


def factors(weight: Tensor) -> tuple[Tensor, Tensor]:
    """lora_A and lora_B for a weight, a zero row of which stays one in W + s BA."""
    a, b = drawn(R, *weight.shape[1:]), drawn(weight.shape[0], R, *[1] * (weight.ndim - 2))
    return a, b


def product(b: Tensor, a: Tensor) -> Tensor:
    return (b.flatten(1) @ a.flatten(1)).view(b.shape[0], *a.shape[1:])


def row_norms(weight: Tensor) -> Tensor:
    return weight.flatten(1).norm(dim=1)


def channel_norms(weight: Tensor) -> Tensor:
    return weight.transpose(0, 1).flatten(1).norm(dim=1)


def per_row(vector: Tensor, like: Tensor) -> Tensor:
    return vector.view(-1, *[1] * (like.ndim - 1))


def per_channel(vector: Tensor, like: Tensor) -> Tensor:
    return vector.view(1, -1, *[1] * (like.ndim - 2))


@dataclasses.dataclass(frozen=True)
class Written:
    """What a trainer wrote for one layer: its tensors, the weight that it computes with, files beside, arguments."""

    tensors: dict[str, Tensor]
    merged: Tensor
    config: dict | None = None
    metadata: dict[str, str] | None = None
    arguments: dict = dataclasses.field(default_factory=dict)
    filename: str = "adapter_model.safetensors"


def row_decomposed(weight: Tensor, s: float = S) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """lora_A, lora_B, m and W' = m (W + s BA) / ||W + s BA||_row, which most trainers have."""
    a, b = factors(weight)
    v = weight + s * product(b, a)
    m = off_norm(row_norms(weight))
    return a, b, m, per_row(m / row_norms(v), v) * v


PEFT_CONFIG = {"peft_type": "LORA", "use_dora": True, "r": R, "lora_alpha": ALPHA, "target_modules": ["q_proj"]}


def peft(weight: Tensor, *, magnitude=".lora_magnitude_vector", adapter="", config=PEFT_CONFIG, **more) -> Written:
    a, b, m, merged = row_decomposed(weight)
    m = m if weight.ndim == 2 else per_channel(m, weight)
    name = f"base_model.model.{NAME}"
    tensors = {f"{name}.lora_A{adapter}.weight": a, f"{name}.lora_B{adapter}.weight": b, name + magnitude: m}
    return Written(tensors, merged, config, **more)


def peft_embedding(weight: Tensor) -> Written:
    """The matrix is the table's transpose: one magnitude per feature."""
    a, b, m, merged = row_decomposed(weight.T)
    name = f"base_model.model.{NAME}"
    keys = ("lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
    tensors = {f"{name}.{key}": t for key, t in zip(keys, (a, b, m), strict=True)}
    return Written(tensors, merged.T, PEFT_CONFIG)


def peft_rslora(weight: Tensor) -> Written:
    written = peft(weight)
    alpha = S * math.sqrt(R)
    config = PEFT_CONFIG | {"use_rslora": True, "lora_alpha": 99.0, "alpha_pattern": {"self_attn.q_proj": alpha}}
    return dataclasses.replace(written, config=config)


def diffusers(weight: Tensor) -> Written:
    a, b, m, merged = row_decomposed(weight)
    name = "transformer.transformer_blocks.0.attn.to_q"
    tensors = {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b, f"{name}.lora_magnitude_vector": m}
    settings = {"transformer.r": R, "transformer.lora_alpha": ALPHA, "transformer.use_dora": True}
    metadata = {"lora_adapter_metadata": json.dumps(settings)}
    return Written(tensors, merged, metadata=metadata, filename="pytorch_lora_weights.safetensors")


def diffusers_without_header(weight: Tensor) -> Written:
    return dataclasses.replace(diffusers(weight), metadata=None, arguments={"lora_alpha": ALPHA})


def lycoris(weight: Tensor, *, on_out: bool, tucker: bool = False, eps: float = 0.0) -> Written:
    """LoConModule: weight / (norm + eps) * dora_scale, the norm over all axes but 0, or but 1 without wd_on_out."""
    down, up = factors(weight)
    name = "lora_unet_down_blocks_0_attentions_0_proj_in"
    tensors = {f"{name}.alpha": torch.tensor(ALPHA, dtype=F64), f"{name}.lora_up.weight": up}
    if tucker:
        mid, down = drawn(R, R, *weight.shape[2:]), drawn(R, weight.shape[1], *[1] * (weight.ndim - 2))
        tensors[f"{name}.lora_mid.weight"] = mid
        delta = torch.einsum("ijkl,pi,jr->prkl", mid, up.flatten(1), down.flatten(1))
    else:
        delta = product(up, down)
    tensors[f"{name}.lora_down.weight"] = down
    v = weight + ALPHA / R * delta
    norm, along = (row_norms, per_row) if on_out else (channel_norms, per_channel)
    scale = along(off_norm(norm(weight)), weight)
    tensors[f"{name}.dora_scale"] = scale
    return Written(tensors, v / (along(norm(v), v) + eps) * scale, arguments={"eps": eps}, filename="lora.safetensors")


def ai_toolkit(weight: Tensor, names=("lora_A", "lora_B")) -> Written:
    a, b, m, merged = row_decomposed(weight)
    name = "transformer.single_transformer_blocks.0.proj_out"
    tensors = {f"{name}.{names[0]}.weight": a, f"{name}.{names[1]}.weight": b, f"{name}.magnitude": m}
    return Written(tensors, merged, arguments={"lora_alpha": ALPHA}, filename="lora.safetensors")


def nvlabs(weight: Tensor) -> Written:
    a, b, m, merged = row_decomposed(weight)
    name = f"base_model.model.{NAME}"
    tensors = {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b, f"{name}.weight_m_wdecomp.weight": m[:, None]}
    config = {"peft_type": "DORA", "r": R, "lora_alpha": ALPHA, "dora_simple": True, "target_modules": ["q_proj"]}
    return Written(tensors, merged, config, filename="adapter_model.bin")


def nvlabs_magnitude_alone(weight: Tensor) -> Written:
    """A module of Wdecompose_target_modules: m W / ||W||."""
    m = off_norm(row_norms(weight))
    tensors = {f"base_model.model.{NAME}.weight_m_wdecomp.weight": m[:, None]}
    config = {"peft_type": "DORA", "r": R, "lora_alpha": ALPHA}
    return Written(tensors, per_row(m / row_norms(weight), weight) * weight, config, filename="adapter_model.bin")


def torchtune(weight: Tensor) -> Written:
    a, b, m, merged = row_decomposed(weight)
    name = "layers.0.attn.q_proj"
    tensors = {f"{name}.lora_a.weight": a, f"{name}.lora_b.weight": b, f"{name}.magnitude": m}
    return Written(tensors, merged, arguments={"lora_alpha": ALPHA}, filename="adapter_0.pt")


def fsdp_qlora(weight: Tensor) -> Written:
    a, b, m, merged = row_decomposed(weight, 1.0)
    tensors = {f"{NAME}.dora_layer.lora_A.weight": a, f"{NAME}.dora_layer.lora_B.weight": b}
    return Written(tensors | {f"{NAME}.magnitude_layer.magnitude": m}, merged, filename="model_state_dict.safetensors")


def megatron(weight: Tensor) -> Written:
    a, b, m, merged = row_decomposed(weight)
    name = "decoder.layers.0.self_attention.linear_proj.adapter"
    tensors = {f"{name}.linear_in.weight": a, f"{name}.linear_out.weight": b, f"{name}.weight_magnitude": m}
    return Written(tensors, merged, arguments={"lora_alpha": ALPHA}, filename="adapter.pt")


MLX_CONFIG = {"fine_tune_type": "dora", "num_layers": 4, "lora_parameters": {"rank": R, "scale": S, "dropout": 0.0}}


def mlx(weight: Tensor) -> Written:
    """DoRALinear: the factors are the other way round, y = x W^T + scale * (x lora_a) lora_b."""
    lora_a, lora_b = drawn(weight.shape[1], R), drawn(R, weight.shape[0])
    v = weight + (S * lora_b.T) @ lora_a.T
    m = off_norm(weight.norm(dim=1))
    tensors = {f"{NAME}.lora_a": lora_a, f"{NAME}.lora_b": lora_b, f"{NAME}.m": m}
    return Written(tensors, (m / v.norm(dim=1))[:, None] * v, MLX_CONFIG, filename="adapters.safetensors")


def mlx_embedding(weight: Tensor) -> Written:
    """DoRAEmbedding: one magnitude per token."""
    lora_a, lora_b = drawn(weight.shape[0], R), drawn(R, weight.shape[1])
    v = weight + S * lora_a @ lora_b
    m = off_norm(weight.norm(dim=1))
    tensors = {f"model.embed_tokens.{k}": t for k, t in {"lora_a": lora_a, "lora_b": lora_b, "m": m}.items()}
    return Written(tensors, (m / v.norm(dim=1))[:, None] * v, MLX_CONFIG, filename="adapters.safetensors")


def of(function: Callable[..., Written], **options) -> Callable[[Tensor], Written]:
    return lambda weight: function(weight, **options)


BIN = {"filename": "adapter_model.bin"}
MEMORY = {"config": None, "arguments": {"lora_alpha": ALPHA}}
TABLES = {"embedding": (7, 5), "square embedding": (6, 6)}
# Each trainer's layers: the format that they are read as, who writes them, and shapes of the weights.
TRAINERS: dict[str, tuple[str, Callable[[Tensor], Written], dict[str, tuple[int, ...]]]] = {
    "PEFT": ("PEFT", peft, LINEAR | CONV),
    "PEFT, embedding": ("PEFT", peft_embedding, TABLES),
    "PEFT, rsLoRA and patterns": ("PEFT", peft_rslora, LINEAR),
    "PEFT, .weight": ("PEFT", of(peft, magnitude=".lora_magnitude_vector.weight"), LINEAR | CONV),
    "PEFT, in memory": (
        "PEFT",
        of(peft, magnitude=".lora_magnitude_vector.default", adapter=".default", **MEMORY),
        LINEAR,
    ),
    "PEFT, in memory, .weight": (
        "PEFT",
        of(peft, magnitude=".lora_magnitude_vector.default.weight", adapter=".default", **MEMORY),
        LINEAR,
    ),
    "PEFT, pickled": ("PEFT", of(peft, **BIN), LINEAR),
    "diffusers": ("diffusers", diffusers, LINEAR),
    "diffusers, no header": ("diffusers", diffusers_without_header, LINEAR),
    "LyCORIS, rows": ("LyCORIS", of(lycoris, on_out=True), LINEAR | CONV),
    "LyCORIS, columns": ("LyCORIS", of(lycoris, on_out=False), LINEAR | CONV),
    "LyCORIS, rows, large eps": ("LyCORIS", of(lycoris, on_out=True, eps=0.5), LINEAR | CONV),
    "LyCORIS, columns, large eps": ("LyCORIS", of(lycoris, on_out=False, eps=0.5), LINEAR | CONV),
    "LyCORIS, rows, Tucker": ("LyCORIS", of(lycoris, on_out=True, tucker=True), {"square conv": (6, 6, 3, 3)}),
    "LyCORIS, columns, Tucker": ("LyCORIS", of(lycoris, on_out=False, tucker=True), {"conv": (5, 4, 3, 2)}),
    "ai-toolkit": ("ai-toolkit", ai_toolkit, LINEAR),
    "ai-toolkit, older": ("ai-toolkit", of(ai_toolkit, names=("lora_down", "lora_up")), LINEAR),
    "NVlabs": ("NVlabs/DoRA", nvlabs, LINEAR),
    "NVlabs, magnitude alone": ("NVlabs/DoRA", nvlabs_magnitude_alone, LINEAR),
    "torchtune": ("torchtune", torchtune, LINEAR),
    "mlx-lm": ("mlx-lm", mlx, LINEAR),
    "mlx-lm, embedding": ("mlx-lm", mlx_embedding, TABLES),
    "fsdp_qlora": ("fsdp_qlora", fsdp_qlora, LINEAR),
    "Megatron-Bridge": ("Megatron-Bridge", megatron, LINEAR),
}
CASES = [(trainer, shape) for trainer, (_, _, shapes) in TRAINERS.items() for shape in shapes]


def save(folder: Path, written: Written) -> Path:
    path = folder / written.filename
    tensors = {key: t.contiguous() for key, t in written.tensors.items()}
    if path.suffix == ".safetensors":
        save_file(tensors, path, metadata=written.metadata)
    else:
        torch.save(tensors, path)
    if written.config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(written.config))
    return path


def case(trainer: str, shape: str) -> tuple[str, Tensor, Written]:
    format, write, shapes = TRAINERS[trainer]
    weight = drawn(*shapes[shape])
    return format, weight, write(weight)


@pytest.mark.parametrize(("trainer", "shape"), CASES, ids=map("-".join, CASES))
def test_values_are_the_trainers_own(trainer, shape, tmp_path):
    format, weight, written = case(trainer, shape)
    path = save(tmp_path, written)
    contents = files.read(path if written.config is None else tmp_path, **written.arguments)
    assert contents.format == format
    (layer,) = contents.layers
    assert not contents.others
    torch.testing.assert_close(files.merged(layer, weight), written.merged, rtol=1e-12, atol=1e-13)
    assert not torch.allclose(written.merged, weight)
    whole = completed(layer, weight)
    assert whole.magnitude is not None
    assert whole.lora_A is not None
    torch.testing.assert_close(files.merged(whole, weight), written.merged, rtol=1e-12, atol=1e-13)


def writable(contents: files.Contents, to: str) -> bool:
    (layer,) = contents.layers
    if layer.lora_A is None:
        return False
    if to == "peft":
        return layer.norm_axis == "out"
    if to == "lycoris":
        return layer.kind != "embedding"
    return layer.kind != "conv" and layer.norm_axis == ("in" if layer.kind == "embedding" else "out")


@pytest.mark.parametrize("to", ["peft", "lycoris", "mlx"])
@pytest.mark.parametrize(("trainer", "shape"), CASES, ids=map("-".join, CASES))
def test_written_and_read_back(trainer, shape, to, tmp_path):
    """In every other format that has the layer; the formats that have not refuse it by name."""
    _, weight, written = case(trainer, shape)
    path = save(tmp_path, written)
    contents = files.read(path if written.config is None else tmp_path, **written.arguments)
    out = tmp_path / "out" / ("lora.safetensors" if to == "lycoris" else "")
    if not writable(contents, to):
        with pytest.raises(ValueError, match=contents.layers[0].name):
            files.write(contents, out, to)
        assert not out.exists()
        return
    if to != "lycoris":  # which have no eps
        contents = contents._replace(layers=(completed(contents.layers[0], weight),))
    files.write(contents, out, to)
    eps = {"eps": contents.layers[0].eps} if to == "lycoris" else {}
    axis = {"norm_axis": contents.layers[0].norm_axis} if to == "lycoris" and shape == "one row" else {}
    back = files.read(out, **eps, **axis)
    assert back.format == {"peft": "PEFT", "lycoris": "LyCORIS", "mlx": "mlx-lm"}[to]
    torch.testing.assert_close(files.merged(back.layers[0], weight), written.merged, rtol=1e-12, atol=1e-13)


def test_scalings_made_one_in_half_precision(tmp_path):
    """mlx-lm has one scale: another layer's quotient goes into its factor, and is not rounded to 8 bits there."""
    layer = files.Layer("a", "linear", *(drawn(*s).bfloat16() for s in ((R, 7), (5, R))), drawn(5).abs(), 2.0)
    files.write(files.Contents("x", (layer, layer._replace(name="b", scaling=3.7))), tmp_path, "mlx")
    weight = drawn(5, 7)
    for back, scaling in zip(files.read(tmp_path).layers, (2.0, 3.7), strict=True):
        expected = files.merged(layer._replace(scaling=scaling), weight)
        torch.testing.assert_close(files.merged(back, weight), expected, rtol=1e-6, atol=1e-6)


def test_shown_without_its_values():
    weight = drawn(4, 3)
    lora_A, lora_B = factors(weight)
    layers = [
        files.Layer(f"l{i}", kind, lora_A, lora_B, None, S) for i, kind in enumerate(("linear", "linear", "conv"))
    ]
    contents = files.Contents("PEFT", tuple(layers), others={"bias": weight})
    assert repr(contents) == f"Contents('PEFT', 2 linear, 1 conv, r={len(lora_A)}, 1 other tensors)"
    assert repr(files.Contents("PEFT", ())) == "Contents('PEFT', no layers)"
