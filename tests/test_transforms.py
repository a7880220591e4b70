"""torch.func over dora_linear, eager and compiled, against the textbook with its norm detached."""

import pytest
import torch
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

import dorac
from dorac import functional, reference
from dorac.testing import linear_inputs

INPUTS = linear_inputs((4, 5, 6, 3))
ARGS = INPUTS.tensors()
TANGENTS = tuple(torch.randn(t.shape, dtype=t.dtype, generator=torch.Generator().manual_seed(1)) for t in ARGS)
STACKED = tuple(torch.stack([t, 2 * t, t - 0.1]) for t in (INPUTS.lora_A, INPUTS.lora_B, INPUTS.magnitude))


def loss_of(layer):
    return lambda *args: layer(*args, scaling=0.7).square().sum()


def per_sample(loss):
    return vmap(grad(loss, argnums=(1, 2, 3, 4, 5)), in_dims=(0, None, None, None, None, None))


def ensemble(loss):
    run = vmap(loss, in_dims=(None, None, 0, 0, 0, None))
    return lambda x, weight, lora_A, lora_B, magnitude, bias: run(x, weight, *STACKED, bias)


TRANSFORMS = {
    "grad": lambda loss: grad(loss, argnums=(0, 1, 2, 3, 4, 5)),
    "vjp": lambda loss: lambda *args: vjp(loss, *args)[1](torch.ones((), dtype=torch.float64)),
    "jvp": lambda loss: lambda *args: jvp(loss, args, TANGENTS),
    "jacrev": lambda loss: jacrev(loss, argnums=(2, 4)),
    # One argument each: torch 2.11 cannot compile the basis that jacfwd builds for two, whatever the function.
    "jacfwd": lambda loss: jacfwd(loss, argnums=3),
    "jacfwd_magnitude": lambda loss: jacfwd(loss, argnums=4),
    "hessian": lambda loss: hessian(loss, argnums=3),
    "per_sample": per_sample,
    "ensemble": ensemble,
    "ensemble_grad": lambda loss: ensemble(grad(loss, argnums=(0, 2, 3, 4))),
    "vmap_vmap": lambda loss: (
        lambda *args: vmap(vmap(loss, (0, *[None] * 5)), (None, None, 0, 0, 0, None))(
            args[0], args[1], *STACKED, args[5]
        )
    ),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("backend", [None, "aot_eager", pytest.param("inductor", marks=pytest.mark.full)])
def test_equals_the_textbook(name, backend):
    transform = TRANSFORMS[name]
    ours = transform(loss_of(functional.dora_linear))
    if backend:
        ours = torch.compile(ours, fullgraph=True, backend=backend)
    torch.testing.assert_close(ours(*ARGS), transform(loss_of(reference.dora_linear))(*ARGS))


def test_forward_mode_through_the_norm_is_zero():
    """jvp along the factors alone changes the norm, but the norm is a constant."""
    norm = lambda lora_B: functional.norm_factored(INPUTS.weight, INPUTS.lora_A, lora_B, 0.7)  # noqa: E731
    value, tangent = jvp(norm, (INPUTS.lora_B,), (torch.ones_like(INPUTS.lora_B),))
    assert (tangent == 0).all()
    torch.testing.assert_close(value, reference.row_norm(INPUTS.weight, INPUTS.lora_A, INPUTS.lora_B, 0.7))


def test_delta_form_transforms():
    base, lora, g = INPUTS.x @ INPUTS.weight.T, INPUTS.x @ INPUTS.lora_A.T @ INPUTS.lora_B.T, INPUTS.magnitude

    def ours(*args):
        return functional.compose(*args, 0.7, delta=True).square().sum()

    def textbook(*args):
        return reference.compose_delta(*args, 0.7).square().sum()

    for transform in (lambda f: hessian(f, argnums=(0, 2)), lambda f: vmap(grad(f, argnums=(0, 1)), (0, 0, None))):
        torch.testing.assert_close(transform(ours)(base, lora, g), transform(textbook)(base, lora, g))


def test_functional_call_over_stacked_modules():
    layers = []
    for seed in range(3):
        torch.manual_seed(seed)
        base = torch.nn.Linear(6, 5, dtype=torch.float64)
        base.load_state_dict({"weight": INPUTS.weight, "bias": INPUTS.bias})
        layer = dorac.nn.DoraLinear(base, r=2, init_lora_weights=False)
        torch.nn.init.uniform_(layer.lora_magnitude_vector, 0.5, 1.5)
        layers.append(layer)
    params, buffers = stack_module_state(layers)
    skeleton = layers[0].to("meta")
    run = vmap(lambda p, b, x: functional_call(skeleton, (p, b), (x,)), (0, 0, None))
    expected = torch.stack(
        [
            reference.dora_linear(
                INPUTS.x,
                *(params[k][i] for k in ("base_layer.weight", "lora_A", "lora_B", "lora_magnitude_vector")),
                params["base_layer.bias"][i],
                scaling=layers[0].scaling,
            )
            for i in range(3)
        ]
    )
    torch.testing.assert_close(run(params, buffers, INPUTS.x), expected)
    torch.testing.assert_close(
        torch.compile(run, fullgraph=True, backend="aot_eager")(params, buffers, INPUTS.x), expected
    )


def test_grad_of_compiled_equals_backward():
    """A plain backward and torch.func.grad inside the compiled function agree."""
    leaves = INPUTS.leaves()
    functional.dora_linear(*leaves.tensors(), scaling=0.7).square().sum().backward()
    compiled = torch.compile(TRANSFORMS["grad"](loss_of(functional.dora_linear)), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*ARGS), tuple(t.grad for t in leaves.tensors()))
