"""``enable()`` and ``disable()``: which of PEFT's classes stand under a ``LoraConfig(use_dora=True)`` model."""

import contextlib
import importlib.metadata
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from types import ModuleType

import torch
from torch import nn

from dorac import checks, stock_peft
from dorac.peft.state import state
from dorac.undo import Undo

SUPPORTED = ">=0.21,<0.22"
_INSTALL = f'pip install "peft{SUPPORTED}"'
DROPOUT_ON = "dora_dropout_on"  # where an enabled LoraModel has what the dropout of later adapters is on
_OWN_SCALING = "own_scaling"  # of a magnitude under the drop-in, see DoraLinearLayer.split


def require_peft() -> None:
    """Refuses to go on without a PEFT whose internals this package knows.

    Raises:
        ImportError: PEFT is missing, or of another version.
    """
    try:
        version = importlib.metadata.version("peft")
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(f"dorac.peft needs PEFT {SUPPORTED}, which is not installed: {_INSTALL}") from None
    if version.split(".")[:2] != ["0", "21"]:
        raise ImportError(f"dorac.peft supports PEFT {SUPPORTED}, installed is {version}: {_INSTALL}")


class Enabled(contextlib.AbstractContextManager):
    """What :func:`enable` returns: a context that undoes on exit what the call changed."""

    def __init__(self, undo: Callable[[], None], of: Callable[[], str]) -> None:
        self._undo, self._of = undo, of

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._of()})"

    def __exit__(self, *exception) -> None:
        self._undo()


def enable(model: nn.Module | None = None, *, dropout_on: str = "adapter") -> Enabled:
    """Runs PEFT's DoRA on dorac.

    Without a model: whatever PEFT builds or adds from now on, and what transformers' ``load_adapter`` and
    ``from_pretrained`` of an adapter read, which lose the magnitudes of a file otherwise. With one: its DoRA adapters,
    and those added to it later. A second call changes nothing but ``dropout_on``. Modules, parameters, checkpoints and
    configs stay PEFT's. ``adapter_names=[...]``, an adapter for each row of a batch, then takes DoRA's (:mod:`.mixed`).

    Args:
        dropout_on: what the ``lora_dropout`` of these adapters is on. "adapter" is PEFT's meaning, "low_rank" another
            function in training, at the price of LoRA's dropout: see :func:`dorac.functional.dora_linear`. No config
            and no checkpoint says it.

    Returns:
        A context manager: leaving it undoes this call, so that ``with dorac.peft.enable(): ...`` is on for the block.
        What was built in it is stock PEFT's afterwards; what ran on dorac before stays there, and so does a model that
        ``enable(model)`` was called with in the block.

    Raises:
        ImportError: PEFT is missing or its version is not supported.
        TypeError: ``model`` is not a module.
        ValueError: ``model`` holds no LoRA layer of PEFT's; another ``dropout_on``.

    Warns:
        UserWarning: names, once for each kind, DoRA layers that dorac does not cover; they stay stock.
    """
    require_peft()
    checks.check_dropout_on(dropout_on)
    return _enable_everywhere(dropout_on) if model is None else _enable_model(model, dropout_on)


def disable(model: nn.Module | None = None) -> None:
    """Gives PEFT its own DoRA back: for one model, or everywhere, models that were enabled or built since included.

    A deep copy of an enabled model is a model of its own: ``disable(copy)``.

    Raises:
        ImportError, TypeError, ValueError: as :func:`enable`.
    """
    require_peft()
    if model is not None:
        _check_model(model)
    with state.lock, Undo() as log:
        if model is not None:
            _restore([model], log)
            _forget(state.models, model, log)
            _set_hotswap(log)
            return
        _stop_building(log)
        _restore(list(state.roots), log)
        for known in (state.roots, state.models, state.reported):
            log.add(partial(known.update, list(known)))
            known.clear()
        _set_hotswap(log)


def _stop_building(log: Undo) -> None:
    log.keep_attribute(state, "dropout_on")
    state.dropout_on = "adapter"
    stock = dict(state.stock)
    log.add(partial(state.stock.update, stock))
    for name, function in stock.items():
        _set_method(name, function, log)
    if keys := _transformers_keys():
        keys.restore(log)
    state.stock.clear()


def _set_hotswap(log: Undo) -> None:
    """Gives PEFT dorac's functions that swap adapters while anything is enabled, else its own."""
    from dorac.peft import hotswap

    for name, function in (hotswap.FUNCTIONS if state.stock or state.models else hotswap.STOCK).items():
        place = stock_peft.place(name)
        log.keep_attribute(*place)
        setattr(*place, function)


