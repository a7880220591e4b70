"""Files of every family into a model: names and rows of other libraries, and all that does not fit."""

import json
import re

import pytest
import test_files
import torch
from safetensors.torch import save_file
from test_files import CASES, F64, S, drawn, lycoris, off_norm, row_norms
from torch import nn

import dorac
from dorac import files

# The module that each trainer's layer is, where it is not of the same name.
MODULES = {
    "diffusers": "transformer_blocks.0.attn.to_q",
    "LyCORIS": "down_blocks.0.attentions.0.proj_in",
    "ai-toolkit": "single_transformer_blocks.0.proj_out",
    "mlx-lm, embedding": "model.embed_tokens",
    "Megatron-Bridge": "model.layers.0.self_attn.o_proj",
}


PROJ = MODULES["LyCORIS"]


def module_of(trainer: str) -> str:
    family, _, variant = trainer.partition(", ")
    return MODULES.get(trainer) or (test_files.NAME if variant == "embedding" else MODULES.get(family, test_files.NAME))


NAMED = [case for case in CASES if case[0] != "torchtune"]


class Config:
    def __init__(self, **values):
        self.values = values

    def to_dict(self):
        return self.values


def nested(**layers: nn.Module) -> nn.Module:
    """A model that holds each layer under its dotted name."""
    root = nn.Module()
    for name, layer in layers.items():
        *parents, last = name.split(".")
        place = root
        for part in parents:
            if part not in place._modules:
                place.add_module(part, nn.Module())
            place = place.get_submodule(part)
        place.add_module(last, layer)
    return root


def layer_of(weight: torch.Tensor, embedding: bool = False) -> nn.Module:
    if embedding:
        return nn.Embedding.from_pretrained(weight.clone())
    if weight.ndim == 2:
        layer = nn.Linear(*reversed(weight.shape), dtype=F64)
    else:
        cls = {3: nn.Conv1d, 4: nn.Conv2d}[weight.ndim]
        layer = cls(weight.shape[1], weight.shape[0], tuple(weight.shape[2:]), dtype=F64)
    layer.weight.data = weight.clone().to(layer.weight.device)
    return layer


def linear(rows: int, columns: int) -> nn.Linear:
    return layer_of(drawn(rows, columns))


def merged(model: nn.Module) -> dict[str, torch.Tensor]:
    plain = dorac.merge(model, unload=True)
    return {name: p.detach() for name, p in plain.named_parameters() if name.endswith("weight")}


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


def assert_unchanged(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "wrapped"])
@pytest.mark.parametrize(("trainer", "shape"), NAMED, ids=map("-".join, NAMED))
def test_into_a_model(trainer, shape, wrapped, tmp_path):
    _, weight, written = test_files.case(trainer, shape)
    name = module_of(trainer)
    model = nested(**{name: layer_of(weight, "embedding" in trainer), "unused": linear(3, 4)})
    path = test_files.save(tmp_path, written)
    source = path if written.config is None else tmp_path
    if wrapped:
        r = 1 if trainer == "NVlabs, magnitude alone" else test_files.R
        scaling = 1.0 if trainer in ("fsdp_qlora", "NVlabs, magnitude alone") else S
        dorac.apply_dora(model, [name], r=r, lora_alpha=r * scaling)
    before = snapshot(model)
    per_column = "columns" in trainer or trainer == "mlx-lm, embedding"
    if per_column:
        with pytest.raises(ValueError, match=rf"{path}: .* has a magnitude per input"):
            dorac.load_adapter(model, source, **written.arguments)
        assert_unchanged(model, before)
        return
    assert dorac.load_adapter(model, source, **written.arguments) == [name]
    weights = merged(model)
    torch.testing.assert_close(weights[f"{name}.weight"], written.merged, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("trainer", "shape"), NAMED, ids=map("-".join, NAMED))
def test_merged_into_a_model(trainer, shape, tmp_path):
    """Of either axis."""
    _, weight, written = test_files.case(trainer, shape)
    name = module_of(trainer)
    model = nested(**{name: layer_of(weight, "embedding" in trainer), "unused": linear(3, 4)})
    path = test_files.save(tmp_path, written)
    source = path if written.config is None else tmp_path
    assert files.merge_into(model, source, **written.arguments) == [name]
    torch.testing.assert_close(
        model.get_submodule(name).weight, written.merged, rtol=1e-12, atol=1e-13, check_stride=False
    )


