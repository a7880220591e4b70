"""torch.func over the convolutions, eager and compiled, against the textbook with its norm detached."""

import dataclasses

import pytest
import torch
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

from dorac import functional, nn, reference
from dorac.testing import Convolution, conv_inputs

# One of each dimension and of each layout of lora_A, a padding of either kind.
CASES = {
    "conv1d": Convolution((3, 2, 5), 4, (2,), 2, geometry={"stride": 2, "padding": 1}),
    "conv2d": Convolution((3, 4, 4, 3), 2, (2, 3), 2, grouped_lora_A=False, geometry={"groups": 2, "padding": "same"}),
    "conv2d_grouped": Convolution((3, 4, 4, 3), 4, (2, 2), 2, geometry={"groups": 2, "dilation": 2}),
    "conv3d": Convolution((2, 2, 3, 2, 3), 3, (2, 2, 2), 2, geometry={"padding": 1, "padding_mode": "reflect"}),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """A functional with its textbook and its arguments, as losses; adapters are stacked for the ensembles."""

    ours: object
    textbook: object
    args: tuple
    tangents: tuple
    stacked: tuple


def row_of(case: str) -> Row:
    convolution = CASES[case]
    inputs = conv_inputs(convolution)
    function = getattr(functional, f"dora_conv{convolution.dimensions}d")
    generator = torch.Generator().manual_seed(1)
    return Row(
        lambda *args: function(*args, scaling=0.7, **convolution.geometry).square().sum(),
        lambda *args: reference.dora_conv(*args, scaling=0.7, **convolution.geometry).square().sum(),
        inputs.tensors(),
        tuple(torch.randn(t.shape, dtype=t.dtype, generator=generator) for t in inputs.tensors()),
        tuple(torch.stack([t, 2 * t, t - 0.1]) for t in (inputs.lora_A, inputs.lora_B, inputs.magnitude)),
    )


def ensemble(loss, row):
    run = vmap(loss, in_dims=(None, None, 0, 0, 0, None))
    return lambda x, weight, lora_A, lora_B, magnitude, bias: run(x, weight, *row.stacked, bias)


def ensemble_of_samples(loss, row):
    run = vmap(vmap(loss, (0, *[None] * 5)), (None, None, 0, 0, 0, None))
    return lambda x, weight, lora_A, lora_B, magnitude, bias: run(x, weight, *row.stacked, bias)


TRANSFORMS = {
    "grad": lambda loss, row: grad(loss, argnums=(0, 1, 2, 3, 4, 5)),
    "vjp": lambda loss, row: lambda *args: vjp(loss, *args)[1](torch.ones((), dtype=torch.float64)),
    "jvp": lambda loss, row: lambda *args: jvp(loss, args, row.tangents),
    "jacrev": lambda loss, row: jacrev(loss, argnums=(2, 4)),
    # One argument each: torch 2.11 cannot compile the basis that jacfwd builds for two, whatever the function.
    "jacfwd": lambda loss, row: jacfwd(loss, argnums=3),
    "jacfwd_magnitude": lambda loss, row: jacfwd(loss, argnums=4),
    "hessian": lambda loss, row: hessian(loss, argnums=3),
    "hessian_lora_A": lambda loss, row: hessian(loss, argnums=2),
    "per_sample": lambda loss, row: vmap(grad(loss, argnums=(1, 2, 3, 4, 5)), in_dims=(0, *[None] * 5)),
    "ensemble": ensemble,
    "ensemble_grad": lambda loss, row: ensemble(grad(loss, argnums=(0, 2, 3, 4)), row),
    "vmap_vmap": ensemble_of_samples,
}


def cells():
    """Every case eager and compiled; in CI one case is compiled, of the layout that the others do not have."""
    for case in CASES:
        compiled = [] if case == "conv2d" else [pytest.mark.full]
        yield pytest.param(case, None, id=case)
        yield pytest.param(case, "aot_eager", id=f"{case}-aot_eager", marks=compiled)
        yield pytest.param(case, "inductor", id=f"{case}-inductor", marks=pytest.mark.full)


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize(("case", "backend"), cells())
def test_equals_the_textbook(name, case, backend):
    row, transform = row_of(case), TRANSFORMS[name]
    ours = transform(row.ours, row)
    if backend:
        ours = torch.compile(ours, fullgraph=True, backend=backend)
    torch.testing.assert_close(ours(*row.args), transform(row.textbook, row)(*row.args))


@pytest.mark.parametrize("case", CASES)
def test_forward_mode_through_the_norm_is_zero(case):
    """jvp along the factors changes the norm, but the norm is a constant; also its part outside of the groups."""
    inputs, groups = conv_inputs(CASES[case]), CASES[case].groups

    def norm(*factors):
        return functional.norm_factored_conv(inputs.weight, *factors, 0.7, groups=groups)

    factors = (inputs.lora_A, inputs.lora_B)
    value, tangent = jvp(norm, factors, tuple(torch.ones_like(t) for t in factors))
    assert (tangent == 0).all()
    torch.testing.assert_close(value, reference.filter_norm(inputs.weight, *factors, 0.7, groups))


@pytest.mark.parametrize("channels_last", [False, True])
def test_functional_call_over_stacked_modules(channels_last):
    convolution = CASES["conv2d"]
    layers = []
    for seed in range(3):
        torch.manual_seed(seed)
        base = torch.nn.Conv2d(4, 2, (2, 3), **convolution.geometry, dtype=torch.float64)
        layer = nn.DoraConv2d(base, r=2, init_lora_weights=False)
        torch.nn.init.uniform_(layer.lora_magnitude_vector, 0.5, 1.5)
        layers.append(layer.to(memory_format=torch.channels_last) if channels_last else layer)
    params, buffers = stack_module_state(layers)
    skeleton, x = layers[0].to("meta"), conv_inputs(convolution).x
    run = vmap(lambda p, b, x: functional_call(skeleton, (p, b), (x,)), (0, 0, None))
    names = ("base_layer.weight", "lora_A", "lora_B", "lora_magnitude_vector", "base_layer.bias")
    expected = []
    for i in range(3):
        weight, lora_A, lora_B, magnitude, bias = (params[name][i] for name in names)
        args = (x, weight, lora_A, lora_B, magnitude.flatten(), bias)
        expected.append(reference.dora_conv(*args, scaling=layers[0].scaling, **convolution.geometry))
    torch.testing.assert_close(run(params, buffers, x), torch.stack(expected))
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(params, buffers, x), torch.stack(expected))
