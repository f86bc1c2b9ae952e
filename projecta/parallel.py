"""One sequence over several ranks (context parallelism) for Mamba layers, on torch.distributed.

Each rank of a group holds a contiguous piece of the sequence, the first rank the first piece. A layer needs
from the rank before it the last d_conv - 1 inputs, and the state of the scan: d_inner d_state numbers for
each sequence, whatever its length. Two schedules hand on the state:

    "pass"     from rank to rank, as soon as it is known. Rank r runs layer i while rank r + 1 runs layer
               i - 1, so L layers on P ranks have an efficiency of L / (L + P - 1), and no work is done twice.
    "gather"   every rank scans from zero for its end state and its sum of steps; one all-gather; each rank
               folds those before it, h_r = exp(A S_{r-1}) h_{r-1} + e_{r-1}, and scans from there. For single
               layers and short stacks.

The backward pass goes the same way in reverse. States travel in float32. All ranks call the same layers.
"""

import contextlib
import math
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from projecta._checks import Checker

SCHEDULES = ("pass", "gather")
_thread = threading.local()


@contextlib.contextmanager
def context(group: Any = None, schedule: str = "pass") -> Iterator["Context"]:
    """Within it, `MambaBlock` and layers under `accelerate` take their input as this rank's piece.

    Backward passes of what ran within it may come later.

    Args:
        group: a process group, a one-dimensional `DeviceMesh`, or None for all ranks.
        schedule: "pass" or "gather"; see this module.

    Raises:
        RuntimeError: torch.distributed is not initialised; or, from a layer, a rank differs or is lost.
    """
    check = Checker("parallel.context")
    check.one_of("schedule", schedule, SCHEDULES)
    if not dist.is_initialized():
        raise RuntimeError(
            "parallel.context: torch.distributed is not initialised. Start with torchrun, and call"
            " torch.distributed.init_process_group() first."
        )
    before = getattr(_thread, "current", None)
    _thread.current = Context(group, schedule)
    try:
        yield _thread.current
    finally:
        _thread.current.finish()
        _thread.current = before


def current() -> "Context | None":
    """The context that this thread is in."""
    return getattr(_thread, "current", None)


class Context:
    """A group of ranks that share sequences. rank: of this process in it. size: its ranks."""

    def __init__(self, group: Any, schedule: str = "pass"):
        group = group.get_group() if hasattr(group, "get_group") else group  # of a DeviceMesh
        self.group, self.schedule = group, schedule
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._sent: list[tuple[Any, Tensor]] = []  # what is under way, and its memory
        self._alike = False

    def peer(self, step: int) -> int | None:
        """The global rank of the neighbour before (-1) or after (1); None at the ends."""
        other = self.rank + step
        if not 0 <= other < self.size:
            return None
        return other if self.group is None else dist.get_global_rank(self.group, other)

    def send(self, t: Tensor, to: int) -> None:
        t = t.detach().contiguous()
        with self._explained("sending"):
            self._sent = [(work, kept) for work, kept in self._sent if not work.is_completed()]
            self._sent.append((dist.isend(t, to, self.group), t))

    def receive(self, like: Tensor, source: int) -> Tensor:
        t = torch.empty_like(like, memory_format=torch.contiguous_format)
        with self._explained("receiving"):
            dist.recv(t, source, self.group)
        return t

    def finish(self) -> None:
        """Wait until everything sent has arrived."""
        with self._explained("sending"):
            for work, _ in self._sent:
                work.wait()
        self._sent = []

    @contextlib.contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            first = str(error).strip().splitlines()[0][:200]
            raise RuntimeError(
                f"parallel: rank {self.rank} of {self.size} failed while {what}: another rank has ended, or"
                f" does not call the same layers ({first})."
            ) from error

    def check_alike(self, hidden: Tensor, kept: int) -> None:
        """Once: all ranks hold pieces of one batch, and each at least what the next one needs."""
        if self._alike:
            return
        own = {
            "batch and width": (len(hidden), hidden.shape[2]), "dtype": str(hidden.dtype),
            "torch": torch.__version__, "gradients": torch.is_grad_enabled(), "schedule": self.schedule,
        }  # fmt: skip
        every: list[Any] = [None] * self.size
        with self._explained("comparing"):
            dist.all_gather_object(every, (own, hidden.shape[1]), self.group)
        for rank, (theirs, length) in enumerate(every):
            for name, value in theirs.items():
                if value != every[0][0][name]:
                    raise RuntimeError(
                        f"parallel: all ranks must have the same {name}; rank 0 has {every[0][0][name]}, rank"
                        f" {rank} {value}."
                    )
            if length < kept:
                raise RuntimeError(
                    f"parallel: each rank needs at least d_conv - 1 = {kept} tokens; rank {rank} has"
                    f" {length}."
                )
        self._alike = True


class _Shift(torch.autograd.Function):
    """The last inputs of the rank before; zeros on the first rank."""

    @staticmethod
    def forward(ctx: Any, tail: Tensor, where: Context) -> Tensor:
        ctx.where, before, after = where, where.peer(-1), where.peer(1)
        if after is not None:
            where.send(tail, after)
        return torch.zeros_like(tail) if before is None else where.receive(tail, before)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        where, before, after = ctx.where, ctx.where.peer(-1), ctx.where.peer(1)
        if before is not None:
            where.send(grad, before)
        return torch.zeros_like(grad) if after is None else where.receive(grad, after), None


