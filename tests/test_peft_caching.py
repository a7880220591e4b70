"""PEFT's ``DoraCaching`` over the drop-in: a kept norm does not outlive what it was taken of."""

import copy
import pickle

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")

from peft.helpers import DoraCaching  # noqa: E402
from peft_models import KINDS, off_init, target, twins  # noqa: E402
from test_norm_cache import computed_norms  # noqa: E402
from test_peft_quantised import SCHEMES, quantised_model  # noqa: E402

from dorac import packed  # noqa: E402
from dorac.peft.variants import factors  # noqa: E402

SOME = ["linear", "gpt2_conv1d", "embedding", "conv2d"]


def of_another_adapter(model):
    """The state dict of an adapter like the model's, with other values."""
    other = off_init(copy.deepcopy(model), seed=7)
    return peft.get_peft_model_state_dict(other)


def factor(model, index=1):
    return factors(target(model), "default")[index]


@torch.no_grad()
def set_scale(model):
    target(model).set_scale("default", 3)


def scale_layer(model):
    layer = target(model)  # PEFT's ignores embeddings
    layer.scaling["default"] *= 0.5


def load_state_dict(model):
    model.load_state_dict(off_init(copy.deepcopy(model), seed=7).state_dict())


def set_peft_state(model):
    peft.set_peft_model_state_dict(model, of_another_adapter(model))


def data_copy(model):
    """As EMA's ``copy_to`` does, and PEFT's hotswap of a compiled model."""
    factor(model).data.copy_(torch.randn_like(factor(model)))


def data_lerp_of_lora_A(model):
    """As schedule-free's ``eval()`` does."""
    factor(model, 0).data.lerp_(torch.randn_like(factor(model, 0)), 0.5)


def base_in_place(model):
    with torch.no_grad():
        target(model).base_layer.weight.mul_(1.5)


def base_data(model):
    weight = target(model).base_layer.weight.data
    weight.copy_(torch.randn_like(weight))


def other_data(model):
    factor(model).data = factor(model).data * 2


def other_parameter(model):
    layer = target(model)
    if "default" in layer.lora_B:
        layer.lora_B["default"].weight = nn.Parameter(factor(model).detach() * 2)
    else:
        layer.lora_embedding_B["default"] = nn.Parameter(factor(model).detach() * 2)


def swapped(model):
    """As PEFT's hotswap does."""
    torch.utils.swap_tensors(factor(model), nn.Parameter(factor(model).detach() * 2))


def another_adapter(model):
    config = copy.deepcopy(model.peft_config["default"])
    model.add_adapter("other", config)
    off_init(model, seed=5)
    model.set_adapter("other")


def merged_and_back(model):
    """In float16 the weight that comes back is not the one that was."""
    model.half()
    with torch.no_grad():
        target(model).lora_magnitude_vector["default"].weight.mul_(1.7)
    x = torch.zeros(1, 1, dtype=torch.long) if target(model).lora_embedding_A else None
    x = torch.randn(2, *{2: (10,), 4: (3, 6, 5)}[target(model).base_layer.weight.ndim]).half() if x is None else x
    model(x)
    model.merge_adapter()
    model.unmerge_adapter()


def optimizer_step(model):
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    for p in parameters:
        p.grad = torch.randn_like(p)
    optimizer.step()


def to_float32(model):
    model.float()


WRITES = [
    set_scale,
    scale_layer,
    load_state_dict,
    set_peft_state,
    data_copy,
    data_lerp_of_lora_A,
    base_in_place,
    base_data,
    other_data,
    other_parameter,
    swapped,
    another_adapter,
    merged_and_back,
    optimizer_step,
    to_float32,
]


def input_of(kind, model):
    return KINDS[kind].input(3, target(model).base_layer.weight.dtype)


