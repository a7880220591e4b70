"""``functional.dora_embedding`` against dense float64 math: values, gradients, transforms, memory, refusals."""

import time

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from dorac import functional, reference
from dorac.functional.embedding import EMBEDDING_BUDGET
from dorac.testing import Sums, embedding_inputs, layer_budgets, max_error
from tests.test_norm import peak_bytes

HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float64, torch.float32, *HALF)
NAMES = ("weight", "lora_A", "lora_B", "magnitude")
SHAPES = {  # indices, vocab, dim, rank
    "aligned": (64, 128, 64, 8),
    "odd": (33, 65, 23, 7),
    "rank_1": (16, 40, 24, 1),
    "rank_64": (32, 96, 80, 64),
    "rank_384": (16, 40, 24, 384),  # more than both sides
    "one_index": (1, 30, 16, 4),
    "no_indices": (0, 30, 16, 4),
    "one_word": (5, 1, 16, 4),
    "one_feature": (5, 30, 1, 4),
}
COMPILED = pytest.mark.parametrize("use_compile", [False, pytest.param(True, marks=pytest.mark.full)])


def compiled(function, backend="aot_eager"):
    return torch.compile(function, fullgraph=True, backend=backend)


def table(inputs, dtype=None):
    """The tensors after x, in ``dtype``, as leaves that require a gradient."""
    return [t.detach().clone(memory_format=torch.preserve_format).to(dtype or t.dtype).requires_grad_() for t in inputs]


# --- values and gradients --------------------------------------------------------------------------------------------


def budgets_of(x, *tables, scaling=0.7, **options):
    sums = Sums.of_embedding(x, *tables[:2])
    return layer_budgets(reference.dora_embedding, table_norm, (x, *tables), sums, scaling=scaling, **options)


def table_norm(weight, *factors):
    return reference.row_norm(weight.T, *factors)


def check(inputs, scaling=0.7, function=functional.dora_embedding, padding_idx=None):
    """The forward pass and the gradients of every float argument; prints their errors (``pytest -s``)."""
    x, *tables = inputs
    ours = table(tables)
    y = function(x, *ours, scaling=scaling, padding_idx=padding_idx)
    assert (y.shape, y.dtype) == ((*x.shape, tables[0].shape[1]), tables[0].dtype)
    dy = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(y)
    y.backward(dy)
    results = {"y": y} | {name: t.grad for name, t in zip(NAMES, ours, strict=True)}
    budgets = budgets_of(*inputs, scaling=scaling, dy=dy, padding_idx=padding_idx)
    errors = {name: f"{max_error(results[name], budget.truth):.1e}" for name, budget in budgets.items()}
    print(f"\n{[*x.shape, *tables[0].shape, tables[1].shape[0]]} {y.dtype}: ", errors, end="")
    assert all(t.grad.dtype == t.dtype for t in ours)
    for name, budget in budgets.items():
        budget.check(results[name], name)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@COMPILED
def test_equals_the_dense_table(shape, dtype, use_compile, device):
    function = compiled(functional.dora_embedding) if use_compile else functional.dora_embedding
    check(embedding_inputs(SHAPES[shape], dtype=dtype, device=device), function=function)


@pytest.mark.parametrize("scaling", [0.0, -1.3])
@pytest.mark.parametrize("padding_idx", [None, 0, 64])
@COMPILED
def test_scaling_and_padding(scaling, padding_idx, use_compile, device):
    function = compiled(functional.dora_embedding) if use_compile else functional.dora_embedding
    inputs = embedding_inputs(SHAPES["odd"], dtype=torch.float32, device=device)
    assert padding_idx is None or padding_idx in inputs[0]
    check(inputs, scaling, function, padding_idx)


@pytest.mark.parametrize(("dtype", "backend"), [(torch.float32, "inductor"), (torch.bfloat16, "aot_eager")])
def test_compiled_sample(dtype, backend):
    check(embedding_inputs(SHAPES["odd"], dtype=dtype), function=compiled(functional.dora_embedding, backend))


