"""Files that are read as nothing: of no format, damaged, without what they need; each with what is missing, by name."""

import dataclasses
import json
import os
import pickle
import random

import pytest
import torch
from safetensors.torch import save_file
from test_files import ALPHA, TRAINERS, R, Written, case, drawn, lycoris, mlx, peft, save

import dorac
from dorac import files


def written_as(tmp_path, written: Written, tensors):
    return save(tmp_path, Written(tensors, written.merged, written.config, written.metadata, filename=written.filename))


def without_arguments(trainer: str) -> bool:
    return trainer.partition(",")[0] in ("ai-toolkit", "torchtune", "Megatron-Bridge") or "no header" in trainer


@pytest.mark.parametrize("trainer", [name for name in TRAINERS if without_arguments(name)])
def test_an_alpha_that_the_file_does_not_say(trainer, tmp_path):
    format, _, written = case(trainer, "linear")
    path = save(tmp_path, written)
    message = rf"a {format} file does not say its alpha: pass lora_alpha= \(--alpha\) or scaling= \(--scaling\)"
    with pytest.raises(ValueError, match=rf"^{path}: {message}$"):
        files.read(path)
    by_alpha = files.read(path, lora_alpha=ALPHA).layers[0].scaling
    assert by_alpha == files.read(path, scaling=ALPHA / R).layers[0].scaling == ALPHA / R


# Of each format the keys without which there is no layer.
NEEDED = {
    "PEFT": ("lora_A", "lora_B"),
    "diffusers": ("lora_A", "lora_B"),
    "LyCORIS, rows": ("lora_down", "lora_up"),
    "ai-toolkit": ("lora_A", "lora_B"),
    "NVlabs": ("lora_A", "lora_B", "weight_m_wdecomp"),
    "torchtune": ("lora_a", "lora_b"),
    "mlx-lm": ("lora_a", "lora_b"),
    "fsdp_qlora": ("lora_A", "lora_B", "magnitude"),
    "Megatron-Bridge": ("linear_in", "linear_out"),
}


@pytest.mark.parametrize(("trainer", "role"), [(t, role) for t, roles in NEEDED.items() for role in roles])
def test_a_missing_tensor(trainer, role, tmp_path):
    """In a file of two layers, so that it is still known what it is."""
    format, _, written = case(trainer, "linear")
    second = {key.replace("0", "1"): t.clone() for key, t in written.tensors.items()}
    gone = next(key for key in second if f".{role}" in key)
    del second[gone]
    path = written_as(tmp_path, written, written.tensors | second)
    missing = {"ai-toolkit": {"lora_A": "lora_down", "lora_B": "lora_up"}}.get(trainer, {}).get(role, role)
    with pytest.raises(ValueError, match=rf"^{tmp_path}/\S+: {format}: \S*1\S* has no {missing}$"):
        files.read(path if written.config is None else tmp_path, **written.arguments)


@pytest.mark.parametrize("trainer", NEEDED)
def test_no_magnitude_anywhere(trainer, tmp_path):
    _, _, written = case(trainer, "linear")
    magnitudes = ("magnitude", "dora_scale", "weight_m_wdecomp.weight", ".m", "lora_magnitude_vector")
    tensors = {key: t for key, t in written.tensors.items() if not key.endswith(magnitudes)}
    path = written_as(tmp_path, written, tensors)
    with pytest.raises(
        ValueError, match=r"has a magnitude: it is no DoRA$|has no |no adapter in a format|not describe a DoRA"
    ):
        files.read(path if written.config is None else tmp_path, **written.arguments)


@pytest.mark.parametrize("trainer", NEEDED)
@pytest.mark.parametrize("how", ["a rank apart", "not finite", "integers", "a magnitude too short"])
def test_values_that_do_not_go_together(trainer, how, tmp_path):
    format, _, written = case(trainer, "linear")
    tensors = {key: t.clone() for key, t in written.tensors.items()}
    magnitude = next(
        key
        for key in tensors
        if key.endswith(("magnitude", "dora_scale", "weight_m_wdecomp.weight", ".m", "lora_magnitude_vector"))
    )
    first = next(key for key in tensors if key != magnitude and tensors[key].ndim == 2)
    if how == "a rank apart":
        longer = tensors[first]
        tensors[first] = torch.cat([longer, longer], int(longer.shape[0] > R))
    elif how == "not finite":
        tensors[first][0, 0] = torch.inf
    elif how == "integers":
        tensors[first] = tensors[first].to(torch.int64)
    else:
        tensors[magnitude] = tensors[magnitude][:-1]
    path = written_as(tmp_path, written, tensors)
    words = {
        "a rank apart": r"do not go together: lora_A|has r = 3 in adapter_config\.json, its lora_A is \[6, 7\]",
        "not finite": "is not finite",
        "integers": "is torch.int64, not floating point of 16 bits or more",
        "a magnitude too short": "has 4 elements, not 5|fits neither axis of|has 4 elements, with 7 inputs",
    }[how]
    with pytest.raises(ValueError, match=rf"^{tmp_path}/\S+: {format}: .*({words})"):
        files.read(path if written.config is None else tmp_path, **written.arguments)


