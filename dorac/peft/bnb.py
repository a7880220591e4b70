"""PEFT's LoRA layers over bitsandbytes' (``peft.tuners.lora.bnb``), on the straight way to :mod:`dorac.peft.over`.

Stock PEFT copies the base layer's output and walks over the adapters before a variant gets it. Where one DoRA adapter
is all that is active, these classes hand it over as it is. This is imported where PEFT has imported its own classes,
which needs the library.
"""

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from dorac import functional, stock_peft
from dorac.nn import linear4bit, shared
from dorac.peft import over
from dorac.peft.mixed import MixedBatch
from dorac.peft.variants import DoraLinearVariant, lone_adapter

__all__ = [name for name in ("Linear4bit", "Linear8bitLt") if hasattr(stock_peft, name)]


class _Straight(MixedBatch):
    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        adapter = lone_adapter(self, args, kwargs)
        if adapter is None:
            return super().forward(x, *args, **kwargs)
        result = self._modules["base_layer"](x)
        y = over.adapted(self, adapter, x, result)
        if y is not None:
            return y
        cast = not torch.is_autocast_enabled()
        if cast:  # as PEFT does
            x = self._cast_input_dtype(x, self.lora_A[adapter].weight.dtype)
        y = DoraLinearVariant.added(self, active_adapter=adapter, x=x, result=result)
        return y.to(result.dtype) if cast else y


if "Linear4bit" in __all__:

    @shared.fusable
    class Linear4bit(_Straight, stock_peft.Linear4bit):
        """Over nf4 and fp4."""

        def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
            if not is_dynamo_compiling() and not (args or kwargs):
                y = None if shared.here.together is None else shared.here.together.take(self, x)
                if y is None:
                    y = linear4bit.alone(self, x)
                if y is not None:
                    return y
            return super().forward(x, *args, **kwargs)

        def in_blocks(self) -> bool:
            """Whether the base layer's product can be that of a block."""
            return linear4bit.is_stock(self._modules["base_layer"])

        def projection(self, x: Tensor) -> tuple[functional.Projection, str] | None:
            """See :class:`dorac.nn.shared.Fusable`."""
            adapter = lone_adapter(self, (), {})
            if adapter is None or not linear4bit.takes(self._modules["base_layer"], x):
                return None
            return over.projection(self, adapter, x)


if "Linear8bitLt" in __all__:

    class Linear8bitLt(_Straight, stock_peft.Linear8bitLt):
        """Over int8."""
