"""The Triton kernels against float64: on the GPU as they are, on the CPU through Triton's interpreter."""

import ast
import contextlib
import dataclasses
import itertools
import types
from pathlib import Path

import pytest
import torch

from dorac import functional, numerics, reference
from dorac.testing import LinearInputs, linear_inputs, max_error

pytest.importorskip("triton")

import triton
from triton.runtime.errors import OutOfResources
from triton.tools.tensor_descriptor import TensorDescriptor

from dorac.kernels import configs, tiles
from dorac.kernels.backward import compose_backward
from dorac.kernels.cast import cast_launch
from dorac.kernels.compose import compose
from dorac.kernels.dropout import BLOCK, drop_launch, pack_launch
from dorac.kernels.launch import Launch, LaunchError
from dorac.kernels.lora_b import lora_b_backward
from dorac.kernels.norm import row_norm, row_norms
from dorac.kernels.target import CARDS

H100 = CARDS["sm_90"]


def test_kernels_hold_rows_above_the_hosts_bound():
    """No number of their own decides what is a zero row."""
    assert tiles.ZERO_ROW_NORM.value == numerics.ZERO_ROW_NORM
    for path in Path(tiles.__file__).parent.glob("*.py"):
        numbers = [node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)]
        assert not any(isinstance(number, float) and 0 < number <= numerics.ZERO_ROW_NORM for number in numbers), path


HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALF)
full = pytest.mark.full
REGIMES = [
    "aligned",
    "odd",
    "rank_1",
    "rank_over_128",
    "rank_over_both",
    "one_token",
    "no_tokens",
    "no_outputs",
    "one_feature",
    "wide",
    "tall",
    pytest.param((16, 64, 96, 520), id="rank_over_512"),
]
S = 0.7


def scaling(device):
    return torch.tensor(S, device=device)


def norm_truth(weight, lora_A, lora_B):
    return torch.linalg.vector_norm(weight.double() + S * lora_B.double() @ lora_A.double(), dim=-1)


def norm_bound(weight, lora_A) -> float:
    """Relative: sums of float32 products; or 16 bits of each float32 factor of a half-precision weight."""
    if lora_A.dtype is torch.float32 and weight.dtype is not torch.float32:
        return 1e-5 if weight.is_cuda else 4e-5  # the interpreter truncates to bfloat16
    return 1e-6


def check_norm(weight, lora_A, lora_B, config=None):
    norm = row_norm(weight, lora_A, lora_B, scaling(weight.device), config)
    truth = norm_truth(weight, lora_A, lora_B)
    assert norm.dtype is torch.float32
    assert norm.shape == truth.shape
    assert ((norm.double() - truth).abs() <= norm_bound(weight, lora_A) * truth).all()
    return norm