class _Receive(torch.autograd.Function):
    """The state of the rank before. `anchor` makes it a part of the graph."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, like: Tensor, where: Context) -> Tensor:
        ctx.where = where
        return where.receive(like, where.peer(-1))  # type: ignore[arg-type]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:  # type: ignore[override]
        ctx.where.send(grad, ctx.where.peer(-1))
        return None, None, None


class _Send(torch.autograd.Function):
    """`output`; `last` goes to the next rank."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, last: Tensor, where: Context) -> Tensor:
        ctx.where, ctx.like = where, last
        where.send(last, where.peer(1))  # type: ignore[arg-type]
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        return grad, ctx.where.receive(ctx.like, ctx.where.peer(1)), None


def inputs_before(where: Context, hidden: Tensor, in_proj: nn.Module, kept: int, d: int) -> Tensor:
    """The convolution's `kept` inputs (b, d, kept) before this rank's piece."""
    where.check_alike(hidden, kept)
    tail = _Shift.apply(hidden[:, hidden.shape[1] - kept :].contiguous(), where)
    return in_proj(tail)[..., :d].transpose(1, 2)


def state_before(where: Context, hidden: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Schedule "pass": the state before this rank's piece."""
    like = torch.empty(shape, dtype=torch.float32, device=hidden.device)
    if where.peer(-1) is None:
        return torch.zeros_like(like)
    anchor = torch.zeros((), requires_grad=torch.is_grad_enabled())
    return _Receive.apply(anchor, like, where)


def hand_on(where: Context, output: Tensor, last: Tensor) -> Tensor:
    """Schedule "pass": `output`, after the last state is on its way."""
    return output if where.peer(1) is None else _Send.apply(output, last, where)


def folded_state(where: Context, end: Tensor, span: Tensor, A: Tensor) -> Tensor:
    """Schedule "gather": the state before this rank's piece.

    end (b, d, n): each rank's state after a scan from zero. span (b, d): its sum of step sizes.
    """
    from torch.distributed.nn.functional import all_gather

    together = torch.cat([end, span[..., None]], -1).contiguous()
    state = torch.zeros_like(end)
    for rank, other in enumerate(all_gather(together, where.group or dist.group.WORLD)):
        if rank < where.rank:
            state = torch.exp(other[..., -1:] * A) * state + other[..., :-1]
        else:  # every rank takes part in the sum of the gradients
            state = state + 0 * other[..., :-1]
    return state


def sum_of_steps(delta: Tensor, bias: Tensor | None) -> Tensor:
    """(b, l, d) to (b, d), in float32."""
    steps = delta.float() if bias is None else delta.float() + bias.float()
    return F.softplus(steps).sum(1)


def split(t: Tensor, group: Any = None, dim: int = 1) -> Tensor:
    """This rank's piece of a whole tensor along `dim`: pieces differ by one element at most."""
    where = Context(group)
    return t.tensor_split(where.size, dim)[where.rank]


def join(t: Tensor, group: Any = None, dim: int = 1) -> Tensor:
    """All ranks' pieces, of any lengths, joined along `dim`, on every rank. Not differentiable."""
    where = Context(group)
    sizes = [torch.zeros(1, dtype=torch.int64, device=t.device) for _ in range(where.size)]
    dist.all_gather(sizes, torch.tensor([t.shape[dim]], device=t.device), where.group)
    most = max(int(size) for size in sizes)
    moved = t.detach().movedim(dim, 0)
    padded = F.pad(moved.flatten(1) if t.dim() > 1 else moved[:, None], (0, 0, 0, most - len(moved)))
    found = [torch.empty_like(padded) for _ in range(where.size)]
    dist.all_gather(found, padded.contiguous(), where.group)
    whole = torch.cat([piece[: int(size)] for piece, size in zip(found, sizes, strict=True)])
    return whole.view(-1, *moved.shape[1:]).movedim(0, dim)


def mean_loss(total: Tensor, count: int | Tensor, group: Any = None) -> Tensor:
    """A loss whose gradients, averaged over the ranks, are those of the mean over all tokens of all ranks.

    Args:
        total: the sum of this rank's losses. count: the number of its terms.
    """
    where = Context(group)
    every = torch.as_tensor(count, dtype=torch.float64, device=total.device).clone()
    dist.all_reduce(every, group=where.group)
    return total * (where.size / every.item())


def average_gradients(parameters: Iterable[nn.Parameter], group: Any = None) -> None:
    """Average the gradients over the ranks, as DDP and FSDP do; for models that neither wraps."""
    where = Context(group)
    grads = [p.grad for p in parameters if p.grad is not None]
    for dtype in {g.dtype for g in grads}:
        mine = [g for g in grads if g.dtype == dtype]
        flat = torch.cat([g.flatten() for g in mine])
        dist.all_reduce(flat, group=where.group)
        flat /= where.size
        for g, new in zip(mine, flat.split([math.prod(g.shape) for g in mine]), strict=True):
            g.copy_(new.view_as(g))
