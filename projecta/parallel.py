"""One sequence over several ranks (context parallelism) for Mamba layers, on torch.distributed.

Each rank of a group holds a contiguous piece of the sequence, the first rank the first piece. A layer needs
from the rank before it the last d_conv - 1 inputs, and the state of the scan: d_inner d_state numbers for
each sequence, whatever its length. Two schedules hand on the state:

    "pass"     from rank to rank, as soon as it is known. Rank r runs layer i while rank r + 1 finishes layer
               i - 1: a stack of L layers fills the ranks once, and no work is done twice. On a GPU, where a
               long scan with gradients runs in chunks of time, that is before the layer's outputs.
    "gather"   every rank scans from zero for its end state and its sum of steps; one all-gather; each rank
               folds those before it, h_r = exp(A S_{r-1}) h_{r-1} + e_{r-1}, and scans from there. For few
               layers on many ranks.

The backward pass goes the same way in reverse. States travel in float32. All ranks call the same layers.
"""

import contextlib
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from projecta._checks import Checker

SCHEDULES = ("pass", "gather")
_thread = threading.local()
_alike: set[tuple] = set()  # the kinds of batches that all ranks of a group are known to share
_layers: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # those that have run on a piece


@contextlib.contextmanager
def context(group: Any = None, schedule: str = "pass") -> Iterator["Context"]:
    """Within it, `MambaBlock` and layers under `accelerate` take their input as this rank's piece.

    Backward passes of what ran within it may come later.

    Args:
        group: a process group, a one-dimensional `DeviceMesh`, or None for all ranks.
        schedule: "pass", "gather", or what `choose_schedule` says; see this module.

    Raises:
        RuntimeError: torch.distributed is not initialised; or, from a layer, a rank differs or is lost.
    """
    before, where = getattr(_thread, "current", None), Context(group, schedule)
    _thread.current = where
    try:
        yield where
    finally:
        _thread.current = before
        where.finish()


def current() -> "Context | None":
    """The context that this thread is in."""
    return getattr(_thread, "current", None)


def context_of(layer: nn.Module, own: "Context | None" = None) -> "Context | None":
    """The context that a call of `layer` runs in: this thread's, or the layer's own."""
    where = current() or own
    if where is None and layer not in _layers:
        return None
    again = torch._C._current_graph_task_id() != -1  # called by a backward pass
    if again and not _is_repeated():
        raise RuntimeError(
            "parallel: a layer is computed again in the backward pass, where no other rank sends. Give"
            " torch.utils.checkpoint use_reentrant=False and context_fn=parallel.checkpoint_contexts."
        )
    if where is not None:
        _layers.add(layer)
    return where


def choose_schedule(layers: int, ranks: int) -> str:
    """The faster schedule for a stack of layers, where 1 is the time of all ranks working at once.

    "pass"     1 + WAIT (ranks - 1) / layers
    "gather"   GATHER_COST
    """
    return "pass" if 1 + WAIT * (ranks - 1) / layers <= GATHER_COST else "gather"


# Measured on NVIDIA H200: see docs/parallel.md.
WAIT = 0.37  # the part of a layer's time for which a rank waits for the one before; the rest needs no state
GATHER_COST = 2.1


def checkpoint_contexts() -> tuple[Any, Any]:
    """`context_fn` of `torch.utils.checkpoint`: what is computed again takes what was received before.

    Examples:
        >>> from torch.utils.checkpoint import checkpoint
        >>> layer, x = torch.nn.Linear(2, 2), torch.zeros(1, 2)
        >>> checkpoint(layer, x, use_reentrant=False, context_fn=checkpoint_contexts).shape
        torch.Size([1, 2])
    """
    where, received = current(), list[Any]()
    return _entered(where, _Notes(received, False)), _entered(where, _Notes(received, True))


class _Notes:
    """What a part of a model received at first, for when it is computed again."""

    def __init__(self, received: list[Any], again: bool):
        self.received, self.again, self.position = received, again, 0


@contextlib.contextmanager
def _entered(where: "Context | None", notes: _Notes) -> Iterator[None]:
    before = current(), getattr(_thread, "notes", None)
    _thread.current, _thread.notes, notes.position = where, notes, 0
    try:
        yield
    finally:
        _thread.current, _thread.notes = before


def _is_repeated() -> bool:
    """Whether this thread computes again what it has received before."""
    notes = getattr(_thread, "notes", None)
    return notes is not None and notes.again


