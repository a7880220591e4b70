"""``peft.utils.hotswap`` under the drop-in: DoRA adapters swapped in place, without recompilation."""

import copy
import os

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")

from peft.utils import hotswap  # noqa: E402
from peft_models import off_init, stock_model, target, twins  # noqa: E402

import dorac  # noqa: E402
import dorac.peft  # noqa: E402

X = torch.randn(2, 3, 6, 5, generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True)
def _stock_afterwards():
    yield
    dorac.peft.disable()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 10), nn.Linear(10, 4)

    def forward(self, x):
        return self.second(self.first(self.conv(x).mean((2, 3))).relu())


def adapted(seed, **options):
    """A model of PEFT's over one base, with an adapter of its own, on dorac."""
    torch.manual_seed(0)
    settings = {"r": 2, "lora_alpha": 3, "target_modules": ["conv", "first", "second"], "use_dora": True}
    model = peft.get_peft_model(Net(), peft.LoraConfig(**settings | options))
    off_init(model, seed)
    dorac.peft.enable(model)
    return model.eval()


def saved(path, seed, **options):
    """Where such an adapter is saved, and its output."""
    model = adapted(seed, **options)
    directory = os.path.join(path, f"{seed}")
    model.save_pretrained(directory)
    with torch.no_grad():
        return directory, model(X)


OTHERS = [
    {"r": 2, "lora_alpha": 3},
    {"r": 4, "lora_alpha": 3},
    {"r": 1, "lora_alpha": 5},
    {"r": 3, "lora_alpha": 7, "rank_pattern": {"first": 4}},
]


def test_stock_raises():
    """What PEFT does without the drop-in; fails once it is right."""
    model = stock_model("linear")
    state = {
        f"base_model.model.target.{k}.default{w}": v
        for k, w, v in (
            ("lora_A", ".weight", target(model).lora_A["default"].weight.data),
            ("lora_B", ".weight", target(model).lora_B["default"].weight.data),
            ("lora_magnitude_vector", "", target(model).lora_magnitude_vector["default"].weight.data),
        )
    }
    with pytest.raises(KeyError, match="lora_magnitude_vector"):
        hotswap.hotswap_adapter_from_state_dict(model, state, "default", model.peft_config["default"])
    dorac.peft.enable(model)
    hotswap.hotswap_adapter_from_state_dict(model, state, "default", model.peft_config["default"])
    before = hotswap.hotswap_adapter_from_state_dict
    dorac.peft.disable()
    assert hotswap.hotswap_adapter_from_state_dict is not before
    with pytest.raises(KeyError, match="lora_magnitude_vector"):
        hotswap.hotswap_adapter_from_state_dict(model, state, "default", model.peft_config["default"])


@pytest.mark.parametrize("cached", [False, True])
def test_eager(tmp_path, cached):
    model = adapted(1)
    if cached:
        dorac.cache_norms(model)
    model(X)
    for seed, options in enumerate(OTHERS, start=2):
        directory, y = saved(tmp_path, seed, **options)
        hotswap.hotswap_adapter(model, directory, "default", torch_device="cpu")
        with torch.no_grad():
            torch.testing.assert_close(model(X), y)
            for layer in model.modules():
                if hasattr(layer, "lora_variant"):
                    layer.set_scale("default", 0)
            with dorac.disabled(model):
                base = model(X)
            assert torch.equal(model(X), base)
            dorac.set_strength(model, 1)
            torch.testing.assert_close(model(X), y)


@pytest.mark.parametrize("cached", [False, True])
def test_same_shape_compiled(tmp_path, cached):
    model = adapted(1)
    if cached:
        dorac.cache_norms(model)
    run = torch.compile(model, fullgraph=True, backend="aot_eager")
    others = [saved(tmp_path, seed) for seed in (2, 3)]
    with torch.no_grad():
        run(X)
        with torch.compiler.set_stance("fail_on_recompile"):
            for directory, y in others:
                hotswap.hotswap_adapter(run, directory, "default", torch_device="cpu")
                torch.testing.assert_close(run(X), y)


def test_other_ranks_and_scalings_compiled(tmp_path):
    """Prepared as PEFT says; strengths do not recompile either, and are taken back by the next swap."""
    model = adapted(1)
    y = model(X).detach()
    hotswap.prepare_model_for_compiled_hotswap(model, target_rank=5)
    torch.testing.assert_close(model(X), y)
    run = torch.compile(model, fullgraph=True, backend="aot_eager")
    others = [saved(tmp_path, seed, **options) for seed, options in enumerate(OTHERS, start=2)]
    with torch.no_grad():
        torch.testing.assert_close(run(X), y)
        with torch.compiler.set_stance("fail_on_recompile"):
            for directory, y in others:
                hotswap.hotswap_adapter(run, directory, "default", torch_device="cpu")
                torch.testing.assert_close(run(X), y)
                layers = [m for m in model.modules() if hasattr(m, "lora_variant")]
                for layer in layers:
                    layer.scale_layer(0.0)
                with torch.compiler.set_stance("default"), dorac.disabled(model):
                    base = model(X)
                torch.testing.assert_close(run(X), base)
                hotswap.hotswap_adapter(run, directory, "default", torch_device="cpu")
                for layer in layers:
                    layer.scale_layer(0.5)
                half = run(X)
                for layer in layers:
                    layer.unscale_layer(0.5)
                torch.testing.assert_close(run(X), y)
                assert not torch.allclose(half, y, atol=1e-4)


def test_layers_that_the_new_adapter_leaves_alone(tmp_path):
    """They become their base layers: PEFT fills with zeros, which of a magnitude would be another layer."""
    model = adapted(1)
    directory, y = saved(tmp_path, 2, target_modules=["first"])
    hotswap.hotswap_adapter(model, directory, "default", torch_device="cpu")
    torch.testing.assert_close(model(X), y)


def test_all_or_nothing(tmp_path, monkeypatch):
    model = adapted(1)
    y = model(X)
    state = copy.deepcopy(model.state_dict())
    directory, _ = saved(tmp_path, 2, lora_alpha=7)
    copy_tensor = torch.Tensor.copy_
    calls = []

    def failing(self, *args, **kwargs):
        calls.append(self.shape)
        if len(calls) == 5:
            raise MemoryError
        return copy_tensor(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "copy_", failing)
    with pytest.raises(MemoryError):
        hotswap.hotswap_adapter(model, directory, "default", torch_device="cpu")
    monkeypatch.undo()
    assert len(calls) >= 5
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert torch.equal(model(X), y)
    dorac.set_strength(model, 1)
    assert torch.equal(model(X), y)


def test_refusals(tmp_path):
    _, model = twins("embedding", dtype=torch.float32)
    model.save_pretrained(tmp_path / "embedding")
    with pytest.raises(ValueError, match="target is an adapted embedding"):
        hotswap.hotswap_adapter(model, str(tmp_path / "embedding"), "default", torch_device="cpu")
    model = adapted(1)
    directory, _ = saved(tmp_path, 2)
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged into the base weights"):
        hotswap.hotswap_adapter(model, directory, "default", torch_device="cpu")


def test_plain_lora_is_stock():
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["first"], init_lora_weights=False)
    model, other = (peft.get_peft_model(Net(), config) for _ in range(2))
    state = {k: v for k, v in other.state_dict().items() if "lora_" in k}
    with dorac.peft.enable():
        hotswap.hotswap_adapter_from_state_dict(model, state, "default", config)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())
