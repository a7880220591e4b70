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
from dorac.kernels.tiles import INTERPRETED, number, product

UNUSED = tl.constexpr(-2)  # the adapter of a tile without rows


@triton.jit
def _count_tile(index_ptr, tile, T, L, K, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """The adapter and the tokens of a tile as :func:`list_tiles` lists them, of at most BLOCK_N tokens."""
    place_N, key_K = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K) - 1  # plain rows are the first
    key_N = tl.load(index_ptr + place_N // L, mask=place_N < T, other=0).to(tl.int32)
    tl.device_assert((key_N >= -1) & (key_N < K), "adapter_index is out of range")
    key_N = tl.where((key_N >= 0) & (key_N < K), key_N, -1)
    count_K = tl.histogram(key_N + 1, BLOCK_K, mask=place_N < T)
    tiles_K = (count_K + BLOCK_T - 1) // BLOCK_T
    last_K = tl.cumsum(tiles_K, axis=0)
    key = tl.sum((last_K <= tile).to(tl.int32), axis=0) - 1
    first = (tile - tl.sum(tl.where(key_K < key, tiles_K, 0), axis=0)) * BLOCK_T
    is_own_N = (key_N == key) & (place_N < T)
    within_N = tl.cumsum(is_own_N.to(tl.int32), axis=0) - 1 - first
    is_here_NT = is_own_N[:, None] & (within_N[:, None] == tl.arange(0, BLOCK_T)[None, :])
    token_T = tl.sum(tl.where(is_here_NT, place_N[:, None] + 1, 0), axis=0) - 1
    return tl.where(tile < tl.max(last_K, axis=0), key, UNUSED), token_T


@triton.jit
def _rank_of(ranks_ptr, key, R):
    """Of an adapter, rounded up so that loads of 8 stay whole; none of a plain row."""
    if ranks_ptr is None:
        return tl.where(key >= 0, R, 0)
    else:
        rank = (tl.load(ranks_ptr + tl.maximum(key, 0)).to(tl.int32) + 7) // 8 * 8
        return tl.multiple_of(tl.where(key >= 0, rank, 0), 8)


@triton.jit
def _small_product(left_TK, right_NK, acc_TN, BLOCK_T: tl.constexpr, SPLIT: tl.constexpr):
    """``acc + left @ right^T``; of one row a sum."""
    if BLOCK_T == 1:
        return acc_TN + tl.sum(left_TK.to(tl.float32) * right_NK.to(tl.float32), axis=1)[None, :]
    else:
        return product(left_TK, right_NK.T, acc_TN, SPLIT)


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
        key, token_T = _count_tile(index_ptr, tile, T, L, K, BLOCK_T, BLOCK_N, BLOCK_K)
        is_token_T = token_T >= 0
        if (split == 0) & (start_r == 0):
            tl.store(tiles_ptr + tile * (1 + BLOCK_T), key)
            tl.store(tiles_ptr + tile * (1 + BLOCK_T) + 1 + tl.arange(0, BLOCK_T), token_T)
    else:
        key, token_T, is_token_T = _known_tile(index_ptr, tiles_ptr, tile, tiles_per_row, BLOCK_T, T, L, FORM, BLOCK_T)
        if FORM != "listed":
            tl.device_assert((key >= -1) & (key < K), "adapter_index is out of range")
    key = tl.maximum(key, -1)

    rank = _rank_of(ranks_ptr, key, R)
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


@triton.jit
def _known_tile(index_ptr, tiles_ptr, tile, tiles_per_row, rows, T, L, FORM: tl.constexpr, BLOCK_T: tl.constexpr):
    """The adapter of a tile whose tokens need no counting, its first BLOCK_T tokens, and which of them there are.

    ``rows``: of "long", how many tokens of a row of the batch are a tile.
    """
    place_T = tl.arange(0, BLOCK_T)
    if FORM == "single":
        token_T = tile + place_T
        return tl.load(index_ptr + tile // L).to(tl.int32), token_T, token_T < T
    elif FORM == "long":
        row = tile // tiles_per_row
        token_T = (tile % tiles_per_row) * rows + place_T
        return tl.load(index_ptr + row).to(tl.int32), row * L + token_T, token_T < L
    else:
        token_T = tl.load(tiles_ptr + tile * (1 + BLOCK_T) + 1 + place_T)
        return tl.load(tiles_ptr + tile * (1 + BLOCK_T)), token_T, token_T >= 0


@triton.jit
def up_kernel(
    base_ptr,  # contiguous, as y, inner and h; y may lie where it does
    partial_ptr,
    b_ptr,
    magnitude_ptr,  # or None: g is 1, plain LoRA
    norm_ptr,  # or None: the magnitude is g
    scaling_ptr,  # of every adapter, or a number
    bias_ptr,
    index_ptr,
    ranks_ptr,  # or None
    tiles_ptr,  # None: both kernels take the same
    y_ptr,
    inner_ptr,  # these two with WANT_INNER
    h_ptr,
    T,
    L,
    O,
    R,
    tiles_per_row,
    rows,  # of a tile, which a program walks down in steps of BLOCK_T
    stride_bk,
    stride_bo,
    stride_br,
    stride_mk,
    stride_nk,
    stride_sk,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
    CHUNKS: tl.constexpr,  # of ranks
    SPLITS: tl.constexpr,
    EVEN: tl.constexpr,  # no tile reaches over the last output
    HAS_BIAS: tl.constexpr,
    WANT_INNER: tl.constexpr,
    ROUND: tl.constexpr,  # lora_B to base's dtype
    SPLIT: tl.constexpr,
):
    """Of long rows: a program keeps its columns and walks down tokens of one row of the batch."""
    tile, start_o = tl.program_id(0), tl.program_id(1) * BLOCK_O
    key, token_T, _ = _known_tile(index_ptr, tiles_ptr, tile, tiles_per_row, rows, T, L, "long", BLOCK_T)
    least: tl.constexpr = -1 if HAS_BIAS or WANT_INNER else 0  # a plain row without a bias is written already
    if key >= least:
        rank = _rank_of(ranks_ptr, key, R)
        adapter = tl.maximum(key, 0).to(tl.int64)
        cols_O = start_o + tl.arange(0, BLOCK_O)
        is_col_O = cols_O < O
        g_O = _scale_of(magnitude_ptr, norm_ptr, key, adapter, cols_O, is_col_O, stride_mk, stride_nk, BLOCK_O)
        scaling = tl.where(key >= 0, _scaling_of(scaling_ptr, adapter * stride_sk), 0.0)
        b_ptr += adapter * stride_bk
        if CHUNKS == 1:
            whole_OR = _load_b(b_ptr, cols_O, 0, rank, O, R, stride_bo, stride_br, base_ptr, BLOCK_R, EVEN, ROUND)
        walked = tl.minimum(rows, L - (tile % tiles_per_row) * rows)
        for start in tl.range(0, walked, BLOCK_T, num_stages=1):
            is_token_T = start + tl.arange(0, BLOCK_T) < walked
            acc_TO = tl.zeros([BLOCK_T, BLOCK_O], dtype=tl.float32)
            for start_r in tl.range(0, BLOCK_R if CHUNKS == 1 else R, BLOCK_R, num_stages=1):
                if CHUNKS == 1:
                    b_OR = whole_OR
                else:
                    b_OR = _load_b(
                        b_ptr, cols_O, start_r, rank, O, R, stride_bo, stride_br, base_ptr, BLOCK_R, EVEN, ROUND
                    )
                h_TR = _h_of(
                    partial_ptr, start + token_T, is_token_T, start_r, rank, T, R, BLOCK_T, BLOCK_R, SPLITS
                ).to(b_OR.dtype)
                if WANT_INNER:  # noqa: SIM102, the first is the compiler's to answer
                    if start_o == 0:
                        _store_h(h_ptr, h_TR, start + token_T, is_token_T, start_r, R, BLOCK_R)
                acc_TO = _small_product(h_TR, b_OR, acc_TO, BLOCK_T, SPLIT)
            base_TO = _load_base(base_ptr, start + token_T, is_token_T, cols_O, O, EVEN)
            _write(
                base_TO,
                bias_ptr,
                y_ptr,
                inner_ptr,
                scaling * acc_TO,
                g_O,
                start + token_T,
                is_token_T,
                cols_O,
                O,
                EVEN,
                HAS_BIAS,
                WANT_INNER,
            )


@triton.jit
def across_kernel(
    base_ptr,  # contiguous, as y, inner and h; y may lie where it does
    partial_ptr,
    b_ptr,
    magnitude_ptr,  # or None: g is 1, plain LoRA
    norm_ptr,  # or None: the magnitude is g
    scaling_ptr,  # of every adapter, or a number
    bias_ptr,
    index_ptr,
    ranks_ptr,  # or None
    tiles_ptr,
    y_ptr,
    inner_ptr,  # these two with WANT_INNER
    h_ptr,
    T,
    L,
    O,
    R,
    columns_per_program,
    stride_bk,
    stride_bo,
    stride_br,
    stride_mk,
    stride_nk,
    stride_sk,
    FORM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
    CHUNKS: tl.constexpr,  # of ranks
    SPLITS: tl.constexpr,
    EVEN: tl.constexpr,  # no tile reaches over the last output
    HAS_BIAS: tl.constexpr,
    WANT_INNER: tl.constexpr,
    ROUND: tl.constexpr,  # lora_B to base's dtype
    SPLIT: tl.constexpr,
    ONE_STEP: tl.constexpr,  # BLOCK_O columns are all of a program's
    STAGES: tl.constexpr,
):
    """Of few tokens: a program keeps these and walks across its columns, whose factors it reads ahead."""
    tile, begin = tl.program_id(0), tl.program_id(1) * columns_per_program
    key, token_T, is_token_T = _known_tile(index_ptr, tiles_ptr, tile, 1, BLOCK_T, T, L, FORM, BLOCK_T)
    least: tl.constexpr = -1 if HAS_BIAS or WANT_INNER else 0  # a plain row without a bias is written already
    if key >= least:
        rank = _rank_of(ranks_ptr, key, R)
        adapter = tl.maximum(key, 0).to(tl.int64)
        scaling = tl.where(key >= 0, _scaling_of(scaling_ptr, adapter * stride_sk), 0.0)
        b_ptr += adapter * stride_bk
        if CHUNKS == 1 and not ONE_STEP:
            h_TR = _h_of(partial_ptr, token_T, is_token_T, 0, rank, T, R, BLOCK_T, BLOCK_R, SPLITS)
        for start_o in tl.range(begin, tl.minimum(begin + columns_per_program, O), BLOCK_O, num_stages=STAGES):
            # Everything is asked for before anything is waited for.
            cols_O = start_o + tl.arange(0, BLOCK_O)
            base_TO = _load_base(base_ptr, token_T, is_token_T, cols_O, O, EVEN)
            g_O = _scale_of(magnitude_ptr, norm_ptr, key, adapter, cols_O, cols_O < O, stride_mk, stride_nk, BLOCK_O)
            acc_TO = tl.zeros([BLOCK_T, BLOCK_O], dtype=tl.float32)
            for start_r in tl.range(0, BLOCK_R if CHUNKS == 1 else R, BLOCK_R, num_stages=1):
                b_OR = _load_b(b_ptr, cols_O, start_r, rank, O, R, stride_bo, stride_br, base_ptr, BLOCK_R, EVEN, ROUND)
                if CHUNKS > 1 or ONE_STEP:
                    h_TR = _h_of(partial_ptr, token_T, is_token_T, start_r, rank, T, R, BLOCK_T, BLOCK_R, SPLITS)
                acc_TO = _small_product(h_TR.to(b_OR.dtype), b_OR, acc_TO, BLOCK_T, SPLIT)
                if WANT_INNER:  # noqa: SIM102, the first is the compiler's to answer
                    if start_o == 0:
                        _store_h(h_ptr, h_TR.to(b_OR.dtype), token_T, is_token_T, start_r, R, BLOCK_R)
            _write(
                base_TO,
                bias_ptr,
                y_ptr,
                inner_ptr,
                scaling * acc_TO,
                g_O,
                token_T,
                is_token_T,
                cols_O,
                O,
                EVEN,
                HAS_BIAS,
                WANT_INNER,
            )


@triton.jit
def _scale_of(magnitude_ptr, norm_ptr, key, adapter, cols_O, is_col_O, stride_mk, stride_nk, BLOCK_O: tl.constexpr):
    """g of an adapter's columns; 1 of a plain row, whatever the adapter 0 holds."""
    g_O = tl.full([BLOCK_O], 1.0, dtype=tl.float32)
    if magnitude_ptr is not None:
        g_O = tl.load(magnitude_ptr + adapter * stride_mk + cols_O, mask=is_col_O, other=1.0).to(tl.float32)
    if norm_ptr is not None:
        norm_O = tl.load(norm_ptr + adapter * stride_nk + cols_O, mask=is_col_O, other=1.0).to(tl.float32)
        g_O = tl.where(norm_O <= 1e-12, 1.0, tl.div_rn(g_O, norm_O))
    return tl.where(key >= 0, g_O, 1.0)


@triton.jit
def _h_of(
    partial_ptr,
    token_T,
    is_token_T,
    start_r,
    rank,
    T,
    R,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """The sum of the splits, in one order."""
    rank_R = start_r + tl.arange(0, BLOCK_R)
    is_rank_R = (rank_R < rank) & (rank_R < R)
    place_TR = token_T.to(tl.int64)[:, None] * R + rank_R[None, :]
    if BLOCK_T == 1:
        place_SR = tl.arange(0, SPLITS)[:, None].to(tl.int64) * T * R + place_TR
        h_SR = tl.load(partial_ptr + place_SR, mask=is_rank_R[None, :], other=0.0)
        return tl.sum(h_SR, axis=0)[None, :]
    else:
        mask_TR = is_token_T[:, None] & is_rank_R[None, :]
        h_TR = tl.zeros([BLOCK_T, BLOCK_R], dtype=tl.float32)
        for _ in tl.static_range(SPLITS):
            h_TR += tl.load(partial_ptr + place_TR, mask=mask_TR, other=0.0)
            partial_ptr += T * R
        return h_TR


@triton.jit
def _store_h(h_ptr, h_TR, token_T, is_token_T, start_r, R, BLOCK_R: tl.constexpr):
    rank_R = start_r + tl.arange(0, BLOCK_R)
    place_TR = token_T.to(tl.int64)[:, None] * R + rank_R[None, :]
    tl.store(h_ptr + place_TR, h_TR, mask=is_token_T[:, None] & (rank_R < R)[None, :])


@triton.jit
def _load_base(base_ptr, token_T, is_token_T, cols_O, O, EVEN: tl.constexpr):
    mask_TO = is_token_T[:, None]
    if not EVEN:
        mask_TO = mask_TO & (cols_O < O)[None, :]
    return tl.load(base_ptr + token_T.to(tl.int64)[:, None] * O + cols_O[None, :], mask=mask_TO, other=0.0)


@triton.jit
def _write(
    base_TO,
    bias_ptr,
    y_ptr,
    inner_ptr,
    lora_TO,
    g_O,
    token_T,
    is_token_T,
    cols_O,
    O,
    EVEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WANT_INNER: tl.constexpr,
):
    """y and inner of a tile."""
    is_col_O = cols_O < O
    place_TO = token_T.to(tl.int64)[:, None] * O + cols_O[None, :]
    mask_TO = is_token_T[:, None]
    if not EVEN:
        mask_TO = mask_TO & is_col_O[None, :]
    inner_TO = base_TO.to(tl.float32) + lora_TO
    if WANT_INNER:
        tl.store(inner_ptr + place_TO, inner_TO.to(inner_ptr.dtype.element_ty), mask=mask_TO)
    y_TO = g_O[None, :] * inner_TO
    if HAS_BIAS:
        y_TO += tl.load(bias_ptr + cols_O, mask=is_col_O, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + place_TO, y_TO.to(y_ptr.dtype.element_ty), mask=mask_TO)


@triton.jit
def _scaling_of(source, place):
    """A float32, given as it is or as a pointer to those of all adapters."""
    if INTERPRETED:  # which leaves a number as it is
        return source if isinstance(source, float) else tl.load(source + place).to(tl.float32)
    elif source.dtype.is_ptr():
        return tl.load(source + place).to(tl.float32)
    else:
        return number(source)


@triton.jit
def _load_b(
    b_ptr,
    cols_O,
    start_r,
    rank,
    O,
    R,
    stride_bo,
    stride_br,
    base_ptr,
    BLOCK_R: tl.constexpr,
    EVEN: tl.constexpr,
    ROUND: tl.constexpr,
):
    rank_R = start_r + tl.arange(0, BLOCK_R)
    mask_OR = ((rank_R < rank) & (rank_R < R))[None, :]
    if not EVEN:
        mask_OR = mask_OR & (cols_O < O)[:, None]
    pointers = b_ptr + cols_O.to(tl.int64)[:, None] * stride_bo + rank_R[None, :] * stride_br
    b_OR = tl.load(pointers, mask=mask_OR, other=0.0)
    return b_OR.to(base_ptr.dtype.element_ty) if ROUND else b_OR


def most_tiles(tokens: int, adapters: int, block_t: int) -> int:
    """How many tiles of ``block_t`` tokens of one adapter, or of none, there are at most."""
    groups = min(tokens, adapters + 1)
    return groups + (tokens - groups) // block_t


def list_tiles(index: Tensor, row_tokens: int, adapters: int, block_t: int) -> Tensor:
    """The tiles of tokens of one adapter each: int32 ``[tiles, 1 + block_t]``, the adapter and then its tokens.

    Of the adapter -1 stands for plain rows and -2 for a tile without tokens, of the tokens -1 for none.

    Args:
        index: ``[N]``, the adapter of each row of the batch, which has ``row_tokens`` tokens.
    """
    tokens, options = index.shape[0] * row_tokens, {"dtype": torch.int64, "device": index.device}
    numbers = torch.arange(adapters + 1, **options)  # of the adapters, one higher: the first are the plain rows
    shifted = numbers.index_select(0, torch.where(index < -1, adapters + 1, index + 1))  # asserts what is out of range
    ordered, order = torch.sort(shifted.repeat_interleave(row_tokens, output_size=tokens), stable=True)
    bounds = torch.searchsorted(ordered, torch.arange(adapters + 2, **options))
    begins, ends = bounds[:-1], bounds[1:]
    last_tiles = ((ends - begins + block_t - 1) // block_t).cumsum(0)
    tile = torch.arange(most_tiles(tokens, adapters, block_t), **options)
    key = torch.searchsorted(last_tiles, tile, right=True)
    known = key.clamp(max=adapters)
    first = (
        begins[known] + (tile - last_tiles[known]) * block_t + (ends - begins + block_t - 1)[known] // block_t * block_t
    )
    place = first[:, None] + torch.arange(block_t, **options)
    is_token = (place < ends[known][:, None]) & (key <= adapters)[:, None]
    listed = torch.where(is_token, order[place.clamp(0, max(tokens - 1, 0))], -1)
    return torch.cat([torch.where(key <= adapters, key - 1, -2)[:, None], listed], dim=1).to(torch.int32)


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
