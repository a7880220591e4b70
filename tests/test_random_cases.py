"""Random layers and random nonsense: every result within its budget of the textbook's, every refusal by name.

A new layer joins with an entry in :data:`functionals.LAYERS` and one in :data:`SHAPES`.
"""

import dataclasses
import math

import pytest
import row_layers
import torch
from functionals import LAYERS, Functional, budgets, cast, conv_row, row_layer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dorac import functional
from dorac.testing import Convolution, conv_inputs, embedding_inputs, linear_inputs

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
INDEX_DTYPES = [torch.int64, torch.int32]
LEADING = st.lists(st.integers(0, 4), max_size=3)
LINEAR = st.tuples(st.integers(0, 24), st.integers(1, 24), st.integers(1, 10))  # out, in, rank
SEEDS = st.integers(0, 2**16)


@st.composite
def numbers(draw, least: int, most: int, number: st.SearchStrategy[int]) -> Tensor:
    """A vector of an index dtype; each length as likely as another, where lists are short for the most part."""
    length = draw(st.integers(least, most))
    return torch.tensor([draw(number) for _ in range(length)], dtype=draw(st.sampled_from(INDEX_DTYPES)))


@st.composite
def linear_layers(draw) -> tuple[Functional, list[Tensor]]:
    leading, layer = draw(LEADING), draw(LINEAR)
    x, *rest = linear_inputs((math.prod(leading), *layer), seed=draw(SEEDS)).tensors()
    return LAYERS["dora_linear"], [x.reshape(*leading, x.shape[-1]), *rest]


@st.composite
def expert_layers(draw) -> tuple[Functional, list[Tensor]]:
    experts, leading = draw(st.integers(0, 4)), draw(LEADING)
    layer = row_layers.experts(experts, math.prod(leading))
    x, *rest = layer.inputs(*draw(LINEAR), seed=draw(SEEDS)).tensors()
    return row_layer(layer), [x.reshape(experts, *leading, x.shape[-1]), *rest]


@st.composite
def grouped_layers(draw) -> tuple[Functional, list[Tensor]]:
    """Experts with rows, without rows and none at all, and rows that no expert takes."""
    rows = draw(numbers(0, 5, st.integers(0, 3)))
    layer = row_layers.grouped(rows.cumsum(0, dtype=rows.dtype), draw(st.integers(0, 2)) if len(rows) else 0)
    return row_layer(layer), [*layer.inputs(*draw(LINEAR), seed=draw(SEEDS)).tensors()]


@st.composite
def mixed_layers(draw) -> tuple[Functional, list[Tensor]]:
    """Adapters of several ranks in one stack, some of them unused, and rows without one."""
    adapters, leading, (*layer, rank) = draw(st.integers(1, 4)), draw(LEADING), draw(LINEAR)
    index = draw(numbers(0, 6, st.integers(-1, adapters - 1)))
    mixed = row_layers.mixed(index, adapters, math.prod(leading))
    x, weight, lora_A, lora_B, magnitude, bias = mixed.inputs(*layer, rank, seed=draw(SEEDS)).tensors()
    ranks = [draw(st.integers(1, rank)) for _ in range(adapters)]
    stack = functional.stack_adapters(
        [
            functional.Adapter(a[:r], b[:, :r], m, 1.0)
            for a, b, m, r in zip(lora_A, lora_B, magnitude, ranks, strict=True)
        ]
    )
    return row_layer(mixed, out_dim=0), [x.reshape(len(index), *leading, x.shape[-1]), weight, *stack[:3], bias]


@st.composite
def embeddings(draw) -> tuple[Functional, list[Tensor]]:
    leading = draw(LEADING)
    vocab, dim, rank = draw(st.integers(1, 24)), draw(st.integers(1, 24)), draw(st.integers(1, 10))
    x, *tables = embedding_inputs((math.prod(leading), vocab, dim, rank), seed=draw(SEEDS))
    x = x.reshape(leading).to(draw(st.sampled_from(INDEX_DTYPES)))
    return LAYERS["dora_embedding"], [x, *tables]