def test_what_is_not_merged_into(tmp_path):
    weight = drawn(6, 6)
    path = test_files.save(tmp_path, lycoris(weight, on_out=False))
    shared = layer_of(weight)
    model = nested(**{PROJ: shared, "head": nn.Linear(6, 6)})
    model.head.weight = shared.weight
    with pytest.raises(ValueError, match=rf"{PROJ}.weight and head.weight are one weight: merging would change both"):
        files.merge_into(model, path)
    model = nested(**{PROJ: layer_of(weight)})
    dorac.apply_dora(model, ["proj_in"], r=2)
    with pytest.raises(ValueError, match="the model has adapted layers"):
        files.merge_into(model, path)
    two = nested(**{"a.x": layer_of(drawn(5, 4)), "a.y": layer_of(drawn(5, 4)).half()})
    sdxl_file(tmp_path / "two.safetensors", ["lora_unet_a_x", "lora_unet_a_y"])
    tensors = dict(files.storage.read(tmp_path / "two.safetensors").tensors)
    tensors["lora_unet_a_y.dora_scale"] *= 1e8
    save_file(tensors, tmp_path / "two.safetensors")
    before = snapshot(two)
    with pytest.raises(ValueError, match=r"a.y: the merged weight is not finite in torch.float16"):
        files.merge_into(two, tmp_path / "two.safetensors")
    assert_unchanged(two, before)


HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "hidden_size": 24}


def adapter(rows: int, columns: int):
    """Tensors of an adapter of these sizes, and its weight of a base weight."""
    a, b = drawn(3, columns), drawn(rows, 3)
    m = off_norm(row_norms(drawn(rows, columns)))

    def adapted(weight):
        v = weight + S * b @ a
        return (m / row_norms(v))[:, None] * v

    return a, b, m, adapted


def permuted(weight: torch.Tensor, heads: int, size: int) -> torch.Tensor:
    """torchtune's tune_to_hf."""
    return weight.view(heads, size // 2, 2, -1).transpose(1, 2).reshape(heads * size, -1)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("exported", [False, True], ids=["own names", "PEFT export"])
def test_torchtunes_rotary_order(exported, kind, tmp_path):
    """The base weights of a Llama are transformers'; torchtune trained on its own order of their rows."""
    sizes = {"q_proj": 24, "k_proj": 12, "v_proj": 12}
    model, tensors, expected = {}, {}, {}
    for name, rows in sizes.items():
        heads = 0 if name == "v_proj" or kind == "qwen2" else rows // 6
        own = drawn(rows, 24)  # in torchtune
        a, b, m, adapted = adapter(rows, 24)
        there = f"model.layers.0.self_attn.{name}"
        model[there] = layer_of(permuted(own, heads, 6) if heads else own)
        expected[there] = permuted(adapted(own), heads, 6) if heads else adapted(own)
        if exported:
            key = f"base_model.model.{there}"
            tensors[f"{key}.lora_A.weight"] = a
            tensors[f"{key}.lora_B.weight"] = permuted(b, heads, 6).contiguous() if heads else b
            tensors[f"{key}.lora_magnitude_vector.weight"] = m
        else:
            key = f"layers.0.attn.{name}"
            tensors |= {f"{key}.lora_a.weight": a, f"{key}.lora_b.weight": b, f"{key}.magnitude": m}
    model = nested(**model)
    path = tmp_path / ("adapter_model.safetensors" if exported else "adapter_0.pt")
    if exported:
        save_file(tensors, path)
        config = {"peft_type": "LORA", "r": 3, "lora_alpha": 3 * S, "target_modules": list(sizes)}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    else:
        torch.save(tensors, path)
    given = {} if exported else {"lora_alpha": 3 * S}
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"torchtune's order: the model's config must say its heads and a model_type"):
        dorac.load_adapter(model, tmp_path, **given)
    assert_unchanged(model, before)
    model.config = Config(model_type=kind, **HEADS)
    dorac.load_adapter(model, tmp_path, **given)
    weights = merged(model)
    for name, weight in expected.items():
        torch.testing.assert_close(weights[f"{name}.weight"], weight, rtol=1e-12, atol=1e-13)


