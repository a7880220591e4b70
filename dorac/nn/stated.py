"""``Stated``: an adapted layer's part of a state dict, of copies and of pickles."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dorac import offload
from dorac.nn import norm_cache, starts
from dorac.ops import sharded
from dorac.undo import Undo


class Stated(nn.Module):
    """The part of :class:`dorac.nn.DoraLayer` that loads, all or nothing, and says what a copy holds."""

    def refuse_loading(self, name: str, state_dict: Mapping[str, object]) -> None:
        """Raises if the layer, called ``name``, is offloaded, or its base weight is not what the state dict is over.

        That is so where it is merged, or a residual (see :mod:`dorac.nn.residual`) and the state dict of none, or of
        another.
        """
        if self.merged:
            raise ValueError(f"{name or type(self).__name__} is merged; unmerge it before loading a state dict")
        if offload.is_offloaded(self):
            raise ValueError(f"{name or type(self).__name__}: {offload.LOAD_BEFORE}")
        if "initial_lora_A" in self._parameters:
            self._refuse_other_residual(name, state_dict)

    def _refuse_other_residual(self, name: str, state_dict: Mapping[str, object]) -> None:
        keys = {key: f"{name}.{key}".lstrip(".") for key in ("base_layer.weight", "initial_lora_A", "initial_lora_B")}
        weight, *initial = (key in state_dict for key in keys.values())
        if weight and not initial[0]:
            raise ValueError(
                f"{name or type(self).__name__} began as a part of its base weight, which the state dict holds whole: "
                "load base weights before the model is adapted"
            )
        if weight or not all(initial):
            return
        for key in ("initial_lora_A", "initial_lora_B"):
            own, given = self._parameters[key].detach(), state_dict[keys[key]]
            if not isinstance(given, Tensor) or own.is_meta or given.is_meta:  # torch says what is wrong, if it is
                continue
            own, given = sharded.whole(own), sharded.whole(given)
            if own.shape == given.shape and not torch.equal(own, given.to(own.device, own.dtype)):
                raise ValueError(
                    f"{name or type(self).__name__} began as another part of its base weight than the state dict is "
                    "over, which does not hold that weight: call dorac.load_adapter(model, directory) first, which "
                    "takes out what the adapter in the directory began as"
                )

    def load_state_dict(self, state_dict: Mapping[str, object], strict: bool = True, assign: bool = False) -> object:
        """As any module, all or nothing."""
        from dorac.nn.loading import keep_all  # which imports dorac.nn.layer, and that this module

        with Undo() as log:
            keep_all(self, state_dict, assign, log)
            return super().load_state_dict(state_dict, strict, assign)

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        """Loads the layer's own tensors, all or none of them; those of its base layer follow."""
        self.refuse_loading(prefix.rstrip("."), state_dict)
        self._widen_magnitudes()
        self.lasting = None  # torch may swap what it was made of
        starts.before_load(self, state_dict, prefix)
        errors = len(error_msgs)
        with Undo() as log:
            log.keep_module(self)
            log.keep(*self.parameters(recurse=False))
            norm_cache.suspend([self])
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
            if len(error_msgs) > errors:
                log.roll_back()
                norm_cache.suspend([self])
                self.loading.all, self.loading.magnitude = False, self.magnitude_loaded  # nothing was loaded

    def __getstate__(self) -> dict:
        """What copies and pickles hold. They take their own norm, since no optimizer of theirs is known."""
        return super().__getstate__() | {"kept": None, "compiled_norm": None, "lasting": None}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.switch(disabled=False)


def after_load(layer: Stated, incompatible_keys: object) -> None:
    """After ``load_state_dict`` of the layer or of what holds it."""
    starts.after_load(layer)
    layer._keep_parts()
    norm_cache.refresh([layer])
