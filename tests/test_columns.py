"""The norm over the other axis: one magnitude per input, against the dense float64 textbook."""

import pytest
import torch
from torch import Tensor

from dorac import functional, reference
from dorac.testing import linear_inputs, rms_error

S = 0.7
NAMES = ("y", "x", "weight", "lora_A", "lora_B", "magnitude", "bias")
# tokens, out, in, r
SHAPES = {
    "square": (5, 8, 8, 3),
    "wide": (4, 6, 33, 4),
    "rank 1": (7, 9, 5, 1),
    "one token": (1, 12, 7, 2),
    "no tokens": (0, 5, 6, 2),
    "rank above the sizes": (3, 4, 5, 9),
}


def tensors(shape, dtype=torch.float64) -> list[Tensor]:
    x, weight, a, b, _, bias = linear_inputs(shape).tensors()
    magnitude = (0.7 + 0.6 * torch.rand(shape[2], dtype=torch.float64)) * reference.column_norm(weight, a, b, S)
    return [t.to(dtype) for t in (x, weight, a, b, magnitude, bias)]


def run(function, leaves, dy, **options) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in leaves]
    y = function(*leaves, scaling=S, **options)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm_grad", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_forward_and_gradients(shape, norm_grad, dtype):
    ours = tensors(shape, dtype)
    exact = [t.double() for t in ours]
    dy = torch.randn(shape[0], shape[1], dtype=torch.float64)
    expected = run(reference.dora_linear_columns, exact, dy.to(dtype).double(), norm_grad=norm_grad)
    got = run(functional.dora_linear_columns, ours, dy, norm_grad=norm_grad)
    # of the size of the result: as many roundings of operands and results as lie on its way, in RMS over all elements
    bound = 8 * torch.finfo(dtype).eps
    for name, value, truth in zip(NAMES, got, expected, strict=True):
        assert value.dtype == dtype, name
        assert not value.numel() or rms_error(value, truth) <= bound * max(1.0, truth.square().mean().sqrt()), name