ODD = {
    "a vector": (lambda t: t.flatten()[:1], r"\[1\], which is no factor"),
    "a number": (lambda t: t.flatten()[0], r"\[\], which is no factor"),
    "rank 0": (lambda t: t[:0] if t.shape[0] == R else t[:, :0], "which is no factor"),
    "8 bits": (lambda t: t.to(torch.float8_e4m3fn), "is torch.float8_e4m3fn, not floating point of 16 bits or more"),
}


@pytest.mark.parametrize("trainer", NEEDED)
@pytest.mark.parametrize("how", ODD)
def test_factors_that_are_none(trainer, how, tmp_path):
    format, _, written = case(trainer, "linear")
    change, message = ODD[how]
    tensors = {key: change(t) if t.ndim == 2 and R in t.shape else t for key, t in written.tensors.items()}
    path = written_as(tmp_path, written, tensors)
    with pytest.raises(ValueError, match=rf"^{tmp_path}/\S+: {format}: .*({message})"):
        files.read(path if written.config is None else tmp_path, **written.arguments)


@pytest.mark.parametrize("alpha", [torch.ones(2), torch.tensor(torch.nan), torch.tensor(True)], ids=str)
def test_an_alpha_that_is_no_number(alpha, tmp_path):
    written = lycoris(drawn(5, 7), on_out=True)
    tensors = {key: alpha if key.endswith("alpha") else t for key, t in written.tensors.items()}
    with pytest.raises(ValueError, match=r"LyCORIS: its alpha must be a finite number, got (nan|True|a tensor .2.)$"):
        files.read(written_as(tmp_path, written, tensors))


@pytest.mark.parametrize("scale", [float("nan"), "20", 10**400, True])
def test_a_scale_that_is_no_number(scale, tmp_path):
    written = mlx(drawn(5, 7))
    config = written.config | {"lora_parameters": {"rank": R, "scale": scale}}
    save(tmp_path, dataclasses.replace(written, config=config))
    with pytest.raises(ValueError, match=f"mlx-lm: its scale must be a finite number, got '?{scale}'?$"):
        files.read(tmp_path)


def test_one_tensor_in_two_spellings(tmp_path):
    written = peft(drawn(5, 7))
    key = next(key for key in written.tensors if key.endswith("magnitude_vector"))
    written_as(tmp_path, written, written.tensors | {f"{key}.weight": written.tensors[key] + 1})
    with pytest.raises(ValueError, match=rf"PEFT: {key} is there twice, in two spellings$"):
        files.read(tmp_path)


@pytest.mark.parametrize(
    ("key", "kind"),
    [("hada_w1_a", "LoHa"), ("lokr_w1", "LoKr"), ("oft_blocks", "OFT"), ("diff", "a full difference")],
)
def test_other_kinds_of_lycoris(key, kind, tmp_path):
    written = lycoris(drawn(5, 7), on_out=True)
    path = written_as(tmp_path, written, written.tensors | {f"lora_unet_x.{key}": drawn(2, 2)})
    with pytest.raises(ValueError, match=f"LyCORIS: lora_unet_x is trained as {kind}, of which there is no lora_down"):
        files.read(path)


def test_an_axis_that_the_shape_does_not_tell(tmp_path):
    written = lycoris(drawn(6, 6), on_out=False)
    tensors = {key: t.flatten() if key.endswith("dora_scale") else t for key, t in written.tensors.items()}
    path = written_as(tmp_path, written, tensors)
    with pytest.raises(ValueError, match=r"dora_scale \[6\] of \S+ fits both axes .*: pass norm_axis='out' or 'in'"):
        files.read(path)
    assert files.read(path, norm_axis="in").layers[0].norm_axis == "in"
    with pytest.raises(ValueError, match=r"dora_scale \[6, 1\] of \S+ fits not the axis 'in' of \[out, in\]"):
        files.read(written_as(tmp_path, written, lycoris(drawn(6, 6), on_out=True).tensors), norm_axis="in")


