"""``Initialised``: the values that an adapter starts from."""

import math

import torch
from torch import Tensor, nn

from dorac import offload
from dorac.nn import norm_cache, starts
from dorac.ops import sharded
from dorac.undo import Undo


class Initialised(nn.Module):
    """The part of :class:`dorac.nn.DoraLayer` that draws its factors, and sets the magnitude so that g = 1."""

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws new factors and sets the magnitude to the norm, so that g = 1; refused while merged."""
        if self.merged:
            raise ValueError("the adapter is merged; unmerge it before resetting its parameters")
        if "initial_lora_A" in self._parameters:
            raise ValueError("the adapter began as a part of its base weight, which a new one would not bring back")
        with Undo() as log:
            self.keep_norm(log)
            with offload.written(log, self), offload.onloaded(self.base_layer):
                self._reset_parameters(log)

    def _reset_parameters(self, log: Undo) -> None:
        starts.materialise(self)
        log.keep(*self.parameters(recurse=False))
        self._draw_factors()
        self._reset_magnitudes()
        starts.after_reset(self)
        norm_cache.refresh([self])

    def _reset_magnitudes(self) -> None:
        """Sets the magnitude to the norm."""
        norm = sharded.whole(self._norm()).view(self.lora_magnitude_vector.shape)
        self.lora_magnitude_vector.copy_(sharded.like(norm, self.lora_magnitude_vector))

    def _draw_factors(self) -> None:
        """Draws the factors anew."""
        lora_A, lora_B = (getattr(self, name) for name in list(self.PEFT_KEYS)[:2])
        self._draw(lora_A, lora_B)

    def _draw(self, lora_A: Tensor, lora_B: Tensor) -> None:
        """lora_A Kaiming-uniform or, if asked for, normal with deviation 1/r; lora_B zero, or Kaiming-uniform."""
        if self.init_lora_weights == "gaussian":
            nn.init.normal_(lora_A, std=1 / self.r)
        else:
            nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5))
        if self.init_lora_weights is False:
            nn.init.kaiming_uniform_(lora_B, a=math.sqrt(5))
        else:
            nn.init.zeros_(lora_B)
