"""PEFT's models on dorac over what accelerate offloads: the un-offloaded numbers, where stock PEFT crashes."""

import copy
import tempfile

import pytest
import torch

accelerate = pytest.importorskip("accelerate")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from accelerate.hooks import remove_hook_from_submodules  # noqa: E402
from offloading import (  # noqa: E402
    NAMES,
    TOKENS,
    WAYS,
    Net,
    adapter,
    assert_same_adapters,
    draw,
    failing_at,
    on_meta,
    train,
    unchanged,
)
from test_norm_cache import computed_norms  # noqa: E402
from test_offload import LOADED, SAMPLE, llama  # noqa: E402

import dorac  # noqa: E402
import dorac.peft  # noqa: E402
from dorac.peft import layer  # noqa: E402


@pytest.fixture(autouse=True)
def _enabled():
    with dorac.peft.enable():
        yield
    dorac.peft.disable()


def config(**options):
    return peft.LoraConfig(use_dora=True, **{"r": 2, "lora_alpha": 3, "target_modules": NAMES} | options)


def adapted(model, **options):
    model = peft.get_peft_model(model, config(**options))
    draw(adapter(model))
    return model


def pair(way, *, first="dispatch", **options):
    reference = adapted(Net(), **options)
    if first == "dispatch":
        return adapted(WAYS[way](Net()), **options), reference
    prefix = {"prefix": "base_model.model."} if way == "device_map" else {}
    return WAYS[way](copy.deepcopy(reference), **prefix), reference


@pytest.mark.parametrize(
    "options", [{}, pytest.param({"lora_dropout": 0.3}, marks=pytest.mark.full)], ids=["plain", "dropout"]
)
@pytest.mark.parametrize("way", WAYS)
def test_a_dispatched_model_trains_as_one_that_is_not(way, options):
    model, reference = pair(way, **options)
    offloaded = on_meta(model)
    assert "base_model.model.up.base_layer.weight" in offloaded
    assert not adapter(model).keys() & set(offloaded)
    fresh = peft.get_peft_model(WAYS[way](Net()), config())
    assert torch.equal(fresh.eval()(TOKENS), Net()(TOKENS))
    assert torch.equal(model.eval()(TOKENS), reference.eval()(TOKENS))
    assert train(model.train()) == train(reference.train())
    assert_same_adapters(model, reference)
    assert on_meta(model) == offloaded
    with model.disable_adapter():
        assert torch.equal(model(TOKENS), Net()(TOKENS))


def test_stock_peft_crashes():
    """If it does not any more, some of this is not needed."""
    dorac.peft.disable()
    with pytest.raises((NotImplementedError, RuntimeError)):
        peft.get_peft_model(accelerate.cpu_offload(Net(), "cpu"), config())(TOKENS)


@pytest.mark.parametrize("way", WAYS)
def test_adapted_then_dispatched(way):
    model, reference = pair(way, first="adapt")
    assert "base_model.model.up.lora_A.default.weight" in on_meta(model)
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(TOKENS), reference.eval()(TOKENS))
    with (
        unchanged(model),
        pytest.raises(RuntimeError, match=r"^base_model\.model\.\w+\.lora_.*: the adapter is offload"),
    ):
        model.train()(TOKENS)
    with unchanged(model), pytest.raises(ValueError, match=r"loading a state dict writes nothing there"):
        peft.set_peft_model_state_dict(model, peft.get_peft_model_state_dict(reference))
    remove_hook_from_submodules(model)
    assert train(model.train()) == train(reference.train())


def test_several_adapters(tmp_path, brought_in):
    model, reference = pair("cpu_offload")
    for m in (model, reference):
        m.add_adapter("other", config(target_modules=["up", "down"], r=3))
        draw({name: p for name, p in adapter(m).items() if "other" in name}, seed=4)
        m.eval()
    for active in ("other", ["default", "other"]):
        for m in (model, reference):
            m.base_model.set_adapter(active)
        assert torch.equal(model(TOKENS), reference(TOKENS))
    for m in (model, reference):
        m.base_model.add_weighted_adapter(["default", "other"], [0.5, 0.25], "both", combination_type="cat")
        m.set_adapter("both")
    assert torch.equal(model(TOKENS), reference(TOKENS))
    reference.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        name = f"low{low_cpu_mem_usage}"
        model.load_adapter(tmp_path / "other", name, low_cpu_mem_usage=low_cpu_mem_usage)
        model.set_adapter(name)
        reference.set_adapter("other")
        assert torch.equal(model(TOKENS), reference(TOKENS))