@pytest.mark.parametrize("write", WRITES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", SOME)
def test_kept_norms_follow(kind, write):
    _, ours = twins(kind)
    ours.eval()
    with DoraCaching():
        with torch.no_grad():
            before = [ours(input_of(kind, ours)) for _ in range(2)]
        assert torch.equal(*before)
        torch.manual_seed(0)
        write(ours)
        x = input_of(kind, ours)
        y = ours(x)
    expected = copy.deepcopy(ours)(x)
    torch.testing.assert_close(y, expected, rtol=0, atol=0)
    if write is not merged_and_back:
        assert not torch.equal(y.double(), before[0].double())


@pytest.mark.parametrize("kind", SOME)
def test_a_norm_is_taken_once(kind, monkeypatch):
    from dorac.peft import dora_linear

    taken = []
    for name in ("norm_factored", "norm_factored_conv"):
        function = getattr(dora_linear.functional, name)
        monkeypatch.setattr(dora_linear.functional, name, lambda *a, f=function, **k: (taken.append(1), f(*a, **k))[1])
    _, ours = twins(kind)
    ours.eval()
    with DoraCaching():
        for _ in range(3):
            ours(input_of(kind, ours))
        assert len(taken) == 1
        ours.eval()  # forgets, for what no check would notice
        ours(input_of(kind, ours))
        assert len(taken) == 2


@pytest.mark.parametrize(
    "write", [set_scale, load_state_dict, data_copy, base_data, other_data], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_compiled(kind, write):
    _, ours = twins(kind)
    ours.eval()
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    x = input_of(kind, ours)
    with DoraCaching():
        for model in (ours, compiled, compiled):
            model(x)
        torch.manual_seed(0)
        write(ours)
        y = compiled(x)
    torch.testing.assert_close(y, copy.deepcopy(ours)(x), rtol=1e-12, atol=1e-12)


def test_copies_keep_no_norm():
    _, ours = twins("linear")
    ours.eval()
    x = input_of("linear", ours)
    with DoraCaching():
        ours(x)
        magnitude = target(ours).lora_magnitude_vector["default"]
        assert magnitude._dora_cache
        for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert not target(copied).lora_magnitude_vector["default"]._dora_cache
            assert torch.equal(copied(x), ours(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@torch.no_grad()
def test_traced_programs_keep_no_norm():
    _, model = twins("linear")
    x = input_of("linear", model.eval())
    with DoraCaching():
        model(x)
        traced = torch.jit.trace(model, x)
        factor(model).mul_(1.5)
        torch.testing.assert_close(traced(x), model(x))


def test_transforms_keep_no_norm():
    """Under ``functional_call`` in ``vmap`` the tensors are wrapped, and others."""
    _, ours = twins("linear")
    ours.eval()
    x = input_of("linear", ours)
    state = {
        name: torch.stack([p.detach(), p.detach() * 1.5]) for name, p in ours.named_parameters() if "lora_B" in name
    }

    def run(parameters):
        return torch.func.functional_call(ours, parameters, (x,))

    expected = torch.stack([run({name: p[i] for name, p in state.items()}) for i in range(2)])
    with DoraCaching():
        ours(x)
        torch.testing.assert_close(torch.func.vmap(run)(state), expected)
        with torch.inference_mode():
            torch.testing.assert_close(copy.deepcopy(ours)(x), ours(x), rtol=0, atol=0)


# Quantised base layers


def quantised_factor(model):
    return model.base_model.model[0].lora_B["default"].weight


def data_of_a_factor(model):
    quantised_factor(model).data.mul_(2)


def scale_in_place(model):
    base = model.base_model.model[0].base_layer
    piece = next(piece for piece in packed.stored(base) if piece.dtype is torch.float32)
    with torch.no_grad():
        piece.mul_(2)


def weight_in_place(model):
    weight = model.base_model.model[0].base_layer.weight
    with torch.no_grad():
        weight.copy_(weight.flip(0) if type(weight.data) is torch.Tensor else weight)


def other_scaling(model):
    model.base_model.model[0].set_scale("default", 3)


@pytest.mark.parametrize(
    "write", [data_of_a_factor, scale_in_place, weight_in_place, other_scaling], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if "hqq" not in scheme.id])
def test_norms_of_quantised_layers_are_kept_and_follow(scheme, write):
    model, x = quantised_model(scheme).eval(), torch.randn(5, 64)
    with DoraCaching(), torch.no_grad():
        model(x)  # in eval mode bitsandbytes packs a weight anew
        assert computed_norms(lambda: model(x)) == 0
        before = model(x)
        write(model)
        # PEFT's scaling is a strength, which changes y and not the norm.
        assert computed_norms(lambda: model(x)) == (write is not other_scaling)
        y = model(x)
    with torch.no_grad():
        torch.testing.assert_close(model(x), y, rtol=0, atol=0)
        assert write is not other_scaling or not torch.equal(y, before)


# The dense norm, PEFT's own name for it


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", SOME)
def test_dense_and_factored_norm_agree_on_extremes(kind, dtype):
    """Rows that are not finite have the norm inf, and rows whose squares overflow in float32 their own."""
    _, ours = twins(kind, dtype=dtype, autocast_adapter_dtype=False)
    layer = target(ours)
    magnitude, weight = layer.lora_magnitude_vector["default"], layer.base_layer.weight
    lora_A, lora_B = factors(layer, "default")
    rows = weight if weight.ndim > 2 else magnitude._matrix(weight)
    with torch.no_grad():
        rows[0] = float("inf")
        rows[1, :1] = float("nan")
        rows[2] *= 1e20
        lora_B[3] = float("inf")
        lora_B[4] *= 1e20
        rows[5], lora_B[5] = 0, 0
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    A, B = lora_A.to(wide), lora_B.to(wide)
    lora_weight = (B.flatten(1) @ A.flatten(1)).view(weight.shape if weight.ndim > 2 else rows.shape)
    scaling = layer.scaling["default"]
    dense = magnitude.get_weight_norm(weight, lora_weight, scaling)
    factored = magnitude.factored_norm(weight, lora_A, lora_B, scaling)
    assert factored.shape == dense.shape
    textbook = (rows.double() + scaling * B.double().flatten(1).mm(A.double().flatten(1)).view(rows.shape)).flatten(1)
    textbook = textbook.norm(dim=1)
    textbook = torch.where(textbook.isnan(), float("inf"), textbook)
    assert textbook.isinf().nonzero().flatten().tolist() == [0, 1, 3]
    assert textbook[5] == 0
    for norm in (dense, factored):
        torch.testing.assert_close(norm.flatten().double(), textbook, rtol=1e-5, atol=0)
