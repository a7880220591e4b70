"""FLOPs as ``FlopCounterMode`` counts them: of every leaf op what the same work takes in plain aten."""

import subprocess
import sys

import pytest
import torch
from torch._functorch import config as functorch_config
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import dorac
from dorac import functional
from dorac.ops import flops, linear, linear_leaves, norm
from dorac.testing import conv_inputs, embedding_inputs, expert_inputs, linear_inputs

S = torch.tensor(0.7, dtype=torch.float64)
LAYERS = (None, 3)  # of experts


def count(function, *args) -> int:
    with FlopCounterMode(display=False) as counter:
        function(*args)
    return counter.get_total_flops()


def leaf_counts(function, *args) -> dict[str, int]:
    """Of dorac's ops by themselves."""
    with FlopCounterMode(display=False) as counter:
        function(*args)
    counts = counter.get_flop_counts()["Global"].items()
    return {str(op).partition(".")[2]: n for op, n in counts if str(op).startswith("dorac")}


def train(function, *tensors):
    """Forward and backward, with respect to every float tensor."""
    leaves = [t if t is None or not t.is_floating_point() else t.detach().requires_grad_() for t in tensors]
    function(*leaves).sum().backward()


def inputs_of(experts, regime=(6, 20, 30, 4), **options):
    return linear_inputs(regime, **options) if experts is None else expert_inputs(experts, regime, **options)


