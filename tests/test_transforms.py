"""The table of transforms: every functional under the transforms of torch.func, eager and compiled, against textbooks.

``pytest tests/test_transforms.py -s`` prints it (``-m 'full or not full'`` with the cells that CI leaves out). The rows
are :data:`functionals.FUNCTIONALS`, with and without the norm's gradient.
"""

import collections

import pytest
import torch
from functionals import FUNCTIONALS
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

from dorac import functional, reference

ROWS = [(name, flag) for name, row in FUNCTIONALS.items() for flag in ((False, True) if row.norm_grad else (None,))]


def direction(t: torch.Tensor) -> torch.Tensor:
    """A fixed tangent or cotangent without a zero."""
    return torch.arange(1, t.numel() + 1, dtype=t.dtype, device=t.device).sin().view(t.shape)


def loss_of(function):
    return lambda *args: function(*args).sin().sum()


def at(function, positions, args):
    """``function`` of its arguments at ``positions`` alone, and those arguments."""

    def of_chosen(*chosen):
        changed = dict(zip(positions, chosen, strict=True))
        return function(*(changed.get(i, t) for i, t in enumerate(args)))

    return of_chosen, tuple(args[i] for i in positions)


def mapped(function, positions, stack):
    """vmap over ``positions``, whose arguments ``stack`` turns into a batch of two or three."""

    def run(*args):
        batch = [stack(t) if i in positions else t for i, t in enumerate(args)]
        return vmap(function, tuple(0 if i in positions else None for i in range(len(args))))(*batch)

    return run


def samples(t):
    return torch.stack([t, t.flip(0)])


def ensemble(t):
    return torch.stack([t, 0.5 * t + 0.3, 2 * t])


def run_vjp(function, row):
    positions = row.differentiable

    def run(*args):
        of_chosen, chosen = at(function, positions, args)
        y, pull_back = vjp(of_chosen, *chosen)
        return y, pull_back(direction(y))

    return run


def run_jvp(function, row):
    positions = row.differentiable

    def run(*args):
        of_chosen, chosen = at(function, positions, args)
        return jvp(of_chosen, chosen, tuple(map(direction, chosen)))

    return run


def run_jacfwd(function, row):
    """One argument each: torch 2.11 cannot compile the basis that jacfwd builds for two, whatever the function."""
    return lambda *args: tuple(jacfwd(function, argnums=i)(*args) for i in row.adapters)


def run_hessian(function, row):
    """Of all adapter tensors together, in one vector for the same reason."""

    def run(*args):
        of_chosen, chosen = at(loss_of(function), row.adapters, args)
        sizes = [t.numel() for t in chosen]

        def of_vector(vector):
            pieces = vector.split(sizes)
            return of_chosen(*(piece.view(t.shape) for piece, t in zip(pieces, chosen, strict=True)))

        return hessian(of_vector)(torch.cat([t.flatten() for t in chosen]))

    return run


COLUMNS = {
    "grad": lambda f, row: grad(loss_of(f), argnums=row.differentiable),
    "vjp": run_vjp,
    "jvp": run_jvp,
    "jacrev": lambda f, row: jacrev(f, argnums=row.adapters),
    "jacfwd": run_jacfwd,
    "hessian": run_hessian,
    "vmap(x)": lambda f, row: mapped(f, row.data, samples),
    "vmap(grad)": lambda f, row: mapped(grad(loss_of(f), argnums=row.adapters), row.data, samples),
    "vmap(jvp)": lambda f, row: mapped(run_jvp(f, row), row.data, samples),
    "ensemble": lambda f, row: mapped(f, row.adapters, ensemble),
    "ensemble(grad)": lambda f, row: mapped(grad(loss_of(f), argnums=row.adapters), row.adapters, ensemble),
    "vmap(vmap)": lambda f, row: mapped(mapped(f, row.data, samples), row.adapters, ensemble),
}
MODULES = "modules"
# CI compiles the first row, of the other steps of a linear layer the columns in which the other ways to register an op
# are silently wrong, and of the layers made of these steps a cell here and there.
CORE = ("dora_linear", "dora_linear, norm given", "norm_factored", "magnitude_scale", "compose", "compose, delta")
COMPILED_IN_CI = ("jvp", "vmap(grad)", "ensemble(grad)")
SAMPLE = (
    ("dora_over", True, "vmap(grad)"),
    ("dora_over, bias in base", False, "ensemble(grad)"),
    ("dora_linears", None, "ensemble(grad)"),
    ("dora_mlp", None, "vmap(grad)"),
    ("dora_linear, experts", True, "jvp"),
    ("dora_linear, experts", False, "vmap(grad)"),
    ("dora_linear_grouped", True, "ensemble(grad)"),
    ("dora_linear_grouped", False, "jvp"),
    ("dora_linear_mixed", True, "vmap(grad)"),
    ("dora_linear_mixed", False, "jvp"),
    ("dora_embedding", True, "jvp"),
    ("dora_embedding, sparse", False, "vmap(grad)"),
    ("norm_factored_conv", False, "jvp"),
    ("dora_conv2d, PEFT's groups", True, "ensemble(grad)"),
    ("dora_conv2d, groups, same", False, "vmap(grad)"),
    ("dora_conv3d, reflect", False, "jvp"),
)

