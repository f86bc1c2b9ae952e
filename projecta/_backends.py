"""Backends: modules of one package with the same functions, imported when they are first used."""

import os
import sys
from importlib import import_module
from types import ModuleType

from projecta._checks import Checker

# Backends for one device type only. Triton's interpreter runs on the CPU.
_ONLY = {"cpu": "cpu", "triton": "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"}
_loaded: dict[str, ModuleType] = {}  # by the module's full name


class BackendUnavailable(RuntimeError):
    """A backend was named that cannot run here; the message says why."""


def device_of(backend: str) -> str:
    """The one device type that a backend runs on, or "" if it runs on any."""
    return _ONLY.get(backend, "")


def why_not(package: str, backend: str) -> str:
    """Import a backend; return why it cannot run here, or ""."""
    name = f"{package}.{backend}"
    if name not in _loaded:
        try:
            _loaded[name] = import_module(name)
        except ImportError as error:
            return f"{error.name or 'a package'} cannot be imported ({error})"
    return _loaded[name].unavailable()


# The mark of torch.compiler.assume_constant_result, which would import a compiler first (0.7 s).
why_not._dynamo_marked_constant = True  # type: ignore[attr-defined]


def require_backend(check: Checker, package: str, backend: str, device: str = "") -> ModuleType:
    """The backend's module; raise if it cannot run here, or not on the given type of device."""
    reason = why_not(package, backend)
    if not reason and device and device_of(backend) not in ("", device):
        reason = f"it takes {device_of(backend)} tensors, not {device}"
    if reason:
        raise BackendUnavailable(
            f"{check.function}: backend must be able to run here; got {backend!r}: {reason}."
        )
    # not from a table, of which torch.compile may have a copy from before the import
    return getattr(sys.modules[package], backend)  # type: ignore[no-any-return]