def test_every_leaf_has_a_formula():
    leaves = {
        name.removeprefix("dorac::").partition(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("dorac::")
        and not torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd")
    }
    assert leaves == flops.FORMULAS.keys()
    assert all(getattr(torch.ops.dorac, name) in flop_registry for name in leaves)


@pytest.mark.parametrize("experts", LAYERS)
@pytest.mark.parametrize("budget", [1, 2**28])
@pytest.mark.parametrize("known_square", [False, True])
def test_norm(experts, budget, known_square):
    inputs = inputs_of(experts)
    square = inputs.weight.square().sum(-1) if known_square else None
    arguments = (inputs.weight, inputs.lora_A, inputs.lora_B, S, square, budget)
    counted = leaf_counts(torch.ops.dorac.norm_factored, *arguments)
    assert counted == {"row_norm": count(norm.row_norm_aten, *arguments)}
    products = 2 * 20 * 30 * 4 * (experts or 1)
    assert counted["row_norm"] > products if known_square else counted["row_norm"] == products


@pytest.mark.parametrize("experts", LAYERS)
def test_gradient_of_the_norm(experts):
    inputs = inputs_of(experts)
    arguments = (inputs.magnitude, inputs.weight, inputs.lora_A, inputs.lora_B, S, 2**28)
    expected = count(norm.row_norm_backward_aten, *arguments)
    assert leaf_counts(torch.ops.dorac.row_norm_backward, *arguments) == {"row_norm_backward": expected}
    assert expected > 0

    def backward(*tensors):
        train(lambda *t: torch.ops.dorac.norm_factored(*t, S, None, 2**28, True), *tensors)

    assert leaf_counts(backward, *arguments[1:4])["row_norm_backward"] == expected


def leaf_arguments():
    """What the layer's leaves take, by name, and the aten that computes the same."""
    inputs = linear_inputs((6, 20, 30, 4))
    x, weight, lora_A, lora_B, m, bias = inputs.tensors()
    base, h, dy, n = x @ weight.t(), x @ lora_A.t(), torch.randn(6, 20, dtype=x.dtype), m.clone()
    return {
        "low_rank_linear": (x, weight, h, lora_B),
        "scale": (base, m, n, bias),
        "scale_backward": (dy, base, m, n),
        "lora_b_backward": (dy, base, m, n, h, S, False, False),
        "delta_linear": (x, x, weight, h, lora_B, m, n, S, bias),
        "up_compose": (base, h, lora_B, m, n, S, bias, False),
        "up_compose_forward": (base, h, lora_B, m, n, S, bias, False),
    }


@pytest.mark.parametrize("leaf", leaf_arguments())
def test_leaves_of_the_layer(leaf):
    arguments = leaf_arguments()[leaf]
    if leaf == "low_rank_linear":  # torch has no formula for addmm_
        x, weight, h, lora_B = arguments
        expected = count(lambda: (x @ weight.t(), h @ lora_B.t()))
    else:
        in_aten = {"scale": linear_leaves.scale_aten, "scale_backward": linear_leaves.scale_backward_aten}
        expected = count(in_aten.get(leaf) or getattr(linear_leaves, f"_{leaf}"), *arguments)
    assert leaf_counts(getattr(torch.ops.dorac, leaf), *arguments) == {leaf: expected}
    assert (expected > 0) == ("scale" not in leaf)


def plain_layer(x, weight, lora_A, lora_B, magnitude, bias):
    """The layer in aten alone, its norm a constant."""
    scaling = S.to(x.dtype)
    n = norm.row_norm_aten(weight.detach(), lora_A.detach(), lora_B.detach(), scaling, None, 2**28)
    plain = linear.linear_aten if weight.ndim == 2 else linear.experts_aten
    return plain(x, weight, lora_A, lora_B, magnitude, n, scaling, bias)


@pytest.mark.parametrize("path", ["separate", "accumulate", "fused"])
@pytest.mark.parametrize("rank", [4, 24])  # with both products along in backward, and with one
@pytest.mark.parametrize("backward", [False, True])
def test_linear(path, rank, backward, monkeypatch):
    monkeypatch.setattr(linear, "route", lambda *args, **kwargs: path)
    tensors = linear_inputs((64, 32, 48, rank), dtype=torch.bfloat16).tensors()

    def run(*tensors):
        return functional.dora_linear(*tensors, scaling=0.7)

    def both(function):
        return count(lambda: train(function, *tensors) if backward else function(*tensors))

    assert both(run) == both(plain_layer)


@pytest.mark.parametrize("backward", [False, True])
def test_experts(backward):
    tensors = inputs_of(3).tensors()

    def both(function):
        return count(lambda: train(function, *tensors) if backward else function(*tensors))

    assert both(lambda *t: functional.dora_linear(*t, scaling=0.7)) == both(plain_layer)


@pytest.mark.parametrize("counts", [(2, 0, 5), (7, 0, 0)])
def test_grouped(counts):
    """Counted by rows, as many as there are: as a plain layer over all of them, and the experts' norms."""
    weights = inputs_of(3)
    rows = torch.randn(sum(counts), 30, dtype=torch.float64)
    offsets = torch.tensor(counts).cumsum(0).int()
    tensors = (rows, *weights.tensors()[1:])
    one = (rows, *(t[0] for t in weights.tensors()[1:]))

    def run(*tensors):
        return functional.dora_linear_grouped(*tensors, offsets=offsets, scaling=0.7)

    counted = leaf_counts(lambda: train(run, *tensors))
    leaves = {"grouped_product", "grouped_outer", "grouped_compose_forward", "grouped_compose_backward"}
    assert counted.keys() == {"row_norm", "sum_by_index", *leaves}
    products = count(lambda: train(plain_layer, *one)) - count(norm.row_norm_aten, *one[1:4], S, None, 2**28)
    assert sum(counted[leaf] for leaf in leaves) == products
    assert counted["row_norm"] == count(norm.row_norm_aten, *weights.tensors()[1:4], S, None, 2**28)


def test_convolution_and_embedding():
    """torch counts what they are made of; the norm is what dorac adds."""
    x, *rest = embedding_inputs()
    _, dim, vocab, rank = 33, 24, 65, 7
    counted = leaf_counts(lambda: train(lambda *t: functional.dora_embedding(x, *t, scaling=0.7), *rest))
    assert counted["row_norm"] == 2 * dim * vocab * rank
    layer = conv_inputs("2d")
    counted = leaf_counts(
        lambda: train(lambda *t: functional.dora_conv2d(*t, scaling=0.7, padding=1), *layer.tensors())
    )
    assert counted["row_norm"] == 2 * 10 * (6 * 3 * 3) * 4


def test_the_planner_of_activations_reads_them(monkeypatch):
    seen = []
    formula = flop_registry[torch.ops.dorac.row_norm]
    monkeypatch.setitem(flop_registry, torch.ops.dorac.row_norm, lambda *a, **k: seen.append(1) or formula(*a, **k))
    layer = dorac.nn.DoraLinear(torch.nn.Linear(24, 32), r=4, norm_grad=False)
    run = torch.compile(lambda x: layer(x).sin(), backend="aot_eager_decomp_partition", fullgraph=True)
    with functorch_config.patch(activation_memory_budget=0.5, activation_memory_budget_runtime_estimator="flops"):
        run(torch.randn(6, 24, requires_grad=True)).sum().backward()
    assert seen


IMPORTS = {
    "dorac": "import dorac\nassert name not in sys.modules\nfrom torch.utils import flop_counter",
    "torch's module": "from torch.utils import flop_counter\nimport dorac",
}


@pytest.mark.parametrize("order", IMPORTS)
def test_whoever_imports_first(order):
    """And importing dorac alone imports neither torch's module nor, with it, Triton."""
    code = (
        "import sys\nimport torch\n"
        f"name = {flops.MODULE!r}\n{IMPORTS[order]}\n"
        "layer, x = dorac.nn.DoraLinear(torch.nn.Linear(24, 32), r=4), torch.randn(5, 24)\n"
        "for reloaded in range(2):\n"
        "    with flop_counter.FlopCounterMode(display=False) as counter:\n"
        "        layer(x)\n"
        "    counts = counter.get_flop_counts()['Global']\n"
        "    assert counts[torch.ops.dorac.row_norm] == 2 * 32 * 24 * 4, counts\n"
        "    import importlib\n"
        "    flop_counter = importlib.reload(flop_counter)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