@pytest.mark.parametrize("norm_grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_magnitude_per_token(dtype, norm_grad):
    vocab, dim, r = 9, 6, 3
    weight, a, b = (torch.randn(*shape, dtype=dtype) for shape in ((vocab, dim), (r, vocab), (dim, r)))
    magnitude = torch.rand(vocab, dtype=dtype) + 0.5
    x = torch.tensor([[0, 3, 3], [8, 1, 0]], dtype=torch.int32)
    leaves, dy = [weight, a, b, magnitude], torch.randn(2, 3, dim, dtype=torch.float64)
    expected = run(
        lambda *t, **o: reference.dora_embedding_columns(x, *t, **o),
        [t.double() for t in leaves],
        dy,
        norm_grad=norm_grad,
    )
    got = run(lambda *t, **o: functional.dora_embedding_columns(x, *t, **o), leaves, dy, norm_grad=norm_grad)
    for value, truth in zip(got, expected, strict=True):
        tolerance = 1e-12 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(value.double(), truth, rtol=tolerance, atol=tolerance)
    norm = functional.column_norm(weight.T, a, b, S)
    known = functional.dora_embedding_columns(x, weight, a, b, magnitude, scaling=S, weight_norm=norm)
    torch.testing.assert_close(known, got[0])


def test_a_zero_column_is_left_and_learns():
    x, weight, a, b, magnitude, bias = tensors((4, 5, 6, 2), torch.float32)
    weight[:, 2], a[:, 2] = 0, 0
    y, *gradients = run(functional.dora_linear_columns, (x, weight, a, b, magnitude, bias), torch.ones(4, 5))
    assert all(t.isfinite().all() for t in (y, *gradients))
    assert gradients[2][:, 2].abs().min() > 0  # lora_A: g is 1 there
    merged, norm = functional.merge_columns(weight, a, b, magnitude, scaling=S)
    assert norm[2] == 0
    assert not merged[:, 2].any()


def test_starts_as_the_frozen_layer():
    x, weight, a, b, _, bias = tensors((4, 5, 6, 2), torch.float32)
    b = torch.zeros_like(b)
    norm = functional.column_norm(weight, a, b, S)
    y = functional.dora_linear_columns(x, weight, a, b, norm, bias, scaling=S)
    assert torch.equal(y, torch.nn.functional.linear(x, weight, bias))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_merged(shape, dtype):
    """Also of a transposed weight, which is not copied."""
    _, weight, a, b, magnitude, _ = tensors(shape, dtype)
    weight = weight.T.contiguous().T
    exact = [t.double() for t in (weight, a, b, magnitude)]
    norm = reference.column_norm(*exact[:3], S)
    truth = reference.merge_columns(*exact, scaling=S, weight_norm=norm)
    merged, taken = functional.merge_columns(weight, a, b, magnitude, scaling=S)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(
        merged.double(), truth, rtol=eps, atol=64 * torch.finfo(taken.dtype).eps * truth.abs().max().item()
    )
    torch.testing.assert_close(taken.double(), norm, rtol=1e-5 if taken.dtype == torch.float32 else 1e-12, atol=0)


def test_it_is_not_the_norm_of_the_rows():
    """On a square weight, where either axis would run."""
    x, weight, a, b, magnitude, bias = tensors(SHAPES["square"])
    columns = functional.dora_linear_columns(x, weight, a, b, magnitude, bias, scaling=S)
    assert not torch.allclose(columns, functional.dora_linear(x, weight, a, b, magnitude, bias, scaling=S))
    assert not torch.allclose(functional.column_norm(weight, a, b, S), functional.norm_factored(weight, a, b, S))


def test_autocast_and_another_dtype_of_the_factors():
    x, weight, a, b, magnitude, bias = tensors((6, 8, 10, 3), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = functional.dora_linear_columns(x, weight, a, b, magnitude, bias, scaling=S)
    assert y.dtype == torch.bfloat16
    truth = reference.dora_linear_columns(*(t.double() for t in (x, weight, a, b, magnitude, bias)), scaling=S)
    assert rms_error(y, truth) <= 8 * torch.finfo(torch.bfloat16).eps * truth.square().mean().sqrt()
    half = [t.bfloat16() for t in (x, weight)]
    y = functional.dora_linear_columns(*half, a, b, magnitude, bias.bfloat16(), scaling=S)
    assert y.dtype == torch.bfloat16


def test_bad_input():
    x, weight, a, b, magnitude, bias = tensors((4, 5, 6, 2))
    call = functional.dora_linear_columns
    with pytest.raises(ValueError, match=r"magnitude must be \[in\] = \[6\], got shape \[5\]"):
        call(x, weight, a, b, magnitude[:5], bias, scaling=S)
    with pytest.raises(ValueError, match=r"weight_norm must be \[in\] = \[6\], got shape \[5\]"):
        call(x, weight, a, b, magnitude, bias, scaling=S, weight_norm=magnitude[:5])
    with pytest.raises(ValueError, match=r"weight must be \[out, in\], got shape \[1, 5, 6\]"):
        call(x[None], weight[None], a[None], b[None], magnitude, scaling=S)
    with pytest.raises(ValueError, match=r"lora_A must be \[r, in\] = \[2, 6\] for this weight, got \[2, 5\]"):
        functional.column_norm(weight, a[:, :5], b, S)
    with pytest.raises(ValueError, match=r"x must be \[\*, in\] with in = 6, got shape \[4, 5\]"):
        call(x[:, :5], weight, a, b, magnitude, bias, scaling=S)
    with pytest.raises(ValueError, match="norm_grad must be False where weight_norm is given"):
        call(x, weight, a, b, magnitude, bias, scaling=S, weight_norm=magnitude, norm_grad=True)
    with pytest.raises(ValueError, match=r"magnitude must be \[vocab\] = \[6\], got shape \[5\]"):
        functional.dora_embedding_columns(torch.tensor([1]), weight.T, a, b, magnitude[:5], scaling=S)
