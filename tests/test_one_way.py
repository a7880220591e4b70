"""One model is adapted one way, ``apply_dora`` or PEFT's; and names of adapters that are not loaded."""

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")

from injected import everything  # noqa: E402

import dorac  # noqa: E402
import dorac.peft  # noqa: E402


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))


def config(target_modules):
    return peft.LoraConfig(r=2, use_dora=True, target_modules=target_modules)


@pytest.mark.parametrize("target_modules", [["0"], ["1"], "all-linear"], ids=str)
def test_peft_over_apply_dora(target_modules):
    ours = model()
    dorac.apply_dora(ours, ["0"], r=2)
    before = everything(ours)
    with dorac.peft.enable(), pytest.raises(ValueError, match=r"^0 is adapted by dorac already: .* either with "):
        peft.get_peft_model(ours, config(target_modules))
    assert everything(ours) == before
    dorac.peft.disable()


def test_stock_peft_over_a_layer_of_ours():
    """Not asked by stock PEFT, the layer still takes nothing of PEFT's in the place of its base layer."""
    ours = model()
    dorac.apply_dora(ours, ["0", "1"], r=2)
    before = everything(ours)
    with pytest.raises(TypeError, match=r"^DoraLinear is adapted by dorac already"):
        peft.get_peft_model(ours, config("all-linear"))
    assert everything(ours) == before
    ours[0].base_layer = nn.Linear(6, 5)  # anything else, it takes


@pytest.mark.parametrize("target_modules", [["0"], ["1"], "all-linear", r".*lora_A\.default"], ids=str)
def test_apply_dora_over_peft(target_modules, tmp_path):
    theirs = peft.get_peft_model(model(), config(["0"]))
    other = model()
    dorac.apply_dora(other, ["1"], r=2)
    dorac.save_adapter(other, tmp_path)
    before = everything(theirs)
    with pytest.raises(ValueError, match=r"^base_model\.model\.0 is adapted by PEFT: .*merge_and_unload\(\)"):
        dorac.apply_dora(theirs, target_modules)
    with pytest.raises(ValueError, match=r"does not fit the model: base_model\.model\.0 is adapted by PEFT"):
        dorac.load_adapter(theirs, tmp_path)
    for call in (dorac.merge, dorac.unmerge, lambda m: dorac.save_adapter(m, tmp_path)):
        with pytest.raises(ValueError, match=r"^base_model\.model\.0 is adapted by PEFT: call save_pretrained, "):
            call(theirs)
    assert everything(theirs) == before


def test_one_after_the_other():
    theirs = peft.get_peft_model(model(), config(["0"])).unload()
    assert dorac.apply_dora(theirs, "all-linear", r=2) == ["0", "1"]
    plain = dorac.merge(theirs, unload=True)
    with dorac.peft.enable():
        assert peft.get_peft_model(plain, config(["0"])).base_model.model[0].scaling
    dorac.peft.disable()


@pytest.mark.parametrize(
    "call",
    [
        lambda m: m.merge_adapter(["other"]),
        lambda m: m.merge_adapter(["default", "other"]),
        lambda m: m.merge_and_unload(adapter_names=["other"]),
        lambda m: m.base_model._unload_and_optionally_merge(True, False, False, ["other"]),
    ],
    ids=["merge", "merge some", "unload", "by position"],
)
def test_a_name_that_is_not_loaded(call):
    theirs = peft.get_peft_model(model(), config(["0"]))
    dorac.peft.enable(theirs)
    before = everything(theirs)
    with pytest.raises(ValueError, match=r"^no adapter 'other' is loaded, only 'default'$"):
        call(theirs)
    assert everything(theirs) == before
    dorac.peft.disable()