def _set_method(name: str, function: Callable | None, log: Undo) -> None:
    """Gives PEFT's ``LoraModel`` a method of its own, or with None the one that it inherits."""
    from dorac.stock_peft import LoraModel

    def write(function: Callable | None) -> None:
        if function is not None:
            setattr(LoraModel, name, function)
        elif name in vars(LoraModel):
            delattr(LoraModel, name)

    log.add(partial(write, vars(LoraModel).get(name)))
    write(function)


def _transformers_keys() -> ModuleType | None:
    """The module that mends the names under which transformers looks for magnitudes, where it asks PEFT for them."""
    if not stock_peft.is_transformers_ge_v5:
        return None
    from dorac.peft import transformers_keys

    return transformers_keys


def _remember(modules: "weakref.WeakSet[nn.Module]", module: nn.Module, log: Undo) -> None:
    if module not in modules:
        log.add(partial(modules.discard, module))
        modules.add(module)


def _forget(modules: "weakref.WeakSet[nn.Module]", module: nn.Module, log: Undo) -> None:
    if module in modules:
        log.add(partial(modules.add, module))
        modules.discard(module)


def _enable_everywhere(dropout_on: str) -> Enabled:
    from dorac.peft import model as ours
    from dorac.stock_peft import LoraModel

    with state.lock, Undo() as log:
        log.keep_attribute(state, "dropout_on")
        before_on, state.dropout_on = state.dropout_on, dropout_on
        if state.stock:
            return Enabled(partial(setattr, state, "dropout_on", before_on), _everywhere)
        log.add(state.stock.clear)
        state.stock.update({name: vars(LoraModel).get(name) for name in ours.METHODS})
        for name, function in ours.METHODS.items():
            _set_method(name, function, log)
        if keys := _transformers_keys():
            keys.mend(log)
        _set_hotswap(log)
        before = _on_dorac(list(state.roots))

        def undo() -> None:
            with state.lock, Undo() as log:
                _stop_building(log)
                _restore(list(state.roots), log, keep=[*before, *state.models])
                _set_hotswap(log)

        return Enabled(undo, _everywhere)


def _everywhere() -> str:
    return f"what PEFT builds: {'on dorac' if state.stock else 'stock'}"


def _enable_model(model: nn.Module, dropout_on: str) -> Enabled:
    _check_model(model)
    with state.lock, Undo() as log:
        before, known = _on_dorac([model]), model in state.models
        switch(model, log)
        values = set_dropout_on(model.modules(), dropout_on, log)
        _remember(state.models, model, log)
        _set_hotswap(log)
        _report(model, log)

        def undo() -> None:
            with state.lock, Undo() as log:
                _write(values, log)
                _restore([model], log, keep=before)
                if not known:
                    _forget(state.models, model, log)
                _set_hotswap(log)

        return Enabled(undo, partial(_layers_on_dorac, model))


def _layers_on_dorac(model: nn.Module) -> str:
    from dorac.peft.variants import OnDorac

    variants = [getattr(module, "lora_variant", {}).values() for module in model.modules()]
    count = sum(any(isinstance(variant, OnDorac) for variant in of) for of in variants)
    return f"{type(model).__name__}: {count} DoRA layers on dorac"


def _on_dorac(roots: Iterable[nn.Module]) -> "weakref.WeakSet[nn.Module]":
    """The modules below these that run on dorac."""
    ours = set(ours_by_stock().values())
    return weakref.WeakSet(module for root in roots for module in root.modules() if type(module) in ours)


def _check_model(model: nn.Module) -> None:
    from dorac.stock_peft import LoraLayer

    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module, got {type(model).__name__}")
    if not any(isinstance(m, LoraLayer) for m in model.modules()):
        raise ValueError(f"model must hold LoRA layers of PEFT's, {type(model).__name__} has none")


def ours_by_stock() -> dict[type, type]:
    """dorac's subclass of each class of PEFT's: they have one name."""
    from dorac.peft import dora, layer, model, torchao, variants

    modules = [dora, layer, model, variants, torchao]  # the last one does not import the library
    if stock_peft.is_imported("Linear4bit"):  # whoever has a layer over bitsandbytes' has done it
        from dorac.peft import bnb

        modules.append(bnb)
    return {getattr(stock_peft, name): getattr(ours, name) for ours in modules for name in ours.__all__}


def switch(root: nn.Module, log: Undo) -> None:
    """Puts dorac under the DoRA layers below ``root``.

    Modules change their class and keep their identity, and with it parameters, hooks and whoever holds them.
    """
    classes = ours_by_stock()
    ours = set(classes.values())
    for module in root.modules():
        if hasattr(module, "lora_variant"):
            _replace_variants(module, classes, log)
            if ours.isdisjoint(map(type, module.lora_variant.values())):
                continue  # plain LoRA, or another variant of it
            _set_own_scalings(module, ours, log)
        _set_class(module, classes, log)
    _remember(state.roots, root, log)


