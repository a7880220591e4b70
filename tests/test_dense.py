"""Tensors that have a float dtype and are no dense tensors of it are refused by name, before anything is touched."""

import copy
import dataclasses
import warnings

import pytest
import torch
from functionals import FUNCTIONALS, LAYER, SCALING, Functional, linear_arguments
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

import dorac
from dorac import functional
from dorac.dense import not_dense
from dorac.testing import linear_inputs


class Quantised(Tensor):
    """As torchao's weights: calls itself by the dtype that it was made of and holds int8."""

    @staticmethod
    def __new__(cls, values, scale, dtype):
        return Tensor._make_wrapper_subclass(cls, values.shape, dtype=dtype)

    def __init__(self, values, scale, dtype):
        self.values, self.scale = values, scale

    @classmethod
    def make(cls, tensor):
        scale = tensor.detach().abs().amax() / 127
        return cls((tensor.detach() / scale).round().to(torch.int8), scale, tensor.dtype)

    def __tensor_flatten__(self):
        return ["values", "scale"], self.dtype

    @classmethod
    def __tensor_unflatten__(cls, parts, dtype, size, stride):
        return cls(parts["values"], parts["scale"], dtype)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].values, args[0].scale, args[0].dtype)
        raise NotImplementedError(f"another library's error: {func}")


class Opaque(Quantised):
    """Says of itself nothing at all."""

    def __getattribute__(self, name):
        if name == "__tensor_flatten__":
            raise AttributeError(name)
        return super().__getattribute__(name)


class Packed(nn.Parameter):
    """As bitsandbytes' weights: packed values in any dtype."""

    quant_state = "4 bits"


class Renamed(nn.Parameter):
    """A subclass that is a dense tensor: it sees no operations."""


