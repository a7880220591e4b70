"""The Triton kernel that reads packed weights: on the GPU as it is, on the CPU through Triton's interpreter."""

import math

import pytest
import torch
from packed_weights import CASES, FORMATS, factors, on, truth, worst
from torch.utils.flop_counter import FlopCounterMode

from dorac import functional
from dorac.ops import eager_norm, front, packed_grouped, packed_product

pytest.importorskip("triton")

from dorac.kernels import target
from dorac.kernels.configs import NormConfig, packed_norm_config
from dorac.kernels.packed_dense import packed_dense
from dorac.kernels.packed_norm import packed_row_norm
from dorac.kernels.target import CARDS

S = 0.7
full = pytest.mark.full
HALF = (torch.bfloat16, torch.float16)
READ = [(name, dtype) for name, dtype in CASES if FORMATS[name]((64, 128), dtype)[0].form() is not None]
NAMES = list(dict(READ))
MATRICES = [name for name in NAMES if len(FORMATS[name]((64, 128))[0].shape) == 2]  # the others have experts


def check_norm(value, dense, rank, factor_dtype, device, config=None):
    assert value.form() is not None
    lora_A, lora_B = factors(value.shape, rank, factor_dtype, device)
    norm = packed_row_norm(on(value, device), lora_A, lora_B, torch.tensor(S, device=device), config)
    exact = truth(dense.to(device), lora_A, lora_B, S)
    assert norm.dtype is torch.float32
    assert norm.shape == exact.shape
    assert worst(norm, exact) <= (1e-5 if factor_dtype is torch.float32 else 1e-6)
    return norm


@pytest.mark.parametrize("factor_dtype", [*HALF, torch.float32])
@pytest.mark.parametrize("shape", [(64, 256), (33, 192)])  # whole tiles; rows and columns that end within one
@pytest.mark.parametrize(("name", "dtype"), READ)
def test_formats(name, dtype, shape, factor_dtype, device):
    check_norm(*FORMATS[name](shape, dtype), 4, factor_dtype, device)


@pytest.fixture
def taken(device, monkeypatch):
    """What ``norm_factored`` was given by the eager way: norms, and None where it was left to the ops."""
    if device == "cpu":
        if torch.cuda.is_available():
            pytest.skip("kernels are compiled where there is a GPU, and take no tensors of the CPU")
        monkeypatch.setattr(front, "has_kernels", lambda *tensors: all(t.dtype.itemsize < 8 for t in tensors))
    given, packed_norm = [], eager_norm.packed_norm

    def spy(*arguments):
        given.append(packed_norm(*arguments))
        return given[-1]

    monkeypatch.setattr(eager_norm, "packed_norm", spy)
    return given


@pytest.mark.parametrize("factor_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", MATRICES)
def test_the_eager_way(name, factor_dtype, device, taken):
    """Its norm is the kernel's bit for bit, whose factors may be strided, and a weight that does not fit is refused."""
    value, _ = FORMATS[name]((33, 128))
    value = on(value, device)
    if target.is_given() and not front.has_packed_kernels(*value[: value.PIECES]):
        pytest.skip("the card of --card has no float8")
    lora_A, lora_B = factors(value.shape, 5, factor_dtype, device)
    lora_B = lora_B.t().contiguous().t()
    expected = packed_row_norm(value, lora_A, lora_B, S)
    for trained in (False, True, True):
        norm = functional.norm_factored(value, *(t.requires_grad_(trained) for t in (lora_A, lora_B)), S)
        assert torch.equal(norm, expected)
        assert not norm.requires_grad
    assert all(norm is not None for norm in taken)
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(functional.norm_factored(value, lora_A, lora_B, S), expected)
    assert torch.equal(functional.norm_factored(packed_product.Held(value), lora_A, lora_B, S), expected)
    del taken[:]
    left = [functional.norm_factored(value, lora_A, lora_B, torch.tensor(S, device=device))]
    assert not taken
    with FlopCounterMode(display=False):
        left.append(functional.norm_factored(value, lora_A, lora_B, S))
    uneven = torch.empty(lora_A.numel() + 1, dtype=factor_dtype, device=device)[1:].view(lora_A.shape)
    left.append(functional.norm_factored(value, uneven.copy_(lora_A.detach()), lora_B, S))
    assert taken == [None, None]
    for norm in left:  # on the CPU in aten
        torch.testing.assert_close(norm, expected, rtol=2e-5 if factor_dtype is torch.float32 else 2e-6, atol=0)
    broken = value._replace(**{value._fields[1]: value[1].flatten()[:-1]})
    with pytest.raises(ValueError, match="must have"):
        functional.norm_factored(broken, lora_A, lora_B, S)
    with pytest.raises(ValueError, match="lora_A must be"):
        functional.norm_factored(value, lora_A[:, 1:], lora_B, S)


