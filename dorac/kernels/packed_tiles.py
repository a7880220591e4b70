"""Tiles of packed weights as float32, each value rounded as the format's own dequantisation rounds it.

A format is: where a number's bits are (two numbers in a byte are two *halves* of a tile), what value they stand for,
and the scales of its blocks. Everything that tells formats apart is in this file.
"""

import triton
import triton.language as tl

from dorac.kernels.tiles import INTERPRETED, load_tile, to_bfloat16


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """float32 ``x`` as DTYPE, a dtype's name, would hold it. Two at a time: one alone takes a slower instruction."""
    if DTYPE == "bfloat16":
        if INTERPRETED:
            return to_bfloat16(x).to(tl.float32)
        else:
            bits = tl.inline_asm_elementwise(
                "{ .reg .b32 t; cvt.rn.bf16x2.f32 t, $3, $2; shl.b32 $0, t, 16; and.b32 $1, t, 0xffff0000; }",
                "=r,=r,f,f",
                [x],
                tl.int32,
                is_pure=True,
                pack=2,
            )
            return bits.to(tl.float32, bitcast=True)
    elif DTYPE == "float16":
        if INTERPRETED:
            return x.to(tl.float16).to(tl.float32)
        else:
            return tl.inline_asm_elementwise(
                "{ .reg .b32 t; .reg .b16 l, h; cvt.rn.f16x2.f32 t, $3, $2; mov.b32 {l, h}, t; "
                "cvt.f32.f16 $0, l; cvt.f32.f16 $1, h; }",
                "=f,=f,f,f",
                [x],
                tl.float32,
                is_pure=True,
                pack=2,
            )
    else:
        return x


@triton.jit
def in_lanes(table_ptr):
    """A table of 16 float32 numbers, of which each lane of a warp holds one, as :func:`_looked_up` reads it."""
    if INTERPRETED:
        return table_ptr
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 l; .reg .b64 p; mov.u32 l, %laneid; and.b32 l, l, 15; mad.wide.u32 p, l, 4, $1; "
            "ld.global.nc.f32 $0, [p]; }",
            "=f,l",
            [table_ptr.to(tl.int64)],
            tl.float32,
            is_pure=True,
            pack=1,
        )


@triton.jit
def _looked_up(table, codes, HIGH: tl.constexpr):
    """``table[number]`` of the numbers in the high or the low halves of bytes: a shuffle for each.

    It sends what the lane holds whose last four bits are those of its operand. As loads, Triton would copy the numbers
    to shared memory first.
    """
    if INTERPRETED:
        return tl.load(table + ((codes >> 4) if HIGH else (codes & 15)).to(tl.int32))
    elif HIGH:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t; "
            "shr.u32 t, $4, 4; shfl.sync.idx.b32 $0, $5, t, 0x101f, 0xffffffff; "
            "shr.u32 t, $4, 12; shfl.sync.idx.b32 $1, $6, t, 0x101f, 0xffffffff; "
            "shr.u32 t, $4, 20; shfl.sync.idx.b32 $2, $7, t, 0x101f, 0xffffffff; "
            "shr.u32 t, $4, 28; shfl.sync.idx.b32 $3, $8, t, 0x101f, 0xffffffff; }",
            "=&f,=&f,=&f,=&f,r,f,f,f,f",
            [codes, table],
            tl.float32,
            is_pure=True,
            pack=4,
        )
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t; "
            "shfl.sync.idx.b32 $0, $5, $4, 0x101f, 0xffffffff; "
            "shr.u32 t, $4, 8; shfl.sync.idx.b32 $1, $6, t, 0x101f, 0xffffffff; "
            "shr.u32 t, $4, 16; shfl.sync.idx.b32 $2, $7, t, 0x101f, 0xffffffff; "
            "shr.u32 t, $4, 24; shfl.sync.idx.b32 $3, $8, t, 0x101f, 0xffffffff; }",
            "=&f,=&f,=&f,=&f,r,f,f,f,f",
            [codes, table],
            tl.float32,
            is_pure=True,
            pack=4,
        )


@triton.jit
def _times(x, y):
    """``x * y``, rounded before anything is added to it."""
    if INTERPRETED:
        return x * y
    else:
        return tl.inline_asm_elementwise("mul.rn.f32 $0, $1, $2;", "=f,f,f", [x, y], tl.float32, is_pure=True, pack=1)


@triton.jit
def _scale(
    scale_ptr, scale_table_ptr, scale_scale_ptr, scale_offset_ptr, rows, group, O, groups, FORMAT, NESTED: tl.constexpr
):
    """The scale of each row's block ``group``, float32, zero beyond the edges."""
    group += tl.zeros(rows.shape, dtype=tl.int64)
    mask = (rows < O) & (group < groups)
    if FORMAT == "bnb_int8":
        return tl.load(scale_ptr + rows, mask=rows < O, other=0.0) * 7.874015718698502e-3
    else:
        index = rows * groups + group
        if NESTED:
            code = tl.load(scale_ptr + index, mask=mask, other=0).to(tl.int32)
            value = tl.load(scale_table_ptr + code)
            outer = tl.load(scale_scale_ptr + index // NESTED, mask=mask, other=0.0)
            return tl.where(mask, _times(value, outer) + tl.load(scale_offset_ptr), 0.0)
        else:
            return tl.load(scale_ptr + index, mask=mask, other=0.0)


@triton.jit
def load_scales(
    scale_ptr,
    scale_table_ptr,
    scale_scale_ptr,
    scale_offset_ptr,
    start_o,
    start_c,
    O,
    groups,
    FORMAT: tl.constexpr,
    NESTED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The scale of each byte of a tile, ``[BLOCK_O, BLOCK_C]`` or ``[BLOCK_O, 1]``.

    Read once per row and block, and told apart by the column: pointers for every byte would be loads for every byte.
    """
    rows = (start_o + tl.arange(0, BLOCK_O)).to(tl.int64)
    first = start_c // GROUP
    scale = _scale(
        scale_ptr, scale_table_ptr, scale_scale_ptr, scale_offset_ptr, rows, first, O, groups, FORMAT, NESTED
    )[:, None]
    for i in tl.static_range(1, BLOCK_C // GROUP):
        other = _scale(
            scale_ptr, scale_table_ptr, scale_scale_ptr, scale_offset_ptr, rows, first + i, O, groups, FORMAT, NESTED
        )[:, None]
        scale = tl.where((tl.arange(0, BLOCK_C) >= i * GROUP)[None, :], other, scale)
    return scale


@triton.jit
def load_bytes(codes_ptr, start_o, start_c, O, C, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr, EVEN: tl.constexpr):
    """The stored tile, zero beyond the edges."""
    return load_tile(codes_ptr, start_o, start_c, O, C, C, 1, BLOCK_O, BLOCK_C, EVEN, False)


@triton.jit
def decoded(codes, scale, table, FORMAT: tl.constexpr, HALF: tl.constexpr, DTYPE: tl.constexpr):
    """The numbers of one half of the bytes as float32: of even columns the first, of odd ones the second."""
    if FORMAT == "bnb_int8":
        return codes.to(tl.float32) * scale
    else:
        return rounded(_looked_up(table, codes, HALF == 0) * scale, DTYPE)  # the first is in the high half
