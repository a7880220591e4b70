"""transformers' own ways to load an adapter, which lose its magnitudes under stock PEFT."""

import pytest
import tiny_trainers as tiny
import torch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

import dorac.peft  # noqa: E402
from dorac.undo import Undo  # noqa: E402

if not peft.import_utils.is_transformers_ge_v5:
    pytest.skip("transformers 4 renames no keys by PEFT's rules", allow_module_level=True)

from dorac.peft.transformers_keys import PLACES  # noqa: E402

EVERY_PLACE = pytest.mark.parametrize("place", PLACES, ids=lambda place: place[1])


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """The base model, an adapter that PEFT has saved, and what the two compute."""
    base, directory = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("adapter")
    model = tiny.wrapped(tiny.save_base(base))
    twin = tiny.stock_twin(model, str(base), tmp_path_factory.mktemp("start"))
    twin.save_pretrained(directory)
    return str(base), str(directory), tiny.logits(model)


def loaded(how, base, directory):
    if how == "from_pretrained":
        return tiny.load(directory)
    model = tiny.load(base)
    if how == "state_dict":
        state = peft.utils.load_peft_weights(directory)
        model.load_adapter(adapter_state_dict=state, peft_config=peft.LoraConfig.from_pretrained(directory))
    else:
        model.load_adapter(directory, adapter_name=how)
    return model


@pytest.mark.parametrize("how", ["from_pretrained", "default", "a+b", "state_dict"])
def test_magnitudes_are_found(adapter, how):
    base, directory, expected = adapter
    with dorac.peft.enable():
        model = loaded(how, base, directory)
        torch.testing.assert_close(tiny.logits(model), expected)
    assert (tiny.logits(loaded(how, base, directory)) - expected).abs().max() > 0.01  # stock again


@EVERY_PLACE
def test_all_or_nothing(place):
    stock = getattr(*place)
    with Undo() as log:
        dorac.peft.switch._transformers_keys().mend(log)
        assert getattr(*place) is not stock
        log.roll_back()
    assert getattr(*place) is stock
    dorac.peft.enable()
    dorac.peft.enable()
    dorac.peft.disable()
    assert getattr(*place) is stock


@EVERY_PLACE
def test_somebody_elses_rules_stay(place, monkeypatch):
    stock = getattr(*place)
    with dorac.peft.enable():
        ours = getattr(*place)

        def theirs(*args, **kwargs):
            return ours(*args, **kwargs)

        monkeypatch.setattr(*place, theirs)
    assert getattr(*place) is theirs
    monkeypatch.setattr(*place, stock)


@pytest.mark.full
def test_an_architecture_whose_weights_transformers_converts(tmp_path):
    """Mixtral: PEFT's own loading renames by the same rules there."""
    sizes = tiny.SIZES | {"num_local_experts": 2, "num_key_value_heads": 2}
    config = transformers.MixtralConfig(vocab_size=len(tiny.WORDS), **sizes)
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "base")
    model = tiny.load(tmp_path / "base")
    dorac.apply_dora(model, ["q_proj", "v_proj"], r=3, init_lora_weights=False)
    tiny.off_start(model)
    dorac.save_adapter(model, tmp_path / "adapter")
    for enabled in (True, False):
        (dorac.peft.enable if enabled else dorac.peft.disable)()
        again = peft.PeftModel.from_pretrained(tiny.load(tmp_path / "base"), tmp_path / "adapter")
        torch.testing.assert_close(tiny.logits(again), tiny.logits(model))
    with dorac.peft.enable():
        again = tiny.load(tmp_path / "base")
        again.load_adapter(tmp_path / "adapter")
    torch.testing.assert_close(tiny.logits(again), tiny.logits(model))