@pytest.mark.parametrize("factor_dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_mixed_dtypes(dtype, factor_dtype, device):
    x, *tables = embedding_inputs(SHAPES["odd"], dtype=dtype, factor_dtype=factor_dtype, device=device)
    y = functional.dora_embedding(x, *tables, scaling=0.7)
    assert y.dtype == dtype
    budgets_of(x, *tables)["y"].check(y)


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_either_layout_of_the_factors_without_a_copy(layout):
    """PEFT's layers pass ``lora_A [vocab, r]`` and ``lora_B [r, dim]`` around: their transposes are views."""
    x, weight, lora_A, lora_B, magnitude = embedding_inputs((64, 4096, 48, 8), dtype=torch.float32)
    if layout == "transposed":
        lora_A, lora_B = lora_A.T.contiguous().T, lora_B.T.contiguous().T
        assert not lora_A.is_contiguous()
    check((x, weight, lora_A, lora_B, magnitude))
    norm = functional.norm_factored(weight.T, lora_A, lora_B, 0.7)
    run = lambda: functional.dora_embedding(x, weight, lora_A, lora_B, magnitude, scaling=0.7, weight_norm=norm)  # noqa: E731
    # h [64, 8], base, lora and y [64, 48], and no column of lora_A but those looked up.
    assert 0 < peak_bytes(run) < lora_A.nbytes


@pytest.mark.parametrize("shape", [(), (2,), (2, 3), (2, 3, 4)])
@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32])
def test_any_shape_of_indices(shape, index_dtype):
    x, *tables = embedding_inputs(SHAPES["odd"])
    x = x[: torch.Size(shape).numel()].reshape(shape)
    y = functional.dora_embedding(x.to(index_dtype), *tables, scaling=0.7)
    torch.testing.assert_close(y, reference.dora_embedding(x, *tables, scaling=0.7))


def test_given_norm_replaces_the_computed_one():
    x, *tables = embedding_inputs()
    norm = functional.norm_factored(tables[0].T, *tables[1:3], 0.7, budget=EMBEDDING_BUDGET)
    y = functional.dora_embedding(x, *tables, scaling=0.7)
    assert torch.equal(functional.dora_embedding(x, *tables, scaling=0.7, weight_norm=norm), y)
    halved = functional.dora_embedding(x, *tables, scaling=0.7, weight_norm=2 * norm)
    torch.testing.assert_close(2 * halved, y)


def test_inputs_are_unchanged_and_runs_repeat_bitwise():
    inputs = embedding_inputs(dtype=torch.bfloat16)
    before = [t.clone() for t in inputs]
    runs = [functional.dora_embedding(*inputs, scaling=0.7) for _ in range(3)]
    assert all(torch.equal(run, runs[0]) for run in runs)
    assert all(torch.equal(a, b) for a, b in zip(before, inputs, strict=True))


@pytest.mark.parametrize("trained", [(), ("lora_A",), ("lora_B",), ("magnitude",), ("lora_A", "lora_B", "magnitude")])
@pytest.mark.parametrize("sparse", [False, True])
def test_which_gradients_exist(trained, sparse):
    x, *tables = embedding_inputs()
    leaves = [t.requires_grad_(name in trained) for name, t in zip(NAMES, tables, strict=True)]
    y = functional.dora_embedding(x, *leaves, scaling=0.7, sparse=sparse)
    assert y.requires_grad == bool(trained)
    if trained:
        y.sum().backward()
    assert tuple(name for name, t in zip(NAMES, leaves, strict=True) if t.grad is not None) == trained


@pytest.mark.parametrize("norm_grad", [False, True])
def test_zero_features_train(norm_grad, device):
    """A feature that is zero in the whole table has g = 1, finite gradients, and can learn."""
    x, weight, lora_A, lora_B, magnitude = embedding_inputs(dtype=torch.float32, device=device)
    weight[:, 3] = 0
    lora_B[3] = 0
    adapter = [t.requires_grad_() for t in (lora_A, lora_B, magnitude)]
    y = functional.dora_embedding(x, weight, *adapter, scaling=0.7, norm_grad=norm_grad)
    assert not y[:, 3].count_nonzero()
    y.sum().backward()
    assert all(t.grad.isfinite().all() for t in adapter)
    torch.testing.assert_close(lora_B.grad[3], 0.7 * lora_A.detach().T[x].sum(0))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("use_compile", [False, True])
