"""Whatever is raised, whenever: the drop-in leaves a model, PEFT and its own books as they were.

Something is raised at a line of many, with ``-m full`` at every one.
"""

import copy
import gc
import warnings

import pytest
import torch
from injected import everything, raised_at_every_line
from torch import nn

peft = pytest.importorskip("peft")

from peft.tuners import lora  # noqa: E402
from peft_models import off_init  # noqa: E402

import dorac.peft  # noqa: E402
from dorac.peft.state import state  # noqa: E402

OURS = ("dorac/peft/",)
MERGING = ("dorac/peft/", "dorac/functional/merge", "peft/tuners/lora/layer", "peft/tuners/tuners_utils")


@pytest.fixture(autouse=True)
def _stock_afterwards():
    yield
    dorac.peft.disable()


class Three(nn.Module):
    """An embedding, a convolution and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.conv = nn.Conv1d(6, 8, 3, padding=1)
        self.linear = nn.Linear(8, 5)

    def forward(self, x):
        return self.linear(self.conv(self.embedding(x).mT).mT)


TARGETS = ["embedding", "conv", "linear"]
X = torch.arange(10).view(2, 5)


def three_kinds(dtype=torch.float32, adapters=("one", "two")):
    """A stock model of three kinds of layers under two adapters, both active."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, use_dora=True, target_modules=TARGETS)
    model = peft.get_peft_model(Three().to(dtype), config, adapter_name=adapters[0])
    for name in adapters[1:]:
        model.add_adapter(name, config)
    model.base_model.set_adapter(list(adapters))
    model.register_forward_hook(lambda *_: None)
    return off_init(model)


def books():
    """What enable() writes to that belongs to no model."""
    methods = {name: id(value) for name, value in vars(lora.LoraModel).items()}
    return methods, dict(state.stock), set(state.roots), set(state.models), set(state.reported)


CHANGES = {
    "enable_model": (lambda model: None, dorac.peft.enable),
    "enable_more": (lambda model: dorac.peft.enable(model.base_model.model.conv), dorac.peft.enable),
    "disable_model": (dorac.peft.enable, dorac.peft.disable),
    "enable": (lambda model: None, lambda model: dorac.peft.enable()),
    "disable": (lambda model: (dorac.peft.enable(), dorac.peft.enable(model)), lambda model: dorac.peft.disable()),
}


def check_switching(change, step):
    before, call = CHANGES[change]
    model = three_kinds()
    before(model)
    expected, kept, y = everything(model), books(), model(X)
    for n in raised_at_every_line(lambda: call(model), OURS, step=step):
        assert everything(model) == expected, n
        assert books() == kept, n
    assert n > 10
    assert (everything(model), books()) != (expected, kept)
    dorac.peft.disable()
    (dorac.peft.enable if change == "disable_model" else dorac.peft.disable)(model)
    torch.testing.assert_close(model(X), y)


@pytest.mark.parametrize("change", CHANGES)
def test_switching(change):
    check_switching(change, step=13)


@pytest.mark.full
@pytest.mark.parametrize("change", CHANGES)
def test_switching_at_every_line(change):
    check_switching(change, step=1)


def test_a_block_is_left():
    """What is raised while a block's end gives PEFT its own back leaves all as in the block."""
    model = three_kinds()
    for context in (dorac.peft.enable(model), dorac.peft.enable()):
        expected, kept = everything(model), books()
        for n in raised_at_every_line(lambda context=context: context.__exit__(None, None, None), OURS):
            assert everything(model) == expected, n
            assert books() == kept, n
        assert n > 10
    assert not state.stock


def test_a_warning_that_is_an_error():
    model = three_kinds()
    model.base_model.model.linear.lora_variant["one"] = lora.layer.LoraVariant()
    with pytest.warns(UserWarning, match="does not cover Linear"):
        dorac.peft.enable(model)
    dorac.peft.disable()
    expected, kept = everything(model), books()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="does not cover Linear"):
            dorac.peft.enable(model)
    assert everything(model) == expected
    assert books() == kept


def check_building(kind, existing, step):
    """PEFT leaves half an adapter in a layer of which building was broken off."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, use_dora=True, target_modules=[kind])
    first = peft.LoraConfig(r=2, target_modules=[kind if existing else "none"])
    model = Three()
    model.none = nn.Linear(2, 2)
    model = peft.get_peft_model(model, first)  # plain LoRA: the class of the layer is not dorac's yet
    dorac.peft.enable(model)
    tuner = model.base_model
    expected, kept = everything(model), books()

    def build():
        torch.manual_seed(1)
        target = getattr(tuner.model, kind)
        tuner._create_and_replace(config, "new", target, kind, tuner.model, current_key=kind)

    files = (*OURS, "peft/tuners/lora/layer", "peft/tuners/lora/model", "peft/tuners/lora/variants")
    for n in raised_at_every_line(build, files, step=step):
        assert everything(model) == expected, n
        assert books() == kept, n
    assert n > 50
    layer = getattr(tuner.model, kind)
    assert type(layer).__module__ == "dorac.peft.layer"
    assert type(layer.lora_variant["new"]).__module__ == "dorac.peft.variants"


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("existing", [False, True], ids=["new_layer", "second_adapter"])
def test_an_adapter_is_built(kind, existing):
    check_building(kind, existing, step=29)


@pytest.mark.full
@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("existing", [False, True], ids=["new_layer", "second_adapter"])
def test_an_adapter_is_built_at_every_line(kind, existing):
    check_building(kind, existing, step=1)


def unmergeable(model):
    """The last layer's second adapter gives a NaN, which safe merging refuses."""
    with torch.no_grad():
        model.base_model.model.linear.lora_magnitude_vector["two"].weight[3] = float("nan")


