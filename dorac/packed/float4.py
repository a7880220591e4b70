"""mxfp4 (GPT-OSS) and NVFP4: 4-bit floats of one sign, two exponent and one mantissa bit, a scale for 32 or 16.

The numbers of a row follow one another, two in a byte, the first in its low half.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dorac.packed.pieces import check_piece, looked_up, scaled


def _floats(codes: Tensor) -> Tensor:
    """The numbers 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives, float32."""
    numbers = torch.arange(16, dtype=torch.int32, device=codes.device)
    # In a float32 the two exponent bits and the mantissa bit stand for the same number times 2^-126.
    bits = ((numbers & 7) << 22) | ((numbers & 8) << 28)
    return looked_up(codes.view(torch.uint8), bits.view(torch.float32) * 2.0**126, high_first=False)


def _check_codes(value: "Mxfp4 | Nvfp4", block: int) -> None:
    if len(value.shape) not in (2, 3) or value.shape[-1] % block or not value.dtype.is_floating_point:
        raise ValueError(
            f"{value.NAME}: expected a shape [out, in], or [E, out, in], with in a multiple of {block}, "
            f"got {list(value.shape)}"
        )
    codes = (*value.shape[:-1], value.shape[-1] // 2)
    kinds = (torch.uint8, *([torch.float4_e2m1fn_x2] if hasattr(torch, "float4_e2m1fn_x2") else []))
    check_piece(value.NAME, "codes", value.codes, kinds, codes, value.codes)


class Mxfp4(NamedTuple):
    """``w = q * 2^(scale - 127)``, rounded to ``dtype``.

    Attributes:
        codes: ``[(E,) out, in / 2]`` uint8; GPT-OSS's blocks ``[E, out, in / 32, 16]``, flattened.
        scale: ``[(E,) out, in / 32]`` uint8.
        shape: of the weight. dtype: of what it is dequantised to.
    """

    codes: Tensor
    scale: Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype

    NAME = "mxfp4 weight"
    PIECES = 2
    SCRATCH = 10  # bytes that rows() takes per element

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def check(self) -> None:
        """Whether the pieces fit together.

        Raises:
            TypeError, ValueError: with what does not fit.
        """
        _check_codes(self, 32)
        scales = (*self.shape[:-1], self.shape[-1] // 32)
        check_piece(self.NAME, "scale", self.scale, (torch.uint8,), scales, self.codes)

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop``, of every expert."""
        values = _floats(self.codes[..., start:stop, :])
        exponents = self.scale[..., start:stop, :].int() - 127
        return scaled(values, torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents), 32).to(
            self.dtype
        )


class Nvfp4(NamedTuple):
    """``w = q * (tensor_scale * scale)``, rounded to ``dtype``.

    Attributes:
        codes: ``[(E,) out, in / 2]`` uint8.
        scale: ``[(E,) out, in / 16]`` float8 (e4m3); swizzled: the same in blocks of 128 x 4, ``[32, 4, 4]`` each,
            the matrix padded to whole blocks, in whatever shape.
        tensor_scale: float32, 0-d or ``[E, 1, 1]``, or None.
        shape: of the weight. dtype: of what it is dequantised to. swizzled: 0 or 1.
    """

    codes: Tensor
    scale: Tensor
    tensor_scale: Tensor | None
    shape: tuple[int, ...]
    dtype: torch.dtype
    swizzled: int

    NAME = "NVFP4 weight"
    PIECES = 3
    SCRATCH = 10  # bytes that rows() takes per element

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def check(self) -> None:
        """Whether the pieces fit together.

        Raises:
            TypeError, ValueError: with what does not fit.
        """
        name = self.NAME
        _check_codes(self, 16)
        *experts, out_features, in_features = self.shape
        scales, kinds = (*self.shape[:-1], in_features // 16), (torch.float8_e4m3fn,)
        if self.swizzled:
            count = -(-out_features * (experts[0] if experts else 1) // 128) * -(-in_features // 64)
            check_piece(name, "scale", self.scale, kinds, self.scale.shape, self.codes)
            if self.scale.numel() != count * 512 or not self.scale.is_contiguous():
                raise ValueError(
                    f"{name}: swizzled, scale must hold {count} blocks of 128 x 4, contiguous, got the shape "
                    f"{list(self.scale.shape)}"
                )
        else:
            check_piece(name, "scale", self.scale, kinds, scales, self.codes)
        if self.tensor_scale is not None:
            expected = () if self.tensor_scale.ndim == 0 else (*experts, 1, 1)
            check_piece(name, "tensor_scale", self.tensor_scale, (torch.float32,), expected, self.codes)

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop``, of every expert."""
        scale = self._plain_scale() if self.swizzled else self.scale
        scale = scale[..., start:stop, :].float()
        if self.tensor_scale is not None:
            scale = self.tensor_scale * scale
        return scaled(_floats(self.codes[..., start:stop, :]), scale, 16).to(self.dtype)

    def _plain_scale(self) -> Tensor:
        """The scales as they are not swizzled: of each block, row ``32 i + j`` lies at ``[j, i]``."""
        *experts, out_features, in_features = self.shape
        rows, columns = out_features * (experts[0] if experts else 1), in_features // 16
        across = -(-columns // 4)
        blocks = self.scale.view(-1, across, 32, 4, 4).permute(0, 3, 2, 1, 4)
        return blocks.reshape(-1, 4 * across)[:rows, :columns].view(*experts, out_features, columns)
