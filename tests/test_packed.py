"""The norm read from packed weights, against float64 of the dense weight that they stand for."""

import math

import pytest
import torch
from packed_weights import CASES, FORMATS, factors, on, truth, worst
from test_norm import peak_bytes

from dorac import functional, packed

S = 0.7
full = pytest.mark.full
SHAPES = [(64, 128), (5, 100), (33, 192), (1, 64), (7, 65), (3, 1)]  # whole blocks and not, odd rows


def bound(lora_A) -> float:
    return 1e-5 if lora_A.dtype is torch.float32 and lora_A.is_cuda else 1e-6


def check_norm(value, dense, rank, factor_dtype, device, scaling=S, **options):
    lora_A, lora_B = factors(value.shape, rank, factor_dtype, device)
    norm = functional.norm_factored(on(value, device), lora_A, lora_B, scaling, **options)
    exact = truth(dense.to(device), lora_A, lora_B, scaling)
    assert norm.dtype is (torch.float64 if factor_dtype is torch.float64 else torch.float32)
    assert norm.shape == exact.shape
    assert worst(norm, exact) <= bound(lora_A)
    return norm


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_rows_are_what_the_format_says(name, dtype, shape):
    """Bit for bit, where the format rounds to a dtype; int8 and float8: value times scale."""
    value, dense = FORMATS[name](shape, dtype)
    value.check()
    rows = value.shape[-2]
    assert value.device == dense.device
    assert value.rows(0, rows).dtype is value.dtype
    for start, stop in {(0, rows), (0, 1), (rows - 1, rows), (rows // 2, rows), (rows // 3, -(-rows // 2))}:
        taken, expected = value.rows(start, stop), dense[..., start:stop, :]
        if name == "bnb_int8":
            torch.testing.assert_close(taken, expected, rtol=3e-7, atol=0)
        else:
            assert torch.equal(taken, expected)


@pytest.mark.parametrize("factor_dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_equals_the_dense_norm(name, dtype, shape, factor_dtype, device):
    check_norm(*FORMATS[name](shape, dtype), 4, factor_dtype, device)


@full
@pytest.mark.parametrize("factor_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rank", [1, 16, 64, 200, 384, 512])
@pytest.mark.parametrize("shape", [(130, 256), (257, 448), (96, 320), (31, 999)])
@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_full_matrix(name, dtype, shape, rank, factor_dtype, device):
    check_norm(*FORMATS[name](shape, dtype), rank, factor_dtype, device)


@pytest.mark.parametrize("rank", [1, 512])
@pytest.mark.parametrize("name", FORMATS)
def test_ranks(name, rank, device):
    check_norm(*FORMATS[name]((40, 256)), rank, torch.bfloat16, device)


@pytest.mark.parametrize("budget", [1, 3000, 30_000])
@pytest.mark.parametrize("name", FORMATS)
def test_any_budget(name, budget, device):
    check_norm(*FORMATS[name]((33, 192)), 4, torch.bfloat16, device, budget=budget)


@pytest.mark.parametrize("name", FORMATS)
def test_peak_memory(name):
    """The buffers fit in the budget, of which a chunk takes a quarter at least: so the profiler did see them."""
    value, _ = FORMATS[name]((256, 1024))
    lora_A, lora_B = factors(value.shape, 4, torch.bfloat16)
    for budget in (2**20, 2**22):
        peak = peak_bytes(lambda budget=budget: functional.norm_factored(value, lora_A, lora_B, S, budget=budget))
        assert budget / 4 <= peak <= budget + 2**17  # the scaled factors and the norms


@pytest.mark.parametrize("scaling", [-1.3, 0.0])
@pytest.mark.parametrize("name", FORMATS)
def test_any_scaling(name, scaling, device):
    value, dense = FORMATS[name]((33, 192))
    number = check_norm(value, dense, 4, torch.bfloat16, device, scaling)
    lora_A, lora_B = factors(value.shape, 4, torch.bfloat16, device)
    tensor = functional.norm_factored(on(value, device), lora_A, lora_B, torch.tensor(scaling, device=device))
    assert torch.equal(tensor, number)


@pytest.mark.parametrize("name", FORMATS)
def test_known_square(name):
    value, dense = FORMATS[name]((33, 192))
    lora_A, lora_B = factors(value.shape, 4, torch.float32)
    square = dense.double().square().sum(-1)
    norm = functional.norm_factored(value, lora_A, lora_B, S, weight_sq=square, budget=20_000)
    torch.testing.assert_close(norm, functional.norm_factored(value, lora_A, lora_B, S))
    shifted = functional.norm_factored(value, lora_A, lora_B, S, weight_sq=square + 1)
    torch.testing.assert_close(shifted.square(), norm.square() + 1)


def scaled_rows(value, row, factor):
    """The value with the scale of one row replaced."""
    scale = value.absmax if isinstance(value, packed.Bnb4bit) else value.scale
    per_row = scale.numel() // value.shape[0]
    scale = scale.clone()
    scale.view(value.shape[0], per_row)[row] = factor
    return value._replace(**{"absmax" if isinstance(value, packed.Bnb4bit) else "scale": scale})


@pytest.mark.parametrize("name", ["bnb_nf4", "bnb_int8"])
class TestExtremes:
    def norm(self, name, row, factor, device, zero_b=True):
        dtype = torch.float32
        value = scaled_rows(FORMATS[name]((70, 128), dtype)[0], row, factor)
        lora_A, lora_B = factors(value.shape, 4, torch.bfloat16, device)
        if zero_b:
            lora_B[row] = 0
        norm = functional.norm_factored(on(value, device), lora_A, lora_B, S)
        return norm, truth(value.rows(0, 70).to(device), lora_A, lora_B, S)

    def test_zero_row(self, name, device):
        norm, exact = self.norm(name, 3, 0.0, device)
        assert norm[3] == 0
        assert worst(norm, exact) <= 1e-6

    def test_squares_that_overflow(self, name, device):
        norm, exact = self.norm(name, 3, 1e30, device)
        assert norm[3] > 1e30
        assert worst(norm, exact) <= 1e-6

    @pytest.mark.parametrize("factor", [math.inf, math.nan])
    def test_not_finite_stays_in_its_row(self, name, factor, device):
        norm, _ = self.norm(name, 3, factor, device, zero_b=False)
        assert norm[3] == math.inf
        assert norm.isfinite().sum() == norm.numel() - 1


@pytest.mark.parametrize("name", FORMATS)
def test_compiled_is_one_graph(name, device):
    """A function whose argument is the value, and one that makes it of a parameter."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    value, _ = FORMATS[name]((33, 192))
    value = on(value, device)
    lora_A, lora_B = factors(value.shape, 4, torch.bfloat16, device)
    expected = functional.norm_factored(value, lora_A, lora_B, S)
    for compiler in (backend, "aot_eager"):
        compiled = torch.compile(functional.norm_factored, fullgraph=True, backend=compiler)
        assert torch.equal(compiled(value, lora_A, lora_B, S), expected)
    targets = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert len(graphs) == 1
    assert sum("packed_norm_factored" in target for target in targets) == 1

    def of_pieces(codes):
        return functional.norm_factored(value._replace(codes=codes), lora_A, lora_B, S)

    assert torch.equal(torch.compile(of_pieces, fullgraph=True, backend="aot_eager")(value.codes), expected)


@pytest.mark.parametrize("name", FORMATS)
def test_ops_keep_torchs_contract(name):
    value, _ = FORMATS[name]((33, 192))
    args = *factors(value.shape, 4, torch.bfloat16), torch.tensor(S), None, *packed.flatten(value), 2**20
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if any(t is not None and "float8" in str(t.dtype) for t in args[5]):
        checks = checks[1:]  # it computes with the arguments
    for op in (torch.ops.dorac.packed_row_norm, torch.ops.dorac.packed_norm_factored):
        torch.library.opcheck(op.default, args, test_utils=checks)


def test_the_norm_is_a_constant():
    value, _ = FORMATS["bnb_nf4"]((33, 192))
    lora_A, lora_B = (t.requires_grad_() for t in factors(value.shape, 4, torch.float32))
    assert not functional.norm_factored(value, lora_A, lora_B, S).requires_grad
    with pytest.raises(ValueError, match="norm_grad needs a dense weight"):
        functional.norm_factored(value, lora_A, lora_B, S, norm_grad=True)


def test_under_transforms():
    """In plain aten: vmap over factors, and a tangent that does not pass."""
    value, dense = FORMATS["bnb_nf4"]((33, 192))
    pairs = [factors(value.shape, 4, torch.float32, seed=seed) for seed in range(3)]
    stacked = [torch.stack(tensors) for tensors in zip(*pairs, strict=True)]
    norms = torch.func.vmap(lambda a, b: functional.norm_factored(value, a, b, S))(*stacked)
    for norm, pair in zip(norms, pairs, strict=True):
        assert worst(norm, truth(dense, *pair, S)) <= 1e-6
    lora_A, lora_B = pairs[0]
    _, tangent = torch.func.jvp(lambda b: functional.norm_factored(value, lora_A, b, S), (lora_B,), (lora_B,))
    assert not tangent.any()


def test_autocast_does_not_reach_the_norm():
    value, dense = FORMATS["bnb_nf4_nested"]((33, 192))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check_norm(value, dense, 4, torch.float32, "cpu")


def test_a_value_is_a_pytree():
    value, _ = FORMATS["bnb_nf4"]((33, 192))
    leaves, spec = torch.utils._pytree.tree_flatten(value)
    assert sum(isinstance(leaf, torch.Tensor) for leaf in leaves) == 3
    assert type(torch.utils._pytree.tree_unflatten(leaves, spec)) is packed.Bnb4bit
    assert packed.unflatten(*packed.flatten(value)) == value


class TestBadInput:
    """Each piece that does not fit, with the format's name."""

    def refused(self, value, error, match):
        lora_A, lora_B = factors(value.shape, 4, torch.bfloat16)
        with pytest.raises(error, match=match) as caught:
            functional.norm_factored(value, lora_A, lora_B, S)
        assert type(value).NAME in str(caught.value)

    @pytest.mark.parametrize(
        ("name", "change", "error", "match"),
        [
            ("bnb_nf4", {"blocksize": 48}, ValueError, "block size"),
            ("bnb_nf4", {"blocksize": 128}, ValueError, "absmax must have the shape"),
            ("bnb_nf4", {"absmax": torch.zeros(99, dtype=torch.uint8)}, ValueError, "nested statistics are missing"),
            ("bnb_nf4", {"code": None}, TypeError, "code must be a tensor"),
            ("bnb_nf4", {"dtype": torch.int8}, ValueError, "float dtype"),
            ("bnb_nf4", {"codes": torch.zeros(7, 1, dtype=torch.uint8)}, ValueError, "codes must hold"),
            ("bnb_nf4", {"absmax": torch.zeros(99, device="meta")}, ValueError, "meta device"),
            ("bnb_nf4_nested", {"nested_offset": None}, ValueError, "some are missing"),
            ("bnb_nf4_nested", {"nested_blocksize": 256}, ValueError, "nested_absmax must have the shape"),
            ("bnb_nf4_nested", {"absmax": torch.zeros(99)}, TypeError, "absmax must be torch.uint8"),
            ("bnb_4bit_cpu", {"absmax": torch.zeros(3, 64)}, TypeError, "absmax must be torch.bfloat16"),
            ("bnb_4bit_cpu", {"shape": (33, 192)}, ValueError, "a multiple of 32"),
            ("bnb_int8", {"scale": None}, TypeError, "SCB. must be a tensor"),
            ("bnb_int8", {"scale": torch.zeros(5)}, ValueError, "must have the shape"),
            ("bnb_int8", {"codes": torch.zeros(33, 192)}, TypeError, "must be torch.int8"),
            ("float8_block", {"block_rows": 16}, ValueError, "scale must have the shape"),
            ("float8_row", {"codes": torch.zeros(33, 192)}, TypeError, "codes must be torch.int8 or"),
            ("int8_group", {"zero": torch.zeros(33, 6)}, TypeError, "zero must be torch.int8"),
            ("torchao_int4", {"block": 64}, ValueError, "scale must have the shape"),
            ("torchao_int4", {"zero": None}, TypeError, "zero must be a tensor"),
            ("mxfp4", {"shape": (2, 33, 191)}, ValueError, "in a multiple of 32"),
            ("mxfp4", {"scale": torch.zeros(2, 33, 6)}, TypeError, "scale must be torch.uint8"),
            ("nvfp4", {"swizzled": 1}, ValueError, "swizzled, scale must hold"),
            ("nvfp4", {"tensor_scale": torch.ones(3)}, ValueError, "tensor_scale must have the shape"),
        ],
    )
    def test_a_piece_that_does_not_fit(self, name, change, error, match):
        self.refused(FORMATS[name]((33, 192))[0]._replace(**change), error, match)

    @pytest.mark.gpu
    def test_another_device(self):
        value, _ = FORMATS["bnb_nf4"]((33, 192))
        self.refused(value._replace(absmax=value.absmax.cuda()), ValueError, "must be on cpu")

    def test_factors_that_do_not_fit(self):
        value, _ = FORMATS["bnb_nf4"]((33, 192))
        lora_A, lora_B = factors(value.shape, 4, torch.bfloat16)
        with pytest.raises(ValueError, match=r"lora_A must be \[r, in\]"):
            functional.norm_factored(value, lora_A[:, 1:], lora_B, S)
        with pytest.raises(ValueError, match="lora_B must be"):
            functional.norm_factored(value, lora_A, lora_B[1:], S)

    def test_no_packed_value(self):
        lora_A, lora_B = factors((33, 192), 4, torch.bfloat16)
        with pytest.raises(TypeError, match="weight must be a tensor, got tuple"):
            functional.norm_factored((lora_A, lora_B), lora_A, lora_B, S)


class Params4bit(torch.nn.Parameter):
    """Named as bitsandbytes' parameter, by which it is known."""

    quant_state = None


class Int8Params(torch.nn.Parameter):
    SCB = None
    has_fp16_weights = False


@pytest.mark.parametrize("kind", [Params4bit, Int8Params])
def test_bitsandbytes_before_it_quantises_is_refused(kind):
    layer = torch.nn.Linear(6, 4)
    layer.weight = kind(torch.randn(4, 6), requires_grad=False)
    with pytest.raises(ValueError, match="is not quantised yet"):
        packed.of(layer)
    with pytest.raises(ValueError, match=f"of this {kind.__name__}"):
        packed.of(layer.weight)


def test_int8_without_its_scales_is_refused():
    with pytest.raises(ValueError, match="SCB"):
        packed.of(Int8Params(torch.zeros(4, 6, dtype=torch.int8), requires_grad=False))


def test_dense_weights_are_none():
    assert packed.of(torch.nn.Linear(6, 4)) is None
    assert packed.of(torch.randn(4, 6)) is None
    assert packed.of(torch.nn.ReLU()) is None
