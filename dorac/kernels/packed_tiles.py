"""Tiles of packed weights as float32, each value rounded as the format's own dequantisation rounds it.

A format is: where a number's bits are (two numbers in a byte are two *halves* of a tile), what value they stand for,
and the scales of its blocks. Everything that tells formats apart is in this file; FORMAT is one of

    bnb_4bit    a table of 16, the first number in a byte's high half; a float32 scale, or a quantised one
    bnb_int8    int8; a float32 scale for a row, 127 times too large
    number      int8 or float8, less its block's zero if there is one; a float32 scale
    int4        from -8 to 7, the first number in the low half; a scale and a zero, which is added
    mxfp4       floats of 4 bits, the first in the low half; an exponent for 32 of them
    nvfp4       the same; a float8 scale for 16 of them, and one of the matrix; SWIZZLED in blocks of 128 x 4
"""

import triton
import triton.language as tl

from dorac.kernels.tiles import INTERPRETED, to_bfloat16


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
def _number_of(code, FORMAT: tl.constexpr):
    """What 4 bits stand for, where that is no table in memory."""
    if FORMAT == "int4":
        return ((code ^ 8) - 8).to(tl.float32)
    else:  # the two exponent bits and the mantissa bit of a float32 stand for the same number times 2^-126
        return (((code & 7) << 22) | ((code & 8) << 28)).to(tl.float32, bitcast=True) * 8.507059173023462e37


@triton.jit
def in_lanes(table_ptr, FORMAT: tl.constexpr):
    """The 16 values of 4 bits, of which each lane of a warp holds one, as :func:`_looked_up` reads them."""
    if INTERPRETED:
        return table_ptr
    elif FORMAT == "bnb_4bit":
        return tl.inline_asm_elementwise(
            "{ .reg .b32 l; .reg .b64 p; mov.u32 l, %laneid; and.b32 l, l, 15; mad.wide.u32 p, l, 4, $1; "
            "ld.global.nc.f32 $0, [p]; }",
            "=f,l",
            [table_ptr.to(tl.int64)],
            tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        lane = tl.inline_asm_elementwise("mov.u32 $0, %laneid;", "=r", [], tl.int32, is_pure=True, pack=1)
        return _number_of(lane & 15, FORMAT)


@triton.jit
def _looked_up(table, codes, HIGH: tl.constexpr, FORMAT: tl.constexpr):
    """What the numbers in the high or the low halves of bytes stand for: a shuffle for each.

    It sends what the lane holds whose last four bits are those of its operand. As loads of a table, Triton would copy
    the numbers to shared memory first.
    """
    if INTERPRETED:
        code = ((codes >> 4) if HIGH else (codes & 15)).to(tl.int32)
        if FORMAT == "bnb_4bit":
            return tl.load(table + code)
        else:
            return _number_of(code, FORMAT)
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
    scales,
    rows,
    group,
    O,
    groups,
    stride_so,
    stride_sg,
    FORMAT: tl.constexpr,
    NESTED: tl.constexpr,
    ROWS: tl.constexpr,
    SWIZZLED: tl.constexpr,
    ZERO: tl.constexpr,
):
    """Of each row the scale of block ``group``, or its zero: float32, zero beyond the edges."""
    group += tl.zeros(rows.shape, dtype=tl.int64)
    mask = (rows < O) & (group < groups)
    if SWIZZLED:  # O is that of all experts
        index = (rows // 128 * stride_so + group // 4) * 512 + rows % 32 * 16 + rows % 128 // 32 * 4 + group % 4
    else:
        index = rows // ROWS * stride_so + group * stride_sg
    loaded = tl.load((scales[1] if ZERO else scales[0]) + index, mask=mask, other=0.0)
    if ZERO or FORMAT == "number" or FORMAT == "int4":
        return loaded.to(tl.float32)
    elif FORMAT == "mxfp4":
        return (loaded.to(tl.int32) << 23).to(tl.float32, bitcast=True)
    elif FORMAT == "nvfp4":
        return loaded.to(tl.float32) * (1.0 if scales[3] is None else tl.load(scales[3]))
    elif NESTED:
        outer = tl.load(scales[3] + index // NESTED, mask=mask, other=0.0)
        scale = _times(tl.load(scales[2] + loaded.to(tl.int32)), outer) + tl.load(scales[4])
        return tl.where(mask, scale, 0.0)
    else:
        return loaded


@triton.jit
def scale_and_zero(
    scales,  # pointers: scale, zero, scale_table, scale_scale, scale_offset
    start_o,
    start_c,
    O,
    groups,
    stride_so,
    stride_sg,
    FORMAT: tl.constexpr,
    NESTED: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    SWIZZLED: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The scale of each byte of a tile, ``[BLOCK_O, BLOCK_C]`` or ``[BLOCK_O, 1]``, and its zero where there is one.

    Read once per row and block, and told apart by the column: pointers for every byte would be loads for every byte.
    """
    rows = (start_o + tl.arange(0, BLOCK_O)).to(tl.int64)
    cols = tl.arange(0, BLOCK_C)[None, :]
    first = start_c // GROUP
    scale = _scale(scales, rows, first, O, groups, stride_so, stride_sg, FORMAT, NESTED, ROWS, SWIZZLED, False)[:, None]
    zero = scale  # not read
    if scales[1] is not None:
        zero = _scale(scales, rows, first, O, groups, stride_so, stride_sg, FORMAT, NESTED, ROWS, SWIZZLED, True)[
            :, None
        ]
    for i in tl.static_range(1, BLOCK_C // GROUP):
        group = first + i
        other = _scale(scales, rows, group, O, groups, stride_so, stride_sg, FORMAT, NESTED, ROWS, SWIZZLED, False)
        scale = tl.where(cols >= i * GROUP, other[:, None], scale)
        if scales[1] is not None:
            other = _scale(scales, rows, group, O, groups, stride_so, stride_sg, FORMAT, NESTED, ROWS, SWIZZLED, True)
            zero = tl.where(cols >= i * GROUP, other[:, None], zero)
    return scale, zero


@triton.jit
def decoded(
    codes,
    scale,
    zero,
    table,
    FORMAT: tl.constexpr,
    HALF: tl.constexpr,
    DTYPE: tl.constexpr,
    HAS_ZERO: tl.constexpr,
):
    """The numbers of one half of the bytes as float32: of even columns the first, of odd ones the second."""
    if FORMAT == "bnb_int8":
        value = codes.to(tl.float32) * scale * 7.874015718698502e-3
    elif FORMAT == "number":
        value = codes.to(tl.float32)
        if HAS_ZERO:
            value -= zero
        value *= scale
    else:
        value = _looked_up(table, codes, (HALF == 0) == (FORMAT == "bnb_4bit"), FORMAT)
        value = _times(value, scale) + zero if HAS_ZERO else value * scale
    return rounded(value, DTYPE)
