"""The functionals that the tables of transforms, dtypes and random cases run over: a new one is an entry here.

Legend: a layer's tensors come in the order ``data, weight, lora_A, lora_B, magnitude, bias``.
"""

import dataclasses
from collections.abc import Callable, Sequence

import row_layers
import torch
from torch import Tensor

import dorac
from dorac import functional, reference
from dorac.testing import Budget, Convolution, Sums, conv_inputs, embedding_inputs, layer_budgets, linear_inputs

SCALING = 0.7
LAYER = ("x", "weight", "lora_A", "lora_B", "magnitude", "bias")


@dataclasses.dataclass(frozen=True)
class Functional:
    """One row.

    Args:
        function, reference: what is tested and the textbook of it, ``(*tensors, **options) -> tensor``.
        arguments: makes the float64 tensors that both are called with.
        names: of the tensors.
        data: positions of what a sample is; mapped by vmap over inputs. adapters: of what is stacked for an ensemble.
        norm_grad: whether both take the keyword ``norm_grad``.
        norm: the textbook's norm of ``weight, lora_A, lora_B, scaling``, given by the rows that are whole layers with
            the arguments ``(data, weight, lora_A, lora_B, magnitude[, bias], *, scaling, weight_norm, norm_grad)``.
        out_dim: the weight's dimension of the outputs. sums: of a layer's first three tensors.
        of_rows: the function's argument that says which layer each row takes, where it has one.
        module: makes a module that runs the function, from a seed and ``norm_grad``. module_arguments: picks the
            reference's tensors after the data from the module's state.
    """

    function: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    arguments: Callable[[], tuple[Tensor, ...]]
    names: tuple[str, ...] = LAYER
    data: tuple[int, ...] = (0,)
    adapters: tuple[int, ...] = (2, 3, 4)
    norm_grad: bool = True
    norm: Callable[..., Tensor] | None = None
    out_dim: int = 0
    sums: Callable[..., Sums] = Sums.of_linear
    of_rows: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    module: Callable[[int, bool], torch.nn.Module] | None = None
    module_arguments: Callable[[dict[str, Tensor]], tuple[Tensor, ...]] | None = None

    @property
    def differentiable(self) -> tuple[int, ...]:
        """Positions of the float tensors."""
        return tuple(i for i, t in enumerate(self.arguments()) if t.is_floating_point())

    def bind(self, norm_grad: bool) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
        """Function and reference of the tensors alone."""
        if not self.norm_grad:
            return self.function, self.reference
        return (
            lambda *tensors: self.function(*tensors, norm_grad=norm_grad),
            lambda *tensors: self.reference(*tensors, norm_grad=norm_grad),
        )


def scaled(function: Callable[..., Tensor], **fixed) -> Callable[..., Tensor]:
    """``function`` with its scaling given."""
    return lambda *tensors, **options: function(*tensors, **{"scaling": SCALING, **fixed, **options})


def linear_arguments() -> tuple[Tensor, ...]:
    return linear_inputs((4, 5, 6, 3)).tensors()


def module_of(
    cls: type, base: Callable[[], torch.nn.Module], r: int, **layout
) -> Callable[[int, bool], torch.nn.Module]:
    """Makes an adapter of rank r around a new base layer, its magnitude off the norm."""

    def make(seed: int, norm_grad: bool) -> torch.nn.Module:
        torch.manual_seed(seed)
        layer = cls(base(), r, r * SCALING, init_lora_weights=False, norm_grad=norm_grad, **layout)
        torch.nn.init.uniform_(layer.lora_magnitude_vector, 0.5, 1.5)
        return layer

    return make


def layer_state(state: dict[str, Tensor]) -> tuple[Tensor, ...]:
    names = ("base_layer.weight", "lora_A", "lora_B", "lora_magnitude_vector", "base_layer.bias")
    return tuple(state[name].flatten() if "magnitude" in name else state[name] for name in names)


