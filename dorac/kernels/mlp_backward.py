"""What joins the layers of an MLP on CUDA, backward: of the rounded inner that forward wrote (``kernels/mlp.py``).

gate and up are what they were there, without another rounding: this differentiates what forward computed. No magnitude
is too small for its gradient, which is taken of inner. Partial sums are added in a fixed order by a second kernel.

Legend: T tokens, O features between the layers, R rank, S strips of rows, K rows of partial sums.
"""

import functools

import triton
import triton.language as tl

from dorac.kernels.configs import MlpBackwardConfig
from dorac.kernels.launch import Launch, cdiv
from dorac.kernels.mlp import activated, bias_of, rounded, scale_of
from dorac.kernels.tiles import ZERO_ROW_NORM, load_tile, number, product, store_tile, strip_sum

HEAD = 4  # rows of partial sums: of the magnitudes of gate and up, and of their biases
_HEAD = tl.constexpr(HEAD)


@triton.jit
def _tiles(
    dz_ptr, up_ptr, gate_ptr, start_t, start_o, T, O, BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, EVEN: tl.constexpr
):
    dz_TO = load_tile(dz_ptr, start_t, start_o, T, O, O, 1, BLOCK_T, BLOCK_O, EVEN, False)
    up_TO = load_tile(up_ptr, start_t, start_o, T, O, O, 1, BLOCK_T, BLOCK_O, EVEN, False)
    if gate_ptr is None:
        return dz_TO, up_TO, up_TO
    else:
        return dz_TO, up_TO, load_tile(gate_ptr, start_t, start_o, T, O, O, 1, BLOCK_T, BLOCK_O, EVEN, False)