@st.composite
def convolutions(draw, dimensions: int) -> tuple[Functional, list[Tensor]]:
    """Any geometry that torch takes, groups and their layouts, ranks, a kernel that fits."""
    groups, same = draw(st.integers(1, 3)), draw(st.booleans())
    per_dimension = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(dimensions))  # noqa: E731
    # On the CPU torch's own dilated convolutions in half precision read uninitialised memory if the output is 1 wide.
    extent = (*per_dimension(5, 7)[1:], draw(st.integers(7, 9)))
    convolution = Convolution(
        (draw(st.integers(0, 3)), groups * draw(st.integers(1, 3)), *extent),
        groups * draw(st.integers(1, 3)),
        per_dimension(1, 3),
        groups * draw(st.integers(1, 4)),
        draw(st.booleans()),
        {
            "stride": 1 if same else draw(st.sampled_from([1, 2, per_dimension(1, 2)])),
            "padding": "same" if same else draw(st.sampled_from([0, 2, "valid", per_dimension(0, 2)])),
            "dilation": draw(st.sampled_from([1, per_dimension(1, 2)])),
            "groups": groups,
            "padding_mode": draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
        },
    )
    channels_last = draw(st.booleans())
    x, *rest = conv_inputs(convolution, channels_last=channels_last, seed=draw(SEEDS)).tensors()
    # torch's own grouped float64 convolution of a channels-last x without a batch has a wrong gradient on the CPU.
    unbatched = len(x) and not (channels_last and groups > 1) and draw(st.booleans())
    return conv_row(convolution), [x[0] if unbatched else x, *rest]


# How to draw a row and the float64 tensors of each layer.
SHAPES: dict[str, st.SearchStrategy] = {
    "dora_linear": linear_layers(),
    "dora_linear, experts": expert_layers(),
    "dora_linear_grouped": grouped_layers(),
    "dora_linear_mixed": mixed_layers(),
    "dora_embedding": embeddings(),
    "dora_conv1d": convolutions(1),
    "dora_conv2d": convolutions(2),
    "dora_conv3d": convolutions(3),
}


@dataclasses.dataclass
class Case:
    """A layer's tensors with their dtypes, layouts and needs of a gradient, and how its function is called."""

    layer: str
    row: Functional
    tensors: list[Tensor | None]
    options: dict

    @property
    def scaling(self) -> float | Tensor:
        """As the textbook takes it."""
        scaling = self.options["scaling"]
        return scaling.double() if isinstance(scaling, Tensor) and scaling.ndim else float(scaling)

    def run(self) -> Tensor:
        return self.row.function(*self.tensors, **self.options)


def in_layout(tensor: Tensor, layout: str) -> Tensor:
    """The same values at other strides."""
    if layout == "transposed":
        return tensor.mT.contiguous().mT if tensor.ndim > 1 else tensor
    if layout == "strided":
        return torch.stack([tensor, torch.zeros_like(tensor)], -1)[..., 0]
    return tensor


SCALINGS = st.floats(-4, 4).map(lambda s: round(s, 3))


@st.composite
def cases(draw, layer: str) -> Case:
    row, tensors = draw(SHAPES[layer])
    dtype, magnitude_dtype = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(DTYPES))
    factor_dtype = draw(st.sampled_from([dtype, *DTYPES]))
    scaling = draw(SCALINGS)
    if draw(st.booleans()):
        if layer == "dora_linear_mixed" and draw(st.booleans()):
            scaling = [draw(SCALINGS) for _ in tensors[2]]
        scaling = torch.tensor(scaling, dtype=draw(st.sampled_from(DTYPES)))
    if tensors[4].shape[-1] and draw(st.booleans()):  # a zero row
        tensors[1].select(row.out_dim, 0).zero_()
        tensors[3].select(tensors[4].ndim - 1, 0).zero_()
    tensors = list(cast(tensors, dtype, factor_dtype, magnitude_dtype))
    if draw(st.booleans()):
        tensors[5:] = [None for _ in tensors[5:]]
    for i, t in enumerate(tensors):
        if t is not None:
            t = in_layout(t, draw(st.sampled_from(["contiguous", "contiguous", "transposed", "strided"])))
            tensors[i] = t.detach().requires_grad_(draw(st.booleans())) if t.is_floating_point() else t
    options = {"scaling": scaling, "budget": draw(st.sampled_from([1, 1000, 2**28]))}
    options["norm_grad"] = draw(st.booleans())
    case = Case(layer, row, tensors, options)
    if draw(st.integers(0, 3)) == 0:
        norm = row.norm(*(t.detach().double() for t in tensors[1:4]), case.scaling)
        options |= {"norm_grad": False, "weight_norm": norm.to(torch.promote_types(dtype, torch.float32))}
    return case