def test_modules_of_one_name_in_lycoris(tmp_path):
    layers = files.read(save(tmp_path, lycoris(drawn(5, 7), on_out=True))).layers
    contents = files.Contents("x", tuple(layers[0]._replace(name=name) for name in ("a.b_c", "a_b.c")))
    with pytest.raises(ValueError, match=r"^a_b\.c and another module are both lycoris_a_b_c in LyCORIS's names$"):
        files.write(contents, tmp_path / "out.safetensors", "lycoris")
    assert not (tmp_path / "out.safetensors").exists()


def test_means_in_the_place_of_norms(tmp_path):
    """LyCORIS 2.2 in its first days: the mean of W over all axes but 1, half of which are negative."""
    weight = drawn(8, 40)
    written = lycoris(weight, on_out=False)
    scale = next(key for key in written.tensors if key.endswith("dora_scale"))
    path = written_as(tmp_path, written, written.tensors | {scale: weight.mean(0, keepdim=True)})
    with pytest.raises(ValueError, match=r"many dora_scales are negative, as the means are that LyCORIS 2\.2 had"):
        files.read(path)


def test_several_adapters_in_one_state_dict(tmp_path):
    written = peft(drawn(5, 7))
    two = {
        key.replace(".lora_A.", f".lora_A.{name}."): t.clone() for key, t in written.tensors.items() for name in "ab"
    }
    path = written_as(tmp_path, written, two)
    with pytest.raises(ValueError, match="keys are of several adapters"):
        files.read(path)


def test_mlx_without_its_config(tmp_path):
    path = save(tmp_path, mlx(drawn(5, 7)))
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match=r"mlx-lm: no adapter_config.json beside the file gives the scale"):
        files.read(path)


def test_arguments_that_cannot_be(tmp_path):
    path = save(tmp_path, lycoris(drawn(5, 7), on_out=True))
    with pytest.raises(ValueError, match="lora_alpha and scaling say the same"):
        files.read(path, lora_alpha=1, scaling=1)
    with pytest.raises(ValueError, match="norm_axis must be 'out' or 'in', got 'rows'"):
        files.read(path, norm_axis="rows")
    with pytest.raises(ValueError, match="eps must be a finite number of at least 0, got -1"):
        files.read(path, eps=-1)
    with pytest.raises(ValueError, match="scaling must be a finite number, got 1000"):
        files.read(path, scaling=10**400)
    with pytest.raises(TypeError, match="scaling must be a number, got 'much'"):
        files.read(path, scaling="much")
    _, _, written = case("fsdp_qlora", "linear")
    path = save(tmp_path, written)
    for name, value in {"eps": 0.1, "norm_axis": "out"}.items():
        with pytest.raises(ValueError, match=f"{name} is settled for a fsdp_qlora file: leave it out"):
            files.read(path, **{name: value})
    assert files.read(path, scaling=3).layers[0].scaling == 3


def test_pefts_config_is_checked_whatever_is_given(tmp_path):
    """That of an adapter over a part of the base weights, and one that is not the weights'."""
    written = peft(drawn(5, 7))
    save(tmp_path, written)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(written.config | {"init_lora_weights": "pissa"}))
    with pytest.raises(ValueError, match="the adapter is over what init_lora_weights='pissa' leaves of the base"):
        files.read(tmp_path, lora_alpha=1)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    dorac.apply_dora(model, ["0"], r=2)
    dorac.save_adapter(model, tmp_path / "own")
    assert files.read(tmp_path / "own").layers[0].scaling == 4
    config = tmp_path / "own" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_alpha": 3}))
    with pytest.raises(ValueError, match=r"is not the config that .* was saved with: lora_alpha differ"):
        files.read(tmp_path / "own")


class Command:
    def __reduce__(self):
        return os.mkdir, ("made by a pickle",)


