"""The import names `mamba_ssm` and `causal_conv1d`, answered by projecta, without a compiler or a GPU.

    from projecta import compat

    compat.install()                       # before the code that imports mamba_ssm
    from mamba_ssm import Mamba

`python -m projecta.compat script.py ARGUMENTS` runs a script with the names installed. Every name is composed
of projecta's own operators. Mamba-2 and Mamba-3 are out of scope.
"""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType, TracebackType
from typing import Any

from projecta.compat._names import MODULES, OUT_OF_SCOPE

_ROOTS = tuple(name for name in MODULES if "." not in name)
# Modules of transformers that choose their kernels when they are imported.
_EARLY = tuple(f"transformers.models.{name}.modeling_{name}" for name in ("mamba", "falcon_mamba", "jamba"))


def install() -> "Installation":
    """Register the import names for this process, until the handle's `remove()`.

    Returns:
        A handle. As a context manager it removes the names at its end. A second call returns a handle that
        removes nothing.

    Raises:
        RuntimeError: the real packages can be imported here, or transformers' Mamba models are imported
            already.

    Examples:
        with compat.install():
            from mamba_ssm import Mamba
    """
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return Installation(None)
    for name in _ROOTS:
        if name in sys.modules or importlib.util.find_spec(name) is not None:
            raise RuntimeError(
                f"compat.install: {name} is installed here already. Uninstall it, or do not call install()."
            )
    for name in _EARLY:
        if name in sys.modules:
            raise RuntimeError(
                f"compat.install: {name} is imported already, and chose its kernels then. Call install()"
                " before anything imports it, or use projecta.accelerate(model)."
            )
    finder = _Finder()
    sys.meta_path.append(finder)
    return Installation(finder)


class Installation:
    """Handle returned by `install`."""

    def __init__(self, finder: "_Finder | None"):
        self._finder = finder

    def remove(self) -> None:
        """Forget the import names. What was imported by them keeps working. A second call does nothing."""
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)  # type: ignore[arg-type]
            for name in MODULES:
                sys.modules.pop(name, None)

    def __enter__(self) -> "Installation":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.remove()


class _Finder:
    """Finds and makes the modules of `MODULES`; for other names below their roots it says what there is."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: Any = None
    ) -> ModuleSpec | None:
        if name.partition(".")[0] not in _ROOTS:
            return None
        if name not in MODULES:
            raise ImportError(_unknown(name), name=name)
        # every module is a package: `from module import name` then asks here for a name that it lacks
        return ModuleSpec(name, self, origin="projecta.compat", is_package=True)  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        for name, place in MODULES[module.__name__].items():
            room, _, value = place.partition(":")
            found = getattr(importlib.import_module(f"projecta.compat.{room}"), value) if room else value
            setattr(module, name, found)


class _Module(ModuleType):
    def __getattr__(self, name: str) -> Any:
        """A submodule; for any other name an error that says what there is."""
        whole = f"{self.__name__}.{name}"
        if whole in MODULES:
            return importlib.import_module(whole)
        raise AttributeError(_unknown(whole))


def _unknown(name: str) -> str:
    parent, _, last = name.rpartition(".")
    reasons = (reason for words, reason in OUT_OF_SCOPE.items() if last in words)
    below = (n[len(parent) + 1 :] for n in MODULES if n.startswith(parent + "."))
    offered = [n for n in MODULES.get(parent, {}) if not n.startswith("_")]
    known = ", ".join([*offered, *(n for n in below if "." not in n)]) or "none"
    return f"{name}: {next(reasons, 'projecta does not have it')}. The names of {parent} are: {known}."
