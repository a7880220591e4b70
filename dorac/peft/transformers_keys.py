"""transformers' ``load_adapter`` and ``from_pretrained`` of an adapter find the magnitudes of an adapter file.

Both rename the keys of a file to the names of the model's parameters by rules that PEFT makes. Behind each
``lora_...`` they put the adapter's name. That makes ``lora_A.default.weight`` of ``lora_A.weight``, and of
``lora_magnitude_vector`` a name without the ``.weight`` that PEFT's parameter has: the magnitudes of the file are
dropped. PEFT's own ``PeftModel.from_pretrained`` goes another way. Imported with transformers 5 or newer only.
"""

import functools
import re

from peft.utils import transformers_weight_conversion as rules
from transformers.core_model_loading import WeightRenaming

from dorac.undo import Undo

_stock = rules.build_peft_weight_mapping


@functools.wraps(_stock)
def _build_peft_weight_mapping(weight_conversions, adapter_name, *args, **kwargs):
    mapping = _stock(weight_conversions, adapter_name, *args, **kwargs)
    if mapping:
        magnitude = rf"(lora_magnitude_vector\.{re.escape(adapter_name)})$"
        mapping.append(WeightRenaming(source_patterns=magnitude, target_patterns=r"\1.weight"))
    return mapping


def mend(log: Undo) -> None:
    """Adds the rule."""
    _put(_build_peft_weight_mapping, log)


def restore(log: Undo) -> None:
    """Takes it back, unless somebody has replaced PEFT's function since."""
    if rules.build_peft_weight_mapping is _build_peft_weight_mapping:
        _put(_stock, log)


def _put(function, log: Undo) -> None:
    log.keep_attribute(rules, "build_peft_weight_mapping")
    rules.build_peft_weight_mapping = function
