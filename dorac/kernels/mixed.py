"""Rows of different adapters over one base weight, on CUDA: ``y[i] = g_k * (base[i] + s_k h[i] lora_B_k^T) + b``.

Two launches beside the base product. The first makes ``h[i] = x[i] lora_A_k^T``, split over the inputs, since a few
rows would not keep the card busy otherwise; the second adds the splits up in their order, multiplies with lora_B and
ends with g, s and b, where the base product lies. Neither gathers a factor: a program takes a tile of rows that name
one adapter, and reads that adapter's factors where they are. Row -1 is ``base + b``.

How rows become tiles (FORM):

- "single": each token is a tile. Products are sums then, not the tensor cores' work, whose tiles have 16 rows.
- "counted": tokens of one adapter, up to BLOCK_T of them. So few tokens in all that a program of the first launch finds
  its own tile among them, and writes it down for the second.
- "long": BLOCK_T tokens of one row of the batch, which has many.
- "listed": as "counted", from a list that :func:`list_tiles` makes.

A tile's rows, and the order of every sum, depend on nothing but the index: two runs give the same bits. The host knows
no more than how many tiles there may be at most; programs past the last one end at once.

Legend: T tokens, L tokens of a row of the batch, O out_features, I in_features, R rank, K adapters, N tokens to count,
S splits of the inputs.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from dorac.kernels import target
from dorac.kernels.configs import MixedConfig, mixed_config
from dorac.kernels.launch import Launch, cdiv
from dorac.kernels.mixed_tiles import count_tile, known_tile, list_tiles, most_tiles, rank_of
from dorac.kernels.mixed_up import across_kernel, up_kernel
from dorac.kernels.tiles import product


@triton.jit
def down_kernel(
    x_ptr,
    a_ptr,
    index_ptr,
    ranks_ptr,  # or None
    tiles_ptr,  # int32 [tiles, 1 + BLOCK_T], an adapter and its tokens: "counted" writes, "listed" reads it
    partial_ptr,
    T,
    L,
    I,
    R,
    K,
    tiles_per_row,
    columns_per_split,
    stride_xt,
    stride_xi,
    stride_ak,
    stride_ar,
    stride_ai,
    FORM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,  # of "counted": all tokens, and all adapters and none
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,  # no tile reaches over the last input
    ROUND: tl.constexpr,  # lora_A to x's dtype, instead of x to lora_A's
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The sums over each range of inputs, ``partial[S, T, R]``; what is beyond an adapter's rank is not written."""
    tile, split, start_r = tl.program_id(0), tl.program_id(1), tl.program_id(2) * BLOCK_R
    if FORM == "counted":
        key, token_T = count_tile(index_ptr, tile, T, L, K, BLOCK_T, BLOCK_N, BLOCK_K)
        is_token_T = token_T >= 0
        if (split == 0) & (start_r == 0):
            tl.store(tiles_ptr + tile * (1 + BLOCK_T), key)
            tl.store(tiles_ptr + tile * (1 + BLOCK_T) + 1 + tl.arange(0, BLOCK_T), token_T)
    else:
        key, token_T, is_token_T = known_tile(index_ptr, tiles_ptr, tile, tiles_per_row, BLOCK_T, T, L, FORM, BLOCK_T)
        if FORM != "listed":
            tl.device_assert((key >= -1) & (key < K), "adapter_index is out of range")
    key = tl.maximum(key, -1)

    rank = rank_of(ranks_ptr, key, R)
    if start_r < rank:
        a_ptr += key.to(tl.int64) * stride_ak
        rank_R = start_r + tl.arange(0, BLOCK_R)
        rows_T = x_ptr + token_T.to(tl.int64)[:, None] * stride_xt
        rows_R = a_ptr + rank_R.to(tl.int64)[:, None] * stride_ar
        is_rank_R = (rank_R < rank) & (rank_R < R)
        begin = split * columns_per_split
        if BLOCK_T == 1:
            acc_RI = tl.zeros([BLOCK_R, BLOCK_I], dtype=tl.float32)
        else:
            acc_TR = tl.zeros([BLOCK_T, BLOCK_R], dtype=tl.float32)
        for start in tl.range(begin, tl.minimum(begin + columns_per_split, I), BLOCK_I, num_stages=STAGES):
            cols_I = (start + tl.arange(0, BLOCK_I)).to(tl.int64)[None, :]
            x_mask, a_mask = is_token_T[:, None], is_rank_R[:, None]
            if not EVEN:
                x_mask, a_mask = x_mask & (cols_I < I), a_mask & (cols_I < I)
            x_TI = tl.load(rows_T + cols_I * stride_xi, mask=x_mask, other=0.0)
            a_RI = tl.load(rows_R + cols_I * stride_ai, mask=a_mask, other=0.0)
            if ROUND:
                a_RI = a_RI.to(x_TI.dtype)
            else:
                x_TI = x_TI.to(a_RI.dtype)
            if BLOCK_T == 1:
                acc_RI += x_TI.to(tl.float32) * a_RI.to(tl.float32)
            else:
                acc_TR = product(x_TI, a_RI.T, acc_TR, SPLIT)
        if BLOCK_T == 1:
            acc_TR = tl.sum(acc_RI, axis=1)[None, :]
        target_TR = (split.to(tl.int64) * T + token_T)[:, None] * R + rank_R[None, :]
        tl.store(partial_ptr + target_TR, acc_TR, mask=is_token_T[:, None] & is_rank_R[None, :])


