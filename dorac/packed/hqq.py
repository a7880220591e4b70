"""HQQ's layers, whose numbers are read by HQQ alone: their norm takes a dense copy."""

import copy

from torch import Tensor, nn

from dorac.packed.holder import Holder, finite


def _requantised(module: nn.Module, dense: Tensor) -> dict[str, object]:
    config = copy.deepcopy(module.quant_config) | {"offload_meta": module.offload_meta}  # which it takes out
    new = type(module)(None, config, compute_dtype=module.compute_dtype, device=module.device)
    new.quantize(finite(dense, module.compute_dtype), **new.quant_config)
    return {"W_q": new.W_q, "meta": new.meta}


HOLDER = Holder("HQQ weight", "W_q", requantised=_requantised)
