"""Rows of different adapters over one base weight, on CUDA: ``y[i] = g_k * (base[i] + s_k h[i] lora_B_k^T) + b``.

Two launches beside the base product. The first makes ``h[i] = x[i] lora_A_k^T``, split over the inputs, since a few
rows would not keep the card busy otherwise; the second adds the splits up in their order, multiplies with lora_B and
ends with g, s and b, where the base product lies. Neither gathers a factor: a program takes a tile of rows that name
one adapter, and reads that adapter's factors where they are. Row -1 is ``base + b``.

How rows become tiles (FORM):

- "single": each token is a tile. Products are sums then, not the tensor cores' work, whose tiles have 16 rows.
- "counted": tokens of one adapter, up to BLOCK_T of them. Every program of the first launch finds its tile by counting
  in the index (so few tokens that this costs less than a launch), and one of them writes it down for the second.
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
COUNTED_AT_ONCE = tl.constexpr(32)


@triton.jit
def _counted_tile(index_ptr, tile, T, L, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr):
    """The adapter of a tile (UNUSED without rows), its tokens ``[BLOCK_T]``, and which of them there are.

    A token begins a tile where a multiple of BLOCK_T tokens of its adapter come before it; tiles are numbered in the
    order of these.
    """
    token_N = tl.arange(0, BLOCK_N)
    is_token_N = token_N < T
    key_N = tl.load(index_ptr + token_N // L, mask=is_token_N, other=0).to(tl.int32)
    before_N = tl.zeros([BLOCK_N], dtype=tl.int32)  # tokens of the same adapter before each
    for start in tl.range(0, T, COUNTED_AT_ONCE, num_stages=1):
        token_C = start + tl.arange(0, COUNTED_AT_ONCE)
        key_C = tl.load(index_ptr + token_C // L, mask=token_C < T, other=0).to(tl.int32)
        alike_NC = (key_N[:, None] == key_C[None, :]) & (token_C[None, :] < token_N[:, None])
        before_N += tl.sum(alike_NC.to(tl.int32), axis=1)
    begins_N = is_token_N & (before_N % BLOCK_T == 0)
    chosen_N = begins_N & (tl.cumsum(begins_N.to(tl.int32), axis=0) == tile + 1)
    key = tl.sum(tl.where(chosen_N, key_N - UNUSED, 0), axis=0) + UNUSED
    first = tl.sum(tl.where(chosen_N, before_N, 0), axis=0)
    place_N = tl.where(is_token_N & (key_N == key), before_N - first, -1)
    hit_TN = tl.arange(0, BLOCK_T)[:, None] == place_N[None, :]
    token_T = tl.sum(tl.where(hit_TN, token_N[None, :], 0), axis=1)
    return key, token_T, tl.sum(hit_TN.to(tl.int32), axis=1) > 0


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
    BLOCK_N: tl.constexpr,
    EVEN: tl.constexpr,  # no tile reaches over the last input
    ROUND: tl.constexpr,  # lora_A to x's dtype, instead of x to lora_A's
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The sums over each range of inputs, ``partial[S, T, R]``; what is beyond an adapter's rank is not written."""
    tile, split, start_r = tl.program_id(0), tl.program_id(1), tl.program_id(2) * BLOCK_R
    if FORM == "counted":
        key, token_T, is_token_T = _counted_tile(index_ptr, tile, T, L, BLOCK_T, BLOCK_N)
        key = tl.where(key < K, key, -1)
        if (split == 0) & (start_r == 0):
            tl.store(tiles_ptr + tile * (1 + BLOCK_T), key)
            place_T = tl.arange(0, BLOCK_T)
            tl.store(tiles_ptr + tile * (1 + BLOCK_T) + 1 + place_T, tl.where(is_token_T, token_T, -1))
        if (tile == 0) & (split == 0) & (start_r == 0):  # tiles of adapters that there are not may be one too many
            token_N = tl.arange(0, BLOCK_N)
            key_N = tl.load(index_ptr + token_N // L, mask=token_N < T, other=0)
            tl.device_assert((key_N >= -1) & (key_N < K), "adapter_index is out of range")
        key = tl.where(tl.sum(is_token_T.to(tl.int32), axis=0) > 0, key, -1)
    else:
        key, token_T, is_token_T = _known_tile(index_ptr, tiles_ptr, tile, tiles_per_row, BLOCK_T, T, L, FORM, BLOCK_T)
        if FORM == "listed":
            key = tl.maximum(key, -1)
        tl.device_assert((key >= -1) & (key < K), "adapter_index is out of range")

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
    tiles_ptr,
    y_ptr,
    inner_ptr,  # these two with WANT_INNER
    h_ptr,
    T,
    L,
    O,
    R,
    tiles_per_row,
    rows,  # of a tile of "long", which a program walks down in steps of BLOCK_T
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
):
    tile, start_o = tl.program_id(0), tl.program_id(1) * BLOCK_O
    key, token_T, is_token_T = _known_tile(index_ptr, tiles_ptr, tile, tiles_per_row, rows, T, L, FORM, BLOCK_T)
    least: tl.constexpr = -1 if HAS_BIAS or WANT_INNER else 0  # a plain row without a bias is written already
    if key >= least:
        rank = _rank_of(ranks_ptr, key, R)
        adapter = tl.maximum(key, 0).to(tl.int64)
        cols_O = start_o + tl.arange(0, BLOCK_O)
        is_col_O = cols_O < O
        g_O = tl.full([BLOCK_O], 1.0, dtype=tl.float32)
        if magnitude_ptr is not None:
            g_O = tl.load(magnitude_ptr + adapter * stride_mk + cols_O, mask=is_col_O, other=1.0).to(tl.float32)
        if norm_ptr is not None:
            norm_O = tl.load(norm_ptr + adapter * stride_nk + cols_O, mask=is_col_O, other=1.0).to(tl.float32)
            g_O = tl.where(norm_O <= 1e-12, 1.0, tl.div_rn(g_O, norm_O))
        g_O = tl.where(key >= 0, g_O, 1.0)  # whatever the adapter 0 holds
        scaling = tl.where(key >= 0, _scaling_of(scaling_ptr, adapter * stride_sk), 0.0)
        b_ptr += adapter * stride_bk
        if CHUNKS == 1:
            whole_OR = _load_b(b_ptr, cols_O, 0, rank, O, R, stride_bo, stride_br, base_ptr, BLOCK_R, EVEN, ROUND)
        walked = tl.minimum(rows, L - (tile % tiles_per_row) * rows) if FORM == "long" else BLOCK_T
        for start in tl.range(0, walked, BLOCK_T, num_stages=1):
            if FORM == "long":
                is_token_T = start + tl.arange(0, BLOCK_T) < walked
            acc_TO = tl.zeros([BLOCK_T, BLOCK_O], dtype=tl.float32)
            for start_r in tl.range(0, BLOCK_R if CHUNKS == 1 else R, BLOCK_R, num_stages=1):
                if CHUNKS == 1:
                    b_OR = whole_OR
                else:
                    b_OR = _load_b(
                        b_ptr, cols_O, start_r, rank, O, R, stride_bo, stride_br, base_ptr, BLOCK_R, EVEN, ROUND
                    )
                rank_R = start_r + tl.arange(0, BLOCK_R)
                h_mask = is_token_T[:, None] & ((rank_R < rank) & (rank_R < R))[None, :]
                place_TR = (start + token_T).to(tl.int64)[:, None] * R + rank_R[None, :]
                h_TR = tl.zeros([BLOCK_T, BLOCK_R], dtype=tl.float32)
                pointers = partial_ptr + place_TR
                for _ in tl.static_range(SPLITS):
                    h_TR += tl.load(pointers, mask=h_mask, other=0.0)
                    pointers += T * R
                h_TR = h_TR.to(b_OR.dtype)
                if WANT_INNER:  # noqa: SIM102, the first is the compiler's to answer
                    if start_o == 0:
                        tl.store(h_ptr + place_TR, h_TR, mask=is_token_T[:, None] & (rank_R < R)[None, :])
                acc_TO = _small_product(h_TR, b_OR, acc_TO, BLOCK_T, SPLIT)
            place_TO = (start + token_T).to(tl.int64)[:, None] * O + cols_O[None, :]
            mask_TO = is_token_T[:, None]
            if not EVEN:
                mask_TO = mask_TO & is_col_O[None, :]
            inner_TO = tl.load(base_ptr + place_TO, mask=mask_TO, other=0.0).to(tl.float32) + scaling * acc_TO
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

    def tiles(rows: int) -> tuple[int, int]:
        """How many, and those of a row of the batch."""
        if config.form == "single":
            return tokens, 1
        if config.form == "long":
            per_row = cdiv(row_tokens, rows)
            return batch * per_row, per_row
        return most_tiles(tokens, adapters, rows), 1

    count, per_row = tiles(config.block_t)
    down = Launch(
        down_kernel,
        (count, splits, cdiv(rank, config.block_r)),
        (tokens, row_tokens, in_features, rank, adapters, per_row, columns, *of_x, *of_a),
        config.down_warps,
        asserts=True,
        FORM=config.form,
        BLOCK_T=config.block_t,
        BLOCK_I=config.block_i,
        BLOCK_R=config.block_r,
        BLOCK_N=max(16, 1 << (tokens - 1).bit_length()) if config.form == "counted" else 16,
        EVEN=in_features % config.block_i == 0,
        ROUND=rounds,
        SPLIT=splits_products,
        STAGES=config.stages,
    )
    rows = config.rows if config.form == "long" else config.block_t
    up_t = config.up_t if config.form == "long" else config.block_t
    count, per_row = tiles(rows)
    up = Launch(
        up_kernel,
        (count, cdiv(out_features, config.block_o), 1),
        (tokens, row_tokens, out_features, rank, per_row, rows, *of_b, *of_vectors),
        config.up_warps,
        FORM=config.form,
        BLOCK_T=up_t,
        BLOCK_O=config.block_o,
        BLOCK_R=config.up_r,
        CHUNKS=cdiv(rank, config.up_r),
        SPLITS=splits,
        EVEN=out_features % config.block_o == 0,
        HAS_BIAS=has_bias,
        WANT_INNER=want_inner,
        ROUND=rounds,
        SPLIT=splits_products,
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
        tiles = index.new_empty(down.grid[0], 1 + config.block_t, dtype=torch.int32)
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