class TestNorm:
    @pytest.mark.parametrize("regime", REGIMES)
    @pytest.mark.parametrize(
        ("dtype", "factor_dtype"), [*((d, d) for d in DTYPES), *((d, torch.float32) for d in HALF)]
    )
    def test_regimes(self, regime, dtype, factor_dtype, device):
        inputs = linear_inputs(regime, dtype=dtype, factor_dtype=factor_dtype, device=device)
        check_norm(inputs.weight, inputs.lora_A, inputs.lora_B)

    @pytest.mark.parametrize("factor_dtype", HALF)
    def test_half_factors_of_a_float32_weight(self, factor_dtype, device):
        inputs = linear_inputs("odd", dtype=torch.float32, factor_dtype=factor_dtype, device=device)
        check_norm(inputs.weight, inputs.lora_A, inputs.lora_B)

    @pytest.mark.parametrize("layout", ["transposed", "sliced", "factors_transposed", "overlapping"])
    def test_strides(self, layout, device):
        inputs = linear_inputs("odd", dtype=torch.bfloat16, device=device)
        weight, lora_A, lora_B = inputs.weight, inputs.lora_A, inputs.lora_B
        if layout == "transposed":
            weight = weight.T.contiguous().T
        elif layout == "sliced":
            weight = torch.stack([weight, -weight], dim=2)[:, :, 0]
            assert weight.stride(1) == 2
        elif layout == "overlapping":
            weight = weight[:1].expand(weight.shape)
        else:
            lora_A, lora_B = lora_A.T.contiguous().T, lora_B.T.contiguous().T
        check_norm(weight, lora_A, lora_B)

    def test_experts(self, device):
        stack = [linear_inputs("odd", dtype=torch.bfloat16, device=device, seed=seed) for seed in range(3)]
        weight, lora_A, lora_B = (
            torch.stack([getattr(i, name) for i in stack]) for name in ("weight", "lora_A", "lora_B")
        )
        norm = check_norm(weight, lora_A, lora_B)
        assert torch.equal(norm[1], row_norm(weight[1], lora_A[1], lora_B[1], scaling(device)))
        check_norm(weight.transpose(1, 2).contiguous().transpose(1, 2), lora_A, lora_B)

    @pytest.mark.parametrize(
        "shape", [(1, 40, 300, 20), pytest.param((1, 130, 600, 72), marks=pytest.mark.full), (1, 33, 65, 7)]
    )
    @pytest.mark.parametrize(("dtype", "factor_dtype"), [(torch.bfloat16,) * 2, (torch.float32, torch.float16)])
    def test_many_layers(self, shape, dtype, factor_dtype, device):
        """In one launch, each with tensors and a scaling of its own, and the bits that it has alone."""
        stack = [linear_inputs(shape, dtype=dtype, factor_dtype=factor_dtype, device=device, seed=s) for s in range(5)]
        layers = [(inputs.weight, inputs.lora_A, inputs.lora_B) for inputs in stack]
        layers = [layers[2], layers[0], *layers[3:], layers[1]]  # not in the order of their addresses
        layers.append((layers[0][0], *layers[1][1:]))  # a shared weight
        scalings = [0.7, 2.0, -1.0, 0.1, 0.3, 1.0]
        norms = row_norms(layers, scalings)
        for norm, tensors, s in zip(norms, layers, scalings, strict=True):
            assert torch.equal(norm, row_norm(*tensors, torch.tensor(s, device=device)))
        transposed = [(weight.T.contiguous().T, *factors) for weight, *factors in layers]
        torch.testing.assert_close(row_norms(transposed, scalings), norms)

    @pytest.mark.parametrize("rank", [128, 300, 384, 400])
    def test_large_ranks(self, rank, device):
        """One or three chunks of lora_B in registers, whole and not, and more than are kept."""
        inputs = linear_inputs((1, 130, 70, rank), dtype=torch.bfloat16, device=device)
        check_norm(inputs.weight, inputs.lora_A, inputs.lora_B)

    @pytest.mark.parametrize("splits", [1, 2, 5])
    def test_column_splits(self, splits, device):
        inputs = linear_inputs((1, 40, 300, 20), dtype=torch.bfloat16, device=device)
        config = configs.NormConfig(32, 32, 32, splits, 4, 2)
        check_norm(inputs.weight, inputs.lora_A, inputs.lora_B, config)

    def test_zero_rows_and_no_columns(self, device):
        inputs = linear_inputs("odd", dtype=torch.bfloat16, device=device)
        inputs.weight[3] = 0
        inputs.lora_B[3] = 0
        assert check_norm(inputs.weight, inputs.lora_A, inputs.lora_B)[3] == 0
        empty = torch.ones(5, 0, device=device), torch.ones(2, 0, device=device), torch.ones(5, 2, device=device)
        assert torch.equal(row_norm(*empty, scaling(device)), torch.zeros(5, device=device))

    def test_not_finite_stays_in_its_row(self, device):
        inputs = linear_inputs("odd", dtype=torch.bfloat16, device=device)
        inputs.weight[2, 5] = torch.inf
        norm = row_norm(inputs.weight, inputs.lora_A, inputs.lora_B, scaling(device))
        assert norm[2] == torch.inf
        assert norm.isfinite().sum() == norm.numel() - 1

    @pytest.mark.parametrize("rank", [8, 200])
    def test_a_factor_that_is_not_finite_stays_in_its_row(self, rank, device):
        inputs = linear_inputs((1, 70, 40, rank), dtype=torch.bfloat16, device=device)
        inputs.lora_B[2, 5] = torch.inf
        norm = row_norm(inputs.weight, inputs.lora_A, inputs.lora_B, scaling(device))
        assert not norm[2].isfinite()
        assert norm.isfinite().sum() == norm.numel() - 1


def activations(inputs: LinearInputs):
    """base, h and the exact norm of a layer."""
    base = inputs.x @ inputs.weight.T
    h = inputs.x.to(inputs.lora_A.dtype) @ inputs.lora_A.T
    return base, h, norm_truth(inputs.weight, inputs.lora_A, inputs.lora_B).float()


def assert_rounded_once(actual, truth, slack=0.0):
    """Half a unit in the last place of the largest value, and ``slack`` for the float32 arithmetic in front of it."""
    scale = truth.abs().max().item() if truth.numel() else 0.0
    ulps = 1.0 if actual.dtype is torch.bfloat16 and actual.device.type == "cpu" else 0.5  # the interpreter truncates
    bound = ulps * torch.finfo(actual.dtype).eps * scale + (64 * torch.finfo(torch.float32).eps + slack) * scale
    assert max_error(actual, truth) <= bound


def g_of(inputs, norm):
    return reference.magnitude_scale(inputs.magnitude.double(), norm.double())


