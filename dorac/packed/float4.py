"""mxfp4 (GPT-OSS) and NVFP4: 4-bit floats of one sign, two exponent and one mantissa bit, a scale for 32 or 16.

The numbers of a row follow one another, two in a byte, the first in its low half.
"""

import sys
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dorac.packed.form import Form, Pieces
from dorac.packed.holder import LEAST, Holder, finite, frozen
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

    def form(self) -> tuple[Form, Pieces] | None:
        """See :meth:`dorac.packed.Bnb4bit.form`."""
        scale = self.scale
        if not self.codes.is_contiguous():
            return None
        strides = scale.stride(0) if len(self.shape) == 3 else 0, *scale.stride()[-2:], 0
        form = Form("mxfp4", str(self.dtype).removeprefix("torch."), 2, 16, strides=strides)
        return form, (self.codes, None, scale, None, None, None, None)

    @staticmethod
    def of_blocks(blocks: Tensor, scales: Tensor) -> "Mxfp4":
        """GPT-OSS's, as they lie in its checkpoint."""
        codes = blocks.detach().flatten(-2)  # [.., in / 32, 16]
        return Mxfp4(codes, scales.detach(), (*codes.shape[:-1], 2 * codes.shape[-1]), torch.bfloat16)


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

    def form(self) -> tuple[Form, Pieces] | None:
        """See :meth:`dorac.packed.Bnb4bit.form`."""
        scale, whole = self.scale, self.tensor_scale
        if not self.codes.is_contiguous():
            return None
        of_whole = 1 if whole is not None and whole.ndim else 0
        if self.swizzled:
            strides = 0, -(-self.shape[-1] // 64), 1, of_whole
        else:
            strides = scale.stride(0) if len(self.shape) == 3 else 0, *scale.stride()[-2:], of_whole
        dtype = str(self.dtype).removeprefix("torch.")
        form = Form("nvfp4", dtype, 2, 8, swizzled=bool(self.swizzled), strides=strides)
        return form, (self.codes.view(torch.uint8), None, scale, None, None, whole, None)

    def _plain_scale(self) -> Tensor:
        """The scales as they are not swizzled: of each block, row ``32 i + j`` lies at ``[j, i]``."""
        *experts, out_features, in_features = self.shape
        rows, columns = out_features * (experts[0] if experts else 1), in_features // 16
        across = -(-columns // 4)
        blocks = self.scale.view(-1, across, 32, 4, 4).permute(0, 3, 2, 1, 4)
        return blocks.reshape(-1, 4 * across)[:rows, :columns].view(*experts, out_features, columns)


def _read(weight: Tensor, _: object) -> Nvfp4 | None:
    codes = weight.qdata
    if codes.stride(-2) < codes.stride(-1):  # transposed
        return None
    shape = (*codes.shape[:-1], 2 * codes.shape[-1])
    return Nvfp4(
        codes, weight.scale, weight.per_tensor_scale, shape, weight.orig_dtype, int(bool(weight.is_swizzled_scales))
    )


def _requantised(module: nn.Module, dense: Tensor) -> dict[str, object]:
    old = module.weight
    dense, scale = finite(dense, old.orig_dtype), old.per_tensor_scale
    if scale is not None:
        largest = dense.abs().amax().clamp_min(LEAST)
        scale = sys.modules[type(old).__module__].per_tensor_amax_to_scale(largest)
    options = {name: getattr(old, name) for name in ("act_per_tensor_scale", "is_swizzled_scales", "use_triton_kernel")}
    return frozen(type(old).to_nvfp4(dense, per_tensor_scale=scale, **options))


NVFP4 = Holder("torchao NVFP4 weight", read=_read, requantised=_requantised)
