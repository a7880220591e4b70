"""bitsandbytes int8 (LLM.int8()): one scale per row."""

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dorac.packed.form import Form, Pieces
from dorac.packed.holder import Holder, class_beside, finite, unquantised
from dorac.packed.pieces import check_piece

PER_127 = 7.874015718698502e-3  # 1 / 127 as bitsandbytes writes it


class BnbInt8(NamedTuple):
    """``w = CB * SCB / 127``.

    Attributes:
        codes: CB ``[out, in]`` int8. scale: SCB ``[out]`` float32.
        shape: ``(out, in)``. dtype: float32, what ``int8_vectorwise_dequant`` returns.
    """

    codes: Tensor
    scale: Tensor
    shape: tuple[int, int]
    dtype: torch.dtype

    NAME = "bitsandbytes int8 weight"
    PIECES = 2
    SCRATCH = 8  # bytes that rows() takes per element

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
        if len(self.shape) != 2:
            raise ValueError(f"{self.NAME}: expected a shape [out, in], got {list(self.shape)}")
        check_piece(self.NAME, "codes (CB)", self.codes, (torch.int8,), self.shape, self.codes)
        check_piece(self.NAME, "scale (SCB)", self.scale, (torch.float32,), self.shape[:1], self.codes)

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` as ``int8_vectorwise_dequant`` has them, bit for bit."""
        return self.codes[start:stop] * self.scale[start:stop, None] * PER_127

    def form(self) -> tuple[Form, Pieces] | None:
        """See :meth:`dorac.packed.Bnb4bit.form`."""
        if not self.codes.is_contiguous():
            return None
        form = Form("bnb_int8", str(self.dtype).removeprefix("torch."))
        return form, (self.codes, None, self.scale, None, None, None, None)


def _read(weight: Tensor, source: nn.Module | Tensor) -> BnbInt8 | None:
    if weight.dtype is not torch.int8:
        if getattr(weight, "has_fp16_weights", False):
            return None  # a dense weight, which the layer quantises anew in every forward
        raise ValueError(unquantised("8-bit", source))
    scale = getattr(weight, "SCB", None)
    if scale is None:  # the layer took it over in its first forward
        scale = getattr(getattr(source, "state", None), "SCB", None)
    if scale is None:
        raise ValueError(
            f"{BnbInt8.NAME}: its scales (SCB) are neither with the parameter nor with the layer's state: give the "
            "layer, not its weight"
        )
    codes = weight.data
    return BnbInt8(codes, scale, tuple(codes.shape), torch.float32)


def _requantised(module: nn.Module, dense: Tensor) -> dict[str, object]:
    # From the CPU, since only there .to() quantises. The codes and scales that forward has taken over are in the state.
    new = class_beside(module, "Linear8bitLt", "Int8Params")(
        finite(dense, torch.float16).cpu(), requires_grad=False, has_fp16_weights=False
    ).to(module.weight.device)
    state = copy.copy(module.state)
    state.CB = state.SCB = None
    return {"weight": new, "state": state}


HOLDER = Holder("bitsandbytes int8 weight", read=_read, requantised=_requantised)