passed: dict[tuple, list[str]] = collections.defaultdict(list)


def row_label(name: str, norm_grad: bool | None) -> str:
    return f"{name}, norm_grad" if norm_grad else name


@pytest.fixture(scope="module", autouse=True)
def _table():
    yield
    columns = [*COLUMNS, MODULES]
    print("\n" + " " * 38 + " ".join(f"{c:>14}" for c in columns) + "    (backends that equal the textbook)")
    for row in ROWS:
        cells = ("+".join(passed.get((*row, c), ())) or "-" for c in columns)
        print(f"{row_label(*row):>37} " + " ".join(f"{cell:>14}" for cell in cells))


def compiled(function, backend):
    return torch.compile(function, fullgraph=True, backend=backend) if backend else function


def record(name, norm_grad, column, backend):
    passed[name, norm_grad, column].append({None: "eager", "aot_eager": "aot", "inductor": "ind"}[backend])


def cells():
    for name, norm_grad in ROWS:
        for column in COLUMNS:
            for backend in (None, "aot_eager", "inductor"):
                sample = (name == "dora_linear" and not norm_grad) or (name in CORE and column in COMPILED_IN_CI)
                ci = backend is None or (backend == "aot_eager" and (sample or (name, norm_grad, column) in SAMPLE))
                label = f"{row_label(name, norm_grad)}-{column}-{backend or 'eager'}"
                yield pytest.param(name, norm_grad, column, backend, id=label, marks=[] if ci else [pytest.mark.full])


@pytest.mark.parametrize(("name", "norm_grad", "column", "backend"), list(cells()))
def test_cell(name, norm_grad, column, backend):
    row = FUNCTIONALS[name]
    ours, textbook = row.bind(norm_grad)
    args = row.arguments()
    result = compiled(COLUMNS[column](ours, row), backend)(*args)
    torch.testing.assert_close(result, COLUMNS[column](textbook, row)(*args))
    record(name, norm_grad, column, backend)


def module_cells():
    for name in [name for name, row in FUNCTIONALS.items() if row.module]:
        for norm_grad in (False, True):
            for backend in (None, "aot_eager", "inductor"):
                sample = name in ("dora_linear", "dora_conv2d, PEFT's groups") and norm_grad
                ci = backend is None or (backend == "aot_eager" and sample)
                label = f"{row_label(name, norm_grad)}-{backend or 'eager'}"
                yield pytest.param(name, norm_grad, backend, id=label, marks=[] if ci else [pytest.mark.full])


@pytest.mark.parametrize(("name", "norm_grad", "backend"), list(module_cells()))
def test_functional_call_over_stacked_modules(name, norm_grad, backend):
    """Three modules over one skeleton without memory: values, and gradients of each module's own adapter."""
    row = FUNCTIONALS[name]
    _, textbook = row.bind(norm_grad)
    layers = [row.module(seed, norm_grad) for seed in range(3)]
    params, buffers = stack_module_state(layers)
    skeleton = row.module(0, norm_grad).to("meta")
    x = row.arguments()[0]

    def loss(p, b):
        return functional_call(skeleton, (p, b), (x,)).sin().sum()

    run = compiled(vmap(torch.func.grad_and_value(loss)), backend)
    gradients, values = run({k: v.detach() for k, v in params.items()}, buffers)
    for i, layer in enumerate(layers):
        state = {k: v.detach().clone().requires_grad_() for k, v in layer.state_dict().items()}
        expected = textbook(x, *row.module_arguments(state)).sin().sum()
        torch.testing.assert_close(values[i], expected.detach())
        for key, leaf in state.items():
            torch.testing.assert_close(
                gradients[key][i], torch.autograd.grad(expected, leaf, retain_graph=True)[0], msg=key
            )
    record(name, norm_grad, MODULES, backend)


