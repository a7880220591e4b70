"""``python -m dorac``: what each command writes and prints, exit codes, and bad input, after which all is as it was."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import test_files
import tiny_trainers as tiny
import torch
from safetensors.torch import load_file, save_file
from test_files import F64, S, drawn, lycoris, mlx_embedding, row_norms

import dorac
from dorac.commands import main
from dorac.files import low_rank
from dorac.files.layers import Layer

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base model and an adapter of it."""
    root = tmp_path_factory.mktemp("commands")
    tiny.save_base(root / "base")
    tiny.save_start(root / "base", root / "adapter")
    return root


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def run(capsys, *arguments) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(10)[None]).logits


def adapted(folder) -> torch.Tensor:
    model = tiny.load(folder / "base")
    dorac.load_adapter(model, folder / "adapter")
    return logits(model)


def files_in(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@pytest.mark.parametrize("to", ["peft", "lycoris", "mlx"])
def test_convert(to, folder, out, capsys):
    out = out.with_suffix(".safetensors") if to == "lycoris" else out
    code, printed, _ = run(capsys, "convert", folder / "adapter", out, "--to", to)
    assert code == 0
    assert f"14 layers, from PEFT to {to}" in printed
    model = tiny.load(folder / "base")
    dorac.load_adapter(model, out)
    torch.testing.assert_close(logits(model), adapted(folder), rtol=1e-5, atol=1e-5)
    if to == "peft":
        stock = peft.PeftModel.from_pretrained(tiny.load(folder / "base"), out)
        torch.testing.assert_close(logits(stock), adapted(folder), rtol=1e-5, atol=1e-5)
    # and back
    again = out.parent / "again"
    assert run(capsys, "convert", out, again, "--to", "peft", "--base", folder / "base")[0] == 0
    model = tiny.load(folder / "base")
    dorac.load_adapter(model, again)
    torch.testing.assert_close(logits(model), adapted(folder), rtol=1e-5, atol=1e-5)


def test_plain_lora(folder, out, capsys):
    """Its errors are printed, fall with the rank, and are what stock PEFT computes with."""
    expected, errors = adapted(folder), []
    for rank in ("2", "8", "64", "full"):
        code, printed, _ = run(
            capsys, "convert", folder / "adapter", out / rank, "--to", "lora", "--rank", rank, "--base", folder / "base"
        )
        assert code == 0
        lines = printed.splitlines()[1:-1]
        assert len(lines) == 15
        assert lines[-1].split()[:2] == ["all", rank]
        errors.append(float(lines[-1].split()[2]))
    assert errors[0] > errors[1] > errors[2] == errors[3] == 0
    config = json.loads((out / "2" / "adapter_config.json").read_text())
    assert (config["use_dora"], config["r"], config["lora_alpha"], config["rank_pattern"]) == (False, 2, 2.0, {})
    far = logits(peft.PeftModel.from_pretrained(tiny.load(folder / "base"), out / "2"))
    near = logits(peft.PeftModel.from_pretrained(tiny.load(folder / "base"), out / "8"))
    for rank in ("64", "full"):
        full = logits(peft.PeftModel.from_pretrained(tiny.load(folder / "base"), out / rank))
        torch.testing.assert_close(full, expected, rtol=1e-5, atol=1e-5)
    base = logits(tiny.load(folder / "base"))
    assert (near - expected).norm() < (far - expected).norm() < (base - expected).norm()


def layer_like(weight: torch.Tensor, rank: int = 3) -> Layer:
    a, b = drawn(rank, weight.shape[1]), 0.3 * drawn(weight.shape[0], rank)
    return Layer("m", "linear", a, b, row_norms(weight) * (1 + 0.05 * torch.randn(weight.shape[0], dtype=F64)), S)


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "randomised"])
def test_the_best_of_its_rank(exact, monkeypatch):
    monkeypatch.setattr(low_rank, "EXACT_UP_TO", 1000 if exact else 0)
    weight = drawn(90, 70)
    layer = layer_like(weight)
    v = weight + S * layer.lora_B @ layer.lora_A
    change = (layer.magnitude / row_norms(v))[:, None] * v - weight
    singular = torch.linalg.svdvals(change)
    for rank in (1, 3, 12, 40):
        found = low_rank.low_rank(layer, weight, rank)
        optimum = (singular[rank:].square().sum() / singular.square().sum()).sqrt().item()
        own = (change - found.layer.lora_B @ found.layer.lora_A).norm() / change.norm()
        assert found.error == pytest.approx(own.item(), rel=1e-6)
        assert optimum * (1 - 1e-9) <= found.error <= optimum * (1 + 1e-9 if exact else 1.01)
        assert found.size == pytest.approx(change.norm().item())
    again = low_rank.low_rank(layer, weight, 3)
    assert torch.equal(again.layer.lora_A, low_rank.low_rank(layer, weight, 3).layer.lora_A)


