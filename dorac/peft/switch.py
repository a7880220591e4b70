"""``enable()`` and ``disable()``: which of PEFT's classes stand under a ``LoraConfig(use_dora=True)`` model."""

import contextlib
import importlib.metadata
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator

from torch import nn

SUPPORTED = ">=0.21,<0.22"
_INSTALL = f'pip install "peft{SUPPORTED}"'


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


class _State:
    """What :func:`disable` has to undo."""

    def __init__(self) -> None:
        # methods of PEFT's LoraModel, by name, while PEFT builds on dorac; None for one that it inherits
        self.stock: dict[str, Callable | None] = {}
        self.roots: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # modules that were switched
        self.models: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # those of them that enable() was called with
        self.reported: set[str] = set()  # kinds of layers that stay stock


_state = _State()


class Enabled(contextlib.AbstractContextManager):
    """What :func:`enable` returns: a context that undoes on exit what the call changed."""

    def __init__(self, undo: Callable[[], None]) -> None:
        self._undo = undo

    def __exit__(self, *exception) -> None:
        self._undo()


def enable(model: nn.Module | None = None) -> Enabled:
    """Runs PEFT's DoRA on dorac.

    Without a model: whatever PEFT builds or adds from now on. With one: its DoRA adapters, and those added to it later.
    A second call changes nothing. Modules, parameters, checkpoints and configs stay PEFT's.

    Returns:
        A context manager: leaving it undoes this call, so that ``with dorac.peft.enable(): ...`` is on for the block.
        What was built in it is stock PEFT's afterwards; what ran on dorac before stays there, and so does a model that
        ``enable(model)`` was called with in the block.

    Raises:
        ImportError: PEFT is missing or its version is not supported.
        TypeError: ``model`` is not a module.
        ValueError: ``model`` holds no LoRA layer of PEFT's.

    Warns:
        UserWarning: names, once for each kind, DoRA layers that dorac does not cover; they stay stock.
    """
    require_peft()
    return _enable_everywhere() if model is None else _enable_model(model)


def disable(model: nn.Module | None = None) -> None:
    """Gives PEFT its own DoRA back: for one model, or everywhere, models that were enabled or built since included.

    A deep copy of an enabled model is a model of its own: ``disable(copy)``.

    Raises:
        ImportError, TypeError, ValueError: as :func:`enable`.
    """
    require_peft()
    if model is not None:
        _check_model(model)
        _restore([model])
        _state.models.discard(model)
        return
    _stop_building()
    _restore(_state.roots)
    _state.roots.clear()
    _state.models.clear()
    _state.reported.clear()


def _stop_building() -> None:
    from peft.tuners.lora.model import LoraModel

    for name, function in _state.stock.items():
        if function is None:
            delattr(LoraModel, name)
        else:
            setattr(LoraModel, name, function)
    _state.stock.clear()


def _enable_everywhere() -> Enabled:
    from peft.tuners.lora.model import LoraModel

    from dorac.peft import model as ours

    if _state.stock:
        return Enabled(lambda: None)
    for name, function in ours.METHODS.items():
        _state.stock[name] = vars(LoraModel).get(name)
        setattr(LoraModel, name, function)
    before = _on_dorac(_state.roots)

    def undo() -> None:
        _stop_building()
        _restore(_state.roots, keep=[*before, *_state.models])

    return Enabled(undo)


def _enable_model(model: nn.Module) -> Enabled:
    _check_model(model)
    before, known = _on_dorac([model]), model in _state.models
    switch(model)
    _state.models.add(model)

    def undo() -> None:
        _restore([model], keep=before)
        if not known:
            _state.models.discard(model)

    return Enabled(undo)


def _on_dorac(roots: Iterable[nn.Module]) -> "weakref.WeakSet[nn.Module]":
    """The modules below these that run on dorac."""
    ours = set(_ours_by_stock().values())
    return weakref.WeakSet(module for root in roots for module in root.modules() if type(module) in ours)


