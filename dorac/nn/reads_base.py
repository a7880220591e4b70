"""``ReadsBase``: what an adapted layer has not itself is its base layer's."""

from torch import nn
from torch.nn.modules.module import _global_parameter_registration_hooks as _registration_hooks

from dorac.nn.stock import MIXED

# The base layer's parameters that a wrapper has properties for, by their names in torch.
_OF_THE_BASE = "weight", "bias"


class ReadsBase(nn.Module):
    """The part of :class:`dorac.nn.DoraLayer` that stands for its base layer where others read it."""

    merged: bool
    # Until ``__init__`` has ended, and while copies are made, what is read and set is the wrapper's own.
    _is_built = False

    def __getattr__(self, name: str) -> object:
        """What a layer has not itself is its base layer's, if that is a public value: geometry, sizes, flags.

        Parameters, modules and methods of the base layer are not: they would go past the adapter.
        """
        own = self.__dict__
        if "_modules" in own:  # nn.Module's lookup, written out: forward comes here for every parameter
            parameters, modules, buffers = own["_parameters"], own["_modules"], own["_buffers"]
            if name in parameters:
                return parameters[name]
            if name in modules:
                return modules[name]
            if name in buffers:
                return buffers[name]
            if self._base_has(name):
                return getattr(self.base_layer, name)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: object) -> None:
        """What is read off the base layer is set there, so that forward sees it."""
        parameters = self.__dict__.get("_parameters")
        if parameters and name in parameters and isinstance(value, nn.Parameter) and not _registration_hooks:
            parameters[name] = value  # FSDP2 comes here for each parameter, four times a step
            self.__dict__["lasting"] = None
            return
        if name in _OF_THE_BASE and self._is_built and name in self.base_layer._parameters:
            if name == "weight" and self.merged and value is not self.base_layer.weight:
                raise ValueError("the adapter is merged; unmerge it before setting another weight")
            setattr(self.base_layer, name, value)  # as transformers' tie_weights() does
            return
        if name == "base_layer" and self._is_built and hasattr(value, "base_layer"):
            raise TypeError(MIXED.format(type(self).__name__))
        if self._base_has(name) and name not in self.__dict__ and not hasattr(type(self), name):
            setattr(self.base_layer, name, value)
        else:
            super().__setattr__(name, value)

    def _base_has(self, name: str) -> bool:
        """Whether the base layer has a public value of this name, that is no parameter or buffer of the wrapper."""
        if not self._is_built or name.startswith("_") or name in self._parameters or name in self._buffers:
            return False
        base = self.base_layer
        if not hasattr(base, name):
            return False
        value = getattr(base, name)
        return not isinstance(value, (nn.Parameter, nn.Module)) and not callable(value)
