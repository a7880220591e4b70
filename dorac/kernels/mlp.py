"""What joins the layers of an MLP on CUDA: ``z = act(gate) * up``, forward and backward, over their products.

``inner = base + s h lora_B^T`` of either layer, as ``kernels/compose.py`` has it, is rounded to the activations' dtype,
in training written over base and kept. Everything is computed of the rounded inner in float32, ``gate = g * inner + b``
and ``up`` without another rounding, and so it is again in backward: that differentiates what forward computed. No
magnitude is too small for its gradient, which is taken of inner.

Without a gate ``z = act(up)``. A pointer that is None stands for what there is not: the gate, a magnitude (g = 1), a
bias, factors. Where ``BLOCK_R`` is 0, products with factors are cuBLAS's, and base is inner already.

Legend: T tokens, O features between the layers, R rank, S strips of rows, K rows of partial sums.
"""

import functools

import triton
import triton.language as tl

from dorac.kernels.configs import MlpBackwardConfig, MlpConfig
from dorac.kernels.launch import Launch, cdiv
from dorac.kernels.tiles import load_tile, magnitude_scale, number, product, store_tile, strip_sum, to_bfloat16

HEAD = 4  # rows of partial sums: of the magnitudes of gate and up, and of their biases
_HEAD = tl.constexpr(HEAD)


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    """``act(x)`` and its slope."""
    if ACTIVATION == "silu":
        sigmoid = tl.sigmoid(x)
        return x * sigmoid, sigmoid * (1 + x * (1 - sigmoid))
    elif ACTIVATION == "gelu":
        below = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        return x * below, below + x * (0.3989422804014327 * tl.exp(-0.5 * x * x))
    elif ACTIVATION == "gelu_tanh":  # 1 + tanh(u) = 2 sigmoid(2 u)
        square = x * x
        sigmoid = tl.sigmoid(1.5957691216057308 * x * (1 + 0.044715 * square))
        slope = 1.5957691216057308 * (1 + 0.134145 * square)
        return x * sigmoid, sigmoid + x * slope * (sigmoid * (1 - sigmoid))
    else:  # relu, which passes NaN on
        return tl.where(x <= 0, 0.0, x), tl.where(x <= 0, 0.0, 1.0)


@triton.jit
def _rounded(x, like_ptr):
    if like_ptr.dtype.element_ty == tl.bfloat16:
        return to_bfloat16(x)
    else:
        return x.to(like_ptr.dtype.element_ty)


@triton.jit
def _scale(magnitude_ptr, norm_ptr, cols_O, mask_O):
    if magnitude_ptr is None:
        return tl.full(cols_O.shape, 1.0, tl.float32)
    else:
        return magnitude_scale(magnitude_ptr, norm_ptr, cols_O, mask_O, True)


@triton.jit
def _bias(bias_ptr, cols_O, mask_O):
    if bias_ptr is None:
        return tl.zeros(cols_O.shape, tl.float32)
    else:
        return tl.load(bias_ptr + cols_O, mask=mask_O, other=0.0).to(tl.float32)


@triton.jit
def _inner(
    base_TO,
    base_ptr,
    h_ptr,
    b_OR,  # or None
    scaling_ptr,
    start_t,
    start_o,
    T,
    O,
    R,
    stride_ht,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
    EVEN: tl.constexpr,
    EVEN_R: tl.constexpr,
    WANT_INNER: tl.constexpr,
):
    """inner as it is rounded, with WANT_INNER written over base."""
    if b_OR is None:
        return base_TO.to(tl.float32)
    else:
        h_TR = load_tile(h_ptr, start_t, 0, T, R, stride_ht, 1, BLOCK_T, BLOCK_R, EVEN and EVEN_R, False)
        acc_TO = product(h_TR, b_OR.T, tl.zeros([BLOCK_T, BLOCK_O], dtype=tl.float32), False)
        inner_TO = _rounded(base_TO.to(tl.float32) + number(scaling_ptr) * acc_TO, base_ptr)
        if WANT_INNER:
            store_tile(base_ptr, inner_TO, start_t, start_o, T, O, BLOCK_T, BLOCK_O, EVEN, False)
        return inner_TO.to(tl.float32)


