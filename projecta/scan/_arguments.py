"""Checks the arguments of a scan and brings them into the canonical form that the backends take."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
WIDE = (torch.float32, torch.float64, torch.complex64, torch.complex128)
_COMPLEX = {torch.float32: torch.complex64, torch.float64: torch.complex128}


def canonical_arguments(check, u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens):
    """Check every argument of a scan; return A, B, C and initial_state in canonical form."""
    check.tensor("u", u)
    check.dtype("u", u, FLOATS)
    check.that(u.dim() == 3, "u", "have shape (b, d, l)", tuple(u.shape))
    b, d, l = u.shape
    check.tensor("A", A, u.device)
    check.dtype("A", A, WIDE)
    if A.dim() != 2 or A.shape[0] != d or A.shape[1] == 0:
        check.that(False, "A", f"have shape (d, n) with d = {d}, n > 0", tuple(A.shape))
    n = A.shape[1]
    for name, t in (("delta", delta), ("z", z)):
        if t is not None or name == "delta":
            check.tensor(name, t, u.device)
            check.dtype(name, t, FLOATS)
            check.shape(name, t, (b, d, l), "(b, d, l)", "like u")
    for name, t in (("D", D), ("delta_bias", delta_bias)):
        if t is not None:
            check.tensor(name, t, u.device)
            check.dtype(name, t, FLOATS)
            check.shape(name, t, (d,), "(d,)")
    B, C = (_canonical_weight(check, name, t, A, b, d, n, l, u) for name, t in (("B", B), ("C", C)))
    if B.dim() == C.dim() == 4:
        check.that(B.shape[1] == C.shape[1], "C", f"have as many groups as B, {B.shape[1]}", C.shape[1])
    sequences = b
    if cu_seqlens is not None:
        check.that(b == 1, "u", "have b = 1 with cu_seqlens", b)
        sequences = check.bounds("cu_seqlens", cu_seqlens, u.device, l)
    if initial_state is not None:
        check.tensor("initial_state", initial_state, u.device)
        axes = "(b, d, n)" if cu_seqlens is None else "(s, d, n)"
        check.shape("initial_state", initial_state, (sequences, d, n), axes)
        check.that(
            A.is_complex() or not initial_state.is_complex(), "initial_state", "be real like A",
            initial_state.dtype, error=TypeError,
        )  # fmt: skip
        initial_state = initial_state.to(state_dtype(u, A)).contiguous()
    return A.to(state_dtype(u, A)).contiguous(), B, C, initial_state


def _canonical_weight(check, name, B, A, b, d, n, l, u):
    """B or C as (d, n) or (b, g, n, l), complex if A is."""
    check.tensor(name, B, u.device)
    check.dtype(name, B, (*FLOATS, *_COMPLEX.values()))
    check.that(A.is_complex() or not B.is_complex(), name, "be real like A", B.dtype, error=TypeError)
    if B.dim() == 2:
        check.shape(name, B, (d, n), "(d, n)")
        return B.to(state_dtype(u, A)) if A.is_complex() else B
    interleaved = A.is_complex() and not B.is_complex()
    length = 2 * l if interleaved else l
    grouped = B[:, None] if B.dim() == 3 else B
    if grouped.dim() != 4 or grouped.shape != (b, grouped.shape[1], n, length):
        axes = "2 l" if interleaved else "l"
        shapes = f"have shape (d, n), (b, n, {axes}) = {(b, n, length)} or (b, g, n, {axes})"
        check.that(False, name, shapes, tuple(B.shape))
    g = grouped.shape[1]
    if g == 0 or d % g:
        check.that(False, name, f"have a number of groups that divides d = {d}", g)
    if interleaved:
        grouped = torch.view_as_complex(
            grouped.to(state_dtype(u, A).to_real()).unflatten(-1, (l, 2)).contiguous()
        )
    return grouped


def check_step(check, state, x, dt, A, B, C, D, z, dt_bias, indices) -> None:
    """Check every argument of a step; its channels may be (d,) or (h, d)."""
    check.tensor("x", x)
    check.dtype("x", x, FLOATS)
    check.that(x.dim() in (2, 3), "x", "have shape (b, d) or (b, h, d)", tuple(x.shape))
    b, heads = x.shape[0], tuple(x.shape[1:])
    axes = "d" if len(heads) == 1 else "h, d"
    check.tensor("A", A, x.device)
    check.dtype("A", A, WIDE)
    check.that(A.shape[:-1] == heads, "A", f"have shape ({axes}, n) with ({axes}) = {heads}", tuple(A.shape))
    n, d = A.shape[-1], math.prod(heads)
    check.tensor("state", state, x.device)
    if indices is None:
        check.shape("state", state, (b, *heads, n), f"(b, {axes}, n)")
    else:
        _check_indices(check, indices, state, (*heads, n), f"({axes}, n)", b)
    alike, rule = state.is_complex() == A.is_complex(), "be complex where A is, and only there"
    check.that(alike, "state", rule, state.dtype, error=TypeError)
    for name, t, shape, names in (
        ("dt", dt, (b, *heads), f"(b, {axes})"), ("z", z, (b, *heads), f"(b, {axes})"),
        ("D", D, heads, f"({axes})"), ("dt_bias", dt_bias, heads, f"({axes})"),
    ):  # fmt: skip
        if t is not None or name == "dt":
            check.tensor(name, t, x.device)
            check.dtype(name, t, FLOATS)
            check.shape(name, t, shape, names)
    for name, t in (("B", B), ("C", C)):
        check.tensor(name, t, x.device)
        real = A.is_complex() or not t.is_complex()
        check.that(real, name, "be real like A", t.dtype, error=TypeError)
        g = t.shape[1] if t.dim() == 3 else 1
        shapes = f"have shape (b, n) = {(b, n)} or (b, g, n)"
        check.that(tuple(t.shape) in ((b, n), (b, g, n)), name, shapes, tuple(t.shape))
        check.that(g > 0 and d % g == 0, name, f"have a number of groups that divides {d}", g)


def _check_indices(check, indices, state, each, axes, b) -> None:
    """Check that `state` is a pool of states of shape `each`, and that `indices` selects b of them."""
    name = "state_batch_indices"
    rule = f"have shape (N, *{axes}) with {axes} = {each}"
    check.that(state.shape[1:] == each, "state", rule, tuple(state.shape))
    check.tensor(name, indices, state.device)
    check.dtype(name, indices, (torch.int32, torch.int64))
    check.shape(name, indices, (b,), "(b,)")
    if state.device.type == "cpu" and not torch.compiler.is_compiling():
        found = indices.tolist()
        real = [i for i in found if i >= 0]
        inside = all(i < len(state) for i in real)
        check.that(inside, name, f"lie in 0...N - 1 = {len(state) - 1}, or below 0 for padding", found)
        check.that(len(set(real)) == len(real), name, "differ from each other", found)


def state_dtype(u: Tensor, A: Tensor) -> torch.dtype:
    real = torch.float64 if u.dtype == torch.float64 else torch.float32
    return _COMPLEX[real] if A.is_complex() else real


def is_canonical(given: Sequence[Tensor | None], canonical: Sequence[Tensor | None]) -> bool:
    """Whether the canonical form shares the memory and the types of the arguments."""
    return all(
        t is other
        or (
            t is not None
            and other is not None
            and t.data_ptr() == other.data_ptr()
            and t.dtype == other.dtype
        )
        for t, other in zip(given, canonical, strict=False)
    )


def with_groups(given: Sequence[Tensor | None], grouped: tuple[bool, bool]) -> tuple[Tensor | None, ...]:
    """The canonical form of such arguments, in which B and C that vary in time (`grouped`) have groups."""
    u, delta, A, B, C, *rest = given
    if grouped[0] and B.dim() == 3:  # type: ignore[union-attr]
        B = B[:, None]  # type: ignore[index]
    if grouped[1] and C.dim() == 3:  # type: ignore[union-attr]
        C = C[:, None]  # type: ignore[index]
    return u, delta, A, B, C, *rest