def test_megatrons_fused_layers(tmp_path):
    """linear_qkv: for each of the 2 groups its 2 queries, its key, its value; linear_fc1: gate, then up."""
    q, k, v = linear(24, 24), linear(12, 24), linear(12, 24)
    gate, up = linear(10, 24), linear(10, 24)
    block = "model.layers.3."
    model = nested(
        **{f"{block}self_attn.{n}_proj": layer for n, layer in zip("qkv", (q, k, v), strict=True)},
        **{f"{block}mlp.gate_proj": gate, f"{block}mlp.up_proj": up},
    )
    rows = [
        part
        for group in range(2)
        for part in (q.weight[12 * group :][:12], k.weight[6 * group :][:6], v.weight[6 * group :][:6])
    ]
    fused = {"self_attention.linear_qkv": torch.cat(rows), "mlp.linear_fc1": torch.cat([gate.weight, up.weight])}
    tensors, expected = {}, {}
    for name, weight in fused.items():
        a, b, m, adapted = adapter(*weight.shape)
        key = f"module.decoder.layers.3.{name}.adapter"
        tensors |= {f"{key}.linear_in.weight": a, f"{key}.linear_out.weight": b, f"{key}.weight_magnitude": m}
        expected[name] = adapted(weight.detach())
    torch.save(tensors, tmp_path / "adapter.pt")
    with pytest.raises(
        ValueError, match=r"linear_qkv holds q, k and v by groups of heads: the model's config must say"
    ):
        dorac.load_adapter(model, tmp_path / "adapter.pt", lora_alpha=3 * S)
    model.config = Config(**HEADS)
    dorac.load_adapter(model, tmp_path / "adapter.pt", lora_alpha=3 * S)
    weights = {name.removeprefix(block): w for name, w in merged(model).items()}
    groups = expected["self_attention.linear_qkv"].view(2, 24, 24)
    for n, part in (("q", groups[:, :12]), ("k", groups[:, 12:18]), ("v", groups[:, 18:])):
        torch.testing.assert_close(weights[f"self_attn.{n}_proj.weight"], part.flatten(0, 1), rtol=1e-12, atol=1e-13)
    together = torch.cat([weights["mlp.gate_proj.weight"], weights["mlp.up_proj.weight"]])
    torch.testing.assert_close(together, expected["mlp.linear_fc1"], rtol=1e-12, atol=1e-13)


def flux() -> nn.Module:
    double, single = "transformer_blocks.0.", "single_transformer_blocks.1."
    names = {f"{double}attn.{n}": (8, 8) for n in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")}
    names |= {f"{double}attn.to_out.0": (8, 8), f"{double}ff.net.0.proj": (32, 8), f"{double}norm1.linear": (48, 8)}
    names |= {f"{single}attn.{n}": (8, 8) for n in ("to_q", "to_k", "to_v")}
    names |= {f"{single}proj_mlp": (32, 8), f"{single}proj_out": (8, 40), "norm_out.linear": (16, 8)}
    return nested(**{name: linear(*shape) for name, shape in names.items()})


FLUX = {
    "double_blocks.0.img_attn.qkv": [f"transformer_blocks.0.attn.to_{n}" for n in "qkv"],
    "double_blocks.0.txt_attn.qkv": [f"transformer_blocks.0.attn.add_{n}_proj" for n in "qkv"],
    "double_blocks.0.img_attn.proj": ["transformer_blocks.0.attn.to_out.0"],
    "double_blocks.0.img_mlp.0": ["transformer_blocks.0.ff.net.0.proj"],
    "double_blocks.0.img_mod.lin": ["transformer_blocks.0.norm1.linear"],
    "single_blocks.1.linear1": [
        *(f"single_transformer_blocks.1.attn.to_{n}" for n in "qkv"),
        "single_transformer_blocks.1.proj_mlp",
    ],
    "single_blocks.1.linear2": ["single_transformer_blocks.1.proj_out"],
}


@pytest.mark.parametrize("dotted", [False, True], ids=["kohya", "diffusion_model"])
def test_flux(dotted, tmp_path):
    model, tensors, expected = flux(), {}, {}
    for name, targets in FLUX.items():
        weight = torch.cat([model.get_submodule(target).weight.detach() for target in targets])
        a, b, m, adapted = adapter(*weight.shape)
        key = f"diffusion_model.{name}" if dotted else f"lora_unet_{name.replace('.', '_')}"
        tensors |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b, f"{key}.dora_scale": m[:, None]}
        tensors[f"{key}.alpha"] = torch.tensor(3 * S)
        sizes = [model.get_submodule(target).weight.shape[0] for target in targets]
        expected |= zip(targets, adapted(weight).split(sizes), strict=True)
    # shift and scale of the last norm, which diffusers has the other way round
    halves = model.get_submodule("norm_out.linear").weight.detach()
    a, b, m, adapted = adapter(16, 8)
    key = "diffusion_model.final_layer.adaLN_modulation.1" if dotted else "lora_unet_final_layer_adaLN_modulation_1"
    tensors |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b, f"{key}.dora_scale": m[:, None]}
    tensors[f"{key}.alpha"] = torch.tensor(3 * S)
    expected["norm_out.linear"] = adapted(halves.roll(8, 0)).roll(8, 0)
    save_file(tensors, tmp_path / "lora.safetensors")
    dorac.load_adapter(model, tmp_path / "lora.safetensors", eps=0)
    weights = merged(model)
    for name, weight in expected.items():
        torch.testing.assert_close(weights[f"{name}.weight"], weight, rtol=1e-12, atol=1e-13)


