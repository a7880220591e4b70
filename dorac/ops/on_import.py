"""What dorac adds to modules of torch that are slow to import, once somebody else imports them."""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable
from types import ModuleType


class _OnImport(importlib.abc.MetaPathFinder):
    """Finds a module as Python does, and calls ``then`` with it once it has run."""

    def __init__(self, name: str, then: Callable[[ModuleType], None]) -> None:
        self.name, self.then = name, then

    def find_spec(self, fullname, path, target=None):
        spec = importlib.machinery.PathFinder.find_spec(fullname, path) if fullname == self.name else None
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def run_and_call(module):
            run(module)
            self.then(module)

        spec.loader.exec_module = run_and_call
        return spec


def on_import(name: str, then: Callable[[ModuleType], None]) -> None:
    """Calls ``then`` with the module, now if it is imported and whenever it is; a second call changes nothing."""
    if name in sys.modules:
        then(sys.modules[name])
    if not any(isinstance(finder, _OnImport) and finder.name == name for finder in sys.meta_path):
        sys.meta_path.insert(0, _OnImport(name, then))