def tangents():
    for name, norm_grad in ROWS:
        for position, argument in enumerate(FUNCTIONALS[name].names):
            if position in FUNCTIONALS[name].differentiable:
                yield pytest.param(name, norm_grad, position, id=f"{row_label(name, norm_grad)}-{argument}")


@pytest.mark.parametrize(("name", "norm_grad", "position"), list(tangents()))
def test_no_tangent_is_silently_zero(name, norm_grad, position):
    """Along each argument alone: the tangent against the textbook's, against differences where no norm is detached."""
    row = FUNCTIONALS[name]
    ours, textbook = row.bind(norm_grad)
    along = [at(f, (position,), row.arguments()) for f in (ours, textbook)]
    (f, (argument,)), (g, _) = along
    tangent = direction(argument)
    value, ours = jvp(f, (argument,), (tangent,))
    torch.testing.assert_close(ours, jvp(g, (argument,), (tangent,))[1])
    _, pull_back = vjp(f, argument)
    torch.testing.assert_close((pull_back(direction(value))[0] * tangent).sum(), (direction(value) * ours).sum())
    if name.startswith(("norm_factored", "column_norm")) and not norm_grad:
        assert (ours == 0).all()
        return
    assert ours.abs().max() > 1e-3
    if norm_grad or not row.norm_grad:
        h = 1e-5  # the difference is off by h^2 and by the value's rounding over h
        differences = (f(argument + h * tangent) - f(argument - h * tangent)) / (2 * h)
        torch.testing.assert_close(ours, differences, rtol=1e-7, atol=1e-8 * value.abs().max().item())


def test_a_merged_weight_is_a_constant_that_maps():
    """Merging is documented as not differentiable, in reverse as in forward mode; over stacked adapters it is right."""
    _, weight, *adapter, _ = FUNCTIONALS["dora_linear"].arguments()

    def merge(*adapter):
        return functional.merge_weight(weight, *adapter, scaling=0.7)

    def restore(*adapter):
        norm = functional.norm_factored(weight, *adapter[:2], 0.7, norm_grad=True)
        return functional.unmerge_weight(weight, *adapter, scaling=0.7, weight_norm=norm)

    for function in (merge, restore):
        _, tangents = jvp(function, tuple(adapter), tuple(map(direction, adapter)))
        tangents = tangents if isinstance(tangents, tuple) else (tangents,)
        assert all((t == 0).all() for t in tangents)
    stacked = [ensemble(t) for t in adapter]
    merged, norms = vmap(merge)(*stacked)
    for k, single in enumerate(zip(*stacked, strict=True)):
        norm = reference.row_norm(weight, *single[:2], 0.7)
        torch.testing.assert_close(norms[k], norm)
        torch.testing.assert_close(merged[k], reference.merge_weight(weight, *single, scaling=0.7, weight_norm=norm))


@pytest.mark.parametrize("norm_grad", [False, True])
def test_grad_of_compiled_equals_backward(norm_grad):
    """A plain backward and torch.func.grad inside the compiled function agree."""
    row = FUNCTIONALS["dora_linear"]
    loss = loss_of(row.bind(norm_grad)[0])
    leaves = [t.clone().requires_grad_() for t in row.arguments()]
    loss(*leaves).backward()
    run = compiled(grad(loss, argnums=row.differentiable), "aot_eager")
    torch.testing.assert_close(run(*row.arguments()), tuple(t.grad for t in leaves))


def test_more_adapters_are_no_new_graph():
    """The compiled ensemble's gradient is, after a second number of adapters, one graph for any."""
    row = FUNCTIONALS["dora_linear"]
    f, args = row.bind(True)[0], row.arguments()

    def run(*adapters):
        of_chosen, _ = at(loss_of(f), row.adapters, args)
        return vmap(grad(of_chosen, argnums=(0, 1, 2)))(*adapters)

    def stacked(k):
        return [torch.stack([(1 + i / 10) * args[p] for i in range(k)]) for p in row.adapters]

    fast = compiled(run, "aot_eager")
    for k in (3, 4):
        fast(*stacked(k))
    with torch.compiler.set_stance("fail_on_recompile"):
        for k in (2, 5, 9):
            torch.testing.assert_close(fast(*stacked(k)), run(*stacked(k)))