@triton.jit
def mlp_backward_kernel(
    dz_ptr,  # contiguous, as all activations here
    up_ptr,  # inner of either layer
    gate_ptr,
    m_gate_ptr,
    n_gate_ptr,
    bias_gate_ptr,
    m_up_ptr,
    n_up_ptr,
    bias_up_ptr,
    h_ptr,  # [T, RG + RU]
    d_h_ptr,  # [T, RD], of down's low-rank branch
    d_gate_ptr,  # of the product x W^T
    d_up_ptr,  # may be dz
    z_ptr,  # may be dz
    parts_ptr,
    T,
    O,
    RG,
    RU,
    RD,
    rows_per_program,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
    EVEN: tl.constexpr,
    EVEN_R: tl.constexpr,
    LOW_GATE: tl.constexpr,  # lora_B's gradient is taken along
    LOW_UP: tl.constexpr,
    SUM_GATE: tl.constexpr,  # so is the bias's
    SUM_UP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The gradients of both products, z where it is wanted, and partial sums ``[S, K, O]``.

    The K rows are four of magnitudes and biases (:data:`HEAD`), and what is taken along of the gradients of gate's and
    up's lora_B and down's lora_A, rank by rank: of tiles that are here already.

    Triton's pipeline does not load ahead what reaches a product through registers alone; where there are products, the
    tiles of the next step are asked for by hand. The first rows are asked for twice.
    """
    start_o = tl.program_id(0) * BLOCK_O
    strip = tl.program_id(1)
    cols_O = start_o + tl.arange(0, BLOCK_O)
    mask_O = cols_O < O
    g_up_O, b_up_O = scale_of(m_up_ptr, n_up_ptr, cols_O, mask_O), bias_of(bias_up_ptr, cols_O, mask_O)
    if gate_ptr is not None:
        g_gate_O, b_gate_O = scale_of(m_gate_ptr, n_gate_ptr, cols_O, mask_O), bias_of(bias_gate_ptr, cols_O, mask_O)
    if m_gate_ptr is not None:
        m_gate_TO = tl.zeros([BLOCK_T, BLOCK_O], dtype=tl.float32)
    if m_up_ptr is not None:
        m_up_TO = tl.zeros([BLOCK_T, BLOCK_O], dtype=tl.float32)
    if SUM_GATE:
        sum_gate_TO = tl.zeros([BLOCK_T, BLOCK_O], dtype=tl.float32)
    if SUM_UP:
        sum_up_TO = tl.zeros([BLOCK_T, BLOCK_O], dtype=tl.float32)
    if LOW_GATE:
        d_b_gate_OR = tl.zeros([BLOCK_O, BLOCK_R], dtype=tl.float32)
    if LOW_UP:
        d_b_up_OR = tl.zeros([BLOCK_O, BLOCK_R], dtype=tl.float32)
    if d_h_ptr is not None:
        d_a_OR = tl.zeros([BLOCK_O, BLOCK_R], dtype=tl.float32)
    begin = strip * rows_per_program
    rows = tl.minimum(rows_per_program, T - begin)
    if BLOCK_R:
        start = begin + (tl.cdiv(rows, BLOCK_T) - 1) * BLOCK_T
        tiles = _tiles(dz_ptr, up_ptr, gate_ptr, start, start_o, T, O, BLOCK_T, BLOCK_O, EVEN)
    for done in tl.range(0, rows, BLOCK_T, num_stages=STAGES):
        start = begin + (tl.cdiv(rows - done, BLOCK_T) - 1) * BLOCK_T
        if BLOCK_R:
            dz_TO, inner_up_TO, inner_TO = tiles
            before = tl.maximum(start - BLOCK_T, begin)
            tiles = _tiles(dz_ptr, up_ptr, gate_ptr, before, start_o, T, O, BLOCK_T, BLOCK_O, EVEN)
        else:
            dz_TO, inner_up_TO, inner_TO = _tiles(
                dz_ptr, up_ptr, gate_ptr, start, start_o, T, O, BLOCK_T, BLOCK_O, EVEN
            )
        dz_TO, inner_up_TO, inner_TO = dz_TO.to(tl.float32), inner_up_TO.to(tl.float32), inner_TO.to(tl.float32)
        if d_h_ptr is not None:
            d_h_TR = load_tile(d_h_ptr, start, 0, T, RD, RD, 1, BLOCK_T, BLOCK_R, EVEN and EVEN_R, False)
        up_TO = g_up_O[None, :] * inner_up_TO + b_up_O[None, :]
        if gate_ptr is not None:
            act_TO, slope_TO = activated(g_gate_O[None, :] * inner_TO + b_gate_O[None, :], ACTIVATION)
            z_TO = act_TO * up_TO
            d_TO = dz_TO * up_TO * slope_TO
            if m_gate_ptr is not None:
                m_gate_TO += d_TO * inner_TO
            if SUM_GATE:
                sum_gate_TO += d_TO
            d_TO = rounded(g_gate_O[None, :] * d_TO, d_gate_ptr)
            store_tile(d_gate_ptr, d_TO, start, start_o, T, O, BLOCK_T, BLOCK_O, EVEN, False)
            if LOW_GATE:
                h_TR = load_tile(h_ptr, start, 0, T, RG, RG + RU, 1, BLOCK_T, BLOCK_R, EVEN and EVEN_R, False)
                d_b_gate_OR = product(d_TO.T, h_TR, d_b_gate_OR, False)
        else:
            z_TO, act_TO = activated(up_TO, ACTIVATION)
        d_TO = dz_TO * act_TO
        if m_up_ptr is not None:
            m_up_TO += d_TO * inner_up_TO
        if SUM_UP:
            sum_up_TO += d_TO
        d_TO = rounded(g_up_O[None, :] * d_TO, d_up_ptr)
        store_tile(d_up_ptr, d_TO, start, start_o, T, O, BLOCK_T, BLOCK_O, EVEN, False)
        if LOW_UP:
            h_TR = load_tile(h_ptr + RG, start, 0, T, RU, RG + RU, 1, BLOCK_T, BLOCK_R, EVEN and EVEN_R, False)
            d_b_up_OR = product(d_TO.T, h_TR, d_b_up_OR, False)
        z_TO = rounded(z_TO, up_ptr)
        if z_ptr is not None:
            store_tile(z_ptr, z_TO, start, start_o, T, O, BLOCK_T, BLOCK_O, EVEN, False)
        if d_h_ptr is not None:
            d_a_OR = product(z_TO.T, d_h_TR, d_a_OR, False)
    row = strip.to(tl.int64) * (_HEAD + _taken(RG, LOW_GATE) + _taken(RU, LOW_UP) + _taken(RD, d_h_ptr is not None))
    parts_ptr += row * O
    if m_gate_ptr is not None:
        tl.store(parts_ptr + cols_O, tl.sum(m_gate_TO, axis=0), mask=mask_O)
    if m_up_ptr is not None:
        tl.store(parts_ptr + O + cols_O, tl.sum(m_up_TO, axis=0), mask=mask_O)
    if SUM_GATE:
        tl.store(parts_ptr + 2 * O + cols_O, tl.sum(sum_gate_TO, axis=0), mask=mask_O)
    if SUM_UP:
        tl.store(parts_ptr + 3 * O + cols_O, tl.sum(sum_up_TO, axis=0), mask=mask_O)
    parts_ptr += _HEAD * O
    if LOW_GATE:
        _store_ranks(parts_ptr, d_b_gate_OR, cols_O, mask_O, O, RG, BLOCK_R)
        parts_ptr += RG * O
    if LOW_UP:
        _store_ranks(parts_ptr, d_b_up_OR, cols_O, mask_O, O, RU, BLOCK_R)
        parts_ptr += RU * O
    if d_h_ptr is not None:
        _store_ranks(parts_ptr, d_a_OR, cols_O, mask_O, O, RD, BLOCK_R)


@triton.jit
def _taken(R, ALONG: tl.constexpr):
    return R if ALONG else 0


@triton.jit
def _store_ranks(parts_ptr, tile_OR, cols_O, mask_O, O, R, BLOCK_R: tl.constexpr):
    ranks_R = tl.arange(0, BLOCK_R)
    tl.store(parts_ptr + ranks_R[None, :] * O + cols_O[:, None], tile_OR, mask=mask_O[:, None] & (ranks_R < R)[None, :])


@triton.jit
def _of_magnitude(parts_ptr, norm_ptr, d_m_ptr, cols_O, mask_O, size, strips):
    total_O = strip_sum(parts_ptr, cols_O, mask_O, size, strips)
    norm_O = tl.load(norm_ptr + cols_O, mask=mask_O, other=1.0).to(tl.float32)
    d_m_O = tl.where(norm_O <= ZERO_ROW_NORM, 0.0, total_O / norm_O)
    tl.store(d_m_ptr + cols_O, rounded(d_m_O, d_m_ptr), mask=mask_O)


@triton.jit
def _of_bias(parts_ptr, d_bias_ptr, cols_O, mask_O, size, strips):
    total_O = strip_sum(parts_ptr, cols_O, mask_O, size, strips)
    tl.store(d_bias_ptr + cols_O, rounded(total_O, d_bias_ptr), mask=mask_O)


@triton.jit
def _of_factor(parts_ptr, scaling, d_ptr, start_o, O, R, stride_r, stride_o, size, strips, BLOCK_O: tl.constexpr):
    cols_O = start_o + tl.arange(0, BLOCK_O)
    for start_r in range(0, R, 16):
        ranks_R = start_r + tl.arange(0, 16)
        mask_RO = (ranks_R < R)[:, None] & (cols_O < O)[None, :]
        total_RO = scaling * strip_sum(parts_ptr, ranks_R[:, None] * O + cols_O[None, :], mask_RO, size, strips)
        pointers = d_ptr + ranks_R[:, None] * stride_r + cols_O[None, :] * stride_o
        tl.store(pointers, rounded(total_RO, d_ptr), mask=mask_RO)


@triton.jit
def mlp_sum_kernel(
    parts_ptr,
    n_gate_ptr,
    n_up_ptr,
    scaling_gate_ptr,  # or numbers
    scaling_up_ptr,
    d_m_gate_ptr,
    d_m_up_ptr,
    d_bias_gate_ptr,
    d_bias_up_ptr,
    d_b_gate_ptr,  # contiguous
    d_b_up_ptr,
    d_a_ptr,
    O,
    RG,
    RU,
    RD,
    strips,
    BLOCK_O: tl.constexpr,
):
    """Adds up the strips of the kernel above; what there is no pointer for was not taken along."""
    start_o = tl.program_id(0) * BLOCK_O
    part = tl.program_id(1)
    cols_O = start_o + tl.arange(0, BLOCK_O)
    mask_O = cols_O < O
    ranks = _taken(RG, d_b_gate_ptr is not None) + _taken(RU, d_b_up_ptr is not None) + _taken(RD, d_a_ptr is not None)
    size = tl.cast(O, tl.int64) * (_HEAD + ranks)
    if part == 0:
        if d_m_gate_ptr is not None:
            _of_magnitude(parts_ptr, n_gate_ptr, d_m_gate_ptr, cols_O, mask_O, size, strips)
        if d_m_up_ptr is not None:
            _of_magnitude(parts_ptr + O, n_up_ptr, d_m_up_ptr, cols_O, mask_O, size, strips)
        if d_bias_gate_ptr is not None:
            _of_bias(parts_ptr + 2 * O, d_bias_gate_ptr, cols_O, mask_O, size, strips)
        if d_bias_up_ptr is not None:
            _of_bias(parts_ptr + 3 * O, d_bias_up_ptr, cols_O, mask_O, size, strips)
    parts_ptr += _HEAD * O
    if d_b_gate_ptr is not None:
        if part == 1:
            s = number(scaling_gate_ptr)
            _of_factor(parts_ptr, s, d_b_gate_ptr, start_o, O, RG, 1, RG, size, strips, BLOCK_O)
        parts_ptr += RG * O
    if d_b_up_ptr is not None:
        if part == 2:
            s = number(scaling_up_ptr)
            _of_factor(parts_ptr, s, d_b_up_ptr, start_o, O, RU, 1, RU, size, strips, BLOCK_O)
        parts_ptr += RU * O
    if d_a_ptr is not None:  # noqa: SIM102 (the compiler's to answer)
        if part == 3:
            _of_factor(parts_ptr, 1.0, d_a_ptr, start_o, O, RD, O, 1, size, strips, BLOCK_O)


@functools.lru_cache(maxsize=4096)
def mlp_backward_launches(
    tokens: int,
    features: int,
    ranks: tuple[int, int, int],
    along: tuple[bool, bool, bool],
    sums: tuple[bool, bool],
    activation: str,
    config: MlpBackwardConfig,
) -> tuple[tuple[int, int, int], Launch, Launch]:
    """The shape of the partial sums, the launch, and the one that adds them up.

    Tensors of the first: dz, inner of up and gate, magnitude, norm and bias of gate and of up, h, d_h, d_gate, d_up,
    z, the partial sums. Of the second: these, norms of gate and up, scalings of gate and up, the gradients of
    magnitude of gate and up, of their biases, their lora_B, and down's lora_A.

    Args:
        ranks: of gate, up and down, 0 without factors.
        along: whether the gradients of gate's and up's lora_B and of down's lora_A are taken along; each rank at most
            ``config.block_r``.
        sums: whether the biases of gate and up have gradients.
    """
    assert not any(rank > config.block_r for rank, taken in zip(ranks, along, strict=True) if taken)
    strips = cdiv(tokens, config.rows)
    launch = Launch(
        mlp_backward_kernel,
        (cdiv(features, config.block_o), strips, 1),
        (tokens, features, *ranks, config.rows),
        config.warps,
        BLOCK_T=config.block_t,
        BLOCK_O=config.block_o,
        BLOCK_R=config.block_r,
        EVEN=not (tokens % config.block_t or features % config.block_o),
        EVEN_R=all(rank == config.block_r for rank, taken in zip(ranks, along, strict=True) if taken),
        LOW_GATE=along[0],
        LOW_UP=along[1],
        SUM_GATE=sums[0],
        SUM_UP=sums[1],
        ACTIVATION=activation,
        STAGES=config.stages,
    )
    rows = HEAD + sum(rank for rank, taken in zip(ranks, along, strict=True) if taken)
    grid = cdiv(features, 64), 4 if any(along) else 1, 1
    return (strips, rows, features), launch, Launch(mlp_sum_kernel, grid, (features, *ranks, strips), 4, BLOCK_O=64)