def check(case: Case) -> None:
    y = case.run()
    dy = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    results, needed = {"y": y}, [t is not None and t.requires_grad for t in case.tensors]
    assert y.dtype == case.tensors[1].dtype
    assert y.requires_grad == any(needed)
    if any(needed):
        y.backward(dy)
    for name, tensor, needs in zip(case.row.names, case.tensors, needed, strict=True):
        assert (tensor is not None and tensor.grad is not None) == needs, name
        if needs:
            assert tensor.grad.dtype == tensor.dtype
            results[name] = tensor.grad
    options = {name: case.options[name] for name in ("norm_grad", "weight_norm") if name in case.options}
    errors = budgets(case.row, case.tensors, dy=dy, scaling=case.scaling, **options)
    for name, result in results.items():
        errors[name].check(result, name)


SAMPLE = 60  # of each layer in CI: hypothesis varies most examples from the one before, so that few would be one shape
COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}


@pytest.mark.parametrize("layer", SHAPES)
@settings(max_examples=SAMPLE, derandomize=True, database=None, **COMMON)
@given(data=st.data())
def test_equals_the_textbook(layer, data):
    check(data.draw(cases(layer)))


@pytest.mark.full
@pytest.mark.parametrize("layer", SHAPES)
@settings(max_examples=2000, **COMMON)
@given(data=st.data())
def test_two_thousand_cases(layer, data):
    check(data.draw(cases(layer)))


NOT_TENSORS = [None, 1.0, [[1.0]], "weight", (1, 2)]
NOT_FLOATS = [torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn]
BAD_OPTIONS = {
    "scaling": [float("nan"), float("inf"), float("-inf"), "2", None, [1.0], 1j, torch.ones(9), torch.tensor(1)],
    "budget": [0, -1, 1.5, "1", None, float("nan")],
    "dropout_p": [1.0, -0.1, 2, float("nan"), "0.5", None],
    "dropout_on": ["", "LOW_RANK", None, True, 0, ["adapter"]],
    "norm_grad": [1, "yes", None],
    "weight_norm": [1.0, torch.ones(99), torch.ones(()), torch.ones(3, dtype=torch.int64), "norm"],
}
NO_DROPOUT = ("dora_embedding", "dora_linear_mixed")


@st.composite
def bad_indices(draw, name: str, index: Tensor, rows: int) -> object:
    """Nothing that says which layer each row takes; offsets that decrease or run over the rows."""
    if name == "offsets" and len(index) and draw(st.booleans()):
        ends, expert = index.clone(), draw(st.integers(0, len(index) - 1))
        # A last one that falls short leaves rows to no expert.
        below = expert < len(index) - 1 and draw(st.booleans())
        ends[expert] = -draw(st.integers(1, 3)) if below else rows + draw(st.integers(1, 3))
        return ends
    kind = draw(st.sampled_from(["not a tensor", "dtype", "device", "size"]))
    if kind == "not a tensor":
        return draw(st.sampled_from([*NOT_TENSORS, 0, index.tolist()]))
    if kind == "dtype":
        return index.to(draw(st.sampled_from([*NOT_FLOATS[1:], torch.int16, torch.float32])))
    if kind == "device":
        return index.to("meta")
    return draw(st.sampled_from([index[None], index.sum(), torch.cat([index, index.new_zeros(2)])]))