def not_to_be_unmerged(model):
    """A row of the second layer's first adapter cannot be unmerged; what is above it is before that is met."""
    model.merge_adapter()
    with torch.no_grad():
        model.base_model.model.conv.lora_magnitude_vector["one"].weight[0, 3] = 0


def overflowing(model):
    """The second layer's second adapter gives a row that float16 has no number for."""
    with torch.no_grad():
        model.base_model.model.conv.lora_magnitude_vector["two"].weight[0, 1] = 60000
        model.base_model.model.conv.lora_magnitude_vector["one"].weight[0, 1] = 60000


REFUSED = {
    "safe": (unmergeable, lambda m: m.merge_adapter(safe_merge=True), "NaNs detected"),
    "safe_unload": (unmergeable, lambda m: m.merge_and_unload(safe_merge=True), "NaNs detected"),
    "safe_layer": (unmergeable, lambda m: m.base_model.model.linear.merge(safe_merge=True), "NaNs detected"),
    "unmerge": (not_to_be_unmerged, lambda m: m.unmerge_adapter(), "cannot unmerge rows 3"),
    "unmerge_layer": (not_to_be_unmerged, lambda m: m.base_model.model.conv.unmerge(), "cannot unmerge rows 3"),
    "overflow": (overflowing, lambda m: m.merge_adapter(), "overflows torch.float16"),
    "overflow_unload": (overflowing, lambda m: m.merge_and_unload(), "overflows torch.float16"),
    "overflow_layer": (overflowing, lambda m: m.base_model.model.conv.merge(), "overflows torch.float16"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("everywhere", [False, True], ids=["model", "everywhere"])
def test_refused_merges(case, everywhere):
    prepare, call, message = REFUSED[case]
    model = three_kinds(torch.float16)
    dorac.peft.enable(*[] if everywhere else [model])
    if everywhere:  # stock LoraModel's methods are dorac's then, its layers are switched by themselves
        for name in TARGETS:
            dorac.peft.enable(getattr(model.base_model.model, name))
    prepare(model)
    expected = everything(model)
    with pytest.raises(ValueError, match=message):
        call(model)
    assert everything(model) == expected


MERGES = {
    "merge": (lambda m: None, lambda m: m.merge_adapter()),
    "merge_safe": (lambda m: None, lambda m: m.merge_adapter(safe_merge=True)),
    "merge_more": (lambda m: m.merge_adapter(["one"]), lambda m: m.merge_adapter()),
    "unmerge": (lambda m: m.merge_adapter(), lambda m: m.unmerge_adapter()),
    "unload": (lambda m: None, lambda m: m.merge_and_unload()),
    "unload_safe": (lambda m: None, lambda m: m.merge_and_unload(safe_merge=True)),
    "unload_only": (lambda m: None, lambda m: m.unload()),
    "layer": (lambda m: None, lambda m: m.base_model.model.conv.merge()),
    "layer_unmerge": (lambda m: m.merge_adapter(), lambda m: m.base_model.model.conv.unmerge()),
}


def check_merge_broken_off(case, start, step):
    prepare, call = MERGES[case]
    model = three_kinds(torch.float16)
    dorac.peft.enable(model)
    prepare(model)
    expected, y = everything(model), model(X)
    for n in raised_at_every_line(lambda: call(model), MERGING, start=start, step=step):
        assert everything(model) == expected, n
    assert n > 20
    assert everything(model) != expected
    if "unload" not in case and case != "merge_more":
        torch.testing.assert_close(model(X), y, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("case", MERGES)
def test_a_merge_is_broken_off(case):
    check_merge_broken_off(case, start=3, step=97)


@pytest.mark.full
@pytest.mark.parametrize("case", MERGES)
def test_a_merge_is_broken_off_at_every_line(case):
    check_merge_broken_off(case, start=0, step=1)


def test_a_norm_beside_merged_adapters_leaves_their_weight():
    """PEFT unmerges for it, and merges again: not the same bits in float16."""
    model = three_kinds(torch.float16)
    dorac.peft.enable(model)
    model.merge_adapter(["one"])
    expected = everything(model)
    for name in TARGETS:
        layer = getattr(model.base_model.model, name)
        with layer._unmerged_base_weight() as weight:
            assert everything(model) == expected
            assert not torch.equal(weight, layer.base_layer.weight)
    assert everything(model) == expected


def test_order_of_merged_adapters_is_kept():
    model = three_kinds(adapters=("one", "two", "three"))
    dorac.peft.enable(model)
    model.merge_adapter(["two", "one", "three"])
    layer = model.base_model.model.linear
    with torch.no_grad():
        layer.lora_magnitude_vector["one"].weight[2] = 0
    with pytest.raises(ValueError, match="cannot unmerge rows 2"):
        model.unmerge_adapter()
    assert layer.merged_adapters == ["two", "one", "three"]
    assert layer._caches.keys() == {f"{name}-weight_norm" for name in ("one", "two", "three")}


def test_dropped_models_leave_nothing():
    dorac.peft.disable()
    with dorac.peft.enable():
        for _ in range(3):
            model = three_kinds()
            dorac.peft.enable(model)
            copy.deepcopy(model)(X)
    del model
    gc.collect()
    assert not state.roots
    assert not state.models
    assert not state.stock