def test_merge(folder, out, capsys):
    code, printed, _ = run(capsys, "merge", folder / "adapter", out, "--base", folder / "base")
    assert code == 0
    assert "14 layers of a PEFT adapter merged into" in printed
    torch.testing.assert_close(logits(tiny.load(out)), adapted(folder), rtol=1e-5, atol=1e-5)
    assert files_in(out).keys() == files_in(folder / "base").keys()
    transformers.AutoTokenizer.from_pretrained(out)
    plain, base = load_file(out / "model.safetensors"), load_file(folder / "base" / "model.safetensors")
    assert [name for name, t in plain.items() if torch.equal(t, base[name])] == [
        name for name in plain if "norm" in name or "embed" in name or "lm_head" in name
    ]


def test_merge_in_the_bases_dtype_and_shards(folder, out, capsys):
    """Of a model in half precision in three files, once rounded."""
    half = tiny.load(folder / "base").bfloat16()
    half.save_pretrained(out / "half", max_shard_size="20KB")
    assert len(list((out / "half").glob("*.safetensors"))) > 1
    (out / "half" / "consolidated.safetensors").write_bytes(b"of another library")  # the index does not name it
    assert run(capsys, "merge", folder / "adapter", out / "merged", "--base", out / "half")[0] == 0
    model = tiny.load(out / "half", dtype=torch.bfloat16)
    dorac.load_adapter(model, folder / "adapter")
    expected = dorac.merge(model, unload=True).state_dict()
    got = tiny.load(out / "merged", dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(got[name], t) for name, t in expected.items())


@pytest.mark.parametrize("shape", [(6, 6, 3, 3), (5, 4, 3, 2), (6, 6), (5, 7)], ids=str)
def test_merge_of_a_magnitude_per_input(shape, out, capsys):
    """No layer of dorac's computes with these, and merging is exact."""
    weight = drawn(*shape)
    written = lycoris(weight, on_out=False)
    out.mkdir()
    path = test_files.save(out, written)
    save_file({"down_blocks.0.attentions.0.proj_in.weight": weight}, out / "unet.safetensors")
    arguments = ("merge", path, out / "merged.safetensors", "--base", out / "unet.safetensors", "--eps", 0)
    assert run(capsys, *arguments)[0] == 0
    (merged,) = load_file(out / "merged.safetensors").values()
    torch.testing.assert_close(merged, written.merged, rtol=1e-12, atol=1e-13)


def test_merge_of_a_magnitude_per_token(out, capsys):
    weight = drawn(6, 6)
    written = mlx_embedding(weight)
    (out / "adapter").mkdir(parents=True)
    test_files.save(out / "adapter", written)
    save_file({"model.embed_tokens.weight": weight}, out / "base.safetensors")
    assert run(capsys, "merge", out / "adapter", out / "m.safetensors", "--base", out / "base.safetensors")[0] == 0
    (merged,) = load_file(out / "m.safetensors").values()
    torch.testing.assert_close(merged, written.merged, rtol=1e-12, atol=1e-13)


def test_merge_into_gpt2(out, capsys):
    """Whose linear weights are [in, out], square ones too."""
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16, "vocab_size": 32}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(bos_token_id=0, eos_token_id=0, **sizes))
    model.save_pretrained(out / "base")
    dorac.apply_dora(model, ["c_attn", "attn.c_proj", "c_fc"], r=3, lora_alpha=6, init_lora_weights=False)
    tiny.off_start(model)
    dorac.save_adapter(model, out / "adapter")
    assert run(capsys, "merge", out / "adapter", out / "merged", "--base", out / "base")[0] == 0
    merged = transformers.GPT2LMHeadModel.from_pretrained(out / "merged")
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-5, atol=1e-5)