@functools.lru_cache(maxsize=4096)
def mixed_launches(
    batch: int,
    row_tokens: int,
    sizes: tuple[int, int, int, int],
    strides: tuple[tuple[int, ...], ...],
    config: MixedConfig,
    *,
    has_bias: bool,
    want_inner: bool,
    rounds: bool,
    splits_products: bool,
) -> tuple[int, Launch, Launch]:
    """How many splits the partial sums have, and the two launches.

    Args:
        sizes: of the stack: adapters, out, in, rank.
        strides: of x ``[T, in]``, lora_A, lora_B, and over the adapters those of magnitude, norm and scaling.
        rounds: the factors are rounded to the dtype of the activations. splits_products: see
            :func:`dorac.kernels.tiles.product`.
    """
    adapters, out_features, in_features, rank = sizes
    of_x, of_a, of_b, of_vectors = strides
    tokens = batch * row_tokens
    columns = max(1, cdiv(cdiv(in_features, config.block_i), config.splits)) * config.block_i
    splits = max(1, cdiv(in_features, columns))
    splits = 1 << (splits - 1).bit_length()  # a program past the last column has a sum of zero
    long, counted = config.form == "long", config.form == "counted"
    per_row = cdiv(row_tokens, config.block_t) if long else 1
    listed = tokens if config.form == "single" else most_tiles(tokens, adapters, config.block_t)
    down = Launch(
        down_kernel,
        (
            batch * per_row if long else listed,
            splits,
            cdiv(rank, config.block_r),
        ),
        (tokens, row_tokens, in_features, rank, adapters, per_row, columns, *of_x, *of_a),
        config.down_warps,
        asserts=True,
        FORM=config.form,
        BLOCK_T=config.block_t,
        BLOCK_I=config.block_i,
        BLOCK_R=config.block_r,
        BLOCK_N=max(16, 1 << (tokens - 1).bit_length()) if counted else 16,
        BLOCK_K=max(16, 1 << adapters.bit_length()) if counted else 16,
        EVEN=in_features % config.block_i == 0,
        ROUND=rounds,
        SPLIT=splits_products,
        STAGES=config.stages,
    )
    constants = {
        "BLOCK_O": config.block_o,
        "BLOCK_R": config.up_r,
        "CHUNKS": cdiv(rank, config.up_r),
        "SPLITS": splits,
        "EVEN": out_features % config.block_o == 0,
        "HAS_BIAS": has_bias,
        "WANT_INNER": want_inner,
        "ROUND": rounds,
        "SPLIT": splits_products,
    }
    if long:
        per_row = cdiv(row_tokens, config.rows)
        up = Launch(
            up_kernel,
            (batch * per_row, cdiv(out_features, config.block_o), 1),
            (tokens, row_tokens, out_features, rank, per_row, config.rows, *of_b, *of_vectors),
            config.up_warps,
            BLOCK_T=config.up_t,
            **constants,
        )
    else:
        up = Launch(
            across_kernel,
            (listed, cdiv(out_features, config.columns), 1),
            (tokens, row_tokens, out_features, rank, config.columns, *of_b, *of_vectors),
            config.up_warps,
            FORM=config.form,
            BLOCK_T=config.block_t,
            **constants,
            ONE_STEP=config.columns == config.block_o,
            STAGES=config.up_stages,
        )
    return splits, down, up


