"""What dorac adds to modules of torch that are slow to import, once somebody else imports them."""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable
from types import ModuleType


class _OnImport(importlib.abc.MetaPathFinder):
    """Finds a module as Python does, and calls each of ``then`` with it once it has run."""

    def __init__(self, name: str) -> None:
        self.name, self.then = name, []

    def find_spec(self, fullname, path, target=None):
        spec = importlib.machinery.PathFinder.find_spec(fullname, path) if fullname == self.name else None
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def run_and_call(module):
            run(module)
            for then in self.then:
                then(module)

        spec.loader.exec_module = run_and_call
        return spec


def on_import(name: str, then: Callable[[ModuleType], None]) -> None:
    """Calls ``then`` with the module, now if it is imported and whenever it is; a second call changes nothing."""
    if name in sys.modules:
        then(sys.modules[name])
    finder = next((f for f in sys.meta_path if isinstance(f, _OnImport) and f.name == name), None)
    if finder is None:
        finder = _OnImport(name)
        sys.meta_path.insert(0, finder)
    if then not in finder.then:
        finder.then.append(then)