@triton.jit
def mlp_kernel(
    up_ptr,  # x W^T of either layer, contiguous
    gate_ptr,
    h_ptr,  # [T, RG + RU], beside each other
    b_gate_ptr,
    b_up_ptr,
    m_gate_ptr,
    n_gate_ptr,
    bias_gate_ptr,
    m_up_ptr,
    n_up_ptr,
    bias_up_ptr,
    scaling_gate_ptr,  # or numbers
    scaling_up_ptr,
    z_ptr,  # may be base
    T,
    O,
    RG,
    RU,
    rows_per_program,
    stride_bgo,
    stride_bgr,
    stride_buo,
    stride_bur,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
    EVEN: tl.constexpr,  # no tile of activations reaches over an edge
    EVEN_R: tl.constexpr,  # nor one of h that is within its rows
    WANT_INNER: tl.constexpr,
    ACTIVATION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A program walks down its rows: what belongs to its columns, lora_B and g, it reads once."""
    start_o = tl.program_id(0) * BLOCK_O
    cols_O = start_o + tl.arange(0, BLOCK_O)
    mask_O = cols_O < O
    begin = tl.program_id(1) * rows_per_program
    rows = tl.minimum(rows_per_program, T - begin)

    b_up_OR = None
    b_gate_OR = None
    if BLOCK_R and b_up_ptr is not None:
        b_up_OR = load_tile(
            b_up_ptr, start_o, 0, O, RU, stride_buo, stride_bur, BLOCK_O, BLOCK_R, EVEN and EVEN_R, False
        )
    if BLOCK_R and b_gate_ptr is not None:
        b_gate_OR = load_tile(
            b_gate_ptr, start_o, 0, O, RG, stride_bgo, stride_bgr, BLOCK_O, BLOCK_R, EVEN and EVEN_R, False
        )
    g_up_O, bias_up_O = _scale(m_up_ptr, n_up_ptr, cols_O, mask_O), _bias(bias_up_ptr, cols_O, mask_O)
    if gate_ptr is not None:
        g_O, bias_O = _scale(m_gate_ptr, n_gate_ptr, cols_O, mask_O), _bias(bias_gate_ptr, cols_O, mask_O)
    for done in tl.range(0, rows, BLOCK_T, num_stages=STAGES):
        start = begin + done
        up_TO = load_tile(up_ptr, start, start_o, T, O, O, 1, BLOCK_T, BLOCK_O, EVEN, False)
        if gate_ptr is not None:
            gate_TO = load_tile(gate_ptr, start, start_o, T, O, O, 1, BLOCK_T, BLOCK_O, EVEN, False)
            inner_TO = _inner(
                gate_TO,
                gate_ptr,
                h_ptr,
                b_gate_OR,
                scaling_gate_ptr,
                start,
                start_o,
                T,
                O,
                RG,
                RG + RU,
                BLOCK_T,
                BLOCK_O,
                BLOCK_R,
                EVEN,
                EVEN_R,
                WANT_INNER,
            )
            act_TO, _ = activated(g_O[None, :] * inner_TO + bias_O[None, :], ACTIVATION)
        inner_TO = _inner(
            up_TO,
            up_ptr,
            h_ptr + RG if BLOCK_R else None,
            b_up_OR,
            scaling_up_ptr,
            start,
            start_o,
            T,
            O,
            RU,
            RG + RU,
            BLOCK_T,
            BLOCK_O,
            BLOCK_R,
            EVEN,
            EVEN_R,
            WANT_INNER,
        )
        z_TO = g_up_O[None, :] * inner_TO + bias_up_O[None, :]
        if gate_ptr is None:
            z_TO, _ = activated(z_TO, ACTIVATION)
        else:
            z_TO *= act_TO
        store_tile(z_ptr, _rounded(z_TO, z_ptr), start, start_o, T, O, BLOCK_T, BLOCK_O, EVEN, False)


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
    g_up_O, b_up_O = _scale(m_up_ptr, n_up_ptr, cols_O, mask_O), _bias(bias_up_ptr, cols_O, mask_O)
    if gate_ptr is not None:
        g_gate_O, b_gate_O = _scale(m_gate_ptr, n_gate_ptr, cols_O, mask_O), _bias(bias_gate_ptr, cols_O, mask_O)
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
            d_TO = _rounded(g_gate_O[None, :] * d_TO, d_gate_ptr)
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
        d_TO = _rounded(g_up_O[None, :] * d_TO, d_up_ptr)
        store_tile(d_up_ptr, d_TO, start, start_o, T, O, BLOCK_T, BLOCK_O, EVEN, False)
        if LOW_UP:
            h_TR = load_tile(h_ptr + RG, start, 0, T, RU, RG + RU, 1, BLOCK_T, BLOCK_R, EVEN and EVEN_R, False)
            d_b_up_OR = product(d_TO.T, h_TR, d_b_up_OR, False)
        z_TO = _rounded(z_TO, up_ptr)
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
    d_m_O = tl.where(norm_O <= 1e-12, 0.0, total_O / norm_O)
    tl.store(d_m_ptr + cols_O, _rounded(d_m_O, d_m_ptr), mask=mask_O)


@triton.jit
def _of_bias(parts_ptr, d_bias_ptr, cols_O, mask_O, size, strips):
    total_O = strip_sum(parts_ptr, cols_O, mask_O, size, strips)
    tl.store(d_bias_ptr + cols_O, _rounded(total_O, d_bias_ptr), mask=mask_O)


@triton.jit
def _of_factor(parts_ptr, scaling, d_ptr, start_o, O, R, stride_r, stride_o, size, strips, BLOCK_O: tl.constexpr):
    cols_O = start_o + tl.arange(0, BLOCK_O)
    for start_r in range(0, R, 16):
        ranks_R = start_r + tl.arange(0, 16)
        mask_RO = (ranks_R < R)[:, None] & (cols_O < O)[None, :]
        total_RO = scaling * strip_sum(parts_ptr, ranks_R[:, None] * O + cols_O[None, :], mask_RO, size, strips)
        pointers = d_ptr + ranks_R[:, None] * stride_r + cols_O[None, :] * stride_o
        tl.store(pointers, _rounded(total_RO, d_ptr), mask=mask_RO)


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
def mlp_launch(
    tokens: int,
    features: int,
    ranks: tuple[int, int],
    strides: tuple[tuple[int, int], tuple[int, int]],
    activation: str,
    config: MlpConfig,
    *,
    want_inner: bool,
) -> Launch:
    """The launch for ranks of gate and up, 0 without factors, and strides of their lora_B.

    Its tensors: the products of up and gate, h, lora_B of gate and up, magnitude, norm and bias of gate and of up,
    scalings of gate and up, z.
    """
    assert not config.block_r or max(ranks) <= config.block_r
    return Launch(
        mlp_kernel,
        (cdiv(features, config.block_o), cdiv(tokens, config.rows), 1),
        (tokens, features, *ranks, config.rows, *strides[0], *strides[1]),
        config.warps,
        BLOCK_T=config.block_t,
        BLOCK_O=config.block_o,
        BLOCK_R=config.block_r,
        EVEN=not (tokens % config.block_t or features % config.block_o),
        EVEN_R=not (config.block_r and any(rank % config.block_r for rank in ranks)),
        WANT_INNER=want_inner,
        ACTIVATION=activation,
        STAGES=config.stages,
    )


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
