"""The rows of the contract table in ``test_contract.py``: a new function or module is one entry in ``ROWS``."""

import contextlib
import dataclasses
import functools
import importlib
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn

import dorac
from dorac import functional
from dorac.testing import linear_inputs, quantised_layers

for _optional in ("peft", "transformers.models.mixtral.modeling_mixtral"):
    with contextlib.suppress(ImportError):  # now: imported after a seed is set, they would draw random numbers
        importlib.import_module(_optional)

IN, OUT = 24, 32
FROZEN = ("weight", "bias")


@dataclasses.dataclass(frozen=True)
class Row:
    """What is compiled.

    Args:
        build: makes a module from a scaling and a rank, with its adapter away from its start; float32.
        inputs: its arguments for a batch and a length. What is floating point gets a gradient.
        lacks: columns that have no meaning for this row, with the reason.
        drops: whether there is dropout on its input.
    """

    build: Callable[[float, int], nn.Module]
    inputs: Callable[[int, int], tuple[Tensor, ...]]
    lacks: Mapping[str, str] = dataclasses.field(default_factory=dict)
    drops: bool = False

    def make(self, device: str, *, scaling: float = 0.5, rank: int = 4, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return self.build(scaling, rank).to(device)

    def arguments(self, device: str, batch: int = 2, length: int = 8) -> tuple[Tensor, ...]:
        torch.manual_seed(100 * batch + length)
        return tuple(t.to(device) for t in self.inputs(batch, length))


class Call(nn.Module):
    """A function as a module: what it takes besides its activations are parameters, the base layer's frozen."""

    def __init__(self, function: Callable[..., Tensor], scaling: float, **tensors: Tensor) -> None:
        super().__init__()
        self.function, self.scaling = function, scaling
        for name, tensor in tensors.items():
            setattr(self, name, nn.Parameter(tensor, requires_grad=name not in FROZEN))

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs, **self._parameters, scaling=self.scaling)


def linear_tensors(rank: int, *names: str) -> dict[str, Tensor]:
    inputs = linear_inputs((1, OUT, IN, rank), dtype=torch.float32)
    return {name: getattr(inputs, name) for name in names}


def off_norm(model: nn.Module) -> nn.Module:
    """Moves every magnitude up to a tenth off its norm."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude_vector" in name:
                parameter.mul_(0.9 + 0.2 * torch.rand_like(parameter))
    return model


def dora_linear(scaling: float, rank: int) -> nn.Module:
    tensors = linear_tensors(rank, "weight", "lora_A", "lora_B", "magnitude", "bias")
    return Call(functional.dora_linear, scaling, **tensors)


def over(scaling: float, rank: int) -> nn.Module:
    """Over the frozen layer's own output, which has the bias in it."""

    def call(x: Tensor, weight: Tensor, bias: Tensor, scaling: float, **adapter: Tensor) -> Tensor:
        norm = functional.norm_factored(weight, adapter["lora_A"], adapter["lora_B"], scaling)
        base = nn.functional.linear(x, weight, bias)
        return functional.dora_over(
            base, x, bias=bias, weight_norm=norm, scaling=scaling, base_has_bias=True, **adapter
        )

    return Call(call, scaling, **linear_tensors(rank, "weight", "lora_A", "lora_B", "magnitude", "bias"))


def block(function: Callable[..., Tensor]) -> Callable[[float, int], nn.Module]:
    """A function of x, a layer with DoRA, one with plain LoRA, a frozen one, and one with LoRA that leads back."""

    def call(x: Tensor, weight: Tensor, bias: Tensor, scaling: float, **adapter: Tensor) -> Tensor:
        a, b = adapter["lora_A"], adapter["lora_B"]
        dora = functional.Projection(weight, bias=bias, scaling=scaling, **adapter)
        lora = functional.Projection(weight, a, b, scaling=2 * scaling)
        back = functional.Projection(weight.t(), b.t(), a.t(), scaling=scaling)
        return function(x, dora, lora, functional.Projection(weight, bias=bias), back)

    tensors = "weight", "lora_A", "lora_B", "magnitude", "bias"
    return lambda scaling, rank: Call(call, scaling, **linear_tensors(rank, *tensors))