def test_a_pickle_of_more_than_tensors(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, value in {"a.pt": {"x": Command()}, "b.bin": {"x": 3}, "c.pth": [torch.ones(2)]}.items():
        torch.save(value, name)
    (tmp_path / "d.ckpt").write_bytes(pickle.dumps(Command()))
    for name, message in {
        "a.pt": "is a pickle that asks for more than tensors",
        "b.bin": "holds no state dict of tensors: x is int",
        "c.pth": "holds no state dict, but list",
        "d.ckpt": "is a pickle that asks for more than tensors",
    }.items():
        with pytest.raises(ValueError, match=f"^{name} {message}"):
            files.read(name)
    assert not os.path.exists("made by a pickle")
    with pytest.raises(ValueError, match=r"nsupported GLOBAL \S+mkdir") as refused:
        files.read("a.pt")
    assert "weights_only" not in str(refused.value)


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_damaged_pickles(new, tmp_path):
    """torch's unpickler meets them with errors of any kind."""
    path = tmp_path / "x.pt"
    torch.save({"layers.0.attn.q_proj.lora_a.weight": torch.ones(2, 3)}, path, _use_new_zipfile_serialization=new)
    whole = path.read_bytes()
    chance = random.Random(0)
    for _ in range(100):
        damaged = bytearray(whole)
        for _ in range(4):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        path.write_bytes(damaged[: chance.choice([len(whole), chance.randrange(len(whole))])])
        with pytest.raises(ValueError, match=f"^{path}"):
            files.read(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("bytes_left", [0, 5, 400])
def test_a_truncated_file(suffix, bytes_left, tmp_path):
    written = peft(drawn(5, 7))
    path = save(tmp_path, Written(written.tensors, written.merged, written.config, filename=f"adapter_model{suffix}"))
    path.write_bytes(path.read_bytes()[:bytes_left])
    with pytest.raises(
        ValueError, match=rf"^{path} (is not a whole|is a pickle that asks for more than tensors, or none)"
    ):
        files.read(tmp_path)


def test_what_is_no_adapter(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file or directory"):
        dorac.load_adapter(torch.nn.Linear(3, 3), tmp_path / "nowhere.safetensors")
    with pytest.raises(FileNotFoundError, match="there is no file or directory"):
        files.read(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"holds no adapter: no adapter_model\.safetensors, "):
        files.read(tmp_path)
    save_file({"model.weight": torch.ones(2)}, tmp_path / "base.safetensors")
    with pytest.raises(
        ValueError, match=r"is no adapter in a format that dorac knows \(LyCORIS, .*; its keys: model.weight"
    ):
        files.read(tmp_path)
    save_file({"model.weight": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(
        ValueError, match=r"holds 2 files of tensors \(base.safetensors, other.safetensors\): name the one"
    ):
        files.read(tmp_path)
    for name in ("adapter_model.safetensors", "pytorch_lora_weights.safetensors"):
        save_file({"model.weight": torch.ones(2)}, tmp_path / name)
    with pytest.raises(ValueError, match=r"\(adapter_model.safetensors, pytorch_lora_weights.safetensors\): name the"):
        files.read(tmp_path)


def test_writing_is_whole_or_not_at_all(tmp_path, monkeypatch):
    contents = files.read(save(tmp_path, lycoris(drawn(5, 7), on_out=True)))
    with pytest.raises(ValueError, match="'gguf' is no format that dorac writes, only peft, lycoris, mlx, lora are"):
        files.write(contents, tmp_path / "out", "gguf")
    out = tmp_path / "out"
    files.write(contents, out / "x.safetensors", "lycoris")
    before = (out / "x.safetensors").read_bytes()

    def full(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr("dorac.files.storage.save_file", full)
    with pytest.raises(OSError, match="no space left"):
        files.write(contents, out / "x.safetensors", "lycoris")
    assert [p.name for p in out.iterdir()] == ["x.safetensors"]
    assert (out / "x.safetensors").read_bytes() == before
    with pytest.raises(OSError, match="no space left"):
        files.write(contents, tmp_path / "new", "peft")
    assert not (tmp_path / "new").exists()
    monkeypatch.undo()
    monkeypatch.chdir(out)
    for name, to in {"y.safetensors": "lycoris", "sub/z.safetensors": "lycoris", ".": "peft"}.items():
        files.write(contents._replace(layers=(contents.layers[0]._replace(eps=0.0),)), name, to)
    assert {p.name for p in out.iterdir()} == {
        "x.safetensors",
        "y.safetensors",
        "sub",
        "adapter_model.safetensors",
        "adapter_config.json",
    }


def test_modules_to_save_are_for_load_adapter(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Linear(5, 3))
    plain = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Linear(5, 3))
    plain.load_state_dict(model.state_dict())
    dorac.apply_dora(model, ["0"], r=2, init_lora_weights=False, modules_to_save=["1"])
    with torch.no_grad():
        model[1].weight.mul_(2)
    dorac.save_adapter(model, tmp_path)
    remedy = (
        r"belong to no DoRA layer: \S+1\.bias, \S+1\.weight; what modules_to_save trains is read by dorac\.load_adapter"
    )
    with pytest.raises(ValueError, match=remedy):
        files.merge_into(plain, tmp_path)
    dorac.load_adapter(plain, tmp_path)
    x = torch.randn(2, 4)
    torch.testing.assert_close(dorac.merge(plain, unload=True)(x), model(x))