def _check_model(model: nn.Module) -> None:
    from peft.tuners.lora import LoraLayer

    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module, got {type(model).__name__}")
    if not any(isinstance(m, LoraLayer) for m in model.modules()):
        raise ValueError(f"model must hold LoRA layers of PEFT's, {type(model).__name__} has none")


def _ours_by_stock() -> dict[type, type]:
    """dorac's subclass of each class of PEFT's: they have one name."""
    from peft.tuners.lora import dora as stock_dora
    from peft.tuners.lora import layer as stock_layer
    from peft.tuners.lora import model as stock_model
    from peft.tuners.lora import variants as stock_variants

    from dorac.peft import dora, layer, model, variants

    pairs = ((stock_dora, dora), (stock_layer, layer), (stock_model, model), (stock_variants, variants))
    return {getattr(stock, name): getattr(ours, name) for stock, ours in pairs for name in ours.__all__}


def switch(root: nn.Module, name: str = "") -> None:
    """Puts dorac under the DoRA layers below ``root`` and reports those that it does not cover.

    Modules change their class and keep their identity, and with it parameters, hooks and whoever holds them.
    """
    classes = _ours_by_stock()
    ours = set(classes.values())
    for module in root.modules():
        if hasattr(module, "lora_variant"):
            _replace_variants(module, classes)
            if ours.isdisjoint(map(type, module.lora_variant.values())):
                continue  # plain LoRA, or another variant of it
        module.__class__ = classes.get(type(module), type(module))
    _state.roots.add(root)
    _report_stock(root, name)


def _restore(roots: Iterable[nn.Module], keep: Iterable[nn.Module] = ()) -> None:
    """Gives the modules below ``roots`` their stock classes back, those in ``keep`` excepted.

    A layer is kept with all its adapters, and so is a model that was enabled.
    """
    from peft.tuners.lora import LoraLayer

    classes = {ours: stock for stock, ours in _ours_by_stock().items()}
    kept: set[nn.Module] = set()
    for module in keep:
        whole = isinstance(module, LoraLayer) or module in _state.models
        kept.update(module.modules() if whole else [module])
    for module in [module for root in roots for module in root.modules()]:
        if module in kept:
            continue
        if hasattr(module, "lora_variant"):
            _replace_variants(module, classes)
        if type(module) in classes:
            module.__class__ = classes[type(module)]
            getattr(module, "_dora_cache", {}).clear()


def _replace_variants(module: nn.Module, classes: dict[type, type]) -> None:
    for adapter, variant in module.lora_variant.items():
        if type(variant) in classes:
            module.lora_variant[adapter] = classes[type(variant)]()


def _report_stock(root: nn.Module, root_name: str) -> None:
    from dorac.peft.variants import OnDorac

    left: dict[str, list[str]] = {}
    for name, module in root.named_modules():
        for adapter, is_dora in getattr(module, "use_dora", {}).items():
            if is_dora and not isinstance(module.lora_variant.get(adapter), OnDorac):
                left.setdefault(type(module).__name__, []).append(f"{root_name}.{name}".strip("."))
    for kind, names in left.items():
        if kind not in _state.reported:
            _state.reported.add(kind)
            warnings.warn(
                f"dorac.peft does not cover {kind}, which stays on stock PEFT's DoRA: {', '.join(names[:8])}"
                + (", ..." if len(names) > 8 else ""),
                stacklevel=4,
            )


@contextlib.contextmanager
def building() -> Iterator[None]:
    """PEFT's layers find dorac's variants and magnitude layers in place of its own."""
    from peft.tuners.lora import variants as stock

    from dorac.peft import dora, variants

    names = {name: getattr(module, name) for module in (dora, variants) for name in module.__all__}
    before = {name: getattr(stock, name) for name in names if hasattr(stock, name)}
    try:
        for name in before:
            setattr(stock, name, names[name])
        yield
    finally:
        for name, value in before.items():
            setattr(stock, name, value)