@pytest.mark.parametrize("first", ["dispatch", "adapt"])
@pytest.mark.parametrize("way", SAMPLE)
def test_merge_unmerge_unload(way, first, brought_in):
    """PEFT keeps what is merged on the host."""
    model, reference = pair(way, first=first)
    for m in (model, reference):
        m.eval().requires_grad_(False)
    for call in ("merge_adapter", "unmerge_adapter"):
        getattr(model, call)()
        getattr(reference, call)()
        assert torch.equal(model(TOKENS), reference(TOKENS))
        assert "base_model.model.up.base_layer.weight" in on_meta(model)
    assert torch.equal(model.merge_and_unload()(TOKENS), reference.merge_and_unload()(TOKENS))


@pytest.mark.parametrize("first", ["dispatch", "adapt"])
def test_a_merge_that_fails_midway(first, brought_in):
    model, _ = pair("cpu_offload", first=first)
    model.eval()
    with unchanged(model), failing_at(layer.Conv1d, "merge", 1), pytest.raises(MemoryError):
        model.merge_adapter()
    model.merge_adapter()
    with unchanged(model), failing_at(layer.Conv1d, "unmerge", 1), pytest.raises(MemoryError):
        model.unmerge_adapter()


@pytest.mark.parametrize("first", ["dispatch", "adapt"])
def test_kept_norms(first, brought_in):
    model, reference = pair("cpu_offload", first=first)
    for m in (model, reference):
        m.eval()
    cache = dorac.cache_norms(model)
    with torch.no_grad():
        model(TOKENS)
        assert computed_norms(lambda: model(TOKENS)) == 0
        assert torch.equal(model(TOKENS), reference(TOKENS))
    cache.check()
    if first == "adapt":
        return
    assert train(model, micro_batches=3) == train(reference, micro_batches=3)
    up = model.base_model.model.up
    up.scaling["default"] = reference.base_model.model.up.scaling["default"] = 0.25
    up.base_layer._hf_hook.weights_map["weight"].mul_(1.5)
    reference.base_model.model.up.base_layer.weight.mul_(1.5)
    assert torch.equal(model(TOKENS), reference(TOKENS))
    cache.check()
    with torch.no_grad():
        up.lora_A["default"].weight.data.mul_(2)
    with pytest.raises(RuntimeError, match=r"the cached norm of .*up.* is stale"):
        cache.check()


@pytest.mark.parametrize("way", ["disk_offload", "device_map"])
def test_norms_of_what_is_on_disk_are_refused(way):
    model, _ = pair(way)
    with unchanged(model), pytest.raises(ValueError, match=r"up \(adapter default\): it is offloaded to disk"):
        dorac.cache_norms(model)


@pytest.mark.full
@pytest.mark.parametrize("how", LOADED)
def test_loaded_with_a_device_map(how, tmp_path):
    reference = llama(tmp_path / "model")
    model = LOADED[how](tmp_path / "model")
    model, reference = (adapted(m, target_modules="all-linear").eval() for m in (model, reference))
    assert torch.equal(model(TOKENS).logits, reference(TOKENS).logits)
    reference.save_pretrained(tmp_path / "adapter")
    low = peft.PeftModel.from_pretrained(llama(tmp_path / "again"), tmp_path / "adapter", low_cpu_mem_usage=True)
    assert torch.equal(low(TOKENS).logits, reference(TOKENS).logits)


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:for .* copying from a non-meta parameter")  # torch's, of what PEFT loads
def test_from_pretrained_forgets_magnitudes_on_disk(tmp_path, monkeypatch):
    """PEFT writes the adapters of what is on disk there, too, and leaves the magnitudes out; stock: a KeyError."""
    monkeypatch.chdir(tmp_path)  # where PEFT then writes its copies of the model's files
    reference = adapted(llama(tmp_path / "model"), target_modules="all-linear")
    reference.save_pretrained(tmp_path / "adapter")
    model = LOADED["from_pretrained"](tmp_path / "model")
    places = {f"base_model.model.{name}": place for name, place in model.hf_device_map.items()}
    model = peft.PeftModel.from_pretrained(
        model, tmp_path / "adapter", device_map=places, offload_folder=tempfile.mkdtemp()
    ).eval()
    with pytest.raises(RuntimeError, match=r"accelerate has no value for .*get_peft_model, and load the adapter with"):
        model(TOKENS)
