"""The second launch of mixed rows: lora_B, g, s and b, over the base product. See ``mixed.py``."""

import triton
import triton.language as tl

from dorac.kernels.mixed_tiles import known_tile, rank_of, small_product
from dorac.kernels.tiles import INTERPRETED, ZERO_ROW_NORM, number


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
    key, token_T, _ = known_tile(index_ptr, tiles_ptr, tile, tiles_per_row, rows, T, L, "long", BLOCK_T)
    least: tl.constexpr = -1 if HAS_BIAS or WANT_INNER else 0  # a plain row without a bias is written already
    if key >= least:
        rank = rank_of(ranks_ptr, key, R)
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
                acc_TO = small_product(h_TR, b_OR, acc_TO, BLOCK_T, SPLIT)
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
    key, token_T, is_token_T = known_tile(index_ptr, tiles_ptr, tile, 1, BLOCK_T, T, L, FORM, BLOCK_T)
    least: tl.constexpr = -1 if HAS_BIAS or WANT_INNER else 0  # a plain row without a bias is written already
    if key >= least:
        rank = rank_of(ranks_ptr, key, R)
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
                acc_TO = small_product(h_TR.to(b_OR.dtype), b_OR, acc_TO, BLOCK_T, SPLIT)
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
        g_O = tl.where(norm_O <= ZERO_ROW_NORM, 1.0, tl.div_rn(g_O, norm_O))
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