@st.composite
def broken_cases(draw, layer: str) -> tuple[Case, set[str]]:
    """A case that cannot work, and the arguments of which the refusal may name one."""
    case = draw(cases(layer))
    case.options.pop("weight_norm", None)
    names, of_rows = case.row.names, case.row.of_rows
    if of_rows and draw(st.booleans()):
        ((option, index),) = of_rows.items()
        case.options[option] = draw(bad_indices(option, index, case.tensors[0].shape[0]))
        return case, {option}
    if draw(st.booleans()):
        option = draw(st.sampled_from([o for o in BAD_OPTIONS if "dropout" not in o or layer not in NO_DROPOUT]))
        if option == "weight_norm":
            case.options["norm_grad"] = False
        case.options[option] = draw(st.sampled_from(BAD_OPTIONS[option]))
        return case, {option}
    position = draw(st.sampled_from([i for i, t in enumerate(case.tensors) if t is not None]))
    tensor = case.tensors[position].detach()
    kind = draw(st.sampled_from(["not a tensor", "dtype", "device", "dimensions", "size", "mixed dtypes"]))
    blamed = {names[position]}
    if kind == "not a tensor":
        nonsense = [*NOT_TENSORS[1:], [*tensor]] if tensor.ndim else NOT_TENSORS[1:]
        tensor = draw(st.sampled_from(nonsense if names[position] == "bias" else [*nonsense, None]))
    elif kind == "dtype" and tensor.is_floating_point():
        tensor = torch.ones(tensor.shape).to(draw(st.sampled_from(NOT_FLOATS)))
    elif kind == "device":
        tensor = tensor.to("meta")
        blamed = set(names)  # the other tensors are not where the weight is
    elif kind == "dimensions" and position:
        tensor = tensor[None, None]
        blamed = set(names) if position == 1 else blamed
    elif kind == "size" and tensor.is_floating_point():
        conv = layer.startswith("dora_conv")
        dimension = draw(st.integers(0, tensor.ndim - 1))
        if not position and not (layer == "dora_linear, experts" and dimension == 0):
            dimension = 1 - case.tensors[1].ndim if conv else -1  # the features of x
        shape = list(tensor.shape)
        # By more channels than a layout of lora_A has.
        shape[dimension] += (10 if conv and position in (1, 2) else 0) + draw(st.integers(1, 3))
        tensor = torch.ones(shape, dtype=tensor.dtype)
        blamed = {"weight": {*names, "groups"}, "lora_A": {"lora_A", "lora_B"}}.get(names[position], blamed)
    else:
        position, blamed = 2, {"lora_A", "lora_B"}
        tensor = case.tensors[2].detach()
        tensor = tensor.to(torch.float16 if tensor.dtype is torch.float32 else torch.float32)
    case.tensors[position] = tensor
    return case, blamed


def check_refused(broken: tuple[Case, set[str]]) -> None:
    case, blamed = broken
    with pytest.raises((TypeError, ValueError)) as refusal:
        case.run()
    message = str(refusal.value)
    assert any(message.startswith(name) or f" {name} " in message for name in blamed), message
    assert "must" in message, message


@st.composite
def unassigned(draw) -> Case:
    """A row whose adapter there is not."""
    # torch looks at no index where the result has no element.
    case = draw(cases("dora_linear_mixed").filter(lambda case: len(case.tensors[0]) and case.tensors[4].numel()))
    rows, past = case.tensors[0].shape[0], draw(st.integers(1, 3))
    index = case.row.of_rows["adapter_index"].clone()
    index[draw(st.integers(0, rows - 1))] = draw(st.sampled_from([-1 - past, len(case.tensors[2]) - 1 + past]))
    case.options["adapter_index"] = index
    return case


def check_unassigned(case: Case) -> None:
    """As torch refuses an index: where torch looks it up, the message knows no argument."""
    with pytest.raises(IndexError, match="out of bounds"):
        case.run()


@pytest.mark.parametrize("layer", SHAPES)
@settings(max_examples=SAMPLE, derandomize=True, database=None, **COMMON)
@given(data=st.data())
def test_refuses_by_name(layer, data):
    check_refused(data.draw(broken_cases(layer)))


@pytest.mark.full
@pytest.mark.parametrize("layer", SHAPES)
@settings(max_examples=2000, **COMMON)
@given(data=st.data())
def test_two_thousand_refusals(layer, data):
    check_refused(data.draw(broken_cases(layer)))


@settings(max_examples=30, derandomize=True, database=None, **COMMON)
@given(case=unassigned())
def test_unassigned_rows_raise_as_torch_does(case):
    check_unassigned(case)


@pytest.mark.full
@settings(max_examples=500, **COMMON)
@given(case=unassigned())
def test_five_hundred_unassigned_rows(case):
    check_unassigned(case)


def test_every_layer_is_drawn():
    """The geometries of a convolution are all drawn under its name."""
    assert set(SHAPES) == {name.partition(",")[0] if "conv" in name else name for name in LAYERS}
