"""PEFT's models under the drop-in without their adapters (``dorac.disabled``)."""

import copy

import pytest
import torch

peft = pytest.importorskip("peft")

from peft_models import KINDS, stock_model, target, twins  # noqa: E402

import dorac  # noqa: E402
import dorac.peft  # noqa: E402

FULL = pytest.mark.full
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


def base_of(model):
    """The layer without anything of PEFT's, a copy."""
    return copy.deepcopy(target(model).get_base_layer())


@EVERY_KIND
def test_disabled_is_the_base_bit_for_bit(kind):
    _, model = twins(kind, dtype=torch.float32)
    x = KINDS[kind].input(0, torch.float32)
    adapted, y = model(x), base_of(model)(x)
    trained = {n: p.requires_grad for n, p in model.named_parameters()}
    with dorac.disabled(model):
        assert torch.equal(model(x), y)
        assert trained == {n: p.requires_grad for n, p in model.named_parameters()}
        with pytest.raises(KeyError), dorac.disabled(model):
            raise KeyError
        assert torch.equal(model(x), y)
    assert torch.equal(model(x), adapted)
    assert not torch.allclose(adapted, y, atol=1e-3)


@pytest.mark.parametrize("kind", ["linear", "embedding", "conv2d"])
def test_merged_is_put_back(kind):
    _, model = twins(kind, dtype=torch.float32)
    x, layer = KINDS[kind].input(0, torch.float32), target(model)
    y = base_of(model)(x)
    model.merge_adapter()
    weight, merged = layer.get_base_layer().weight.clone(), model(x)
    with dorac.disabled(model):
        assert not layer.merged
        torch.testing.assert_close(model(x), y)
    assert layer.merged_adapters == ["default"]
    assert torch.equal(layer.get_base_layer().weight, weight)
    assert torch.equal(model(x), merged)
    model.unmerge_adapter()
    torch.testing.assert_close(base_of(model)(x), y)


def test_blocks_that_overlap():
    _, model = twins("linear", dtype=torch.float32)
    x = KINDS["linear"].input(0, torch.float32)
    adapted, y = model(x), base_of(model)(x)
    blocks = dorac.disabled(model), dorac.disabled(model)
    for block in blocks:
        block.__enter__()
    for block in blocks:
        assert torch.equal(model(x), y)
        block.__exit__(None, None, None)
    assert torch.equal(model(x), adapted)


def test_modules_to_save_are_the_originals():
    _, model = twins("linear", dtype=torch.float32, modules_to_save=["head"])
    head, x = model.base_model.model.head, torch.randn(2, 3)
    with torch.no_grad():
        head.modules_to_save["default"].weight.add_(1)
    trained = head(x)
    with dorac.disabled(model):
        assert torch.equal(head(x), head.original_module(x))
    assert torch.equal(head(x), trained)
    assert not torch.equal(trained, head.original_module(x))


@pytest.mark.parametrize(
    "kind", ["linear", *(pytest.param(k, marks=pytest.mark.full) for k in ("embedding", "conv2d"))]
)
def test_compiled_once_for_each_mode(kind):
    _, model = twins(kind, dtype=torch.float32)
    x = KINDS[kind].input(0, torch.float32)
    run, y = torch.compile(model, fullgraph=True, backend="aot_eager"), base_of(model)(x)
    adapted = run(x)
    with dorac.disabled(run):
        torch.testing.assert_close(run(x), y)
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(2):
            torch.testing.assert_close(run(x), adapted)
            with dorac.disabled(run):
                torch.testing.assert_close(run(x), y)


def test_what_stays_off():
    """A model that PEFT has switched off itself, and one of stock PEFT's."""
    stock, model = twins("linear", dtype=torch.float32)
    x = KINDS["linear"].input(0, torch.float32)
    with model.disable_adapter():
        with dorac.disabled(model):
            pass
        assert torch.equal(model(x), base_of(model)(x))
    with pytest.raises(ValueError, match=r"dorac\.peft\.enable"), dorac.disabled(stock):
        raise AssertionError


def test_both_ways_in_one_model():
    _, model = twins("linear", dtype=torch.float32)
    other = torch.nn.Sequential(torch.nn.Linear(12, 4))
    dorac.apply_dora(other, ["0"], r=2, init_lora_weights=False)
    both = torch.nn.Sequential(model, *other)
    x = KINDS["linear"].input(0, torch.float32)
    y = both[1].base_layer(base_of(model)(x))
    with dorac.disabled(both):
        assert torch.equal(both(x), y)
    assert not torch.allclose(both(x), y, atol=1e-3)


def test_stock_model_beside():
    assert not dorac.peft.switch.tuners(stock_model("linear"))
