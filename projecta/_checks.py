"""One format for every error message: `function: argument must rule; got value[. what to do]`."""

import itertools
import sys
from collections.abc import Sequence
from typing import Any, NoReturn


def fail(
    function: str, argument: str, rule: str, value: object, advice: str = "", error: type = ValueError
) -> NoReturn:
    """Raise `error` with the one-line message.

    >>> fail("prune", "keep", "lie in (0, 1]", 1.5)
    Traceback (most recent call last):
    ValueError: prune: keep must lie in (0, 1]; got 1.5.
    """
    raise error(f"{function}: {argument} must {rule}; got {value}." + (f" {advice}" if advice else ""))


class Checker:
    """The checks of one public function, whose name and first tensor each message repeats."""

    def __init__(self, function: str, first: str = "u"):
        self.function, self.first = function, first

    def that(
        self, holds: bool, argument: str, rule: str, value: object, advice: str = "", error: type = ValueError
    ):
        if not holds:
            fail(self.function, argument, rule, value, advice, error)

    def tensor(self, argument: str, value: Any, device: Any = None):
        """Check that `value` is a torch tensor, on `device` if given."""
        torch = sys.modules.get("torch")  # not imported here: a caller with a tensor has imported it
        if torch is None or not isinstance(value, torch.Tensor):
            fail(self.function, argument, "be a tensor", type(value).__name__, error=TypeError)
        if device is not None and value.device != device:
            fail(self.function, argument, f"be on {device} like {self.first}", value.device)

    def shape(self, argument: str, value: Any, shape: Sequence[int], axes: str, why: str = ""):
        """`axes` names the expected `shape`, as in "(b, d, l)"; `why` explains it, as in "like u"."""
        if value.shape != tuple(shape):
            rule = f"have shape {axes} = {tuple(shape)}" + (f" {why}" if why else "")
            self.that(False, argument, rule, tuple(value.shape))

    def dtype(self, argument: str, value: Any, allowed: Sequence[Any]):
        if value.dtype not in allowed:
            names = " or ".join(", ".join(_short(d) for d in allowed).rsplit(", ", 1))
            self.that(False, argument, f"be {names}", _short(value.dtype), error=TypeError)

    def bounds(self, argument: str, value: Any, device: Any, l: int) -> int:
        """The number of packed sequences; values are checked on the CPU only, where reading them is free."""
        torch = sys.modules["torch"]
        self.tensor(argument, value, device)
        self.dtype(argument, value, (torch.int32,))
        one_axis = value.dim() == 1 and len(value) > 0
        self.that(one_axis, argument, "have shape (s + 1,)", tuple(value.shape))
        if device.type == "cpu" and not torch.compiler.is_compiling():
            ends = value.tolist()
            rises = all(x <= y for x, y in itertools.pairwise(ends))
            self.that(
                rises and ends[0] == 0 and ends[-1] == l, argument, f"rise from 0 to l = {l}", ends
            )  # fmt: skip
        return len(value) - 1

    def one_of(self, argument: str, value: object, allowed: Sequence[object]):
        if value not in allowed:
            fail(self.function, argument, "be one of " + ", ".join(map(repr, allowed)), repr(value))


def host(package: str) -> str:
    """Name and version of an imported package, for error messages.

    >>> host("transformers_of_nobody")
    'transformers_of_nobody of an unknown version'
    """
    return f"{package} {getattr(sys.modules.get(package), '__version__', 'of an unknown version')}"


def _short(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
