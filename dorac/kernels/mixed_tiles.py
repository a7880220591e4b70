"""Which rows a program takes of a batch whose rows are of different adapters: see ``mixed.py``."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dorac.kernels.tiles import product

UNUSED = tl.constexpr(-2)  # the adapter of a tile without rows


@triton.jit
def count_tile(index_ptr, tile, T, L, K, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
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
def known_tile(index_ptr, tiles_ptr, tile, tiles_per_row, rows, T, L, FORM: tl.constexpr, BLOCK_T: tl.constexpr):
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
def rank_of(ranks_ptr, key, R):
    """Of an adapter, rounded up so that loads of 8 stay whole; none of a plain row."""
    if ranks_ptr is None:
        return tl.where(key >= 0, R, 0)
    else:
        rank = (tl.load(ranks_ptr + tl.maximum(key, 0)).to(tl.int32) + 7) // 8 * 8
        return tl.multiple_of(tl.where(key >= 0, rank, 0), 8)


@triton.jit
def small_product(left_TK, right_NK, acc_TN, BLOCK_T: tl.constexpr, SPLIT: tl.constexpr):
    """``acc + left @ right^T``; of one row a sum."""
    if BLOCK_T == 1:
        # A bare product would be contracted into the first sum across threads, which then differ in their last bits.
        product_NK = tl.fma(left_TK.to(tl.float32), right_NK.to(tl.float32), 0.0)
        return acc_TN + tl.sum(product_NK, axis=1)[None, :]
    else:
        return product(left_TK, right_NK.T, acc_TN, SPLIT)


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
