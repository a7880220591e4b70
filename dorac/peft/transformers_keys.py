"""transformers' ``load_adapter`` and ``from_pretrained`` of an adapter find the magnitudes of an adapter file.

Both rename the keys of a file to the names of the model's parameters by rules that PEFT makes. Behind each
``lora_...`` they put the adapter's name. That makes ``lora_A.default.weight`` of ``lora_A.weight``, and of
``lora_magnitude_vector`` a name without the ``.weight`` that PEFT's parameter has: the magnitudes of the file are
dropped. PEFT's own ``PeftModel.from_pretrained`` goes another way. transformers 5.0 has a copy of these rules. Imported
with transformers 5 or newer only.
"""

import functools
import re
from collections.abc import Callable

from transformers.core_model_loading import WeightRenaming
from transformers.integrations import peft as integration

from dorac import stock_peft
from dorac.undo import Undo

PLACES = [stock_peft.place("build_peft_weight_mapping")]
if hasattr(integration, "_build_peft_weight_mapping"):
    PLACES.append((integration, "_build_peft_weight_mapping"))


def _with_magnitudes(stock: Callable) -> Callable:
    @functools.wraps(stock)
    def build_peft_weight_mapping(weight_conversions, adapter_name, *args, **kwargs):
        mapping = stock(weight_conversions, adapter_name, *args, **kwargs)
        if mapping:
            magnitude = rf"(lora_magnitude_vector\.{re.escape(adapter_name)})$"
            mapping.append(WeightRenaming(source_patterns=magnitude, target_patterns=r"\1.weight"))
        return mapping

    return build_peft_weight_mapping


_stock = [getattr(*place) for place in PLACES]
_ours = [_with_magnitudes(stock) for stock in _stock]


def mend(log: Undo) -> None:
    """Adds the rule."""
    for place, ours in zip(PLACES, _ours, strict=True):
        _put(place, ours, log)


def restore(log: Undo) -> None:
    """Takes it back, unless somebody has replaced the function since."""
    for place, ours, stock in zip(PLACES, _ours, _stock, strict=True):
        if getattr(*place) is ours:
            _put(place, stock, log)


def _put(place: tuple, function: Callable, log: Undo) -> None:
    log.keep_attribute(*place)
    setattr(*place, function)