# kohya's names for SDXL, which are Stability's, and diffusers'.
SDXL = {
    "input_blocks_0_0": "conv_in",
    "input_blocks_1_0_in_layers_2": "down_blocks.0.resnets.0.conv1",
    "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks_4_1_transformer_blocks_0_attn1_to_q": "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    "input_blocks_8_0_emb_layers_1": "down_blocks.2.resnets.1.time_emb_proj",
    "middle_block_1_transformer_blocks_3_attn2_to_v": "mid_block.attentions.0.transformer_blocks.3.attn2.to_v",
    "middle_block_2_out_layers_3": "mid_block.resnets.1.conv2",
    "output_blocks_2_2_conv": "up_blocks.0.upsamplers.0.conv",
    "output_blocks_4_1_proj_in": "up_blocks.1.attentions.1.proj_in",
    "output_blocks_8_0_skip_connection": "up_blocks.2.resnets.2.conv_shortcut",
    "time_embed_0": "time_embedding.linear_1",
    "label_emb_0_2": "add_embedding.linear_2",
    "out_2": "conv_out",
}


def sdxl_file(path, names) -> None:
    tensors = {}
    for name in names:
        a, b, m, _ = adapter(5, 4)
        tensors |= {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b, f"{name}.dora_scale": m[:, None]}
        tensors[f"{name}.alpha"] = torch.tensor(3 * S)
    save_file(tensors, path)


@pytest.mark.parametrize("theirs", [False, True], ids=["diffusers' model", "Stability's model"])
def test_sdxl(theirs, tmp_path):
    dotted = {key: re.sub(r"_(?=\d)|(?<=\d)_", ".", key) for key in SDXL}
    names = {key: f"model.diffusion_model.{dotted[key]}" if theirs else name for key, name in SDXL.items()}
    model = nested(**{name: linear(5, 4) for name in names.values()})
    sdxl_file(tmp_path / "lora.safetensors", [f"lora_unet_{key}" for key in names])
    assert set(dorac.load_adapter(model, tmp_path / "lora.safetensors")) == set(names.values())


ENCODER = "text_model.encoder.layers.0.self_attn.q_proj"
PIPELINE = {
    "lora_unet_mid_block_attentions_0_proj_in": "unet.mid_block.attentions.0.proj_in",
    f"lora_te1_{ENCODER.replace('.', '_')}": f"text_encoder.{ENCODER}",
    f"lora_te2_{ENCODER.replace('.', '_')}": f"text_encoder_2.{ENCODER}",
}


