"""What lives in float32 is not rounded to half precision on its way: norm, g, s and the merged scale.

The bounds of ``dorac.testing`` count how many roundings there may be, not of what. Those of products and activations
differ from token to token and average out; one of n, g or s is the same for all of them and stays.
"""

import pytest
import row_layers
import torch

from dorac import functional, reference
from dorac.ops import linear
from dorac.testing import Convolution, conv_inputs, embedding_inputs, linear_inputs, unit_roundoff

S = 0.7  # halfway between two numbers of either half precision, nearly
SHAPE = (64, 48, 64)  # out, in, rank: gradients of lora_B and the weight average over the latter two
CONVOLUTION = Convolution((4, 12, 9, 9), 64, (2, 2), 64)


def table_norm(weight, *factors):
    return reference.row_norm(weight.T, *factors)


def row_layer(layer):
    return (
        layer.function,
        layer.textbook,
        row_layers.row_norm,
        lambda dtype: layer.inputs(*SHAPE, dtype=dtype).tensors(),
    )


# The function, its textbook, the textbook's norm, the tensors in a dtype; at least 256 tokens.
LAYERS = {
    "linear": (
        functional.dora_linear,
        reference.dora_linear,
        reference.row_norm,
        lambda dtype: linear_inputs((256, *SHAPE), dtype=dtype).tensors(),
    ),
    "conv2d": (
        functional.dora_conv2d,
        reference.dora_conv,
        reference.filter_norm,
        lambda dtype: conv_inputs(CONVOLUTION, dtype=dtype).tensors(),
    ),
    "embedding": (
        functional.dora_embedding,
        reference.dora_embedding,
        table_norm,
        lambda dtype: embedding_inputs((400, 300, 64, 64), dtype=dtype),
    ),
    "experts": row_layer(row_layers.experts(2, 256)),
    "grouped": row_layer(row_layers.grouped(torch.tensor([256, 512]))),
    "mixed": row_layer(row_layers.mixed(torch.tensor([0, 1, 0, 1]), 2, 128)),
}
CASES = [(name, None) for name in LAYERS] + [("linear", route) for route in ("separate", "accumulate", "fused")]


def shared_by_tokens(error, truth, dim):
    """The RMS over the outputs ``dim`` of how far each is off as a whole: the projection of its error on its truth."""
    error, truth = (t.double().movedim(dim, 0).flatten(1) for t in (error, truth))
    return ((error * truth).sum(1) / truth.square().sum(1)).square().mean().sqrt()


@pytest.mark.parametrize(("name", "route"), CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [False, True])
def test_no_error_is_shared_by_tokens(name, route, dtype, training, monkeypatch):
    if route:
        monkeypatch.setattr(linear, "route", lambda *args, **kwargs: route)
    function, textbook, norm, inputs = LAYERS[name]
    tensors = [t if not t.is_floating_point() else t.clone().requires_grad_(training) for t in inputs(dtype)]
    exact = [t.detach().double().requires_grad_(training) if t.is_floating_point() else t for t in tensors]
    n = norm(*(t.detach() for t in exact[1:4]), S)
    out_dim = 1 if name == "conv2d" else -1
    y, truth = function(*tensors, scaling=S), textbook(*exact, scaling=S, weight_norm=n)
    unbiased = [*exact[:5], *([None] if len(exact) == 6 else [])]
    base, inner = (textbook(*unbiased, scaling=s, weight_norm=n).detach() for s in (0.0, S))
    error, roundoff = (y.double() - truth).detach(), unit_roundoff(dtype)
    if name == "experts":  # every expert has rows of its own
        error, inner, base = (t.transpose(1, 2).reshape(-1, 256).T for t in (error, inner, base))
    # One rounding of g is 0.4 units off in RMS, those of 256 activations are 0.06.
    assert shared_by_tokens(error, inner, out_dim) <= 0.2 * roundoff
    parts = torch.stack([base.flatten(), (inner - base).flatten()], 1)
    of_base, of_lora = torch.linalg.lstsq(parts, error.flatten()[:, None]).solution.flatten().abs() / roundoff
    assert of_base <= 0.1
    assert of_lora <= 0.1  # s rounded: 0.57
    if training:
        dy = torch.randn_like(truth).to(dtype)
        y.backward(dy)
        truth.backward(dy.double())
        for i in (3, 1):  # lora_B and the weight, whose gradients have a g for each output
            grad, best = (t[i].grad for t in (tensors, exact))
            if name == "embedding" and i == 1:  # few tokens for each word
                continue
            if grad.ndim == 3:  # of experts or adapters
                grad, best = grad.flatten(0, 1), best.flatten(0, 1)
            assert shared_by_tokens(grad.double() - best, best, 0) <= 0.3 * roundoff, i
