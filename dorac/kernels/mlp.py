"""What joins the layers of an MLP on CUDA: ``z = act(gate) * up`` over their products; backward is in mlp_backward.py.

``inner = base + s h lora_B^T`` of either layer, as ``kernels/compose.py`` has it, is rounded to the activations' dtype,
in training written over base and kept. Everything is computed of the rounded inner in float32, ``gate = g * inner + b``
and ``up`` without another rounding.

Without a gate ``z = act(up)``. A pointer that is None stands for what there is not: the gate, a magnitude (g = 1), a
bias, factors. Where ``BLOCK_R`` is 0, products with factors are cuBLAS's, and base is inner already.

Legend: T tokens, O features between the layers, R rank.
"""

import functools

import triton
import triton.language as tl

from dorac.kernels.configs import MlpConfig
from dorac.kernels.launch import Launch, cdiv
from dorac.kernels.tiles import load_tile, magnitude_scale, number, product, store_tile, to_bfloat16


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
def rounded(x, like_ptr):
    if like_ptr.dtype.element_ty == tl.bfloat16:
        return to_bfloat16(x)
    else:
        return x.to(like_ptr.dtype.element_ty)


@triton.jit
def scale_of(magnitude_ptr, norm_ptr, cols_O, mask_O):
    if magnitude_ptr is None:
        return tl.full(cols_O.shape, 1.0, tl.float32)
    else:
        return magnitude_scale(magnitude_ptr, norm_ptr, cols_O, mask_O, True)


@triton.jit
def bias_of(bias_ptr, cols_O, mask_O):
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
        inner_TO = rounded(base_TO.to(tl.float32) + number(scaling_ptr) * acc_TO, base_ptr)
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
    g_up_O, bias_up_O = scale_of(m_up_ptr, n_up_ptr, cols_O, mask_O), bias_of(bias_up_ptr, cols_O, mask_O)
    if gate_ptr is not None:
        g_O, bias_O = scale_of(m_gate_ptr, n_gate_ptr, cols_O, mask_O), bias_of(bias_gate_ptr, cols_O, mask_O)
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
        store_tile(z_ptr, rounded(z_TO, z_ptr), start, start_o, T, O, BLOCK_T, BLOCK_O, EVEN, False)


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