def test_parts_of_a_pipeline(tmp_path):
    file = tmp_path / "lora.safetensors"
    sdxl_file(file, PIPELINE)
    whole = nested(**{name: linear(5, 4) for name in PIPELINE.values()})
    assert set(dorac.load_adapter(whole, file)) == set(PIPELINE.values())
    unet = nested(**{"mid_block.attentions.0.proj_in": linear(5, 4)})
    before = snapshot(unet)
    with pytest.raises(ValueError, match=r"no module for 2 of the file's 3 layers: lora_te1_text_\S+, .*component="):
        dorac.load_adapter(unet, file)
    with pytest.raises(ValueError, match="no layer of the file is of the component 'vae'"):
        dorac.load_adapter(unet, file, component="vae")
    assert_unchanged(unet, before)
    assert dorac.load_adapter(unet, file, component="unet") == ["mid_block.attentions.0.proj_in"]
    encoder = nested(**{ENCODER: linear(5, 4)})
    assert dorac.load_adapter(encoder, file, component="text_encoder_2") == [ENCODER]


def test_plain_lora_beside_dora(tmp_path):
    """Its magnitude is the norm, so that W' = W + s BA."""
    model = nested(**{"a.x": linear(5, 4), "a.y": linear(5, 4)})
    sdxl_file(tmp_path / "lora.safetensors", ["lora_unet_a_x", "lora_unet_a_y"])
    tensors = files.storage.read(tmp_path / "lora.safetensors").tensors
    del tensors["lora_unet_a_y.dora_scale"]
    save_file(tensors, tmp_path / "plain.safetensors")
    base = model.get_submodule("a.y").weight.detach().clone()
    expected = base + S * tensors["lora_unet_a_y.lora_up.weight"] @ tensors["lora_unet_a_y.lora_down.weight"]
    dorac.load_adapter(model, tmp_path / "plain.safetensors")
    torch.testing.assert_close(merged(model)["a.y.weight"], expected)


@pytest.fixture
def large_eps(tmp_path):
    """A file whose values need the base weights, that weight, and what the layer computes of an input."""
    weight, x = drawn(6, 6), drawn(3, 6)
    written = lycoris(weight, on_out=True, eps=0.25)
    return test_files.save(tmp_path, written), weight, x, x @ written.merged.T


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_base_weights(where, large_eps, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    path, weight, x, expected = large_eps
    model = nested(**{PROJ: layer_of(weight)})
    if where == "cpu":
        accelerate.cpu_offload(model, execution_device="cpu")
    else:
        accelerate.disk_offload(model, tmp_path / "offload", execution_device="cpu")
    dorac.load_adapter(model, path, eps=0.25)
    bias = model.get_submodule(PROJ)(torch.zeros_like(x))
    torch.testing.assert_close(model.get_submodule(PROJ)(x) - bias, expected)


def test_beside_another_adapter_and_in_compiled_blocks(large_eps):
    path, weight, x, expected = large_eps
    model = nested(**{PROJ: layer_of(weight)})
    model.down_blocks = torch.compile(model.down_blocks, backend="eager")
    (name,) = dorac.load_adapter(model, path, eps=0.25)
    assert name == PROJ.replace("blocks", "blocks._orig_mod")
    layer = model.get_submodule(name)
    torch.testing.assert_close(layer(x) - layer(torch.zeros_like(x)), expected)
    dorac.load_adapter(model, path, eps=0, adapter_name="second")
    torch.testing.assert_close(layer(x) - layer(torch.zeros_like(x)), expected)
    dorac.set_adapter(model, "second")
    assert not torch.allclose(layer(x) - layer(torch.zeros_like(x)), expected)


def test_base_weights_without_values(large_eps):
    path, weight, *_ = large_eps
    with torch.device("meta"):
        model = nested(**{PROJ: layer_of(weight)})
    with pytest.raises(ValueError, match=f"{PROJ} is on meta and has no values: load the base weights first"):
        dorac.load_adapter(model, path, eps=0.25)
    assert dorac.load_adapter(model, path, eps=0) == [PROJ]  # for which they are not needed


def test_arguments_that_pefts_files_have_no_place_for(tmp_path):
    model = nested(**{"a.x": linear(5, 4)})
    dorac.apply_dora(model, ["x"], r=2)
    dorac.save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="holds PEFT's files, which say all that is needed: lora_alpha= has no place"):
        dorac.load_adapter(model, tmp_path, lora_alpha=3)
