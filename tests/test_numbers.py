"""Where a number is taken: NumPy's are numbers too, and what is none is refused before anything is set."""

import pytest
import torch
from torch import nn

import dorac
from dorac import functional
from dorac.nn import DoraConv2d, DoraEmbedding, DoraLinear
from dorac.testing import linear_inputs

np = pytest.importorskip("numpy")

NUMBERS = [np.float32(2), np.float64(2), np.float16(2), np.int64(2), np.uint8(2)]
OTHERS = ["2", None, True, np.bool_(True), 2j, np.complex64(2), [2.0], np.array([2.0, 2.0]), torch.ones(2)]


def linear_arguments():
    inputs = linear_inputs((3, 6, 8, 2))
    return inputs.x, inputs.weight, inputs.lora_A, inputs.lora_B, inputs.magnitude


def conv_arguments():
    return torch.ones(1, 3, 5, 5), torch.ones(4, 3, 2, 2), torch.ones(2, 3, 2, 2), torch.ones(4, 2, 1, 1), torch.ones(4)


def embedding_arguments():
    return torch.arange(5), torch.ones(5, 4), torch.ones(2, 5), torch.ones(4, 2), torch.ones(4)


FUNCTIONALS = {
    "dora_linear": (functional.dora_linear, linear_arguments),
    "dora_conv2d": (functional.dora_conv2d, conv_arguments),
    "dora_embedding": (functional.dora_embedding, embedding_arguments),
}


@pytest.mark.parametrize("number", NUMBERS, ids=repr)
@pytest.mark.parametrize("name", FUNCTIONALS)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_scalings_of_functionals(name, number, compiled):
    function, arguments = FUNCTIONALS[name]
    arguments = arguments()

    def run(scaling):
        return function(*arguments, scaling=scaling)

    expected = run(2.0)
    run = torch.compile(run, fullgraph=True, backend="aot_eager") if compiled else run
    torch.testing.assert_close(run(number), expected)


@pytest.mark.parametrize("other", OTHERS, ids=repr)
@pytest.mark.parametrize("name", FUNCTIONALS)
def test_what_is_no_scaling(name, other):
    function, arguments = FUNCTIONALS[name]
    with pytest.raises(TypeError, match=r"^scaling must be a number or a 0-d float tensor, got"):
        function(*arguments(), scaling=other)


def test_a_scaling_of_numpy_must_be_finite_too():
    with pytest.raises(ValueError, match=r"scaling must be finite in float32, got nan"):
        functional.dora_linear(*linear_arguments(), scaling=np.float32("nan"))


def test_numbers_of_the_other_arguments():
    x, *adapter = linear_arguments()
    weight, *rest = adapter
    expected = functional.norm_factored(*adapter[:3], 2.0, budget=4096)
    assert torch.equal(functional.norm_factored(*adapter[:3], np.int64(2), budget=np.int32(4096)), expected)
    y = functional.dora_linear(x, *adapter, scaling=2.0)
    assert torch.equal(functional.dora_linear(x, *adapter, scaling=2.0, dropout_p=np.float32(0)), y)
    merged, norm = functional.merge_weight(*adapter, scaling=np.float64(2), budget=np.int64(4096))
    assert torch.equal(merged, functional.merge_weight(*adapter, scaling=2.0, budget=4096)[0])
    back = functional.unmerge_weight(merged, *rest, scaling=np.int64(2), weight_norm=norm, budget=np.int64(4096))
    torch.testing.assert_close(back, weight)
    for scale, combine in (
        (functional.scale_adapter, functional.combine_adapters),
        (functional.scale_in_norm, functional.combine_in_norm),
    ):
        scaled = scale(*adapter, np.float32(0.5), scaling=np.int64(2))
        plain = scale(*adapter, 0.5, scaling=2.0)
        for mine, other in zip((*scaled[:3], float(scaled[3])), plain, strict=True):
            torch.testing.assert_close(mine, other)
        combined = combine(weight, [plain, plain], [np.float32(0.5), np.int64(1)])
        for mine, other in zip(combined, combine(weight, [plain, plain], [0.5, 1.0]), strict=True):
            torch.testing.assert_close(mine, other)
    stacked = functional.stack_adapters([functional.Adapter(*rest, np.int64(2)), plain])
    assert stacked.scaling.tolist() == [2.0, 1.0]
    for bad in (True, np.bool_(True), np.float32(4096), "4096"):
        with pytest.raises(TypeError, match=r"budget must be"):
            functional.norm_factored(*adapter[:3], 2.0, budget=bad)
    for bad in (True, np.bool_(False), "0", None):
        with pytest.raises(TypeError, match=r"dropout_p must be a number"):
            functional.dora_linear(x, *adapter, scaling=2.0, dropout_p=bad)