def tuners(model: nn.Module) -> list[nn.Module]:
    """What PEFT itself switches off to have the base model, where one of the adapters runs on dorac; else nothing."""
    from dorac.peft.variants import OnDorac
    from dorac.stock_peft import AuxiliaryTrainingWrapper, BaseTunerLayer

    found = [m for m in model.modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    variants = (variant for module in found for variant in getattr(module, "lora_variant", {}).values())
    return found if any(isinstance(variant, OnDorac) for variant in variants) else []


_Values = list[tuple[dict[str, object], str, str | None]]  # attributes, a name among them, and its value or None


def set_dropout_on(modules: Iterable[nn.Module], dropout_on: str, log: Undo, adapter: str | None = None) -> _Values:
    """Says what the dropout of the adapters of these modules is on, or of one of them, and returns what it was.

    A model of PEFT's has it for the adapters that are added later.
    """
    from dorac.peft.model import LoraModel
    from dorac.peft.variants import OnDorac

    values: _Values = []
    for module in modules:
        for name, variant in getattr(module, "lora_variant", {}).items():
            if isinstance(variant, OnDorac) and adapter in (None, name):
                values.append((vars(variant), "dropout_on", dropout_on))
        if type(module) is LoraModel:
            values.append((vars(module), DROPOUT_ON, dropout_on))
    return _write(values, log)


def _write(values: _Values, log: Undo) -> _Values:
    before = [(attributes, name, attributes.get(name)) for attributes, name, _ in values]
    log.add(partial(_assign, before))
    _assign(values)
    return before


def _assign(values: _Values) -> None:
    for attributes, name, value in values:
        if value is None:
            attributes.pop(name, None)
        else:
            attributes[name] = value


def _restore(roots: Iterable[nn.Module], log: Undo, keep: Iterable[nn.Module] = ()) -> None:
    """Gives the modules below ``roots`` their stock classes back, those in ``keep`` excepted.

    A layer is kept with all its adapters, and so is a model that was enabled.
    """
    from dorac.stock_peft import LoraLayer

    classes = {ours: stock for stock, ours in ours_by_stock().items()}
    kept: set[nn.Module] = set()
    for module in keep:
        whole = isinstance(module, LoraLayer) or module in state.models
        kept.update(module.modules() if whole else [module])
    for module in [module for root in roots for module in root.modules()]:
        if module in kept:
            continue
        if hasattr(module, "lora_variant"):
            _replace_variants(module, classes, log)
        if type(module) in classes and _OWN_SCALING in vars(module):
            log.add(partial(vars(module).__setitem__, _OWN_SCALING, vars(module).pop(_OWN_SCALING)))
        _set_class(module, classes, log)


def _set_class(module: nn.Module, classes: dict[type, type], log: Undo) -> None:
    from dorac.peft.norms import forget

    if type(module) in classes:
        log.keep_attribute(module, "__class__")
        module.__class__ = classes[type(module)]
        if DROPOUT_ON in vars(module):
            _write([(vars(module), DROPOUT_ON, None)], log)
        # What one class keeps the other would not check.
        forget(module, log)
        if getattr(module, "_dora_cache", None):
            log.add(partial(module._dora_cache.update, dict(module._dora_cache)))
            module._dora_cache.clear()


def _set_own_scalings(module: nn.Module, ours: set[type], log: Undo) -> None:
    """Tells the magnitudes of a layer which scaling is the adapter's own, of which PEFT's is a multiple."""
    from dorac.nn.hyperparameters import scaling_factor

    for adapter, variant in module.lora_variant.items():
        magnitude = vars(module.lora_magnitude_vector[adapter])
        if type(variant) in ours and magnitude.get(_OWN_SCALING) is None:
            log.add(partial(magnitude.pop, _OWN_SCALING, None))
            rank_stabilised = module.use_rslora.get(adapter, False)
            own = scaling_factor(module.r[adapter], module.lora_alpha[adapter], rank_stabilised)
            scaling = module.scaling[adapter]
            magnitude[_OWN_SCALING] = torch.full_like(scaling, own) if isinstance(scaling, torch.Tensor) else own


def _replace_variants(module: nn.Module, classes: dict[type, type], log: Undo) -> None:
    for adapter, variant in module.lora_variant.items():
        if type(variant) in classes:
            log.add(partial(module.lora_variant.__setitem__, adapter, variant))
            module.lora_variant[adapter] = classes[type(variant)]()


def _report(root: nn.Module, log: Undo) -> None:
    from dorac.peft.uncovered import report

    report(root, state.reported)