@pytest.mark.parametrize("shape", [(64, 256), (33, 192), (5, 100), (3, 1)])  # whole tiles, and what ends within one
@pytest.mark.parametrize(("name", "dtype"), READ)
def test_made_dense(name, dtype, shape, device):
    """The bits that the format's definition has, in every dtype, of all rows and of some."""
    value, _ = FORMATS[name](shape, dtype)
    if value.form() is None:
        pytest.skip("its blocks go on in the next row")
    value = on(value, device)
    rows = value.shape[-2]
    for wanted in (*HALF, torch.float32):
        for first, stop in ((0, rows), (rows // 3, rows - 1), (rows, rows)):
            dense = packed_dense(value, wanted, first, stop)
            assert dense.dtype is wanted
            assert torch.equal(dense, value.rows(first, stop).to(wanted))


@pytest.mark.parametrize("blocksize", [32, 64, 256, 4096])
@pytest.mark.parametrize("nested", [False, True])
def test_made_dense_of_block_sizes(blocksize, nested, device):
    value, _ = FORMATS["bnb_nf4_nested" if nested else "bnb_nf4"]((9, 4096), torch.bfloat16, blocksize=blocksize)
    value = on(value, device)
    absmax = value.nested_absmax if nested else value.absmax
    for index, scale in zip(range(absmax.numel()), (math.nan, math.inf, 0.0, 1e38), strict=False):
        absmax[index] = scale
    dense = packed_dense(value, torch.bfloat16)
    torch.testing.assert_close(dense, value.rows(0, 9), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in MATRICES])
def test_rows_of_experts_are_made_dense_by_it(name, device, taken, monkeypatch):
    """As the product with them takes them."""
    value = on(FORMATS[name]((33, 128))[0], device)
    if target.is_given() and not front.has_packed_kernels(*value[: value.PIECES]):
        pytest.skip("the card of --card has no float8")
    expected = value.rows(2, 33)
    monkeypatch.setattr(type(value), "rows", None)
    assert torch.equal(packed_grouped._dense(value, torch.float32, 2, 33), expected.float())


@pytest.mark.parametrize("name", MATRICES)
def test_the_eager_way_makes_it_dense(name, device, taken, monkeypatch):
    """By the kernel, unless a mode looks on, the dtype is none of its own or a tensor does not start at 16 bytes."""
    value = on(FORMATS[name]((33, 128))[0], device)
    if target.is_given() and not front.has_packed_kernels(*value[: value.PIECES]):
        pytest.skip("the card of --card has no float8")
    made, by_kernel = [], packed_product._by_kernel
    monkeypatch.setattr(packed_product, "_by_kernel", lambda *given: made.append(by_kernel(*given)) or made[-1])
    expected = value.rows(0, 33).to(torch.bfloat16)
    held = packed_product.Held(value)
    for weight in (value, held, held):
        assert torch.equal(packed_product.dense(weight, torch.bfloat16), expected)
    assert torch.equal(held.dense(torch.bfloat16), expected)
    assert [dense is not None for dense in made] == [True] * 4
    with FlopCounterMode(display=False):
        assert torch.equal(packed_product.dense(held, torch.bfloat16), expected)
    assert len(made) == 4
    assert torch.equal(packed_product.dense(held, torch.float64), value.rows(0, 33).double())
    codes = torch.empty(value[0].numel() + 1, dtype=value[0].dtype, device=device)[1:].view(value[0].shape)
    moved = value._replace(**{value._fields[0]: codes.copy_(value[0])})
    assert torch.equal(packed_product.dense(moved, torch.bfloat16), expected)
    assert made[4:] == [None, None]


@pytest.mark.parametrize("shape", [(5, 100), (7, 65), (3, 1)])
@pytest.mark.parametrize("name", NAMES)
def test_a_row_that_ends_within_a_block(name, shape, device):
    value, dense = FORMATS[name](shape)
    if value.form() is None:
        pytest.skip("its blocks go on in the next row")
    check_norm(value, dense, 4, torch.bfloat16, device)


@full
@pytest.mark.parametrize("factor_dtype", [*HALF, torch.float32])
@pytest.mark.parametrize("rank", [1, 16, 64, 200, 384, 512])
@pytest.mark.parametrize("shape", [(130, 256), (257, 448), (1, 64), (64, 4096)])
@pytest.mark.parametrize(("name", "dtype"), READ)
def test_full_matrix(name, dtype, shape, rank, factor_dtype, device):
    check_norm(*FORMATS[name](shape, dtype), rank, factor_dtype, device)


@pytest.mark.parametrize("rank", [1, 128, 300, 400])
@pytest.mark.parametrize("name", NAMES)
def test_ranks(name, rank, device):
    """One chunk of lora_B, one and three in registers, and more than are kept."""
    check_norm(*FORMATS[name]((40, 128)), rank, torch.bfloat16, device)


@pytest.mark.parametrize("blocksize", [32, 64, 128, 256])
@pytest.mark.parametrize("nested", [False, True])
def test_block_sizes(blocksize, nested, device):
    """Tiles of many blocks and blocks of many tiles."""
    value, dense = FORMATS["bnb_nf4_nested" if nested else "bnb_nf4"]((33, 512), torch.bfloat16, blocksize=blocksize)
    check_norm(value, dense, 4, torch.bfloat16, device)


@pytest.mark.parametrize("splits", [1, 2, 5])
@pytest.mark.parametrize("name", NAMES)
def test_column_splits(name, splits, device):
    check_norm(*FORMATS[name]((40, 320)), 20, torch.bfloat16, device, NormConfig(32, 32, 32, splits, 4, 2))


@pytest.mark.parametrize("name", ["bnb_nf4", "bnb_int8"])
@pytest.mark.parametrize("factor", [0.0, 1e30, math.inf, math.nan])
def test_extreme_rows(name, factor, device):
    """A zero row, one whose squares overflow, and some that are not finite, which stay in their row."""
    value = FORMATS[name]((70, 128), torch.float32)[0]
    scales = "absmax" if name == "bnb_nf4" else "scale"
    scale = getattr(value, scales).clone()
    scale.view(70, -1)[3] = factor
    value = value._replace(**{scales: scale})
    lora_A, lora_B = factors(value.shape, 4, torch.bfloat16, device)
    lora_B[3] = 0
    norm = packed_row_norm(on(value, device), lora_A, lora_B, torch.tensor(S, device=device))
    exact = truth(value.rows(0, 70).to(device), lora_A, lora_B, S)
    if math.isfinite(factor):
        assert worst(norm, exact) <= 1e-6
    else:
        assert norm[3] == math.inf
        assert norm.isfinite().sum() == norm.numel() - 1


def test_strided_factors(device):
    value, dense = FORMATS["bnb_nf4"]((33, 192))
    lora_A, lora_B = (t.T.contiguous().T for t in factors(value.shape, 4, torch.bfloat16, device))
    norm = packed_row_norm(on(value, device), lora_A, lora_B, S)
    assert worst(norm, truth(dense.to(device), lora_A, lora_B, S)) <= 1e-6


def test_what_is_not_read():
    """Blocks over the end of a row or no power of two, codes with strides: the norm takes dense rows of these."""
    assert FORMATS["bnb_nf4"]((64, 96))[0].form() is None
    assert FORMATS["bnb_nf4"]((64, 96), blocksize=32)[0].form() is not None
    assert FORMATS["int8_group"]((64, 96), block=(1, 48))[0].form() is None
    value, _ = FORMATS["int8_row"]((64, 96))
    assert value._replace(codes=value.codes.T.contiguous().T).form() is None
    assert FORMATS["bnb_4bit_cpu"]((64, 128))[0].form() is None


def test_strided_scales(device):
    value, dense = FORMATS["int8_group"]((33, 192))
    value = value._replace(scale=value.scale.T.contiguous().T, zero=value.zero.T.contiguous().T)
    check_norm(value, dense, 4, torch.bfloat16, device)
    value, dense = FORMATS["nvfp4_experts"]((33, 192))
    value = value._replace(scale=torch.stack([value.scale, value.scale], -1)[..., 0])
    check_norm(value, dense, 4, torch.bfloat16, device)


def test_experts_have_the_bits_of_one(device):
    value, _ = FORMATS["mxfp4"]((33, 192))
    lora_A, lora_B = factors(value.shape, 4, torch.bfloat16, device)
    norms = packed_row_norm(on(value, device), lora_A, lora_B, S)
    for i in range(2):
        one = value._replace(codes=value.codes[i], scale=value.scale[i], shape=value.shape[1:])
        assert torch.equal(packed_row_norm(on(one, device), lora_A[i], lora_B[i], S), norms[i])


@pytest.mark.parametrize("halves", [1, 2])
@pytest.mark.parametrize("rank", [1, 16, 64, 128, 192, 384, 512, 1536])
def test_config_fits(rank, halves):
    """Shared memory: the stages of codes and lora_A, and lora_B where registers do not hold it; 227 KiB are there."""
    config = packed_norm_config(1, 8192, 8192, halves, rank, CARDS["sm_90"])
    chunks = min(3, -(-rank // config.block_r))
    stage = config.block_o * config.block_i + halves * chunks * 2 * config.block_r * config.block_i
    resident = 0 if config.registers else chunks * 2 * config.block_o * config.block_r
    assert config.stages * stage + resident <= 227 * 2**10
    assert config.splits >= 1


@pytest.mark.gpu
def test_reads_the_packed_bytes_alone():
    """8192 x 8192 nf4: no transient above 4 MiB."""
    shape = 8192, 8192
    codes = torch.randint(0, 256, (2**25, 1), dtype=torch.uint8, device="cuda")
    value, _ = FORMATS["bnb_nf4"]((64, 64))
    absmax = torch.rand(2**20, device="cuda") + 0.5
    value = on(value, "cuda")._replace(codes=codes, absmax=absmax, shape=shape)
    lora_A, lora_B = factors(shape, 16, torch.bfloat16, "cuda")
    packed_row_norm(value, lora_A, lora_B, S)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    norm = packed_row_norm(value, lora_A, lora_B, S)
    assert torch.cuda.max_memory_allocated() - before <= 4 * 2**20
    assert worst(norm, truth(value.rows(0, 8192), lora_A, lora_B, S)) <= 1e-6
