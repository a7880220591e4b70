"""Which modules have their weight read past their forward, found in the source of the code that a forward reaches.

A parent that runs ``F.linear(x, self.proj.weight)`` does not run ``self.proj``, and would not run what adapts it
either. No list of such classes is ever complete, so their source is read: every function that a forward of the model
can reach by the names it uses, for ``self.<path>.weight``. Reads of metadata (``.dtype``, ``.shape``, ``isinstance``)
are none. What has no source, or reaches the weight in another way (a helper function that is given the module,
``getattr``, a loop over ``enumerate``, ``zip`` or ``.items()``), is not found here, but by :func:`dorac.find_idle`.
"""

import ast
import dataclasses
import inspect
import os
import textwrap
from collections.abc import Callable, Iterator, Mapping

from torch import nn

_METADATA = {"dtype", "device", "shape", "ndim", "size", "dim", "numel", "layout", "stride", "is_contiguous"}
_METADATA |= {"is_cuda", "is_meta", "is_floating_point", "is_quantized", "element_size", "itemsize", "nbytes"}
_METADATA |= {"requires_grad", "grad", "data_ptr", "names", "__class__", "__dict__", "quant_state", "SCB", "CB"}
_METADATA |= {
    "new_zeros",
    "new_ones",
    "new_empty",
    "new_full",
    "new_tensor",
    "type",
    "get_device",
    "is_cpu",
    "is_sparse",
}
_METADATA |= {"nelement", "ndimension", "storage_offset", "_version"}
# Functions and methods that take no more than metadata of a tensor they are given.
_ASKING = {"isinstance", "type", "id", "hasattr", "is_tensor", "to", "type_as", "view_as", "expand_as", "reshape_as"}
_ASKING |= {
    "len",
    "numel",
    "result_type",
    "zeros_like",
    "ones_like",
    "empty_like",
    "full_like",
    "rand_like",
    "randn_like",
    "is_floating_point",
}

_EACH = "*"  # in a path: every child, of a container that is indexed or iterated over
Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class _Read:
    """``self.<path>.weight`` in a function: its path, and where it stands."""

    path: Path
    where: str


def read_past_forward(model: nn.Module, adapters: tuple[type[nn.Module], ...] = ()) -> dict[nn.Module, str]:
    """The modules whose weight the code of another module reads, with the place: ``Mixer.scan, mixer.py:12``.

    ``adapters``: classes of modules that may read what they hold.
    """
    modules = [module for module in model.modules() if not isinstance(module, adapters)]
    own = {module: _plain_function(vars(module)["forward"]) for module in modules if "forward" in vars(module)}
    reads = _collect(list(dict.fromkeys(map(type, modules))), own)
    found = {}
    for module in modules:
        for read in [*reads[type(module)], *reads.get(module, [])]:
            for child in _children(module, read.path):
                found.setdefault(child, read.where)
    return found


def _children(module: nn.Module, path: Path) -> Iterator[nn.Module]:
    """The modules at a path below ``module``."""
    if not path:
        yield module
        return
    children = module._modules
    for child in children.values() if path[0] == _EACH else (children.get(path[0]),):
        if child is not None:
            yield from _children(child, path[1:])


def _collect(classes: list[type[nn.Module]], own: Mapping[nn.Module, Callable | None]) -> dict[object, list[_Read]]:
    """The reads in the functions that are called, as far as their names tell, from a forward: by class or module.

    ``own``: the forwards that belong to one module only.
    """
    reads = {owner: [] for owner in (*classes, *own)}
    names, seen, parsed = {"forward"}, set(), {}
    pending = [(module, function) for module, function in own.items() if function is not None]
    while pending or names - seen:
        new = sorted(names - seen)
        seen.update(new)
        pending += [(cls, function) for cls in classes for name in new for function in _definitions(cls, name)]
        for owner, function in pending:
            if function not in parsed:
                parsed[function] = _Function.parse(function)
            if parsed[function] is not None:
                names |= parsed[function].names
                reads[owner] += parsed[function].reads(owner if isinstance(owner, type) else type(owner))
        pending = []
    return reads