def linears(x: Tensor, dora, lora, frozen, back) -> Tensor:
    return torch.cat(functional.dora_linears(x, (dora, lora, frozen)), -1)


def mlp(x: Tensor, dora, lora, frozen, back) -> Tensor:
    return functional.dora_mlp(x, dora, lora, back)


def norm_factored(scaling: float, rank: int) -> nn.Module:
    """The weight is the input, so that its rows are the length; with its gradient, so that there is a backward pass."""

    def norm(x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
        weight, b = x.flatten(0, 1), lora_B.expand(x.shape[0] * x.shape[1], -1)
        return functional.norm_factored(weight, lora_A, b, scaling, norm_grad=True)

    tensors = linear_tensors(rank, "lora_A", "lora_B")
    return Call(norm, scaling, lora_A=tensors["lora_A"], lora_B=tensors["lora_B"][:1])


def compose(scaling: float, rank: int) -> nn.Module:
    return Call(functional.compose, scaling, mag_scale=linear_tensors(rank, "magnitude")["magnitude"])


def merge_weight(scaling: float, rank: int) -> nn.Module:
    """The weight is the input here too."""

    def merge(x: Tensor, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor, scaling: float) -> Tensor:
        weight, rows = x.flatten(0, 1), x.shape[0] * x.shape[1]
        return functional.merge_weight(
            weight, lora_A, lora_B.expand(rows, -1), magnitude.expand(rows), scaling=scaling
        )[0]

    tensors = linear_tensors(rank, "lora_A", "lora_B", "magnitude")
    first = {"lora_B": tensors["lora_B"][:1], "magnitude": tensors["magnitude"][:1]}
    return Call(merge, scaling, lora_A=tensors["lora_A"], **first)


def linear_columns(scaling: float, rank: int) -> nn.Module:
    """One magnitude per input."""
    tensors = linear_tensors(rank, "weight", "lora_A", "lora_B", "bias")
    norm = functional.column_norm(tensors["weight"], tensors["lora_A"], tensors["lora_B"], scaling)
    return Call(functional.dora_linear_columns, scaling, magnitude=1.1 * norm, **tensors)


def linear(scaling: float, rank: int, **options) -> nn.Module:
    base = nn.Linear(IN, OUT)
    return off_norm(dorac.nn.DoraLinear(base, r=rank, lora_alpha=rank * scaling, init_lora_weights=False, **options))


def cached(scaling: float, rank: int) -> nn.Module:
    layer = linear(scaling, rank)
    dorac.cache_norms(layer)
    return layer


def quantised(scaling: float, rank: int, **options) -> nn.Module:
    """Over a stand-in for bitsandbytes' 4-bit layer."""
    base = quantised_layers.Linear4bit(IN, OUT).to("cpu")
    return off_norm(
        dorac.nn.DoraQuantLinear(base, r=rank, lora_alpha=rank * scaling, init_lora_weights=False, **options)
    )


def quantised_cached(scaling: float, rank: int) -> nn.Module:
    layer = quantised(scaling, rank)
    dorac.cache_norms(layer)
    return layer


VOCAB, CHANNELS = 40, 6


def embedding_function(scaling: float, rank: int) -> nn.Module:
    tensors = {"weight": torch.randn(VOCAB, OUT), "lora_A": torch.randn(rank, VOCAB), "lora_B": torch.randn(OUT, rank)}
    return Call(functional.dora_embedding, scaling, **tensors, magnitude=torch.rand(OUT) + 0.5)


def embedding_columns(scaling: float, rank: int) -> nn.Module:
    """One magnitude per token."""
    tensors = {"weight": torch.randn(VOCAB, OUT), "lora_A": torch.randn(rank, VOCAB), "lora_B": torch.randn(OUT, rank)}
    return Call(functional.dora_embedding_columns, scaling, **tensors, magnitude=torch.rand(VOCAB) + 0.5)


def embedding(scaling: float, rank: int) -> nn.Module:
    base = nn.Embedding(VOCAB, OUT)
    return off_norm(dorac.nn.DoraEmbedding(base, r=rank, lora_alpha=rank * scaling, init_lora_weights=False))


def conv_function(dimensions: int) -> Callable[[float, int], nn.Module]:
    def build(scaling: float, rank: int) -> nn.Module:
        function = getattr(functional, f"dora_conv{dimensions}d")
        kernel, ones = (3,) * dimensions, (1,) * dimensions
        return Call(
            function,
            scaling,
            weight=0.2 * torch.randn(OUT, CHANNELS, *kernel),
            lora_A=0.2 * torch.randn(rank, CHANNELS, *kernel),
            lora_B=0.2 * torch.randn(OUT, rank, *ones),
            magnitude=torch.rand(OUT) + 0.5,
            bias=torch.randn(OUT),
        )

    return build


def conv(dimensions: int) -> Callable[[float, int], nn.Module]:
    def build(scaling: float, rank: int) -> nn.Module:
        base = getattr(nn, f"Conv{dimensions}d")(CHANNELS, OUT, 3, padding=1)
        cls = getattr(dorac.nn, f"DoraConv{dimensions}d")
        return off_norm(cls(base, r=rank, lora_alpha=rank * scaling, init_lora_weights=False))

    return build


EXPERTS = 3


def stacked_tensors(rank: int) -> dict[str, Tensor]:
    """Those of ``dora_linear`` once for each expert or adapter."""
    names = ("weight", "lora_A", "lora_B", "magnitude", "bias")
    each = [linear_inputs((1, OUT, IN, rank), dtype=torch.float32, seed=seed) for seed in range(EXPERTS)]
    return {name: torch.stack([getattr(inputs, name) for inputs in each]) for name in names}


def linear_of_experts(scaling: float, rank: int) -> nn.Module:
    return Call(functional.dora_linear, scaling, **stacked_tensors(rank))


def grouped(scaling: float, rank: int) -> nn.Module:
    def call(x: Tensor, offsets: Tensor, **tensors) -> Tensor:
        return functional.dora_linear_grouped(x, offsets=offsets, **tensors)

    return Call(call, scaling, **stacked_tensors(rank))


def mixed(scaling: float, rank: int) -> nn.Module:
    def call(x: Tensor, adapter_index: Tensor, **tensors) -> Tensor:
        return functional.dora_linear_mixed(x, adapter_index=adapter_index, **tensors)

    tensors = stacked_tensors(rank)
    tensors |= {name: tensors[name][0] for name in FROZEN}
    return Call(call, scaling, **tensors)


def experts(scaling: float, rank: int) -> nn.Module:
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    sizes = {"hidden_size": IN, "intermediate_size": OUT, "num_local_experts": EXPERTS, "num_experts_per_tok": 2}
    base = mixtral.MixtralExperts(mixtral.MixtralConfig(**sizes))
    for parameter in base.parameters():
        nn.init.normal_(parameter, std=0.2)
    return off_norm(dorac.nn.DoraExperts(base, r=rank, lora_alpha=rank * scaling, init_lora_weights=False))


def peft_layer(
    base: Callable[[], nn.Module], dropout_on: str = "adapter", **options
) -> Callable[[float, int], nn.Module]:
    """A PEFT model of one layer on the drop-in."""

    def build(scaling: float, rank: int) -> nn.Module:
        peft = pytest.importorskip("peft")
        import dorac.peft

        config = peft.LoraConfig(
            use_dora=True,
            r=rank,
            lora_alpha=rank * scaling,
            target_modules=["0"],
            init_lora_weights=False,
            **options,
        )
        model = peft.get_peft_model(nn.Sequential(base()), config)
        dorac.peft.enable(model, dropout_on=dropout_on)
        return off_norm(model)

    return build


def gpt2_conv1d() -> nn.Module:
    return pytest.importorskip("transformers.pytorch_utils").Conv1D(OUT, IN)


def rows_of_experts(batch: int, length: int) -> tuple[Tensor]:
    return (torch.randn(EXPERTS, batch, length, IN),)


def sorted_rows(batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Rows and where each expert's end; the second expert has none."""
    rows = batch * length
    return torch.randn(rows, IN), torch.tensor([rows // 3, rows // 3, rows])


def indexed_rows(batch: int, length: int) -> tuple[Tensor, Tensor]:
    """The first without an adapter."""
    return torch.randn(batch, length, IN), torch.arange(batch) % EXPERTS - 1


def routed(batch: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    tokens = batch * length
    chosen = torch.stack([torch.randperm(EXPERTS)[:2] for _ in range(tokens)])
    return torch.randn(tokens, IN), chosen, torch.rand(tokens, 2)


def indices(batch: int, length: int) -> tuple[Tensor]:
    return (torch.randint(VOCAB, (batch, length)),)


def images(dimensions: int) -> Callable[[int, int], tuple[Tensor]]:
    """The first spatial dimension is the length, the others are of one size."""
    return lambda batch, length: (torch.randn(batch, CHANNELS, length, *(6,) * (dimensions - 1)),)


def features(batch: int, length: int) -> tuple[Tensor]:
    return (torch.randn(batch, length, IN),)


def outputs(batch: int, length: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, length, OUT), torch.randn(batch, length, OUT)


NOT_TRAINED = dict.fromkeys(("optimizer", "checkpoint", "selective"), "not differentiable")

ROWS = {
    "dora_linear": Row(dora_linear, features),
    "dora_over": Row(over, features),
    "dora_linears": Row(block(linears), features),
    "dora_mlp": Row(block(mlp), features),
    "norm_factored": Row(norm_factored, features),
    "compose": Row(compose, outputs, {"ranks": "knows no rank"}),
    "merge_weight": Row(merge_weight, features, NOT_TRAINED),
    "dora_embedding": Row(embedding_function, indices),
    "dora_linear_columns": Row(linear_columns, features),
    "dora_embedding_columns": Row(embedding_columns, indices),
    **{f"dora_conv{n}d": Row(conv_function(n), images(n)) for n in (1, 2, 3)},
    "dora_linear, experts": Row(linear_of_experts, rows_of_experts),
    "dora_linear_grouped": Row(grouped, sorted_rows),
    "dora_linear_mixed": Row(mixed, indexed_rows),
    "DoraLinear": Row(linear, features),
    "DoraLinear, dropout": Row(lambda s, r: linear(s, r, lora_dropout=0.3), features, drops=True),
    "DoraLinear, dropout on the low rank": Row(
        lambda s, r: linear(s, r, lora_dropout=0.3, dropout_on="low_rank"), features, drops=True
    ),
    "DoraLinear, norm cached": Row(cached, features),
    "DoraQuantLinear": Row(quantised, features),
    "DoraQuantLinear, dropout": Row(lambda s, r: quantised(s, r, lora_dropout=0.3), features, drops=True),
    "DoraQuantLinear, norm cached": Row(quantised_cached, features),
    "DoraEmbedding": Row(embedding, indices),
    "DoraExperts": Row(experts, routed),
    **{f"DoraConv{n}d": Row(conv(n), images(n)) for n in (1, 2, 3)},
    "PEFT Linear": Row(peft_layer(lambda: nn.Linear(IN, OUT)), features),
    "PEFT Linear, dropout": Row(peft_layer(lambda: nn.Linear(IN, OUT), lora_dropout=0.3), features, drops=True),
    "PEFT Linear, dropout on the low rank": Row(
        peft_layer(lambda: nn.Linear(IN, OUT), "low_rank", lora_dropout=0.3), features, drops=True
    ),
    "PEFT Conv1D": Row(peft_layer(gpt2_conv1d, fan_in_fan_out=True), features),
    "PEFT Embedding": Row(peft_layer(lambda: nn.Embedding(VOCAB, OUT)), indices),
    **{
        f"PEFT Conv{n}d": Row(peft_layer(functools.partial(getattr(nn, f"Conv{n}d"), CHANNELS, OUT, 3)), images(n))
        for n in (1, 2, 3)
    },
}
