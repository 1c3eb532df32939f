"""Run a function when a module has been imported, so that loading the plugin imports nothing of vLLM. Stdlib only."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

_waiting: dict[str, list[Callable[[ModuleType], None]]] = {}
_searching: set[str] = set()


def when_imported(name: str, action: Callable[[ModuleType], None]) -> None:
    """Call `action(module)` now if module `name` is imported, else right after its body has run.

    Whoever imports it afterwards by `from name import x` sees what `action` put there. An exception in `action`
    surfaces in that import statement.
    """
    if name in sys.modules:
        action(sys.modules[name])
        return
    _waiting.setdefault(name, []).append(action)
    if _Finder not in sys.meta_path:
        sys.meta_path.insert(0, _Finder)


class _Finder:
    """Finds nothing itself: it lets the other finders find a module waited for and follows its execution."""

    @classmethod
    def find_spec(
        cls, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in _waiting or name in _searching:
            return None
        _searching.add(name)
        try:
            spec = importlib.util.find_spec(name)  # passes through this finder again
        finally:
            _searching.discard(name)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            # taken here, not above: a spec may be looked up without being executed
            for action in _waiting.pop(name, ()):
                action(module)

        # on the loader instance, which is this import's own: its type, so inspect and resources, stay as they are
        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