def test_inspect(folder, out, capsys):
    code, printed, _ = run(capsys, "inspect", folder / "adapter")
    assert code == 0
    heads, *rows = printed.splitlines()[1:]
    assert heads.split()[0] == "layer"
    assert len(rows) == 14
    picture = out / "changes.png"
    code, printed, _ = run(capsys, "inspect", folder / "adapter", "--base", folder / "base", "--plot", picture)
    assert code == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    row = next(line for line in printed.splitlines() if "layers.0.self_attn.q_proj" in line).split()
    tensors, name = load_file(folder / "adapter" / "adapter_model.safetensors"), "model.layers.0.self_attn.q_proj"
    a, b, m = (
        tensors[f"base_model.model.{name}.{key}"].double()
        for key in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
    )
    w = load_file(folder / "base" / "model.safetensors")[f"{name}.weight"].double()
    v = w + 2 * b @ a
    merged = (m / row_norms(v))[:, None] * v
    cosine = torch.nn.functional.cosine_similarity(merged, w, dim=1)
    expected = [(m - row_norms(w)).abs().mean(), (1 - cosine).mean(), (merged - w).norm() / w.norm()]
    assert [float(cell) for cell in row[-3:]] == pytest.approx([t.item() for t in expected], rel=5e-3)


def test_check(folder, out, capsys):
    code, printed, _ = run(capsys, "check", folder / "adapter", "--base", folder / "base")
    assert (code, printed.splitlines()) == (
        0,
        ["PEFT: 14 layers", "  14 linear, a magnitude per output", f"fits {folder / 'base'}"],
    )
    tiny.save_base(out / "wider", hidden_size=40)
    code, _, error = run(capsys, "check", folder / "adapter", "--base", out / "wider")
    assert code == 1
    assert "PEFT: 14 of the file's 14 layers do not fit the model: model.layers.0.mlp.down_proj is [40, 48]" in error
    assert error.count(" in the model, ") == 3
    tiny.save_base(out / "shorter", num_hidden_layers=1)
    code, _, error = run(capsys, "check", folder / "adapter", "--base", out / "shorter")
    assert code == 1
    assert "the model has no module for 7 of the file's 14 layers: model.layers.1.mlp.down_proj, " in error


def tied(folder, out):
    (out / "adapter").mkdir(parents=True)
    test_files.save(out / "adapter", test_files.peft_embedding(drawn(11, 32)))
    tensors = load_file(out / "adapter" / "adapter_model.safetensors")
    save_file(
        {key.replace(test_files.NAME, "model.embed_tokens"): t for key, t in tensors.items()},
        out / "adapter" / "adapter_model.safetensors",
    )
    tiny.save_base(out / "tied", tie_word_embeddings=True)
    return "merge", out / "adapter", out / "merged", "--base", out / "tied"


def without_names(folder, out):
    out.mkdir()
    path = test_files.save(out, lycoris(drawn(5, 7), on_out=True))
    return "convert", path, out / "peft", "--to", "peft"


def tied_by_default(folder, out):
    """As Gemma's config, which says nothing where it is as the class has it."""
    arguments = tied(folder, out)
    config = json.loads((out / "tied" / "config.json").read_text())
    del config["tie_word_embeddings"]
    (out / "tied" / "config.json").write_text(json.dumps(config))
    return arguments


def two_copies(folder, out):
    shutil.copytree(folder / "base", out)
    shutil.copy(out / "model.safetensors", out / "model.fp16.safetensors")
    return "merge", folder / "adapter", out / "merged", "--base", out


def quantised(folder, out):
    base = load_file(folder / "base" / "model.safetensors")
    (out / "base").mkdir(parents=True)
    save_file(
        {name: t.to(torch.int8) if "q_proj" in name else t for name, t in base.items()}, out / "base" / "m.safetensors"
    )
    return "merge", folder / "adapter", out / "merged", "--base", out / "base"