class Context:
    """A group of ranks that share sequences. rank: of this process in it. size: its ranks."""

    def __init__(self, group: Any = None, schedule: str = "pass"):
        Checker("parallel.context").one_of("schedule", schedule, SCHEDULES)
        if not dist.is_initialized():
            raise RuntimeError(
                "parallel.context: torch.distributed is not initialised. Start with torchrun, and call"
                " torch.distributed.init_process_group() first."
            )
        group = group.get_group() if hasattr(group, "get_group") else group  # of a DeviceMesh
        self.group, self.schedule = group, schedule
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._sent: deque[tuple[Any, Tensor]] = deque()  # what is under way, and its memory
        self.before, self.after = self._peer(-1), self._peer(1)  # global ranks; None at the ends

    def __deepcopy__(self, memo: dict) -> "Context":
        return self

    def _peer(self, step: int) -> int | None:
        other = self.rank + step
        if not 0 <= other < self.size:
            return None
        return other if self.group is None else dist.get_global_rank(self.group, other)

    def send(self, t: Tensor, back: bool = False) -> None:
        """Hand a float32 tensor on to the rank after, or `back` to the one before; to nobody at the ends."""
        to = self.before if back else self.after
        if to is None or _is_repeated():
            return
        while self._sent and self._sent[0][0].is_completed():
            self._sent.popleft()
        t = t.detach().contiguous()
        self._sent.append((self._call("sending", dist.isend, t, to, self.group), t))

    def receive(self, shape: tuple[int, ...], device: torch.device, back: bool = False) -> Tensor | None:
        """What the rank before sends, or with `back` the one after; None at the ends.

        On a GPU it is asked for where it is needed: a kernel that waits takes a processor from others.
        """
        source = self.after if back else self.before
        if source is None:
            return None

        def call() -> Tensor:
            t = torch.empty(shape, dtype=torch.float32, device=device)
            dist.recv(t, source, self.group)
            return t

        return self._once("receiving", call)

    def gather(self, t: Tensor) -> Tensor:
        """Every rank's `t`, stacked."""

        def call() -> Tensor:
            every = t.new_empty(self.size, *t.shape)
            dist.all_gather(list(every), t.detach().contiguous(), self.group)
            return every

        return self._once("gathering", call)

    def _once(self, what: str, call: Callable[[], Tensor]) -> Tensor:
        notes: Any = getattr(_thread, "notes", None)
        if _is_repeated():
            notes.position += 1
            return notes.received[notes.position - 1]
        received = self._call(what, call)
        if notes is not None:
            notes.received.append(received)
        return received

    def finish(self) -> None:
        """Wait until everything sent has arrived."""
        while self._sent:
            self._call("sending", self._sent.popleft()[0].wait)

    def _call(self, what: str, function: Callable, *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except RuntimeError as error:
            first = str(error).strip().splitlines()[0][:200]
            raise RuntimeError(
                f"parallel: rank {self.rank} of {self.size} failed while {what}: another rank has ended, or"
                f" does not call the same layers ({first})."
            ) from error

    def check_alike(self, hidden: Tensor, least: int = 0) -> None:
        """All ranks hold pieces of one batch, of `least` steps or more. Asked once for each kind of batch."""
        own = {
            "batch and width": (len(hidden), hidden.shape[2]), "dtype": str(hidden.dtype),
            "torch": torch.__version__, "gradients": torch.is_grad_enabled(), "schedule": self.schedule,
        }  # fmt: skip
        kind = (id(self.group or dist.group.WORLD), self.size, *own.values())
        if kind in _alike or _is_repeated():
            return
        every: list[Any] = [None] * self.size
        self._call("comparing", dist.all_gather_object, every, (own, hidden.shape[1]), self.group)
        for rank, (theirs, length) in enumerate(every):
            for name, value in theirs.items():
                if value != every[0][0][name]:
                    raise RuntimeError(
                        f"parallel: all ranks must have the same {name}; rank 0 has {every[0][0][name]}, rank"
                        f" {rank} {value}."
                    )
            if length < least:
                raise RuntimeError(
                    f'parallel: with schedule "gather" each rank needs at least d_conv - 1 = {least} steps;'
                    f' rank {rank} has {length}. Take "pass".'
                )
        _alike.add(kind)


class _Receive(torch.autograd.Function):
    """What the rank before sends. `anchor` is part of the graph."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, shapes: list[tuple[int, ...]], where: Context) -> Any:
        ctx.where = where
        return tuple(where.receive(shape, anchor.device) for shape in shapes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None]:  # type: ignore[override]
        for grad in reversed(grads):
            ctx.where.send(grad, back=True)
        return None, None, None


class _Send(torch.autograd.Function):
    """The first tensor; the others go to the next rank."""

    @staticmethod
    def forward(ctx: Any, where: Context, output: Tensor, *sent: Tensor) -> Tensor:
        ctx.where, ctx.shapes, ctx.device = where, [t.shape for t in sent], output.device
        for t in sent:
            where.send(t)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        found = [ctx.where.receive(shape, ctx.device, back=True) for shape in reversed(ctx.shapes)]
        return None, grad, *reversed(found)


class _Gather(torch.autograd.Function):
    """Every rank's tensor, stacked."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, where: Context) -> Tensor:
        ctx.where = where
        return where.gather(t)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        grad = grad.contiguous()
        ctx.where._call("summing gradients", lambda: dist.all_reduce(grad, group=ctx.where.group))
        return grad[ctx.where.rank], None


def received(where: Context, device: torch.device, *shapes: tuple[int, ...]) -> tuple[Tensor, ...] | None:
    """Schedule "pass": what the rank before hands on; None on the first rank."""
    if where.before is None:
        return None
    anchor = torch.zeros((), device=device, requires_grad=torch.is_grad_enabled())
    return _Receive.apply(anchor, list(shapes), where)


def hand_on(where: Context, output: Tensor, *tensors: Tensor) -> Tensor:
    """`output`, after the float32 tensors are on their way to the next rank."""
    return output if where.after is None else _Send.apply(where, output, *tensors)


def from_before(where: Context, tail: Tensor) -> Tensor:
    """Schedule "gather": the tensor of the rank before; zeros on the first rank."""
    every = _Gather.apply(tail, where)
    return every[where.rank - 1] if where.rank else 0 * every[0]  # every rank's backward takes part


def folded_state(where: Context, end: Tensor, span: Tensor, A: Tensor) -> Tensor:
    """Schedule "gather": the state before this rank's piece.

    end (b, d, n): each rank's state after a scan from zero. span (b, d): its sum of step sizes.
    """
    every = _Gather.apply(torch.cat([end, span[..., None]], -1), where)
    state = 0 * every[0, ..., :-1]
    for before in every[: where.rank]:
        state = torch.exp(before[..., -1:] * A) * state + before[..., :-1]
    return state


def sum_of_steps(delta: Tensor, bias: Tensor | None) -> Tensor:
    """(b, l, d) to (b, d), in float32."""
    steps = delta.float() if bias is None else delta.float() + bias.float()
    return F.softplus(steps).sum(1)


def split(t: Tensor, group: Any = None, dim: int = 1) -> Tensor:
    """This rank's piece of a whole tensor along `dim`: pieces differ by one element at most."""
    first, last = bounds(t.shape[dim], group)
    return t.narrow(dim, first, last - first)


def bounds(length: int, group: Any = None) -> tuple[int, int]:
    """The first step of this rank's piece of a sequence, and the one after its last, as `split` cuts it."""
    where = Context(group)
    each, more = divmod(length, where.size)
    first = where.rank * each + min(where.rank, more)
    return first, first + each + (where.rank < more)


def split_packed(cu_seqlens: Tensor, first: int, last: int) -> Tensor:
    """`cu_seqlens` of the sequences in steps first...last of a packed row, counted from `first`.

    The first value is negative if the first sequence began before: MambaBlock then takes its state from the
    rank before.

    Examples:
        >>> split_packed(torch.tensor([0, 3, 8, 12], dtype=torch.int32), 4, 10)
        tensor([-1,  4,  6], dtype=torch.int32)
    """
    own = cu_seqlens[(cu_seqlens > first) & (cu_seqlens < last)]
    begun = cu_seqlens[cu_seqlens <= first][-1:]
    return torch.cat([begun, own, cu_seqlens.new_tensor([last])]) - first


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

    Returns:
        This rank's share of the loss; it is not finite if no rank has terms.
    """
    where = Context(group)
    every = torch.as_tensor(count, dtype=torch.float64, device=total.device).clone()
    dist.all_reduce(every, group=where.group)
    return total * (where.size / every).to(total.dtype)  # without waiting for the device


def average_gradients(parameters: Iterable[nn.Parameter], group: Any = None) -> None:
    """Average the gradients over the ranks, as DDP and FSDP do; for models that neither wraps.

    All ranks must have gradients of the same parameters.
    """
    where = Context(group)
    grads = [p.grad for p in parameters if p.grad is not None]
    for dtype in dict.fromkeys(g.dtype for g in grads):
        for bucket in _buckets([g for g in grads if g.dtype == dtype]):
            flat = torch.cat([g.flatten() for g in bucket])
            dist.all_reduce(flat, group=where.group)
            flat /= where.size
            pieces = flat.split([g.numel() for g in bucket])
            torch._foreach_copy_(bucket, [p.view_as(g) for p, g in zip(pieces, bucket, strict=True)])


def _buckets(tensors: list[Tensor], most: int = 2**26) -> Iterator[list[Tensor]]:
    """Lists of up to `most` numbers, at least one tensor each."""
    bucket: list[Tensor] = []
    for t in tensors:
        if bucket and sum(map(torch.numel, bucket)) + t.numel() > most:
            yield bucket
            bucket = []
        bucket.append(t)
    if bucket:
        yield bucket
