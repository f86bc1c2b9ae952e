"""Fast selective scans and token pruning, and the performance-regression suite that keeps them fast.

The public names are imported when they are first used: `import projecta` loads no tensor library.

>>> import projecta
>>> projecta.available_backends()["reference"]
''
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_MODULE_OF = {
    "BackendUnavailable": "projecta.scan",
    "available_backends": "projecta.scan",
    "causal_conv": "projecta.conv",
    "causal_conv_update": "projecta.conv",
    "selective_scan": "projecta.scan",
    "selective_state_update": "projecta.scan",
    "mrss_scan": "projecta.mrss",
    "MambaBlock": "projecta.mamba",
    "accelerate": "projecta.mamba",
    "Plan": "projecta.vtp",
}
_MODULES = (
    "compat", "conv", "low_rank", "mamba", "mrss", "parallel", "regress", "s4d", "scan", "vision_mamba",
    "vtp",
)  # fmt: skip
_EXTRA = {"torch": "scan", "numpy": "scan", "transformers": "models"}  # the extra that installs each package

__all__ = [
    "BackendUnavailable",
    "MambaBlock",
    "Plan",
    "accelerate",
    "available_backends",
    "causal_conv",
    "causal_conv_update",
    "mrss_scan",
    "selective_scan",
    "selective_state_update",
]

if TYPE_CHECKING:
    from projecta.conv import causal_conv as causal_conv
    from projecta.conv import causal_conv_update as causal_conv_update
    from projecta.mamba import MambaBlock as MambaBlock
    from projecta.mamba import accelerate as accelerate
    from projecta.mrss import mrss_scan as mrss_scan
    from projecta.scan import BackendUnavailable as BackendUnavailable
    from projecta.scan import available_backends as available_backends
    from projecta.scan import selective_scan as selective_scan
    from projecta.scan import selective_state_update as selective_state_update
    from projecta.vtp import Plan as Plan


def __getattr__(name: str):
    try:
        if name in _MODULE_OF:
            return getattr(import_module(_MODULE_OF[name]), name)
        if name in _MODULES:
            return import_module(f"projecta.{name}")
    except ModuleNotFoundError as error:
        if error.name not in _EXTRA:
            raise
        install = f'pip install "projecta[{_EXTRA[error.name]}]"'
        line = f"projecta.{name} needs {error.name}, which is not installed. Install it with: {install}"
        raise ModuleNotFoundError(line, name=error.name) from None
    raise AttributeError(f"module 'projecta' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*_MODULE_OF, *_MODULES, "__version__"])
