"""torch.func over the functionals that take one of several layers per row, against a dense layer for every row."""

import pytest
import torch
from row_layers import LAYERS, SCALING
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

ALL = tuple(range(6))
ADAPTERS = (2, 3, 4)


def loss_of(function):
    return lambda *tensors: function(*tensors, scaling=SCALING).sin().sum()


def mapped(function, positions, scales):
    """vmap over the tensors at ``positions``, of each of which there is a multiple for every scale."""

    def run(*tensors):
        batch = [torch.stack([s * t for s in scales]) if i in positions else t for i, t in enumerate(tensors)]
        return vmap(function, tuple(0 if i in positions else None for i in ALL))(*batch)

    return run


def tangents(tensors):
    return tuple(torch.arange(1, t.numel() + 1, dtype=t.dtype).sin().view(t.shape) for t in tensors)


TRANSFORMS = {
    "grad": lambda f: grad(loss_of(f), argnums=ALL),
    "vjp": lambda f: lambda *ts: vjp(loss_of(f), *ts)[1](torch.ones((), dtype=torch.float64)),
    "jvp": lambda f: lambda *ts: jvp(loss_of(f), ts, tangents(ts)),
    "jacrev": lambda f: jacrev(loss_of(f), argnums=ADAPTERS),
    # One argument: torch 2.11 cannot compile the basis that jacfwd builds for two, whatever the function.
    "jacfwd": lambda f: jacfwd(loss_of(f), argnums=3),
    "hessian": lambda f: hessian(loss_of(f), argnums=2),
    "vmap": lambda f: mapped(loss_of(f), (0,), (1.0, 0.5)),
    "per_sample": lambda f: mapped(grad(loss_of(f), argnums=ADAPTERS), (0,), (1.0, 0.5)),
    "ensemble": lambda f: mapped(loss_of(f), ADAPTERS, (1.0, 0.5, 2.0)),
    "ensemble_grad": lambda f: mapped(grad(loss_of(f), argnums=(0, *ADAPTERS)), ADAPTERS, (1.0, 0.5, 2.0)),
    "vmap_vmap": lambda f: mapped(mapped(loss_of(f), (0,), (1.0, 0.5)), ADAPTERS, (1.0, 2.0)),
}
COMPILED_IN_CI = ("jvp", "per_sample", "ensemble_grad")


def cells():
    for name in LAYERS:
        for transform in TRANSFORMS:
            for backend in (None, "aot_eager", "inductor"):
                ci = backend is None or (backend == "aot_eager" and transform in COMPILED_IN_CI)
                yield pytest.param(name, transform, backend, marks=[] if ci else [pytest.mark.full])


@pytest.mark.parametrize(("name", "transform", "backend"), list(cells()))
def test_equals_the_textbook(name, transform, backend):
    layer = LAYERS[name]
    tensors = layer.inputs(3, 4, 2).tensors()
    ours = TRANSFORMS[transform](layer.function)
    if backend:
        ours = torch.compile(ours, fullgraph=True, backend=backend)
    torch.testing.assert_close(ours(*tensors), TRANSFORMS[transform](layer.textbook)(*tensors))