def test_autocast(dtype, use_compile, device):
    """The low-rank product runs in the autocast dtype; norm, g and the result stay in float32."""
    inputs = embedding_inputs(dtype=torch.float32, device=device)
    function = compiled(functional.dora_embedding) if use_compile else functional.dora_embedding
    with torch.autocast(device, dtype=dtype):
        y = function(*inputs, scaling=0.7)
        eager = functional.dora_embedding(*inputs, scaling=0.7)
    # On CUDA eager is a kernel with fused multiply-adds: a float32 rounding or two apart.
    torch.testing.assert_close(y, eager, rtol=0, atol=0 if device == "cpu" else 2**-22 * eager.abs().max().item())
    x, weight, lora_A, lora_B, magnitude = (t.double() if t.is_floating_point() else t for t in inputs)
    truth = reference.dora_embedding(x, weight, lora_A, lora_B, magnitude, scaling=0.7)
    g = magnitude / reference.row_norm(weight.T, lora_A, lora_B, 0.7)
    # lora_A, lora_B and their product are each rounded to the autocast dtype; all else is exact beside that.
    size = g * 0.7 * (lora_A.abs().T[x] @ lora_B.abs().T)
    assert ((y.double() - truth).abs() <= 2 * torch.finfo(dtype).eps * size + 1e-6 * truth.abs().max()).all()
    assert y.dtype == torch.float32


# --- padding, frequencies, sparse gradients --------------------------------------------------------------------------


def lookup_gradients(x, tables, **options):
    """Gradients of lora_A and weight from dorac, and as F.embedding gives them on the two tables."""
    ours, theirs = table(tables), table(tables)
    functional.dora_embedding(x, *ours, scaling=0.7, **options).square().sum().backward()
    weight, lora_A, lora_B, magnitude = theirs
    norm = reference.row_norm(weight.T, lora_A, lora_B, 0.7).detach()
    options.pop("sparse", None)
    h = F.embedding(x, lora_A.T, **options)
    y = reference.compose(F.embedding(x, weight, **options), h @ lora_B.T, magnitude / norm, 0.7)
    y.square().sum().backward()
    return ours, theirs


@pytest.mark.parametrize(
    "options", [{}, {"padding_idx": 3}, {"padding_idx": -1}, {"scale_grad_by_freq": True, "padding_idx": 0}]
)
def test_gradients_of_the_lookup_are_torchs(options):
    x, *tables = embedding_inputs(SHAPES["odd"])
    ours, theirs = lookup_gradients(x, tables, **options)
    for actual, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual.grad, expected.grad)
    if (padding_idx := options.get("padding_idx")) is not None:
        assert not ours[1].grad[:, padding_idx].count_nonzero()
    assert ours[2].grad.count_nonzero()


@pytest.mark.parametrize("padding_idx", [None, -1])
@pytest.mark.parametrize("backend", [None, "aot_eager", pytest.param("inductor", marks=pytest.mark.full)])
def test_sparse_gradients(padding_idx, backend):
    """lora_A's holds the columns looked up and no other, and SparseAdam takes it."""
    x, weight, *adapter = embedding_inputs(SHAPES["odd"])
    _, theirs = lookup_gradients(x, [weight, *adapter], padding_idx=padding_idx)
    leaves = table(adapter)
    function = compiled(functional.dora_embedding, backend) if backend else functional.dora_embedding
    function(x, weight, *leaves, scaling=0.7, sparse=True, padding_idx=padding_idx).square().sum().backward()
    gradient = leaves[0].grad.coalesce()
    assert gradient.layout == torch.sparse_coo
    assert set(gradient.indices()[1].tolist()) == set(x.tolist())
    assert [t.grad.layout for t in leaves[1:]] == [torch.strided] * 2
    for actual, expected in zip(leaves, theirs[1:], strict=True):
        torch.testing.assert_close(actual.grad.to_dense(), expected.grad)
    before = leaves[0].detach().clone()
    torch.optim.SparseAdam(leaves[:1], lr=0.1).step()
    changed = (leaves[0] != before).any(0).nonzero().flatten().tolist()
    assert set(changed) == set(x.tolist()) - ({len(weight) - 1} if padding_idx == -1 else set())


def test_sparse_gradient_of_a_trained_table():
    x, *tables = embedding_inputs(SHAPES["odd"])
    ours, theirs = lookup_gradients(x, tables, sparse=True)
    assert ours[0].grad.layout == ours[1].grad.layout == torch.sparse_coo
    for actual, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual.grad.to_dense(), expected.grad)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32])
def test_opcheck_of_the_sparse_lookup(requires_grad, index_dtype):
    x, _, lora_A, *_ = embedding_inputs(SHAPES["odd"])
    opcheck(torch.ops.dorac.sparse_columns.default, (lora_A.requires_grad_(requires_grad), x.to(index_dtype)))


