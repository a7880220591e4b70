"""Two threads that build models at once, one on dorac and one not, and what is left of it."""

import threading

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")

from peft.tuners import lora  # noqa: E402
from peft_models import Holder  # noqa: E402
from test_peft_switch import on_dorac, package_state  # noqa: E402

import dorac.peft  # noqa: E402

BASES = {
    "linear": lambda: nn.Linear(10, 12),
    "embedding": lambda: nn.Embedding(20, 12),
    "conv2d": lambda: nn.Conv2d(3, 8, 3),
}


@pytest.fixture(autouse=True)
def _stock_afterwards():
    yield
    dorac.peft.disable()


def meeting(layer: nn.Module, meet) -> nn.Module:
    """The layer, which calls ``meet`` when its weight is read: PEFT does while it builds an adapter over it."""

    class Meeting(type(layer)):
        def __getattr__(self, name):
            if name == "weight":
                meet()
            return super().__getattr__(name)

    Meeting.__name__ = type(layer).__name__
    layer.__class__ = Meeting
    return layer


@pytest.mark.parametrize("kind", BASES)
def test_two_threads_build(kind):
    """Each is in the middle of building an adapter while the other is, and PEFT's package stays as it was."""
    config = {"use_dora": True, "r": 2, "target_modules": ["target"]}
    ours = peft.get_peft_model(Holder(BASES[kind]()), peft.LoraConfig(**config | {"target_modules": ["head"]}))
    dorac.peft.enable(ours)
    stock = peft.get_peft_model(Holder(BASES[kind]()), peft.LoraConfig(**config | {"target_modules": ["head"]}))
    before = package_state()
    barrier = threading.Barrier(2)
    inside, seen, failed = threading.local(), [], []

    def meet():
        if getattr(inside, "building", False):
            inside.building = False
            barrier.wait(30)
            seen.append(package_state() == before)
            barrier.wait(30)

    def build(model, name):
        try:
            inside.building = True
            model.add_adapter(name, peft.LoraConfig(**config))
        except BaseException as error:  # shown by the main thread
            failed.append(error)
            barrier.abort()

    for name in ("new", "second"):  # a new layer, then another adapter of a layer
        for model in (ours, stock):
            layer = model.base_model.model.target
            base = layer.base_layer if isinstance(layer, lora.LoraLayer) else layer
            if not type(base).__qualname__.endswith("Meeting"):
                meeting(base, meet)
        threads = [threading.Thread(target=build, args=(model, name)) for model in (ours, stock)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not failed, failed
        assert seen == [True, True]
        seen.clear()
        barrier.reset()
        for model, expected in ((ours, True), (stock, False)):
            layer = model.base_model.model.target
            kinds = {type(layer), type(layer.lora_variant[name]), type(layer.lora_magnitude_vector[name])}
            assert {kind.__module__.startswith("dorac.peft.") for kind in kinds} == {expected}, kinds
    assert package_state() == before


def test_many_threads_enable_and_disable():
    """Contexts that overlap in threads: PEFT's package and every model end as they began."""
    dorac.peft.disable()  # models that tests before this one enabled, and that nothing has collected yet
    before, failed = package_state(), []

    def work(seed):
        try:
            for _ in range(4):
                config = peft.LoraConfig(use_dora=True, r=2, target_modules=["target"])
                model = peft.get_peft_model(Holder(nn.Linear(10, 12)), config)
                with dorac.peft.enable(model):
                    model.add_adapter("more", config)
                    assert on_dorac(model)
                    model(torch.randn(2, 10)).sum().backward()
        except BaseException as error:  # shown by the main thread
            failed.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        with dorac.peft.enable():
            pass
    for thread in threads:
        thread.join()
    assert not failed, failed
    assert package_state() == before


@pytest.mark.parametrize("kind", BASES)
def test_what_is_built_on_dorac_has_stock_pefts_start(kind):
    """The same seed gives the same factors, whichever classes they are built with."""
    config = peft.LoraConfig(use_dora=True, r=2, target_modules=["target"], init_lora_weights=kind == "linear")
    models = []
    for enabled in (False, True):
        torch.manual_seed(0)
        base = Holder(BASES[kind]())
        if enabled:
            dorac.peft.enable()
        models.append(peft.get_peft_model(base, config))
    stock, ours = (dict(model.named_parameters()) for model in models)
    assert stock.keys() == ours.keys()
    for name, p in stock.items():
        if "magnitude" in name:
            torch.testing.assert_close(ours[name], p)
        else:
            assert torch.equal(ours[name], p), name
        assert ours[name].requires_grad == p.requires_grad


class Third(lora.Linear):
    """A third party's layer that takes PEFT's variants."""


def test_a_third_partys_layer():
    config = peft.LoraConfig(use_dora=True, target_modules=["target"])
    config._register_custom_module({nn.Linear: Third})
    with dorac.peft.enable():
        model = peft.get_peft_model(Holder(nn.Linear(10, 12)), config)
        layer = model.base_model.model.target
        assert type(layer) is Third
        assert type(layer.lora_variant["default"]).__module__ == "dorac.peft.variants"
        assert type(layer.lora_magnitude_vector["default"]) is dorac.peft.DoraLinearLayer
        model.add_adapter("more", config)
        assert type(layer) is Third
        assert type(layer.lora_variant["more"]).__module__ == "dorac.peft.variants"
    assert type(layer.lora_variant["default"]).__module__ == "peft.tuners.lora.variants"


def test_what_peft_refuses_it_refuses_in_its_words():
    for layer, message in (
        (nn.MultiheadAttention(8, 2), "MultiheadAttention does not support DoRA"),
        (nn.Tanh(), "not supported"),
    ):
        for enabled in (False, True):
            if enabled:
                dorac.peft.enable()
            config = peft.LoraConfig(use_dora=True, target_modules=["target"])
            with pytest.raises(ValueError, match=message):
                peft.get_peft_model(Holder(layer), config)
        dorac.peft.disable()
