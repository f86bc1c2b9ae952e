"""Low-rank factors of a linear map, and low-rank updates merged into one."""

from types import TracebackType

import torch
from torch import Tensor, nn

from projecta._checks import Checker


def break_even_rank(linear: nn.Linear) -> int:
    """The largest rank at which two factors need fewer multiplications than W: r (in + out) < in out.

    Examples:
        >>> break_even_rank(nn.Linear(768, 3072))
        614
    """
    inputs, outputs = linear.in_features, linear.out_features
    return (inputs * outputs - 1) // (inputs + outputs)


class Factorised(nn.Sequential):
    """The map x -> (x V^T) U^T + bias, returned by `factorise`.

    Attributes:
        rank: rank of the factors. error: ||W - U V||_F / ||W||_F, before the factors are rounded to the dtype
            of W. break_even: the largest rank that saves arithmetic.
    """

    def __init__(self, first: nn.Linear, second: nn.Linear, error: float, break_even: int):
        super().__init__(first, second)
        self.rank, self.error, self.break_even = first.out_features, error, break_even

    def extra_repr(self) -> str:
        return f"rank={self.rank}, error={self.error:.3g}, break_even={self.break_even}"


def factorise(linear: nn.Linear, rank: int) -> Factorised:
    """Replace a linear map W (out, in) by the product U V of rank `rank` that is nearest to it.

        W = P S Q^T (singular values);   U = P_r S_r^(1/2) (out, r),   V = S_r^(1/2) Q_r^T (r, in)

    ||W - U V||_F is the root of the sum of squares of the omitted singular values. No other product of this
    rank has a smaller one (Eckart and Young, 1936). `linear` is not changed. Above rank `break_even` the
    factors cost more than W.

    Raises:
        TypeError: `linear` is not an nn.Linear. ValueError: `rank` is not in 1...min(in, out).

    Examples:
        >>> half = factorise(nn.Linear(8, 8), 2)
        >>> half.rank, half.break_even, half(torch.zeros(3, 8)).shape
        (2, 3, torch.Size([3, 8]))
    """
    check = Checker("factorise")
    check.that(
        isinstance(linear, nn.Linear), "linear", "be an nn.Linear", type(linear).__name__, error=TypeError
    )
    _check_floating(check, linear)
    most = min(linear.in_features, linear.out_features)
    check.that(isinstance(rank, int) and 1 <= rank <= most, "rank", f"lie in 1...{most}", rank)
    weight = linear.weight.detach()
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    root = values[:rank].sqrt()
    kind = {"device": weight.device, "dtype": weight.dtype}
    first = nn.Linear(linear.in_features, rank, bias=False, **kind)
    second = nn.Linear(rank, linear.out_features, bias=linear.bias is not None, **kind)
    with torch.no_grad():
        first.weight.copy_(root[:, None] * right[:rank])
        second.weight.copy_(left[:, :rank] * root)
        if linear.bias is not None:
            second.bias.copy_(linear.bias)
    total = values.square().sum()
    error = (values[rank:].square().sum() / total).sqrt().item() if total > 0 else 0.0
    return Factorised(first, second, error, break_even_rank(linear)).train(linear.training)


def _check_floating(check: Checker, linear: nn.Linear) -> None:
    kind = linear.weight.dtype
    check.that(kind.is_floating_point, "linear", "have floating-point weights", kind, error=TypeError)


def merge_lora(linear: nn.Linear, A: Tensor, B: Tensor, alpha: float) -> "MergedLora":
    """Add a low-rank update to a linear map in place.

        W <- W + alpha / r B A      (LoRA, arXiv 2106.09685, section 4.1)

    Args:
        linear: W (out, in). A: (r, in). B: (out, r). alpha: scale of the update, before division by r.

    Returns:
        A handle whose `unmerge()` restores W bit for bit; also a context manager. It keeps a copy of W: undo
        several merges in reverse order.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or shape.

    Examples:
        >>> linear = nn.Linear(4, 3)
        >>> with merge_lora(linear, torch.ones(1, 4), torch.ones(3, 1), alpha=2.0):
        ...     merged = linear.weight.detach().clone()
        >>> bool(((merged - linear.weight) > 1.9).all())
        True
    """
    check = Checker("merge_lora")
    check.that(
        isinstance(linear, nn.Linear), "linear", "be an nn.Linear", type(linear).__name__, error=TypeError
    )
    _check_floating(check, linear)
    outputs, inputs = linear.weight.shape
    for name, t in (("A", A), ("B", B)):
        check.that(isinstance(t, Tensor), name, "be a tensor", type(t).__name__, error=TypeError)
    fits = A.dim() == 2 and A.shape[1] == inputs and len(A) > 0
    check.that(fits, "A", f"have shape (r, {inputs}) with r > 0", tuple(A.shape))
    check.that(B.shape == (outputs, len(A)), "B", f"have shape {(outputs, len(A))}", tuple(B.shape))
    return MergedLora(linear, A, B, alpha)


class MergedLora:
    """Handle of a merged update, returned by `merge_lora`."""

    @torch.no_grad()
    def __init__(self, linear: nn.Linear, A: Tensor, B: Tensor, alpha: float):
        self._linear = linear
        self._before: Tensor | None = linear.weight.detach().clone()
        wide = torch.float64 if linear.weight.dtype == torch.float64 else torch.float32
        update = alpha / len(A) * (B.to(wide) @ A.to(wide))
        linear.weight.copy_(linear.weight.to(wide) + update.to(linear.weight.device))

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore the map. A second call does nothing."""
        if self._before is not None:
            self._linear.weight.copy_(self._before)
            self._before = None

    def __enter__(self) -> "MergedLora":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.unmerge()