class TestCompose:
    @pytest.mark.parametrize("regime", REGIMES)
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("delta", [False, True])
    @pytest.mark.parametrize("project", [True, False])
    def test_regimes(self, regime, dtype, delta, project, device):
        inputs = linear_inputs(regime, dtype=dtype, device=device, bias=not delta)
        base, h, norm = activations(inputs)
        lora = h if project else h @ inputs.lora_B.T
        y, inner = compose(
            base,
            lora,
            inputs.lora_B if project else None,
            inputs.magnitude,
            norm,
            scaling(device),
            inputs.bias,
            delta=delta,
            want_inner=True,
        )
        exact = lora.double() @ inputs.lora_B.double().T if project else lora.double()
        truth = base.double() + S * exact
        assert_rounded_once(inner, truth)
        g = g_of(inputs, norm)
        if delta:
            expected = reference.compose_delta(base.double(), exact, g, S)
            slack = 3e-7 * truth.abs().max().item() / max(expected.abs().max().item(), 1e-30) if truth.numel() else 0
            assert_rounded_once(y, expected, slack)
        else:
            assert_rounded_once(y, g * truth + inputs.bias.double())

    @pytest.mark.parametrize("regime", ["odd", "aligned"])
    def test_a_change_with_a_bias_and_inner_over_base(self, regime, device):
        """As PEFT's meaning of dropout has them."""
        inputs = linear_inputs(regime, dtype=torch.bfloat16, device=device)
        base, h, norm = activations(inputs)
        tensors = h, inputs.lora_B, inputs.magnitude, norm, scaling(device)
        change, inner = compose(base, *tensors, None, delta=True, want_inner=True)
        over = base.clone()
        y, inner_over = compose(over, *tensors, inputs.bias, delta=True, want_inner=True, over_base=True)
        assert inner_over is over
        assert torch.equal(over, inner)
        lora = h.double() @ inputs.lora_B.double().T
        exact = reference.compose_delta(base.double(), lora, g_of(inputs, norm), S)
        assert_rounded_once(y, exact + inputs.bias.double(), 1e-6)
        assert_rounded_once(change, exact, 1e-5)

    @pytest.mark.parametrize("dtype", HALF)
    @pytest.mark.parametrize("regime", ["odd", "rank_over_128"])
    def test_float32_factors(self, dtype, regime, device):
        """16 bits of each factor: 2^-16 of the low-rank part, below the rounding of the output."""
        inputs = linear_inputs(regime, dtype=dtype, factor_dtype=torch.float32, device=device)
        base, h, norm = activations(inputs)
        y, none = compose(base, h, inputs.lora_B, inputs.magnitude, norm, scaling(device), inputs.bias)
        assert none is None
        truth = base.double() + S * h.double() @ inputs.lora_B.double().T
        assert_rounded_once(y, g_of(inputs, norm) * truth + inputs.bias.double(), slack=2**-16)

    @pytest.mark.parametrize("regime", ["odd", "no_tokens", "tall"])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_scale_alone(self, regime, dtype, device):
        inputs = linear_inputs(regime, dtype=dtype, device=device)
        base, _, norm = activations(inputs)
        y, _ = compose(base, None, None, inputs.magnitude, norm, None, inputs.bias)
        assert_rounded_once(y, g_of(inputs, norm) * base.double() + inputs.bias.double())

    @pytest.mark.parametrize("project", [True, False])
    def test_strides(self, project, device):
        inputs = linear_inputs("odd", dtype=torch.bfloat16, device=device)
        base, h, norm = activations(inputs)
        lora = h if project else h @ inputs.lora_B.T
        lora_B = inputs.lora_B if project else None
        arguments = (inputs.magnitude, norm, scaling(device), inputs.bias)
        expected = compose(base, lora, lora_B, *arguments)[0]
        strided = [t if t is None else t.T.contiguous().T for t in (base, lora, lora_B)]
        assert not strided[0].is_contiguous()
        assert torch.equal(compose(*strided, *arguments)[0], expected)
        wide = torch.cat([base, base], dim=1)[:, : base.shape[1]]
        assert torch.equal(compose(wide, lora, lora_B, *arguments)[0], expected)
        strided = [torch.stack([t, -t], dim=1)[:, 0] for t in (inputs.magnitude, norm, inputs.bias)]
        vectors = strided[0], strided[1], scaling(device), strided[2]
        assert torch.equal(compose(base, lora, lora_B, *vectors)[0], expected)
        one = torch.ones((), device=device).expand(base.shape[1])
        assert torch.equal(
            compose(base, lora, lora_B, one, None, scaling(device), None)[0],
            compose(base, lora, lora_B, one.contiguous(), None, scaling(device), None)[0],
        )
        rows = compose(base[:1].expand(base.shape), lora, lora_B, *arguments)[0]
        assert torch.equal(rows, compose(base[:1].repeat(base.shape[0], 1), lora, lora_B, *arguments)[0])

    @pytest.mark.parametrize("shape", [(128, 256, 64, 192), (100, 264, 64, 72)], ids=["aligned", "over_the_edges"])
    def test_descriptors(self, shape, device):
        """The tiles of large ranks, which a GPU loads through its tensor memory accelerator."""
        inputs = linear_inputs(shape, dtype=torch.bfloat16, device=device)
        base, h, norm = activations(inputs)
        arguments = (inputs.lora_B, inputs.magnitude, norm, scaling(device), inputs.bias)
        config = configs.TileConfig(64, 128, 64, 4, 2)
        plain = compose(base, h, *arguments, want_inner=True, config=config)
        through = compose(base, h, *arguments, want_inner=True, config=dataclasses.replace(config, descriptors=True))
        for left, right in zip(plain, through, strict=True):
            assert torch.equal(left, right)

    @pytest.mark.parametrize("form", [{}, {"delta": True}, {"holds_bias": True}], ids=["full", "delta", "holds_bias"])
    @pytest.mark.parametrize("shape", [(160, 256, 64, 16), (105, 136, 64, 9)], ids=["aligned", "over_the_edges"])
    def test_walk(self, shape, form, device):
        """A program that walks down several tiles of rows writes what one for each tile writes."""
        inputs = linear_inputs(shape, dtype=torch.bfloat16, device=device)
        base, h, norm = activations(inputs)
        arguments = (inputs.lora_B, inputs.magnitude, norm, scaling(device), inputs.bias)
        config = configs.TileConfig(16, 128, 16, 4, 2)
        plain = compose(base, h, *arguments, want_inner=True, config=config, **form)
        walked = compose(base, h, *arguments, want_inner=True, config=dataclasses.replace(config, rows=48), **form)
        for left, right in zip(plain, walked, strict=True):
            assert torch.equal(left, right)

    def test_walks_where_there_are_programs_enough(self):
        for tokens, features, rank in itertools.product((33, 700, 4096, 2**22), (1, 100, 14336), (1, 16, 64)):
            config = configs.tile_config(tokens, features, rank, torch.bfloat16, torch.bfloat16, H100)
            assert config.rows % config.block_t == 0
            assert rank <= config.block_r
            assert config.rows == config.block_t or -(-tokens // config.rows) * -(-features // 128) >= 256

    def test_zero_rows(self, device):
        inputs = linear_inputs("odd", dtype=torch.bfloat16, device=device, bias=False)
        base, h, norm = activations(inputs)
        norm[4] = 0
        y, inner = compose(base, h, inputs.lora_B, inputs.magnitude, norm, scaling(device), None, want_inner=True)
        assert torch.equal(y[:, 4], inner[:, 4])


class TestBackward:
    @pytest.mark.parametrize("regime", REGIMES)
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("delta", [False, True])
    @pytest.mark.parametrize("has_norm", [True, False])
    def test_regimes(self, regime, dtype, delta, has_norm, device):
        inputs = linear_inputs(regime, dtype=dtype, device=device)
        inner, _, norm = activations(inputs)
        dy = torch.randn(inner.shape, dtype=torch.float64).to(dtype).to(device)
        magnitude = inputs.magnitude if has_norm else (inputs.magnitude / norm).nan_to_num(1.0)
        d_base, d_lora, d_magnitude = compose_backward(
            dy, inner, magnitude, norm if has_norm else None, scaling(device), delta=delta, lora_dtype=torch.float32
        )
        g = g_of(inputs, norm) if has_norm else magnitude.double()
        assert_rounded_once(d_base, (g - 1 if delta else g) * dy.double(), slack=2e-6 if delta else 0)
        assert_rounded_once(d_lora, g * S * dy.double())
        terms = dy.double() * inner.double()
        truth = terms.sum(0) / norm.double() if has_norm else terms.sum(0)
        size = terms.abs().sum(0) / (norm.double() if has_norm else 1)
        assert d_magnitude.dtype == magnitude.dtype
        assert ((d_magnitude.double() - truth).abs() <= 16 * torch.finfo(torch.float32).eps * size + 1e-30).all()

    def test_strips_strides_and_zero_rows(self, device):
        inputs = linear_inputs((150, 65, 32, 4), dtype=torch.bfloat16, device=device)
        inner, _, norm = activations(inputs)
        dy = torch.randn(inner.shape, device=device).bfloat16()
        norm[7] = 0
        config = configs.ColumnConfig(8, 32, 40, 4, 2)
        d_inner, none, d_m = compose_backward(dy, inner, inputs.magnitude, norm, config=config)
        assert none is None
        assert d_m[7] == 0
        assert torch.equal(d_inner[:, 7], dy[:, 7])
        strided = compose_backward(dy.T.contiguous().T, inner.T.contiguous().T, inputs.magnitude, norm, config=config)
        assert torch.equal(strided[0], d_inner)
        assert torch.equal(strided[2], d_m)
        vectors = [torch.stack([t, -t], dim=1)[:, 0] for t in (inputs.magnitude, norm)]
        assert torch.equal(compose_backward(dy, inner, *vectors, config=config)[2], d_m)
        one = torch.ones((), device=device, dtype=torch.bfloat16).expand(dy.shape)  # what y.sum().backward() hands over
        expanded = compose_backward(one, inner, inputs.magnitude, norm)
        assert torch.equal(expanded[2], compose_backward(one.contiguous(), inner, inputs.magnitude, norm)[2])


class TestLoraBBackward:
    @pytest.mark.parametrize("regime", REGIMES[:-1])
    @pytest.mark.parametrize("dtype", HALF)
    @pytest.mark.parametrize("h_is_scaled", [False, True])
    @pytest.mark.parametrize("delta", [False, True])
    def test_regimes(self, regime, dtype, h_is_scaled, delta, device):
        inputs = linear_inputs(regime, dtype=dtype, device=device)
        inner, h, norm = activations(inputs)
        dy = torch.randn(inner.shape, dtype=torch.float64).to(dtype).to(device)
        arguments = dy, inner, inputs.magnitude, norm
        d_inner, d_m, d_b = lora_b_backward(*arguments, h, scaling(device), h_is_scaled=h_is_scaled, delta=delta)
        plain, _, plain_m = compose_backward(*arguments, delta=delta)
        assert torch.equal(d_inner, plain)
        torch.testing.assert_close(d_m, plain_m, rtol=1e-5, atol=1e-5)
        g = functional.magnitude_scale(inputs.magnitude, norm).double()
        assert_rounded_once(d_b, (1 if h_is_scaled else S) * g[:, None] * (dy.double().T @ h.double()))

    @pytest.mark.parametrize("shape", [(96, 64, 40, 128), (70, 200, 40, 200), (100, 130, 40, 384), (130, 70, 40, 20)])
    def test_chunks_and_strips(self, shape, device):
        """Ranks of one to three chunks, rows of one strip and of several, g = 0 and zero rows, any strides."""
        inputs = linear_inputs(shape, dtype=torch.bfloat16, device=device)
        inner, h, norm = activations(inputs)
        inputs.magnitude[3], norm[7] = 0, 0
        dy = torch.randn(inner.shape, device=device).bfloat16()
        g = functional.magnitude_scale(inputs.magnitude, norm)
        chosen = configs.lora_b_config(shape[0], shape[1], shape[3], H100)
        for rows, block_o in ((chosen.rows, chosen.block_o), (32, 64), (64, 128)):
            config = dataclasses.replace(chosen, rows=rows, block_o=block_o)
            for tensors in ((dy, inner, h), [t.T.contiguous().T for t in (dy, inner, h)]):
                d_inner, d_m, d_b = lora_b_backward(
                    *tensors[:2], inputs.magnitude, norm, tensors[2], scaling(device), h_is_scaled=False, config=config
                )
                assert_rounded_once(d_inner, g.double() * dy.double())
                assert d_m[7] == 0
                exact = (dy.double() * inner.double()).sum(0) / norm.double()
                exact[7] = 0
                torch.testing.assert_close(d_m.double(), exact, rtol=1e-5, atol=1e-5)
                assert_rounded_once(d_b, S * g.double()[:, None] * (dy.double().T @ h.double()))
        assert d_m[3] != 0
        assert not d_b[3].any()

    @pytest.mark.parametrize("dtype", HALF)
    @pytest.mark.parametrize("rows", [32, 96])
    def test_from_y(self, dtype, rows, device):
        """Of y in place of inner, with rows of no magnitude, of a faint one, and zero rows."""
        inputs = linear_inputs((70, 40, 24, 20), dtype=dtype, device=device)
        inner, h, norm = activations(inputs)
        inner = (inputs.x.double() @ inputs.weight.double().T + S * h.double() @ inputs.lora_B.double().T).to(dtype)
        norm[7] = 0
        inputs.magnitude[3], inputs.magnitude[5], inputs.magnitude[39] = 0, 1e-6, -inputs.magnitude[39]
        y = (functional.magnitude_scale(inputs.magnitude, norm)[None] * inner.float()).to(dtype)
        dy = torch.randn(inner.shape, device=device).to(dtype)
        config = dataclasses.replace(configs.lora_b_config(70, 40, 20, H100), rows=rows)
        arguments = inputs.magnitude, norm, h
        for layout in (lambda t: t, lambda t: t.T.contiguous().T):
            of_y = tuple(map(layout, (inputs.x, inputs.weight, inputs.lora_B)))
            plain = lora_b_backward(layout(dy), inner, *arguments, S, h_is_scaled=False, config=config)
            from_y = lora_b_backward(layout(dy), y, *arguments, S, h_is_scaled=False, of_y=of_y, config=config)
            assert torch.equal(from_y[0], plain[0])
            assert torch.equal(from_y[2], plain[2])
            terms = (dy.double() * inner.double()).abs().sum(0) / norm.double().clamp_min(1e-12)
            # y is rounded once more, and inner of faint rows once less; the sums are float32's.
            assert ((from_y[1] - plain[1]).abs() <= (0.5 * torch.finfo(dtype).eps + 1e-5) * terms).all()
            assert from_y[1][7] == 0
            assert from_y[1][3] != 0

    def test_a_scaling_by_value(self, device):
        inputs = linear_inputs("odd", dtype=torch.bfloat16, device=device)
        base, h, norm = activations(inputs)
        vectors = inputs.magnitude, norm
        for s in (S, 2.0, -1.0, 0.0):
            given = [
                (
                    row_norm(inputs.weight, inputs.lora_A, inputs.lora_B, value),
                    *compose(base, h, inputs.lora_B, *vectors, value, inputs.bias, want_inner=True),
                    *lora_b_backward(base, base, *vectors, h, value, h_is_scaled=False),
                )
                for value in (s, torch.tensor(s, device=device))
            ]
            assert all(torch.equal(left, right) for left, right in zip(*given, strict=True))

    def test_refuses_a_rank_beyond_its_chunks(self, device):
        inputs = linear_inputs((4, 8, 8, 385), dtype=torch.bfloat16, device=device)
        inner, h, norm = activations(inputs)
        with pytest.raises(ValueError, match="rank must be at most 384 here, got 385"):
            lora_b_backward(inner, inner, inputs.magnitude, norm, h, scaling(device), h_is_scaled=True)


@pytest.mark.parametrize(
    ("dtype", "cast"), [(torch.float32, torch.bfloat16), (torch.float32, torch.float16), HALF[::-1], HALF]
)
@pytest.mark.parametrize("sizes", [(1, 1), (1023, 1025), (2048, 5), (3, 4096)])
def test_cast(sizes, dtype, cast, device):
    """As torch rounds them; whatever lies behind stays."""
    sources = [torch.randn(size, device=device).to(dtype) for size in sizes]
    for source in sources:
        source[: source.numel() // 3] *= 1e-4
    sources[0][0], sources[1][-1] = torch.inf, -70000.0  # which float16 does not hold
    targets = [torch.full((size + 7,), 3.0, dtype=cast, device=device) for size in sizes]
    cast_launch(*sizes)(*sources, *targets)
    for source, target, size in zip(sources, targets, sizes, strict=True):
        assert torch.equal(target[:size], source.to(cast))
        assert (target[size:] == 3).all()


def packed(mask):
    bits = torch.full((-(-mask.numel() // 8),), 85, dtype=torch.uint8, device=mask.device)
    pack_launch(mask.numel())(mask.view(torch.uint8), bits)
    return bits


class TestDropout:
    @pytest.mark.parametrize("size", [1, 7, 8, 9, 256, 8 * BLOCK, 8 * BLOCK + 1, 24 * BLOCK - 3])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_sizes(self, size, dtype, device):
        values, p = torch.randn(size, device=device).to(dtype), 0.4
        mask = torch.rand(size, device=device) > p
        bits = packed(mask)
        padded = torch.zeros(8 * bits.numel(), dtype=torch.int32, device=device)
        padded[:size] = mask
        powers = 2 ** torch.arange(8, dtype=torch.int32, device=device)
        assert torch.equal(bits, (padded.view(-1, 8) * powers).sum(1).to(torch.uint8))
        out = torch.empty_like(values)
        drop_launch(size)(values, bits, 1 / (1 - p), out)
        assert torch.equal(out == 0, ~mask | (values == 0))
        assert_rounded_once(out, values.double() * mask / (1 - p))
        if device == "cuda":  # on the CPU torch rounds the factor, too
            assert torch.equal(out, torch.ops.aten.native_dropout_backward(values, mask, 1 / (1 - p)))
        drop_launch(size)(values, bits, 1 / (1 - p), values)
        assert torch.equal(values, out)

    def test_not_finite(self, device):
        """As torch has it: what is dropped is multiplied by zero."""
        values = torch.tensor([torch.inf, torch.inf, torch.nan, -1.0], device=device)
        bits = packed(torch.tensor([True, False, False, False], device=device))
        drop_launch(4)(values, bits, 2.0, values)
        assert values[0] == torch.inf
        assert values[1:3].isnan().all()
        assert values[3].item() == 0
        assert values[3].signbit()


@pytest.mark.parametrize("dtype", DTYPES)
def test_repeats_bitwise(dtype, device):
    """Fifty runs give the same bits."""
    runs = 50 if device == "cuda" else 3
    shape = (300, 520, 776, 40) if device == "cuda" else (70, 40, 300, 20)
    inputs = linear_inputs(shape, dtype=dtype, device=device)
    base, h, norm = activations(inputs)
    dy = torch.randn_like(base)

    def run():
        y = compose(base, h, inputs.lora_B, inputs.magnitude, norm, scaling(device), inputs.bias, want_inner=True)
        d_base, _, d_m = compose_backward(dy, base, inputs.magnitude, norm)
        if dtype in HALF:
            y = *y, *lora_b_backward(dy, base, inputs.magnitude, norm, h, scaling(device), h_is_scaled=True)
        return row_norm(inputs.weight, inputs.lora_A, inputs.lora_B, scaling(device)), *y, d_base, d_m

    first = run()
    for _ in range(runs - 1):
        assert all(torch.equal(left, right) for left, right in zip(first, run(), strict=True))


@pytest.mark.gpu
def test_more_than_2_31_elements():
    """Offsets beyond 32 bits, in the weight and in the activations."""
    rows, columns, rank = 66_000, 33_000, 2
    weight = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)
    assert weight.numel() > 2**31
    lora_A = torch.randn(rank, columns, device="cuda", dtype=torch.bfloat16)
    lora_B = torch.randn(rows, rank, device="cuda", dtype=torch.bfloat16)
    norm = row_norm(weight, lora_A, lora_B, scaling("cuda"))
    tail = slice(rows - 100, rows)
    truth = norm_truth(weight[tail], lora_A, lora_B[tail])
    assert ((norm[tail].double() - truth).abs() <= 1e-6 * truth).all()
    magnitude = torch.rand(columns, device="cuda") + 0.5
    ones = torch.ones(columns, device="cuda")
    d_inner, _, _ = compose_backward(weight, weight, magnitude, ones)
    assert torch.equal(d_inner[tail], (magnitude * weight[tail].float()).bfloat16())
    del d_inner
    mask = torch.zeros_like(weight, dtype=torch.bool)
    mask[tail] = torch.rand(100, columns, device="cuda") > 0.5
    expected = weight[tail] * mask[tail] * 2
    drop_launch(weight.numel())(weight, packed(mask.flatten()), 2.0, weight)
    assert torch.equal(weight[tail], expected)
    assert not weight[:-100].any()


class Compiler:
    """Stands for a kernel, and counts how often it is compiled; what it was compiled to records its launches."""

    __name__ = "compiler"

    def __init__(self) -> None:
        self.arg_names = ["left", "right", "size", "stride", "BLOCK"]
        self.compilations = 0
        self.launches = []

    def __getitem__(self, grid):
        def compile_and_launch(*arguments, num_warps, BLOCK):
            self.compilations += 1
            return self.compiled()

        return compile_and_launch

    def compiled(self):
        def run(*arguments):
            self.launches.append(arguments)

        return types.SimpleNamespace(run=run, function="function", packed_metadata="metadata")


@pytest.fixture
def stream(monkeypatch):
    """A stream for launches without a GPU."""
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: f"stream of {device}", raising=False)


def test_compiled_once_for_what_triton_specialises_on(stream):
    compiler = Compiler()
    launch = Launch(compiler, (1, 2, 3), (24, 32), 4, BLOCK=64)
    tensor, half = torch.empty(64), torch.empty(64, dtype=torch.bfloat16)
    described = [TensorDescriptor.from_tensor(tensor.view(4, 16), block) for block in ([2, 16], [4, 16])]
    kinds = [
        (tensor, tensor),
        (tensor, None),
        (tensor, half),
        (half, tensor),
        (tensor, tensor[1:]),  # 4 bytes on
        (tensor[1:], tensor),
        (tensor, described[0]),
        (tensor, described[1]),
        (tensor, 0.5),
    ]
    for count, arguments in enumerate(kinds, 1):
        launch(*arguments)
        assert compiler.compilations == count, arguments
    launch(tensor[4:], tensor[8:])  # other addresses
    launch(tensor, 2.0)
    assert compiler.compilations == len(kinds)
    others = [(40, 48), (24, 24), (1, 32), (2**31 + 24, 32)]  # of the first alone Triton sees no difference
    for count, integers in zip((0, 1, 2, 3), others, strict=True):
        Launch(compiler, (1, 2, 3), integers, 4, BLOCK=64)(tensor, tensor)
        assert compiler.compilations == len(kinds) + count, integers
    assert compiler.launches.pop()[9:] == (tensor.data_ptr(), tensor.data_ptr(), 40, 48, 64)
    for warps, block in ((8, 64), (4, 128)):
        Launch(compiler, (1, 2, 3), (24, 32), warps, BLOCK=block)(tensor, tensor)
    assert compiler.compilations == len(kinds) + 5
    settled = "stream of None", "function", "metadata", None, None, None
    pointer = tensor.data_ptr()
    assert compiler.launches == [
        (1, 2, 3, *settled, pointer + 16, pointer + 32, 24, 32, 64),
        (1, 2, 3, *settled, pointer, 2.0, 24, 32, 64),
    ]


def test_compiled_for_each_device(monkeypatch, stream):
    """A compiled kernel is loaded on one device, and launched on the one where its arguments are."""
    current = [0]

    @contextlib.contextmanager
    def on_device(device):
        before, current[0] = current[0], device.index
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", on_device)

    class OnCard(torch.Tensor):
        device = None

    class Loaded(Compiler):
        def compiled(self):
            loaded_on = current[0]

            def run(*arguments):
                self.launches.append((loaded_on, current[0], arguments[3]))

            return types.SimpleNamespace(run=run, function=None, packed_metadata=None)

    compiler = Loaded()
    launch = Launch(compiler, (1, 1, 1), (24, 32), 4, BLOCK=64)
    for index in (0, 1, 0, 1, 2):
        tensor = torch.empty(64).as_subclass(OnCard)
        tensor.device = torch.device("cuda", index)
        launch(tensor, tensor)
    assert compiler.compilations == 3
    assert compiler.launches == [(0, 0, "stream of 0"), (1, 1, "stream of 1")]  # the third and the fourth
    assert current == [0]


def test_a_tool_that_listens_gets_the_arguments_as_they_are(monkeypatch, stream):
    compiler = Compiler()
    launch = Launch(compiler, (1, 1, 1), (24, 32), 4, BLOCK=64)
    tensor = torch.empty(64)
    launch(tensor, tensor)
    monkeypatch.setattr(triton.knobs.runtime.launch_enter_hook, "calls", [print])
    launch(tensor, tensor)
    assert (compiler.compilations, len(compiler.launches)) == (2, 0)


def test_a_launch_that_fails_names_kernel_card_and_shapes(stream):
    class Refused(Compiler):
        def __getitem__(self, grid):
            raise OutOfResources(300_000, 232_448, "shared memory")

    tensor = torch.empty(4, 16)
    expected = r"^the kernel compiler cannot be launched on cpu over float32\[4, 16\], float32\[4, 16\] with the grid "
    expected += r"\(1, 2, 3\), 4 warps and {'BLOCK': 64}: OutOfResources: out of resource: shared memory"
    with pytest.raises(LaunchError, match=expected):
        Launch(Refused(), (1, 2, 3), (24, 32), 4, BLOCK=64)(tensor, tensor)


class TestConfigs:
    def test_frozen(self):
        config = configs.norm_config(1, 4096, 4096, 16, torch.bfloat16, H100)
        with pytest.raises(dataclasses.FrozenInstanceError):
            config.block_o = 1

    @pytest.mark.parametrize("rank", [1, 16, 17, 64, 65, 384, 385, 1000])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_norm_tiles(self, rank, dtype):
        """Powers of two that the tensor cores take, each split with columns to work on, resident factors that fit."""
        for out_features, in_features in ((8192, 8192), (28672, 8192), (5, 3), (70_000, 16)):
            config = configs.norm_config(1, out_features, in_features, rank, dtype, H100)
            assert all(b >= 16 and b & (b - 1) == 0 for b in (config.block_o, config.block_i, config.block_r))
            assert 1 <= config.splits <= max(1, in_features // config.block_i)
            chunks = -(-rank // config.block_r)
            if chunks <= 3:  # lora_B's rows and the tiles of W and lora_A in flight, in 227 KiB of shared memory
                resident = chunks * config.block_o * config.block_r
                tiles = config.stages * config.block_i * (chunks * config.block_r + config.block_o)
                assert (resident + tiles) * dtype.itemsize <= 2 * 227 * 1024

    @pytest.mark.parametrize("shape", [(8192, 8192), (28672, 8192), (4096, 14336), (4096, 4096), (14336, 4096)])
    @pytest.mark.parametrize("rank", [16, 64, 384])
    def test_full_waves(self, shape, rank):
        """The norm of common weights takes no more than a fifth over what tiles spread evenly over an H100 would."""
        config = configs.norm_config(1, *shape, rank, torch.bfloat16, H100)
        row_blocks, tiles = shape[0] // config.block_o, shape[1] // config.block_i
        slots = H100.processors * (1 if rank > 64 else 2)
        waves, tiles_of_each = -(-row_blocks * config.splits // slots), -(-tiles // config.splits)
        assert waves * tiles_of_each <= 1.2 * row_blocks * tiles / slots

    @pytest.mark.parametrize("rank", [1, 17, 64, 65, 130, 384])
    @pytest.mark.parametrize("tokens", [1, 33, 700, 4096, 10**6])
    @pytest.mark.parametrize("out_features", [1, 100, 4096, 8192, 14336, 150_000])
    def test_lora_b(self, tokens, out_features, rank):
        config = configs.lora_b_config(tokens, out_features, rank, H100)
        strips, blocks = -(-tokens // config.rows), -(-out_features // config.block_o)
        assert config.rows % config.block_t == 0
        assert strips == 1 or strips * blocks <= H100.processors
        assert (config.chunks - 1) * config.block_r < rank <= config.chunks * config.block_r
        assert strips == 1 or strips * out_features * rank * 4 <= 66 * rank * 1024  # of partial sums, as documented

    def test_thresholds(self):
        large = configs.tile_config(4096, 8192, 384, torch.bfloat16, torch.bfloat16, H100)
        assert large.descriptors
        assert not configs.tile_config(4096, 8192, 64, torch.bfloat16, torch.bfloat16, H100).descriptors
        assert configs.tile_config(1, 8192, 16, torch.bfloat16, torch.bfloat16, H100).block_t == 16
        assert configs.column_config(8192, 8192, torch.bfloat16, H100).rows == 256
        assert configs.column_config(64, 128, torch.bfloat16, H100).rows == 32
        one, several, narrow = (configs.lora_b_config(4096, out, 384, H100) for out in (14336, 4096, 8192))
        assert (one.rows, one.block_o, one.chunks) == (4096, 128, 3)
        assert (several.rows, several.block_o) == (1024, 128)
        assert (narrow.rows, narrow.block_o) == (4096, 64)  # a program per processor without strips
        for config in (configs.column_config(2**27, 64, torch.bfloat16, H100),):
            assert -(-(2**27) // config.rows) <= 65_535  # what a grid's second axis holds
