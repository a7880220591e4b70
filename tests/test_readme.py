"""The recipes of README and of the pages run as they are written, and give what the textbook gives."""

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_trainers
import torch
from pages import recipe
from torch._dynamo.testing import CompileCounterWithBackend

import dorac
from dorac import reference

ADAPTER = ("lora_A", "lora_B", "lora_magnitude_vector")


def wrapped(norm_grad: bool = False) -> torch.nn.Module:
    """Two adapted layers with a nonlinearity between them, off the adapters' initial state."""
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4)).double()
    dorac.apply_dora(model, "all-linear", r=2, lora_alpha=3, init_lora_weights=False, norm_grad=norm_grad)
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.lora_magnitude_vector *= 0.8 + 0.4 * torch.rand_like(layer.lora_magnitude_vector)
    return model


def textbook(model, adapter, x, norm_grad=False):
    for i in (0, 2):
        base, tensors = model[i].base_layer, (adapter[f"{i}.{name}"] for name in ADAPTER)
        x = reference.dora_linear(x, base.weight, *tensors, base.bias, scaling=1.5, norm_grad=norm_grad)
        x = x.tanh() if i == 0 else x
    return x


def trained(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("norm_grad", [False, True])
def test_per_sample_gradients(norm_grad):
    model = wrapped(norm_grad)
    x, targets = torch.randn(5, 6, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    names = {"torch": torch, "dorac": dorac, "model": model, "inputs": x, "targets": targets}
    exec(recipe("Per-sample gradients"), names)
    gradients = names["gradients"]
    assert set(gradients) == {f"{i}.{name}" for i in (0, 2) for name in ADAPTER}
    for i in range(5):
        leaves = {name: t.requires_grad_() for name, t in trained(model).items()}
        loss = torch.nn.functional.mse_loss(textbook(model, leaves, x[i], norm_grad), targets[i])
        expected = dict(zip(leaves, torch.autograd.grad(loss, leaves.values()), strict=True))
        torch.testing.assert_close({name: gradients[name][i] for name in leaves}, expected)
    if norm_grad:
        return
    compiled = torch.compile(names["per_sample"], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(names["adapter"], x, targets), gradients)


def test_ensemble_of_adapters(tmp_path):
    model, x = wrapped(), torch.randn(5, 6, dtype=torch.float64)
    expected, directories = [], [tmp_path / str(k) for k in range(3)]
    for directory in directories:
        with torch.no_grad():
            for p in trained(model):
                model.get_parameter(p).mul_(1.1).add_(0.1)
        dorac.save_adapter(model, directory)
        expected.append(textbook(model, trained(model), x))
    names = {"torch": torch, "dorac": dorac, "model": model, "inputs": x, "directories": directories}
    exec(recipe("An ensemble of adapters over one base"), names)
    assert names["adapters"]["0.lora_A"].shape == (3, 2, 6)
    torch.testing.assert_close(names["outputs"], torch.stack(expected))
    assert not torch.allclose(expected[0], expected[1])
    compiled = torch.compile(torch.vmap(names["run"], in_dims=(0, None)), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(names["adapters"], x), names["outputs"])


# Trainers.


def trained_as_written(heading, base, folder, monkeypatch, **names):
    """The model of a recipe, after it: trained, and with its adapter in PEFT's files."""
    monkeypatch.chdir(folder)
    names |= {"torch": torch, "dorac": dorac, "transformers": pytest.importorskip("transformers"), "name": base}
    exec(recipe(heading), names)
    tiny_trainers.adapter_files(folder / "out" / "checkpoint-4")
    loaded = tiny_trainers.load(base)
    dorac.load_adapter(loaded, folder / "adapter")
    tiny_trainers.assert_equal(tiny_trainers.trained(loaded), tiny_trainers.trained(names["model"]))
    assert all(layer.lora_B.abs().min() > 0 for layer in dorac.apply.dora_layers(loaded).values())


@pytest.fixture
def base(tmp_path):
    pytest.importorskip("transformers")
    return tiny_trainers.save_base(tmp_path / "base")


def test_trainer(base, tmp_path, monkeypatch):
    pytest.importorskip("accelerate")
    trained_as_written("Trainer", base, tmp_path, monkeypatch, rows=tiny_trainers.Rows())


def test_trl(base, tmp_path, monkeypatch):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_dict(tiny_trainers.TEXTS)
    trained_as_written("TRL", base, tmp_path, monkeypatch, trl=trl, dataset=dataset)


@pytest.mark.full
def test_trainers_from_an_installed_wheel(base, tmp_path):
    """Both recipes in an empty folder, with dorac as pip installs it."""
    pytest.importorskip("trl")
    source, wheels, site, folder = (tmp_path / name for name in ("source", "wheels", "site", "empty"))
    folder.mkdir()
    root = Path(dorac.__file__).parents[1]
    shutil.copytree(root, source, ignore=shutil.ignore_patterns(".git", "tests", "build", "*.egg-info"))
    pip = [sys.executable, "-m", "pip", "--quiet"]
    build = [*pip, "wheel", "--no-deps", "--wheel-dir", wheels, source]
    subprocess.run(build, check=True)
    subprocess.run([*pip, "install", "--no-deps", "--target", site, *wheels.iterdir()], check=True)
    code = f"""
import sys
sys.path.insert(0, {str(site)!r})
import datasets, dorac, torch, transformers, trl
assert dorac.__file__.startswith({str(site)!r})
name = {base!r}
rows = [{{"input_ids": [2, 3, 4, 5], "labels": [2, 3, 4, 5]}}] * 8
dataset = datasets.Dataset.from_dict({tiny_trainers.TEXTS!r})
{recipe("Trainer")}
{recipe("TRL")}
"""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, check=True)
    assert len(tiny_trainers.adapter_files(folder / "adapter")["target_modules"]) == 7


# Compiling: as written, but for the backend.


@pytest.fixture
def quick_compiler(monkeypatch):
    """``torch.compile`` without Inductor; the number of graphs in ``frame_count``."""
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    return counter


def llama(**options) -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = transformers.LlamaConfig(num_hidden_layers=10, vocab_size=32, use_cache=False, **sizes)
    model = transformers.LlamaForCausalLM(config)
    dorac.apply_dora(model, "all-linear", lora_alpha=4, init_lora_weights=False, **options)
    return model


def check_causal_lm(model, expected_graphs, counter):
    ids = torch.randint(32, (2, 7))
    loss = model(input_ids=ids, labels=ids).loss
    with torch.compiler.set_stance("force_eager"):
        torch.testing.assert_close(loss, model(input_ids=ids, labels=ids).loss)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert counter.frame_count == expected_graphs


def test_block_by_block(quick_compiler):
    model = llama(r=2)
    exec(recipe("Block by block"), {"torch": torch, "model": model})
    check_causal_lm(model, 1, quick_compiler)


def test_blocks_of_different_ranks(quick_compiler):
    model = llama(r=2, rank_pattern={rf"layers\.{i}\..*": 3 + i for i in range(10)})
    model.enable_input_require_grads()
    with torch._dynamo.config.patch(force_parameter_static_shapes=True):  # put back at the end
        exec(recipe("Blocks of different ranks"), {"torch": torch, "model": model})
        check_causal_lm(model, 2, quick_compiler)


def test_checkpointing(quick_compiler):
    model = wrapped()
    names = {"torch": torch, "model": model}
    exec(recipe("Checkpointing that keeps what is expensive"), names)
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    y = names["run"](x)
    torch.testing.assert_close(y, textbook(model, trained(model), x))
    y.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert quick_compiler.frame_count == 1


def test_norms_once():
    model, plain = wrapped(), wrapped()
    plain.load_state_dict(model.state_dict())
    x, target = torch.randn(5, 6, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    names = {"torch": torch, "dorac": dorac, "steps": [[(x, target), (2 * x, target)]] * 3}
    code = recipe("Norms once per optimizer step")
    results = []
    for net, source in ((model, code), (plain, "\n".join(code.splitlines()[1:]))):
        optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)
        exec(source, names | {"model": net, "optimizer": optimizer})
        results.append(list(trained(net).values()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert model[0].kept.norm is not None
    assert plain[0].kept is None
