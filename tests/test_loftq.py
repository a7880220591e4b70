"""LoftQ's start over quantised weights: the nearest of its rank to what quantising has lost."""

import copy

import pytest
import torch
from torch import nn

import dorac
from dorac.apply import dora_layers

bnb = pytest.importorskip("bitsandbytes")

R = 5
QUANTISED = {
    "nf4": lambda layer: bnb.nn.Linear4bit(64, 96, quant_type="nf4", compute_dtype=torch.float32),
    "nested": lambda layer: bnb.nn.Linear4bit(64, 96, compress_statistics=True, compute_dtype=torch.float32),
    "int8": lambda layer: bnb.nn.Linear8bitLt(64, 96, has_fp16_weights=False),
}


def models(kind="nf4"):
    """A dense model of two layers, one of which the second one has quantised."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 3))
    quantised = copy.deepcopy(dense)
    quantised[0] = QUANTISED[kind](dense[0])
    quantised[0].load_state_dict(dense[0].state_dict())
    return dense, quantised.to("cpu")


@torch.no_grad()
def dequantised(layer):
    """Q by bitsandbytes' own functions."""
    weight = layer.weight
    if isinstance(layer, bnb.nn.Linear8bitLt):
        return bnb.functional.int8_vectorwise_dequant(weight.data, weight.SCB).double()
    return bnb.functional.dequantize_4bit(weight.data, weight.quant_state).double()


@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.parametrize("options", [{"lora_alpha": 7}, {"lora_alpha": -3}, {"lora_alpha": 4, "use_rslora": True}])
def test_nearest_of_its_rank(kind, options):
    """By Eckart and Young: what is left of W - Q is its singular values from the rank on; g is 1."""
    dense, model = models(kind)
    Q, W = dequantised(model[0]), dense[0].weight.detach().double()
    x = torch.randn(50, 64)
    before = (model[0](x) - dense[0](x)).norm()
    dorac.apply_dora(model, ["0"], R, init_lora_weights="loftq", original_weights=dense.state_dict(), **options)
    layer = model[0]
    V = Q + layer.scaling * (layer.lora_B.double() @ layer.lora_A.double()).detach()
    left = torch.linalg.svdvals(W - Q)[R:].square().sum().sqrt()
    error = torch.linalg.matrix_norm(W - V)
    assert error == pytest.approx(left.item(), rel=1e-4)
    assert error < 0.95 * torch.linalg.matrix_norm(W - Q)
    torch.testing.assert_close(layer.lora_magnitude_vector.detach().double(), V.norm(dim=1), rtol=1e-6, atol=0)
    torch.testing.assert_close(layer.lora_A.norm(dim=1), layer.lora_B.norm(dim=0))
    assert (layer(x) - dense[0](x)).norm() < before


def test_saved_as_any_adapter(tmp_path):
    dense, model = models()
    dorac.apply_dora(model, ["0"], R, 7, init_lora_weights="loftq", original_weights=dense.state_dict())
    dorac.save_adapter(model, tmp_path)
    _, again = models()
    dorac.load_adapter(again, tmp_path)
    x = torch.randn(4, 64)
    assert torch.equal(again(x), model(x))


def test_with_pefts_config():
    peft = pytest.importorskip("peft")
    dense, model = models()
    config = peft.LoraConfig(use_dora=True, r=R, target_modules=["0"])
    config.init_lora_weights = "loftq"  # which its own checks ask scipy for
    config.loftq_config = {"loftq_bits": 4, "loftq_iter": 1}
    dorac.apply_dora(model, config, original_weights=dense.state_dict())
    assert model[0].lora_B.any()
    config.loftq_config = {"loftq_bits": 4, "loftq_iter": 2}
    with pytest.raises(ValueError, match="loftq_iter=2 would quantise the base weights anew, only 1 leaves them"):
        dorac.apply_dora(models()[1], config, original_weights=dense.state_dict())


REFUSED = {
    "none": (
        lambda state: None,
        {},
        TypeError,
        "needs original_weights, the state dict of the model before .* NoneType",
    ),
    "dense": (lambda state: state, {"target_modules": ["0", "2"]}, ValueError, "2: Linear is not quantised: quantise"),
    "absent": (lambda state: {}, {}, ValueError, "0: original_weights holds no 0.weight"),
    "shape": (lambda s: {"0.weight": s["0.weight"].T}, {}, ValueError, r"tensor \[96, 64\], got .*float32 \[64, 96\]"),
    "nan": (
        lambda s: {"0.weight": s["0.weight"] * torch.nan},
        {},
        ValueError,
        "0.weight of original_weights is not fin",
    ),
    "meta": (
        lambda s: {"0.weight": s["0.weight"].to("meta")},
        {},
        ValueError,
        "0.weight of original_weights is on meta",
    ),
    "rank": (lambda state: state, {"r": 65}, ValueError, "0: r = 65 is more than the rank of its weight, 64"),
    "scaling": (lambda state: state, {"lora_alpha": 0}, ValueError, "0: a scaling of 0 leaves the error"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case):
    weights, options, error, message = REFUSED[case]
    dense, model = models()
    before = {key: t.clone() for key, t in model.state_dict().items()}
    options = {"target_modules": ["0"], "r": R, **options}
    with pytest.raises(error, match=message):
        dorac.apply_dora(model, init_lora_weights="loftq", original_weights=weights(dense.state_dict()), **options)
    assert not dora_layers(model)
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    assert all(p.requires_grad == p.is_floating_point() for p in model[2].parameters())