def quiet(function, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


def nested(t, **options):
    return quiet(torch.nested.nested_tensor, [t.detach(), t.detach()], **options)


KINDS = {
    "sparse": (lambda t: t.detach().to_sparse(), "has the layout torch.sparse_coo: make it dense with to_dense"),
    "csr": (lambda t: quiet(torch.zeros(2, 3).to_sparse_csr).to(t.dtype), "has the layout torch.sparse_csr"),
    "mkldnn": (lambda t: t.detach().float().to_mkldnn(), "has the layout torch._mkldnn: make it dense"),
    "nested": (nested, "is nested: pad it"),
    "jagged": (lambda t: nested(t, layout=torch.jagged), "is nested: pad it"),
    "quantised": (Quantised.make, r"is a Quantised, which holds something else than .*values: torch.int8.*dequantise"),
    "masked": (
        lambda t: quiet(torch.masked.masked_tensor, t.detach(), torch.ones_like(t).bool()),
        "is a MaskedTensor, which decides by itself",
    ),
    "packed": (lambda t: Packed(t.detach(), requires_grad=False), r"is quantised \(Packed\): dequantise it first"),
    "lazy": (
        lambda t: nn.UninitializedParameter(requires_grad=False, dtype=t.dtype),
        "is an UninitializedParameter, which has no values",
    ),
}


def over_arguments():
    x, weight, *adapter = linear_arguments()
    return x @ weight.T, x, *adapter


def over(base, *tensors):
    norm = torch.ones(5, dtype=torch.float64)
    return functional.dora_over(base, *tensors, weight_norm=norm, scaling=SCALING, base_has_bias=True)


# The table's rows of dora_over make its product themselves, and the arguments of blocks are projections.
_OTHERS = ("dora_over", "dora_linears", "dora_mlp")
FUNCTIONS = {name: row for name, row in FUNCTIONALS.items() if not name.startswith(_OTHERS)}
FUNCTIONS["dora_over"] = Functional(over, None, over_arguments, names=("base", "x", *LAYER[2:]))


BLOCKS = {
    r"projections\[0\]": lambda x, projection: functional.dora_linears(x, [projection]),
    "gate": lambda x, projection: functional.dora_mlp(x, projection, *_fitting(5)),
    "up": lambda x, projection: functional.dora_mlp(x, None, projection, _fitting(5)[1]),
    "down": lambda x, projection: functional.dora_mlp(
        x, None, functional.Projection(torch.ones(6, 6).double()), projection
    ),
}


def _fitting(features: int) -> tuple[functional.Projection, functional.Projection]:
    """Frozen layers from 6 features to these, and from these to one."""
    return tuple(functional.Projection(torch.ones(*size).double()) for size in ((features, 6), (1, features)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_name_the_argument(name, kind):
    row = FUNCTIONS[name]
    make, message = KINDS[kind]
    for i, argument in enumerate(row.names):
        arguments = list(row.arguments())
        if arguments[i] is None or (kind == "mkldnn" and not arguments[i].is_floating_point()):
            continue
        if kind == "jagged" and arguments[i].ndim == 0:
            continue
        arguments[i] = make(arguments[i])
        with pytest.raises(TypeError, match=f"^{argument} must be a dense tensor, but it {message}"):
            row.function(*arguments)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "call"), BLOCKS.items())
def test_blocks_name_the_projection_and_the_argument(name, call, kind):
    x, *tensors = linear_arguments()
    make, message = KINDS[kind]
    projection = functional.Projection(*tensors, weight_norm=torch.ones(5, dtype=torch.float64))
    with pytest.raises(TypeError, match=f"^x must be a dense tensor, but it {message}"):
        call(make(x), projection)
    for argument in functional.Projection._fields[:6]:
        changed = projection._replace(**{argument: make(getattr(projection, argument))})
        with pytest.raises(TypeError, match=rf"^{name}: {argument} must be a dense tensor, but it {message}"):
            call(x, changed)


@pytest.mark.parametrize("argument", ["adapter_index", "offsets", "scaling", "weight_norm", "weight_sq"])
def test_the_other_arguments(argument):
    name = {"adapter_index": "dora_linear_mixed", "offsets": "dora_linear_grouped"}.get(argument, "norm_factored")
    name = "dora_linear" if argument == "weight_norm" else name
    row = FUNCTIONALS[name]
    value = row.of_rows.get(argument, torch.ones(()) if argument == "scaling" else torch.ones(5).double())
    for kind in ("sparse", "quantised"):
        make, message = KINDS[kind]
        with pytest.raises(TypeError, match=f"^{argument} must be a dense tensor, but it {message}"):
            row.function(*row.arguments(), **{argument: make(value)})


@pytest.mark.parametrize(
    ("kind", "fullgraph"),
    # torch.compile takes no sparse tensor into a graph, and no MKL-DNN tensor at all.
    [("sparse", False), ("jagged", False), ("jagged", True), ("quantised", False), ("quantised", True)],
)
def test_compiled(kind, fullgraph):
    make, message = KINDS[kind]
    inputs = linear_inputs("odd", dtype=torch.float32)
    inputs = dataclasses.replace(inputs, weight=make(inputs.weight))
    function = torch.compile(functional.dora_linear, backend="aot_eager", fullgraph=fullgraph)
    error = torch._dynamo.exc.TorchDynamoException if fullgraph else TypeError
    with pytest.raises(error, match=f"weight must be a dense tensor, but it {message}"):
        function(*inputs.tensors(), scaling=0.7)


@pytest.mark.parametrize("compiled", [False, True])
def test_subclasses_of_their_own_dtype_are_taken(compiled):
    """Those that are dense themselves, and those that carry out aten operations on such parts."""
    inputs = linear_inputs("odd", dtype=torch.float32)
    function = torch.compile(functional.dora_linear, backend="eager", fullgraph=True) if compiled else None
    function = function or functional.dora_linear
    expected = functional.dora_linear(*inputs.tensors(), scaling=0.7)
    two = dataclasses.replace(inputs, weight=TwoTensor(inputs.weight.detach(), 2 * inputs.weight.detach()))
    y = function(*two.tensors(), scaling=0.7)
    torch.testing.assert_close(y.a, expected)
    assert not torch.allclose(y.b, expected)
    renamed = dataclasses.replace(inputs, weight=Renamed(inputs.weight.detach()))
    torch.testing.assert_close(function(*renamed.tensors(), scaling=0.7), expected)


def test_fakes_and_meta_tensors_are_dense():
    with torch._subclasses.FakeTensorMode():
        assert not_dense(torch.ones(3, 2)) is None
    assert not_dense(torch.ones(3, 2, device="meta")) is None
    assert not_dense(nn.Buffer(torch.ones(2))) is None


def base_layers():
    layers = [nn.Linear(4, 3), nn.Embedding(4, 3), nn.Conv1d(4, 3, 2), nn.Conv2d(4, 3, 2), nn.Conv3d(4, 3, 2)]
    return {type(layer).__name__: layer for layer in layers}


@pytest.mark.parametrize("kind", ["sparse", "nested", "jagged", "quantised", "masked", "packed"])
@pytest.mark.parametrize("name", base_layers())
def test_layers_are_refused_by_module_name(name, kind):
    make, message = KINDS[kind]
    model = nn.ModuleDict({"first": nn.Linear(4, 4), "layer": base_layers()[name]})
    weight = make(model.layer.weight)
    model.layer.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)
    before = copy.copy(vars(model.layer)), list(model.parameters()), [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=f"\\n  layer: the weight of {name} {message}"):
        dorac.apply_dora(model, ["first", "layer"], r=1)
    with pytest.raises(TypeError, match=f"cannot be wrapped: the weight of {name} {message}"):
        dorac.nn.layer_class(model.layer)(model.layer, r=1)
    assert (vars(model.layer), [p.requires_grad for p in model.parameters()]) == (before[0], before[2])
    assert all(p is q for p, q in zip(model.parameters(), before[1], strict=True))
    assert type(model.first) is nn.Linear


def test_biases_are_looked_at_too():
    layer = nn.Linear(4, 3)
    layer.bias = nn.Parameter(Quantised.make(layer.bias), requires_grad=False)
    with pytest.raises(TypeError, match="the bias of Linear is a Quantised"):
        dorac.nn.DoraLinear(layer, r=1)


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes(bits):
    """Functions take no packed parameter for a weight, but what ``dorac.packed.of`` makes of it."""
    bnb = pytest.importorskip("bitsandbytes")
    layer = {
        4: lambda: bnb.nn.Linear4bit(64, 64, quant_storage=torch.bfloat16),
        8: lambda: bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False),
    }[bits]().to("cpu")
    with pytest.raises(TypeError, match=r"weight must be .*[;:] dequantise"):
        functional.norm_factored(layer.weight, torch.ones(2, 64), torch.ones(64, 2), 1.0)