def embedding_state(state: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return tuple(
        state[name] for name in ("base_layer.weight", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
    )


def embedding_arguments() -> tuple[Tensor, ...]:
    return embedding_inputs((5, 6, 4, 3))


def sparse_embedding(layer: Callable[..., Tensor], **fixed) -> Callable[..., Tensor]:
    """The layer with its table given, as a function of the rest."""
    weight = embedding_arguments()[1]
    return lambda x, *adapter, **options: layer(x, weight, *adapter, scaling=SCALING, **fixed, **options)


def row_layer(layer: row_layers.RowLayer, out_dim: int = 1) -> Functional:
    """The row of a functional that takes one of several layers per row."""
    return Functional(
        scaled(layer.functional, **layer.of_rows),
        scaled(layer.textbook),
        lambda: layer.inputs(3, 4, 2).tensors(),
        norm=row_layers.row_norm,
        out_dim=out_dim,
        of_rows=layer.of_rows,
    )


def gated_row(gate: functional.Gate) -> Functional:
    """Rows by expert with a gate behind them."""
    layer = row_layers.LAYERS["grouped"]

    def textbook(*tensors, **options) -> Tensor:
        return reference.gated(layer.textbook(*tensors, **options), **dataclasses.asdict(gate))

    return Functional(
        scaled(layer.functional, gate=gate, **layer.of_rows),
        scaled(textbook),
        lambda: layer.inputs(6, 4, 2).tensors(),
    )


def conv_row(convolution: Convolution, channels_last: bool = False) -> Functional:
    """The row of one convolution."""
    dimensions, groups = convolution.dimensions, convolution.groups

    def base() -> torch.nn.Module:
        cls = getattr(torch.nn, f"Conv{dimensions}d")
        filters = (convolution.x[1], convolution.out, convolution.kernel)
        layer = cls(*filters, **convolution.geometry, dtype=torch.float64)
        return layer.to(memory_format=torch.channels_last) if channels_last else layer

    return Functional(
        scaled(getattr(functional, f"dora_conv{dimensions}d"), **convolution.geometry),
        scaled(reference.dora_conv, **convolution.geometry),
        lambda: conv_inputs(convolution, channels_last=channels_last).tensors(),
        norm=lambda *tensors: reference.filter_norm(*tensors, groups=groups),
        sums=lambda *tensors: convolution.sums(),
        module=module_of(
            getattr(dorac.nn, f"DoraConv{dimensions}d"),
            base,
            convolution.rank,
            grouped_lora_A=convolution.grouped_lora_A,
        ),
        module_arguments=layer_state,
    )


# One of each dimension and of each layout of lora_A, and each way that padding takes.
STRIDED = Convolution((3, 2, 5), 4, (2,), 2, geometry={"stride": 2, "padding": 1})
GROUPED_PEFT = Convolution((2, 4, 3, 3), 4, (2, 1), 2, grouped_lora_A=False, geometry={"groups": 2, "padding": (1, 0)})
GROUPED_SAME = Convolution((2, 4, 3, 4), 2, (2, 2), 2, geometry={"groups": 2, "dilation": (1, 2), "padding": "same"})
REFLECT = Convolution((2, 2, 3, 2, 3), 3, (2, 1, 2), 2, geometry={"padding": (1, 0, 1), "padding_mode": "reflect"})


def given_norm(layer: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The layer as a function of its norm, too."""
    return lambda *tensors: layer(*tensors[:-1], scaling=SCALING, weight_norm=tensors[-1])


def over(has_bias: bool = True) -> Callable[..., Tensor]:
    """The layer through ``dora_over`` on the frozen layer's own output, which has the bias in it or not."""

    def layer(x, weight, lora_A, lora_B, magnitude, bias=None, *, scaling, weight_norm=None, norm_grad=False):
        if weight_norm is None:
            weight_norm = functional.norm_factored(weight, lora_A, lora_B, scaling, norm_grad=norm_grad)
        base = torch.nn.functional.linear(x, weight, bias if has_bias else None)
        adapter = lora_A, lora_B, magnitude, bias
        return functional.dora_over(base, x, *adapter, weight_norm=weight_norm, scaling=scaling, base_has_bias=has_bias)

    return layer


def with_norm() -> tuple[Tensor, ...]:
    tensors = linear_arguments()
    return *tensors, 1.1 * reference.row_norm(*tensors[1:4], SCALING)


def of_block(projection: Callable[..., object]) -> Callable[..., tuple]:
    """Of a layer's tensors and its norm: the layer, plain LoRA, the frozen layer, and LoRA that leads back."""

    def layers(weight, lora_A, lora_B, magnitude, bias, weight_norm) -> tuple:
        return (
            projection(weight, lora_A, lora_B, magnitude, bias, weight_norm=weight_norm, scaling=SCALING),
            projection(weight, lora_A, lora_B, scaling=-1.5),
            projection(weight, None, None, None, bias),
            projection(weight.mT, lora_B.mT, lora_A.mT, scaling=SCALING),
        )

    return layers


def textbook_projection(*tensors, **options) -> tuple:
    return tensors, options


def block_row(function: Callable[..., Tensor], textbook: Callable[..., Tensor]) -> Functional:
    ours, theirs = of_block(functional.Projection), of_block(textbook_projection)
    return Functional(
        lambda x, *tensors: function(x, *ours(*tensors)),
        lambda x, *tensors: textbook(x, *theirs(*tensors)),
        with_norm,
        names=(*LAYER, "weight_norm"),
        norm_grad=False,
    )


def detachable(norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The textbook's norm, a constant unless asked."""
    return lambda *tensors, norm_grad: norm(*tensors) if norm_grad else norm(*tensors).detach()


def parts() -> tuple[Tensor, ...]:
    """What compose takes: base, lora, g."""
    x, weight, lora_A, lora_B, magnitude, _ = linear_arguments()
    return x @ weight.T, x @ lora_A.T @ lora_B.T, magnitude


def column_arguments() -> tuple[Tensor, ...]:
    """A linear layer's, with a magnitude per input."""
    x, weight, lora_A, lora_B, _, bias = linear_arguments()
    return x, weight, lora_A, lora_B, 1.2 * reference.column_norm(weight, lora_A, lora_B, SCALING), bias


def token_arguments() -> tuple[Tensor, ...]:
    """An embedding's, with a magnitude per token."""
    x, weight, lora_A, lora_B, _ = embedding_arguments()
    return x, weight, lora_A, lora_B, 0.8 * reference.column_norm(weight.T, lora_A, lora_B, SCALING)


FUNCTIONALS = {
    "dora_linear": Functional(
        scaled(functional.dora_linear),
        scaled(reference.dora_linear),
        linear_arguments,
        norm=reference.row_norm,
        module=module_of(dorac.nn.DoraLinear, lambda: torch.nn.Linear(6, 5, dtype=torch.float64), 3),
        module_arguments=layer_state,
    ),
    "dora_linear, norm given": Functional(
        given_norm(functional.dora_linear),
        given_norm(reference.dora_linear),
        with_norm,
        names=(*LAYER, "weight_norm"),
        norm_grad=False,
    ),
    "dora_linears": block_row(
        lambda x, *layers: torch.cat(functional.dora_linears(x, layers[:3]), -1),
        lambda x, *layers: torch.cat(reference.dora_linears(x, layers[:3]), -1),
    ),
    "dora_mlp": block_row(
        lambda x, dora, lora, _, back: functional.dora_mlp(x, dora, lora, back),
        lambda x, dora, lora, _, back: reference.dora_mlp(x, dora, lora, back, "silu"),
    ),
    # Their roundings are counted in test_over.py: one more of base, which is one of b, too, where that is in it.
    "dora_over": Functional(scaled(over(has_bias=False)), scaled(reference.dora_linear), linear_arguments),
    "dora_over, bias in base": Functional(scaled(over()), scaled(reference.dora_linear), linear_arguments),
    "norm_factored": Functional(
        scaled(functional.norm_factored),
        detachable(scaled(reference.row_norm)),
        lambda: linear_arguments()[1:4],
        names=LAYER[1:4],
        adapters=(1, 2),
    ),
    "magnitude_scale": Functional(
        functional.magnitude_scale,
        reference.magnitude_scale,
        lambda: (linear_arguments()[4], with_norm()[-1]),
        names=("magnitude", "weight_norm"),
        data=(1,),
        adapters=(0,),
        norm_grad=False,
    ),
    "compose": Functional(
        lambda base, lora, g, bias: functional.compose(base, lora, g, SCALING, bias=bias),
        lambda base, lora, g, bias: reference.compose(base, lora, g, SCALING, bias),
        lambda: (*parts(), linear_arguments()[5]),
        names=("base", "lora", "mag_scale", "bias"),
        data=(0, 1),
        adapters=(2,),
        norm_grad=False,
    ),
    "compose, delta": Functional(
        lambda *tensors: functional.compose(*tensors, SCALING, delta=True),
        lambda *tensors: reference.compose_delta(*tensors, SCALING),
        parts,
        names=("base", "lora", "mag_scale"),
        data=(0, 1),
        adapters=(2,),
        norm_grad=False,
    ),
    "dora_linear, experts": row_layer(row_layers.LAYERS["experts"]),
    "dora_linear_grouped": row_layer(row_layers.LAYERS["grouped"]),
    "dora_linear_grouped, gate": gated_row(functional.Gate("silu", True, 1.5, 1.702, 1.0)),
    "dora_linear_mixed": row_layer(row_layers.LAYERS["mixed"], out_dim=0),
    "dora_embedding": Functional(
        scaled(functional.dora_embedding),
        scaled(reference.dora_embedding),
        embedding_arguments,
        names=LAYER[:5],
        norm=lambda weight, *factors: reference.row_norm(weight.T, *factors),
        out_dim=1,
        sums=Sums.of_embedding,
        module=module_of(dorac.nn.DoraEmbedding, lambda: torch.nn.Embedding(6, 4, dtype=torch.float64), 3),
        module_arguments=embedding_state,
    ),
    "dora_linear_columns": Functional(
        scaled(functional.dora_linear_columns), scaled(reference.dora_linear_columns), column_arguments
    ),
    "dora_embedding_columns": Functional(
        scaled(functional.dora_embedding_columns),
        scaled(reference.dora_embedding_columns),
        token_arguments,
        names=LAYER[:5],
    ),
    "column_norm": Functional(
        scaled(functional.column_norm),
        detachable(scaled(reference.column_norm)),
        lambda: column_arguments()[1:4],
        names=LAYER[1:4],
        adapters=(1, 2),
    ),
    "dora_embedding, sparse": Functional(
        sparse_embedding(functional.dora_embedding, sparse=True),
        sparse_embedding(reference.dora_embedding),
        lambda: (embedding_arguments()[0], *embedding_arguments()[2:]),
        names=("x", *LAYER[2:5]),
        adapters=(1, 2, 3),
    ),
    "norm_factored_conv": Functional(
        scaled(functional.norm_factored_conv, groups=2),
        detachable(scaled(reference.filter_norm, groups=2)),
        lambda: conv_inputs(GROUPED_PEFT).tensors()[1:4],
        names=LAYER[1:4],
        adapters=(1, 2),
    ),
    "dora_conv1d, strided": conv_row(STRIDED),
    "dora_conv2d, PEFT's groups": conv_row(GROUPED_PEFT, channels_last=True),
    "dora_conv2d, groups, same": conv_row(GROUPED_SAME),
    "dora_conv3d, reflect": conv_row(REFLECT),
}

LAYERS = {name: row for name, row in FUNCTIONALS.items() if row.norm}


def cast(tensors, dtype, factor_dtype=None, magnitude_dtype=None) -> tuple[Tensor | None, ...]:
    """A layer's tensors in the dtypes of a mix; the factors default to ``dtype``, the magnitude to float32 or wider."""
    factor_dtype = factor_dtype or dtype
    magnitude_dtype = magnitude_dtype or torch.promote_types(dtype, torch.float32)
    dtypes = (dtype, dtype, factor_dtype, factor_dtype, magnitude_dtype, dtype)[: len(tensors)]
    return tuple(
        t.to(d) if t is not None and t.is_floating_point() else t for t, d in zip(tensors, dtypes, strict=True)
    )


def leaves_of(tensors, dtype=None) -> list[Tensor | None]:
    """Copies in the same layout that require a gradient, if they can."""
    copies = [t if t is None else t.detach().clone(memory_format=torch.preserve_format) for t in tensors]
    copies = [t.to(dtype) if dtype and t is not None and t.is_floating_point() else t for t in copies]
    return [t.requires_grad_() if t is not None and t.is_floating_point() else t for t in copies]


def run_backward(function, tensors, dy=None, dtype=None) -> tuple[Tensor, list[Tensor | None]]:
    """y and the gradients of ``<dy, y>``; dy is drawn from seed 1 in y's dtype if it is None."""
    leaves = leaves_of(tensors, dtype)
    y = function(*leaves)
    if dy is None:
        dy = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y.backward(dy.to(y))
    return y.detach(), [None if t is None else t.grad for t in leaves]


def budgets(row: Functional, tensors: Sequence[Tensor | None], **options) -> dict[str, Budget]:
    """As :func:`layer_budgets`, of a row that is a whole layer."""
    options = {"scaling": SCALING, **options}
    return layer_budgets(row.reference, row.norm, tensors, row.sums(*tensors[:3]), **options)
