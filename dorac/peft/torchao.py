"""PEFT's LoRA layers over torchao's weights (``peft.tuners.lora.torchao``): how DoRA is merged into them.

Stock PEFT adds the low-rank product to the dequantised weight and quantises that, without the magnitude.
"""

from torch import nn

from dorac import packed, stock_peft
from dorac.peft import norms
from dorac.peft.merging import UnmergedWeight, keep_layer
from dorac.peft.mixed import MixedBatch
from dorac.stock_peft import check_adapters_to_merge
from dorac.undo import Undo

__all__ = ["TorchaoLoraLinear"]


class TorchaoLoraLinear(UnmergedWeight, MixedBatch, stock_peft.TorchaoLoraLinear):
    """Merging quantises ``g * (W + s * lora_B lora_A)`` anew, as W was; unmerging puts W back, bit for bit.

    Until then W takes memory beside it.

    Raises:
        ValueError: a format that cannot be quantised anew here.
    """

    replaced_base: nn.Module | None = None  # holds W while adapters are merged

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        adapter_names = check_adapters_to_merge(self, adapter_names)
        base = self.get_base_layer()
        holder = packed.holder(base)
        if adapter_names and holder.requantised is None:
            raise ValueError(holder.cannot_requantise(base))
        with Undo() as log:
            keep_layer(log, self)
            for adapter in adapter_names:
                if adapter not in self.lora_A:
                    continue
                if adapter in self.lora_variant:
                    dense = self.lora_variant[adapter].merge_safe(self, adapter, base.weight)
                else:
                    dense = base.weight.dequantize() + self.get_delta_weight(adapter)
                if safe_merge and not dense.isfinite().all():
                    raise ValueError(f"the merged weight of adapter {adapter} is not finite")
                if self.replaced_base is None:
                    replaced = nn.Module()
                    replaced.weight = base.weight
                    vars(self)["replaced_base"] = replaced  # no child: it is in no state dict
                base.weight = holder.requantised(base, dense)["weight"]
                self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        if self.replaced_base is None:
            return super().unmerge()  # which says that there is nothing to do
        with Undo() as log:
            keep_layer(log, self)
            self.get_base_layer().weight = self.replaced_base.weight
            vars(self)["replaced_base"] = None
            for adapter in self.merged_adapters:
                self._caches.pop(f"{adapter}-weight_norm", None)
            self.merged_adapters.clear()
            norms.refresh(self)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        if self.replaced_base is not None:
            self.replaced_base._apply(fn)
        return self