def _definitions(cls: type, name: str) -> Iterator[Callable]:
    """The function that ``cls`` has under this name, and those below it that it may reach with ``super()``."""
    for base in cls.__mro__:
        if base is nn.Module:
            return
        function = _plain_function(vars(base).get(name))
        if function is not None:
            yield function
            if "super" not in function.__code__.co_names:
                return


def _plain_function(attribute: object) -> Callable | None:
    """The function behind a method, a property or a decorator that says what it wraps."""
    for _ in range(2):  # a wrapped bound method, as accelerate leaves it
        attribute = getattr(attribute, "__func__", None) or getattr(attribute, "fget", None) or attribute
        attribute = inspect.unwrap(attribute) if callable(attribute) else attribute
    return attribute if inspect.isfunction(attribute) else None


@dataclasses.dataclass
class _Function:
    """A function's syntax tree, with the parent of each node."""

    function: Callable
    tree: ast.AST
    parents: dict[ast.AST, ast.AST]
    names: set[str]

    @classmethod
    def parse(cls, function) -> "_Function | None":
        try:
            lines, first = inspect.getsourcelines(function)
            tree = ast.parse(textwrap.dedent("".join(lines)))
        except (OSError, TypeError, SyntaxError):  # built at run time, or a lambda cut out of its line
            return None
        ast.increment_lineno(tree, first - 1)
        parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
        return cls(function, tree, parents, {n.attr for n in parents if isinstance(n, ast.Attribute)})

    def reads(self, cls: type) -> list[_Read]:
        """The reads of weights that compute with them."""
        arguments = self.function.__code__.co_varnames
        aliases = {arguments[0]: ()} if arguments else {}
        for node in ast.walk(self.tree):  # breadth first: an alias of an alias in one block comes after it
            if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
                target, path = node.targets[0], _path(node.value, aliases)
            elif isinstance(node, (ast.For, ast.comprehension)) and isinstance(node.target, ast.Name):
                target, path = node.target, _path(node.iter, aliases)
                path = None if path is None else (*path, _EACH)
            else:
                continue
            if path:
                aliases.setdefault(target.id, path)
        place = f"{cls.__name__}.{self.function.__name__}, {os.path.basename(self.function.__code__.co_filename)}"
        found = []
        for node in self.parents:
            if isinstance(node, ast.Attribute) and node.attr == "weight" and isinstance(node.ctx, ast.Load):
                path = _path(node.value, aliases)
                if path and self._computes(node):
                    found.append(_Read(path, f"{place}:{node.lineno}"))
        return found

    def _computes(self, node: ast.expr) -> bool:
        """Whether more than metadata is taken of the tensor that ``node`` stands for."""
        parent = self.parents[node]
        if isinstance(parent, ast.Attribute):
            return parent.attr not in _METADATA and (parent.attr != "data" or self._computes(parent))
        if isinstance(parent, ast.Call) and node in parent.args:
            name = parent.func.attr if isinstance(parent.func, ast.Attribute) else getattr(parent.func, "id", None)
            return name not in _ASKING
        if isinstance(parent, ast.Compare):
            return not all(isinstance(op, (ast.Is, ast.IsNot)) for op in parent.ops)
        if isinstance(parent, ast.Assign) and len(parent.targets) == 1 and isinstance(parent.targets[0], ast.Name):
            name = parent.targets[0].id
            uses = (n for n in self.parents if isinstance(n, ast.Name) and n.id == name and isinstance(n.ctx, ast.Load))
            return any(self._computes(use) for use in uses)
        return not isinstance(parent, ast.Expr)


def _path(node: ast.AST, aliases: dict[str, Path]) -> Path | None:
    """The path below ``self`` that an expression stands for, or None."""
    if isinstance(node, ast.Name):
        return aliases.get(node.id)
    if isinstance(node, (ast.Attribute, ast.Subscript)):
        path = _path(node.value, aliases)
        return None if path is None else (*path, node.attr if isinstance(node, ast.Attribute) else _EACH)
    return None