def overflowing(folder, out):
    base = load_file(folder / "base" / "model.safetensors")
    (out / "base").mkdir(parents=True)
    save_file({name: t.half() for name, t in base.items()}, out / "base" / "m.safetensors")
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    big = {k: t * 1e8 if "layers.1.mlp.up_proj.lora_magnitude" in k else t for k, t in adapter.items()}
    (out / "big").mkdir()
    save_file(big, out / "big" / "adapter_model.safetensors")
    config = (folder / "adapter" / "adapter_config.json").read_text()
    (out / "big" / "adapter_config.json").write_text(config)
    return "merge", out / "big", out / "merged", "--base", out / "base"


def a_file_in_the_way(folder, out):
    out.write_text("x")
    return "convert", folder / "adapter", out / "peft", "--to", "peft"


def there_already(folder, out):
    out.mkdir()
    (out / "mine").write_text("x")
    return "merge", folder / "adapter", out, "--base", folder / "base"


def cut_short(folder, out):
    shutil.copytree(folder / "base", out)
    weights = out / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    return "check", folder / "adapter", "--base", out


def not_finite(folder, out):
    base = load_file(folder / "base" / "model.safetensors")
    base["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    out.mkdir()
    save_file(base, out / "model.safetensors")
    return "convert", folder / "adapter", out / "lora", "--to", "lora", "--base", out


def a_directory_to_draw_into(folder, out):
    out.with_suffix(".png").mkdir()
    return "inspect", folder / "adapter", "--base", folder / "base", "--plot", out.with_suffix(".png")


def plain(*arguments):
    return lambda folder, out: [a.format(folder=folder, out=out) for a in arguments]


BAD = {
    "no command": (plain(), "the following arguments are required: COMMAND"),
    "an unknown command": (plain("melt"), "invalid choice: 'melt'"),
    "an unknown format": (plain("convert", "{folder}/adapter", "{out}", "--to", "gguf"), "invalid choice: 'gguf'"),
    "no adapter": (plain("check", "{out}"), "there is no file or directory"),
    "no base": (plain("check", "{folder}/adapter", "--base", "{out}"), "there is no base model"),
    "a base without weights": (
        plain("merge", "{folder}/adapter", "{out}", "--base", "{folder}"),
        "no safetensors file",
    ),
    "an adapter as a base": (
        plain("merge", "{folder}/adapter", "{out}", "--base", "{folder}/adapter/adapter_config.json"),
        "is no safetensors file",
    ),
    "a base as an adapter": (plain("inspect", "{folder}/base"), "is no adapter in a format that dorac knows"),
    "plain LoRA without a base": (
        plain("convert", "{folder}/adapter", "{out}", "--to", "lora"),
        "--to lora needs --base",
    ),
    "a rank of words": (
        plain("convert", "{folder}/adapter", "{out}", "--to", "lora", "--rank", "much", "--base", "{folder}/base"),
        "--rank must be a number of at least 1, or full, got much",
    ),
    "a rank for DoRA": (
        plain("convert", "{folder}/adapter", "{out}", "--to", "mlx", "--rank", "4"),
        "--rank is for --to lora",
    ),
    "a directory for LyCORIS": (
        plain("convert", "{folder}/adapter", "{out}", "--to", "lycoris"),
        "OUT must end in .safetensors",
    ),
    "a picture without a base": (plain("inspect", "{folder}/adapter", "--plot", "{out}.png"), "--plot needs --base"),
    "a picture of no kind": (
        plain("inspect", "{folder}/adapter", "--base", "{folder}/base", "--plot", "{out}.txt"),
        "--plot must end in .png, .svg or .pdf",
    ),
    "a part of nothing": (plain("check", "{folder}/adapter", "--base", "{folder}/base", "--component", "unet"), "unet"),
    "a part without a base": (plain("inspect", "{folder}/adapter", "--component", "unet"), "--component needs --base"),
    "two scalings": (
        plain("check", "{folder}/adapter", "--alpha", "1", "--scaling", "2"),
        "lora_alpha and scaling say the same",
    ),
    "names of no module": (without_names, "a LyCORIS file does not say which modules its layers are"),
    "a tied embedding": (tied, "model.embed_tokens: the head shares its table"),
    "an embedding that is tied by default": (tied_by_default, "model.embed_tokens: the head shares its table"),
    "two copies of a base": (two_copies, "is in two files, "),
    "a quantised base": (quantised, "is torch.int8, quantised: take the model it was made from"),
    "values beyond half precision": (overflowing, "the merged weight is not finite in torch.float16"),
    "a file in the way": (a_file_in_the_way, "cannot be written"),
    "a place that is taken": (there_already, "is there already"),
    "the adapter itself": (plain("convert", "{folder}/adapter", "{folder}/adapter", "--to", "mlx"), "is there already"),
    "a file that is there": (
        plain("convert", "{folder}/adapter", "{folder}/base/model.safetensors", "--to", "lycoris"),
        "is there already",
    ),
    "one file merged into a directory": (
        plain("merge", "{folder}/adapter", "{out}", "--base", "{folder}/base/model.safetensors"),
        "it must end in .safetensors",
    ),
    "a base cut short": (cut_short, "is not a whole safetensors file"),
    "a base that is not finite": (
        not_finite,
        "model.layers.1.mlp.up_proj: the change of its base weight is not finite",
    ),
    "a directory to draw into": (a_directory_to_draw_into, "is a directory"),
    "a part of no base": (plain("check", "{folder}/adapter", "--component", "unet"), "--component needs --base"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, folder, out, capsys):
    build, message = BAD[name]
    arguments = build(folder, out)
    before = files_in(folder), files_in(out.parent)
    capsys.readouterr()
    code, _, error = run(capsys, *arguments)
    assert code == (1 if name == "a part of nothing" else 2)
    assert message in error
    assert len(error.splitlines()) == 1
    assert (files_in(folder), files_in(out.parent)) == before


def test_an_interruption(folder, out, capsys, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("dorac.files.merging.merged", interrupted)
    code, _, error = run(capsys, "merge", folder / "adapter", out, "--base", folder / "base")
    assert (code, error) == (130, "\ninterrupted; nothing is half written\n")
    assert list(out.parent.iterdir()) == []


def test_help(capsys):
    for command in ("convert", "merge", "inspect", "check"):
        with pytest.raises(SystemExit) as end:
            main([command, "--help"])
        assert end.value.code == 0
        assert "--base" in capsys.readouterr().out


@pytest.mark.full
def test_from_an_installed_wheel(folder, tmp_path):
    """Every command in an empty folder, with dorac as pip installs it, by its exit code; never a traceback."""
    source, wheels, site, empty = (tmp_path / name for name in ("source", "wheels", "site", "empty"))
    empty.mkdir()
    root = Path(dorac.__file__).parents[1]
    shutil.copytree(root, source, ignore=shutil.ignore_patterns(".git", "tests", "build", "*.egg-info"))
    pip = [sys.executable, "-m", "pip", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", wheels, source], check=True)
    subprocess.run([*pip, "install", "--no-deps", "--target", site, *wheels.iterdir()], check=True)
    base, adapter = folder / "base", folder / "adapter"
    runs = (
        (0, "--help"),
        (0, "check", adapter, "--base", base),
        (0, "inspect", adapter, "--base", base, "--plot", "changes.png"),
        (0, "convert", adapter, "mlx", "--to", "mlx"),
        (0, "convert", "mlx", "peft", "--to", "peft"),
        (0, "convert", "peft", "lora.safetensors", "--to", "lycoris"),
        (0, "convert", "lora.safetensors", "plain", "--to", "lora", "--rank", "4", "--base", base),
        (0, "merge", "lora.safetensors", "merged", "--base", base),
        (1, "check", "lora.safetensors", "--base", base, "--component", "unet"),
        (2, "check", "plain"),
        (2, "merge", "peft", "merged", "--base", base),
        (2, "convert", "peft", "x", "--to", "gguf"),
        (2, "inspect", "nowhere"),
        (2,),
    )
    environment = os.environ | {"PYTHONPATH": str(site)}
    for code, *arguments in runs:
        command = [sys.executable, "-m", "dorac", *map(str, arguments)]
        done = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == code, (arguments, done.stderr)
        assert "Traceback" not in done.stderr
    assert sorted(p.name for p in empty.iterdir()) == [
        "changes.png",
        "lora.safetensors",
        "merged",
        "mlx",
        "peft",
        "plain",
    ]