def mixed(
    base: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor | None,
    weight_norm: Tensor | None,
    scaling: Tensor | float,
    bias: Tensor | None,
    index: Tensor,
    ranks: Tensor | None = None,
    *,
    want_inner: bool = False,
    rounds: bool = False,
    config: MixedConfig | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``(y, h, inner)``, the last two None unless wanted; overwrites ``base`` with y, or with inner if that is wanted.

    Args:
        base: ``[T, O]``, contiguous: ``x W^T``.
        x: ``[T, I]``, any strides. T is a multiple of the length of ``index``, the tokens of a row being neighbours.
        lora_A: ``[K, R, I]``. lora_B: ``[K, O, R]``, in one dtype.
        magnitude: ``[K, O]``, g itself where ``weight_norm`` is None; None for plain LoRA.
        scaling: a number, or of every adapter ``[K]``.
        index: ``[N]``, int32 or int64, each in ``[-1, K)``, which an assertion on the device checks.
        ranks: ``[K]``, int32 or int64: beyond these the factors are zeros, which are not read.
        rounds: the factors' numbers are rounded to the dtype of x and base, as under autocast.
        config: how to launch; None chooses it.
    """
    tokens, out_features = base.shape
    adapters, rank, in_features = lora_A.shape
    h = inner = None
    y = base
    if want_inner:
        y, inner, h = torch.empty_like(base), base, lora_B.new_empty(tokens, rank)
    if not base.numel():
        return y, h, inner
    batch = index.shape[0]
    if config is None:
        sizes = adapters, out_features, in_features, rank
        config = mixed_config(batch, tokens // batch, *sizes, lora_A.dtype, base.dtype, target.of(base))
    magnitude, weight_norm = (t if t is None or t.stride(1) == 1 else t.contiguous() for t in (magnitude, weight_norm))
    splits, down, up = mixed_launches(
        batch,
        tokens // batch,
        (adapters, out_features, in_features, rank),
        (x.stride(), lora_A.stride(), lora_B.stride(), vector_strides(magnitude, weight_norm, scaling)),
        config,
        has_bias=bias is not None,
        want_inner=want_inner,
        rounds=rounds,
        splits_products=needs_split(base.dtype, lora_A.dtype) and not rounds,
    )
    partial = base.new_empty(splits, tokens, rank, dtype=torch.float32)
    tiles = None
    if config.form == "counted":
        tiles = index.new_empty(up.grid[0], 1 + config.block_t, dtype=torch.int32)
    elif config.form == "listed":
        tiles = list_tiles(index, tokens // batch, adapters, config.block_t)
    index = index.contiguous()
    bias = bias if bias is None else bias.contiguous()
    ranks = ranks if ranks is None else ranks.contiguous()
    down(x, lora_A, index, ranks, tiles, partial)
    up(base, partial, lora_B, magnitude, weight_norm, scaling, bias, index, ranks, tiles, y, inner, h)
    return y, h, inner


def needs_split(base_dtype: torch.dtype, factor_dtype: torch.dtype) -> bool:
    """Whether float32 factors are multiplied as pairs of bfloat16 numbers."""
    return factor_dtype is torch.float32 and base_dtype is not torch.float32


def vector_strides(
    magnitude: Tensor | None, weight_norm: Tensor | None, scaling: Tensor | float
) -> tuple[int, int, int]:
    return (
        0 if magnitude is None else magnitude.stride(0),
        0 if weight_norm is None else weight_norm.stride(0),
        scaling.stride(0) if isinstance(scaling, Tensor) else 0,
    )