# --- derivatives -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["norm_grad", "norm_grad, sparse", "given", "given with its gradient"])
def test_gradcheck(how):
    x, *tables = embedding_inputs((5, 4, 3, 2))
    constant = functional.norm_factored(tables[0].T, *tables[1:3], 0.7)

    def layer(weight, lora_A, lora_B, magnitude, scaling):
        if how.startswith("norm_grad"):
            options = {"norm_grad": True, "sparse": how.endswith("sparse")}
        else:
            norm = functional.norm_factored(weight.T, lora_A, lora_B, scaling, norm_grad=True)
            options = {"weight_norm": constant if how == "given" else norm}
        return functional.dora_embedding(x, weight, lora_A, lora_B, magnitude, scaling=scaling, **options)

    args = (*table(tables), torch.tensor(0.7, dtype=torch.float64, requires_grad=True))
    assert torch.autograd.gradcheck(layer, args, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(layer, args, check_fwd_over_rev=True, check_batched_grad=True)


@pytest.mark.parametrize("backend", [None, pytest.param("inductor", marks=pytest.mark.full)])
@pytest.mark.parametrize("options", [{"padding_idx": -1}, {"scale_grad_by_freq": True}, {"sparse": True}])
def test_norm_grad_reaches_every_column(options, backend):
    """Padding, frequencies and sparse concern the lookup's part of the gradient: none is sparse."""
    x, *tables = embedding_inputs(SHAPES["odd"])
    alone, whole = table(tables), table(tables)
    functional.dora_embedding(x, *alone, scaling=0.7, **options | {"sparse": False}).square().sum().backward()
    function = compiled(functional.dora_embedding, backend) if backend else functional.dora_embedding
    function(x, *whole, scaling=0.7, norm_grad=True, **options).square().sum().backward()
    # The norm's part is that of the plain lookup.
    plain = [table(tables) for _ in range(2)]
    for leaves, norm_grad in zip(plain, (False, True), strict=True):
        reference.dora_embedding(x, *leaves, scaling=0.7, norm_grad=norm_grad).square().sum().backward()
    for leaf, without, one, other in zip(whole, alone, *reversed(plain), strict=True):
        assert leaf.grad.layout == torch.strided
        torch.testing.assert_close(leaf.grad, without.grad + one.grad - other.grad)
    assert whole[1].grad.count_nonzero() == whole[1].numel()


# --- the norm --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_memory_of_the_norm(dtype):
    """A tall table: beyond it the norm takes its budget, the rounded-up last buffer and what is summed in float64."""
    vocab, dim, rank = 16384, 1024, 16
    weight = torch.randn(vocab, dim).to(dtype)
    lora_A, lora_B = torch.randn(rank, vocab) * 0.01, torch.randn(dim, rank)
    peak = peak_bytes(lambda: functional.norm_factored(weight.T, lora_A, lora_B, 0.7, budget=EMBEDDING_BUDGET))
    assert EMBEDDING_BUDGET // 2 <= peak <= EMBEDDING_BUDGET + 2**20 < weight.nbytes


@pytest.mark.full
@pytest.mark.parametrize(
    ("vocab", "dim", "dtype"), [(50_000, 768, torch.float32), (50_000, 768, torch.bfloat16), (262_144, 4096, None)]
)
def test_norm_beside_pefts(vocab, dim, dtype):
    """Peak memory and time of the norm of a table, printed with ``-s``; PEFT's way is too large for the last one."""
    peft_dora = pytest.importorskip("peft.tuners.lora.dora")
    rank, theirs = 16, dtype is not None
    dtype = dtype or torch.bfloat16
    weight = torch.randn(vocab, dim, dtype=dtype)
    lora_A, lora_B = torch.randn(rank, vocab) * 0.01, torch.randn(dim, rank)
    layer = peft_dora.DoraEmbeddingLayer(fan_in_fan_out=True)

    def dense():
        lora_weight = layer.get_lora_weight(lora_A=lora_A.T, lora_B=lora_B.T)
        return layer.get_weight_norm(weight, lora_weight, 0.7)

    def factored():
        return functional.norm_factored(weight.T, lora_A, lora_B, 0.7, budget=EMBEDDING_BUDGET)

    measured = {}
    for name, function in (("dorac", factored), ("PEFT", dense))[: 1 + theirs]:
        peak, times = peak_bytes(function), []
        for _ in range(5):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
        measured[name] = peak
        print(
            f"\n{vocab} x {dim} {dtype}, r = {rank}, {name}: {peak / 2**20:.1f} MiB, {min(times) * 1e3:.0f} ms", end=""
        )
    print()
    assert measured["dorac"] <= EMBEDDING_BUDGET + 2**20
    if theirs:
        assert measured["PEFT"] >= weight.nbytes
        assert ((factored() - dense()).abs() <= 2e-2 * factored()).all()  # PEFT's norm is rounded as its table is


# --- what is refused -------------------------------------------------------------------------------------------------


REFUSED = {
    "x_float": ({"x": torch.ones(3)}, TypeError, "x must hold int64 or int32 indices, got torch.float32"),
    "x_bool": ({"x": torch.ones(3).bool()}, TypeError, "x must hold int64 or int32 indices, got torch.bool"),
    "x_list": ({"x": [0, 1]}, TypeError, "x must be a tensor of indices, got list"),
    "x_device": ({"x": torch.zeros(3, dtype=torch.int64, device="meta")}, ValueError, "x must be on cpu like weight"),
    "weight_1d": ({"weight": torch.ones(6)}, ValueError, r"weight must be \[vocab, dim\], got shape \[6\]"),
    "weight_int8": ({"weight": torch.ones(6, 4).char()}, TypeError, "weight must be .*got torch.int8; dequantise"),
    "A_layout": (
        {"lora_A": torch.ones(6, 3)},
        ValueError,
        r"lora_A must be \[r, vocab\] = \[r, 6\] .*lora_embedding_A as stored, not its transpose\), got shape \[6, 3\]",
    ),
    "B_layout": (
        {"lora_B": torch.ones(3, 4)},
        ValueError,
        r"lora_B must be \[dim, r\] = \[4, r\] .*lora_embedding_B as stored, not its transpose\), got shape \[3, 4\]",
    ),
    "A_rank_0": ({"lora_A": torch.ones(0, 6)}, ValueError, "lora_A must have a rank of at least 1"),
    "B_rank": ({"lora_B": torch.ones(4, 2)}, ValueError, r"lora_B must be \[out, r\] = \[4, 3\] .*got \[4, 2\]"),
    "B_dtype": ({"lora_B": torch.ones(4, 3).half()}, TypeError, "lora_A and lora_B must share a dtype"),
    "B_device": ({"lora_B": torch.ones(4, 3, device="meta")}, ValueError, "lora_B must be on cpu"),
    "magnitude_length": ({"magnitude": torch.ones(6)}, ValueError, r"magnitude must be \[out\] = \[4\]"),
    "norm_length": ({"weight_norm": torch.ones(6)}, ValueError, r"weight_norm must be \[out\] = \[4\]"),
    "scaling_nan": ({"scaling": float("nan")}, ValueError, "scaling must be finite in float32, got nan"),
    "budget_zero": ({"budget": 0}, ValueError, "budget must be at least one byte, got 0"),
    "padding_high": ({"padding_idx": 6}, ValueError, r"padding_idx must be in \[-6, 6\), got 6"),
    "padding_low": ({"padding_idx": -7}, ValueError, r"padding_idx must be in \[-6, 6\), got -7"),
    "padding_float": ({"padding_idx": 1.0}, TypeError, "padding_idx must be an integer or None, got 1.0"),
    "sparse_and_freq": (
        {"sparse": True, "scale_grad_by_freq": True},
        ValueError,
        "sparse must be False with scale_grad_by_freq",
    ),
}


def call(function, **changes):
    names = ("x", *NAMES)
    arguments = dict(zip(names, embedding_inputs((5, 6, 4, 3), dtype=torch.float32), strict=True))
    return function(**arguments | {"scaling": 0.7} | changes)


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("use_compile", [False, True])
def test_bad_input(case, use_compile):
    changes, error, message = REFUSED[case]
    function = functional.dora_embedding
    if use_compile:
        function = torch.compile(function, backend="eager")
    with pytest.raises(error, match=message):
        call(function, **changes)


@pytest.mark.parametrize("case", REFUSED)
def test_fullgraph_keeps_the_sentence(case):
    changes, _, message = REFUSED[case]
    with pytest.raises(torch._dynamo.exc.TorchDynamoException, match=message):
        call(compiled(functional.dora_embedding, "eager"), **changes)


@pytest.mark.parametrize("index", [6, -1])
@pytest.mark.parametrize("backend", [None, "eager", "aot_eager"])
def test_an_index_out_of_range_is_torchs_error(index, backend):
    x = torch.tensor([0, index])
    with pytest.raises(IndexError, match="index out of range in self"):
        F.embedding(x, torch.ones(6, 4))
    function = compiled(functional.dora_embedding, backend) if backend else functional.dora_embedding
    with pytest.raises(IndexError, match="index out of range in self"):
        call(function, x=x)