LAYERS = {
    "linear": (lambda **options: DoraLinear(nn.Linear(8, 6), **options), (3, 8)),
    "embedding": (lambda **options: DoraEmbedding(nn.Embedding(8, 6), **options), None),
    "conv2d": (lambda **options: DoraConv2d(nn.Conv2d(4, 6, 2), **options), (1, 4, 3, 3)),
}
KINDS = pytest.mark.parametrize("kind", LAYERS)


@KINDS
@pytest.mark.parametrize("cached", [False, True], ids=["", "cached"])
def test_layers_hold_numbers_of_python(kind, cached):
    make, shape = LAYERS[kind]
    layer = make(r=np.int64(2), lora_alpha=np.float32(3), lora_dropout=np.float32(0.25), init_lora_weights=False).eval()
    x = torch.arange(8) if shape is None else torch.ones(shape)
    if cached:
        dorac.cache_norms(layer)
    assert [type(v) for v in (layer.r, layer.lora_alpha, layer.lora_dropout, layer.scaling)] == [int, *[float] * 3]
    for number in NUMBERS:
        layer.scaling = number
        assert type(layer.scaling) in (int, float)
        assert layer.scaling == 2
        y = layer(x)
    layer.scaling = 2.0
    assert torch.equal(layer(x), y)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="eager")(x), y)


@KINDS
@pytest.mark.parametrize("cached", [False, True], ids=["", "cached"])
def test_a_refused_scaling_is_not_set(kind, cached):
    make, shape = LAYERS[kind]
    layer = make(r=2, init_lora_weights=False)
    x = torch.arange(8) if shape is None else torch.ones(shape)
    if cached:
        dorac.cache_norms(layer)
    y = layer(x)
    for bad in [*OTHERS, float("nan"), float("inf"), np.float32("nan"), torch.tensor(2), nn.Parameter(torch.ones(()))]:
        with pytest.raises((TypeError, ValueError), match=r"^scaling must be"):
            layer.scaling = bad
        assert layer.scaling == 4.0
        assert torch.equal(layer(x), y)
        assert "scaling" not in dict(layer.named_parameters())
    layer.scaling = torch.tensor(4.0)
    torch.testing.assert_close(layer(x), y)
    layer.merge()
    for value in (3.0, "3"):
        with pytest.raises(ValueError, match="merged"):
            layer.scaling = value
    assert layer.scaling == 4.0


def test_hyperparameters_that_are_none():
    for name in ("r", "lora_alpha", "lora_dropout"):
        for bad in (True, np.bool_(True), "2", None, [2], 2j):
            with pytest.raises(TypeError, match=f"^{name} must be"):
                DoraLinear(nn.Linear(8, 6), **{name: bad})
    with pytest.raises(TypeError, match=r"^r must be an integer"):
        DoraLinear(nn.Linear(8, 6), r=np.float32(2))


def test_patterns_and_layer_numbers(tmp_path):
    def model():
        return nn.ModuleDict({"layers": nn.ModuleList(nn.ModuleDict({"up": nn.Linear(8, 8)}) for _ in range(3))})

    wrapped = model()
    names = dorac.apply_dora(
        wrapped,
        ["up"],
        r=np.int64(2),
        lora_alpha=np.float32(3),
        rank_pattern={"1.up": np.int64(4)},
        alpha_pattern={"1.up": np.float32(6)},
        lora_dropout=np.float64(0.0),
    )
    assert names == ["layers.0.up", "layers.1.up", "layers.2.up"]
    assert [(part["up"].r, part["up"].scaling) for part in wrapped["layers"]] == [(2, 1.5), (4, 1.5), (2, 1.5)]
    dorac.save_adapter(wrapped, tmp_path)  # whose config is JSON
    assert dorac.load_adapter(model(), tmp_path) == names
    assert dorac.apply_dora(model(), ["up"], r=2, layers_to_transform=np.int64(1), layers_pattern="layers") == [
        "layers.1.up"
    ]
    conv = nn.Sequential(nn.Conv2d(4, 6, 2, groups=2))
    with pytest.raises(ValueError, match=r"divisible by the groups"):
        dorac.apply_dora(conv, ["0"], r=np.int64(3))
