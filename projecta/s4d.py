"""S4D (Gu, Gupta, Goel, Re: arXiv 2206.11893): a diagonal state space model with fixed steps.

    x' = A x + B u,   y = 2 Re(C x) + D u        (Re(C x) once where A is real)

The steps do not depend on the input, so the whole map is one convolution:

    x_t = A_bar x_{t-1} + B_bar u_t
    zoh:       A_bar = exp(delta A)                              B_bar = (A_bar - 1) / A * B
    bilinear:  A_bar = (1 + delta A / 2) / (1 - delta A / 2)     B_bar = delta B / (1 - delta A / 2)
    K_t = 2 Re(sum over n of C_n A_bar_n^t B_bar_n),             y = K * u + D u

S4D is a baseline for selective scans: the same recurrence with constant delta, B and C, which
`selective_scan` itself can run.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from projecta._checks import Checker
from projecta.scan import selective_scan
from projecta.scan._arguments import FLOATS

INITS = ("lin", "inv", "real")
DISCRETISATIONS = ("zoh", "bilinear")


def s4d_rates(n: int, init: str = "lin", device: torch.device | str | None = None) -> Tensor:
    """Initial A of n states: one of each conjugate pair (complex64), or real (float32).

        lin:   A_k = -1/2 + i pi k                          (section 4.2)
        inv:   A_k = -1/2 + i N / pi (N / (2 k + 1) - 1)    with N = 2 n
        real:  A_k = -(k + 1)

    Examples:
        >>> s4d_rates(2, "real")
        tensor([-1., -2.])
    """
    check = Checker("s4d_rates")
    check.one_of("init", init, INITS)
    check.that(isinstance(n, int) and n > 0, "n", "be a positive integer", n)
    k = torch.arange(n, dtype=torch.float64)
    if init == "real":
        return -(k + 1).float().to(device)
    imaginary = math.pi * k if init == "lin" else 2 * n / math.pi * (2 * n / (2 * k + 1) - 1)
    return torch.complex(torch.full_like(k, -0.5), imaginary).to(torch.complex64).to(device)


def discretise(
    delta: Tensor, A: Tensor, B: Tensor | None = None, discretisation: str = "zoh"
) -> tuple[Tensor, Tensor]:
    """log A_bar and B_bar, both (d, n), for steps delta (d,) and rates A (d, n); B is ones if not given.

    The logarithm gives powers of A_bar: A_bar^t = exp(t log A_bar). It is complex for real A and "bilinear",
    because A_bar is negative if |A| > 2 / delta.
    """
    Checker("discretise").one_of("discretisation", discretisation, DISCRETISATIONS)
    z = delta[:, None] * A
    B_bar = delta[:, None] * (torch.ones_like(A) if B is None else B)
    if discretisation == "zoh":
        safe = torch.where(z == 0, torch.ones_like(z), z)
        return z, B_bar * torch.where(z == 0, 1.0, torch.expm1(safe) / safe)
    half = (z if z.is_complex() else torch.complex(z, torch.zeros_like(z))) / 2
    log = torch.log1p(half) - torch.log1p(-half)
    log = torch.complex(log.real.clamp(min=-1e4), log.imag)  # finite for A_bar = 0, too: 0^0 is 1
    return log, B_bar / (1 - z / 2)


def s4d_kernel(log_A_bar: Tensor, B_bar: Tensor, C: Tensor, l: int) -> Tensor:
    """K (d, l) = 2 Re(sum over n of C B_bar A_bar^t), t = 0...l - 1; the sum itself if all are real.

    Let t = r s + q: compute the powers for all r and all q, then one matrix product. So no (d, n, l) tensor
    is formed.
    """
    side = max(1, math.isqrt(max(l - 1, 0)) + 1)
    q = torch.arange(side, device=C.device)
    fine = _powers(log_A_bar, q, C.dtype)  # (d, n, s)
    coarse = _powers(log_A_bar, side * q, C.dtype) * (C * B_bar)[..., None]
    kernel = (coarse.mT @ fine).flatten(1)[:, :l]
    return 2 * kernel.real if kernel.is_complex() else kernel


def s4d_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    B: Tensor | None = None,
    discretisation: str = "zoh",
    initial_state: Tensor | None = None,
    return_last_state: bool = False,
    mode: str = "convolution",
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Run the module's formula over a sequence.

    Args:
        u: input (b, d, l), float16, bfloat16, float32 or float64.
        delta: step sizes (d,), positive.
        A: decay rates (d, n), complex64 or float32.
        B: input weights (d, n), like A; ones if not given.
        C: output weights (d, n), like A.
        D: skip weight (d,).
        discretisation: "zoh" or "bilinear".
        initial_state: (b, d, n).
        mode: "convolution" (FFT, O(l log l), parallel in time) or "recurrence" (by `selective_scan`). The
            results agree to 1e-5 of the largest value.
        backend: backend of the recurrence, as in `selective_scan`; a convolution runs on any device.

    Returns:
        y (b, d, l) in u's dtype; with `return_last_state` also the last state (b, d, n) in float32 or
        complex64 (float64 or complex128 if u, delta or A is).

    Raises:
        ValueError: a shape or value is wrong. TypeError: a dtype is wrong. BackendUnavailable: `backend`
            cannot run the recurrence here.

    Examples:
        >>> u = torch.tensor([[[1.0, 0.0, 0.0]]])
        >>> s4d_scan(u, torch.ones(1), -torch.ones(1, 1), torch.ones(1, 1))[0, 0]
        tensor([0.6321, 0.2325, 0.0855])
    """
    check = Checker("s4d_scan")
    check.tensor("u", u)
    check.dtype("u", u, FLOATS)
    check.that(u.dim() == 3, "u", "have shape (b, d, l)", tuple(u.shape))
    b, d = u.shape[:2]
    check.tensor("A", A, u.device)
    check.that(A.dim() == 2 and A.shape[0] == d, "A", f"have shape (d, n) with d = {d}", tuple(A.shape))
    for name, t, shape, names in (
        ("delta", delta, (d,), "(d,)"), ("C", C, tuple(A.shape), "(d, n)"), ("D", D, (d,), "(d,)"),
        ("B", B, tuple(A.shape), "(d, n)"), ("initial_state", initial_state, (b, *A.shape), "(b, d, n)"),
    ):  # fmt: skip
        if t is not None or name in ("delta", "C"):
            check.tensor(name, t, u.device)
            check.shape(name, t, shape, names)
    for name, t in (("C", C), ("B", B), ("initial_state", initial_state)):
        if t is not None:
            rule = "be complex where A is, and only there"
            check.that(t.is_complex() == A.is_complex(), name, rule, t.dtype, error=TypeError)
    check.one_of("mode", mode, ("convolution", "recurrence"))
    double = torch.float64 in (u.dtype, delta.dtype, A.real.dtype)
    wide, kind = (torch.float64, torch.complex128) if double else (torch.float32, torch.complex64)
    kind = kind if A.is_complex() else wide
    delta, x = delta.to(wide), u.to(wide)
    A, C = A.to(kind), C.to(kind)
    B, initial_state = (t if t is None else t.to(kind) for t in (B, initial_state))
    state = A.new_zeros(b, *A.shape) if initial_state is None else initial_state
    with torch.autocast(u.device.type, enabled=False):
        log_A_bar, B_bar = discretise(delta, A, B, discretisation)
        if not u.numel():
            y, last = x.clone(), state.clone()
        elif mode == "recurrence":
            y, last = _recur(x, delta, log_A_bar, B_bar, C, state, backend)
        else:
            y, last = _convolve(x, log_A_bar, B_bar, C, initial_state, return_last_state)
        if D is not None:
            y = y + D[:, None].to(wide) * x
    return (y.to(u.dtype), last) if return_last_state else y.to(u.dtype)


def _recur(x, delta, log_A_bar, B_bar, C, state, backend):
    """Scan by `selective_scan`. It adds delta u B at each step, and outputs 2 Re(C h) if A is complex."""
    steps, real = delta[None, :, None].expand(x.shape), not C.is_complex()
    rates, B = log_A_bar / delta[:, None], B_bar / delta[:, None]
    if rates.is_complex() and real:  # A_bar may be negative: use complex numbers
        B, C, state = (torch.complex(t, torch.zeros_like(t)) for t in (B, C / 2, state))
    y, last = selective_scan(
        x, steps, rates, B, C, return_last_state=True, initial_state=state, backend=backend
    )  # fmt: skip
    return y, last.real if real and last.is_complex() else last


def _convolve(x, log_A_bar, B_bar, C, state, with_last):
    """Convolve by FFT. The last state, if asked for, is one more sum over time."""
    l, size = x.shape[-1], 2 * x.shape[-1]
    kernel = s4d_kernel(log_A_bar, B_bar, C, l)
    y = torch.fft.irfft(torch.fft.rfft(x, n=size) * torch.fft.rfft(kernel, n=size), n=size)[..., :l]
    t = torch.arange(l, device=x.device)
    if state is not None:
        free = torch.einsum("bdn,dnl->bdl", state * C, _powers(log_A_bar, t + 1, C.dtype))
        y = y + (2 * free.real if free.is_complex() else free)
    if not with_last:
        return y, None
    back = _powers(log_A_bar, l - 1 - t, C.dtype)
    last = torch.einsum("bdl,dnl->bdn", x.to(back.dtype), back) * B_bar
    if state is not None:
        last = last + state * _powers(log_A_bar, t.new_tensor([l]), C.dtype)[..., 0]
    return y, last


def _powers(log_A_bar: Tensor, t: Tensor, dtype: torch.dtype) -> Tensor:
    """A_bar^t (d, n, len(t)), computed in float64, because the phase grows with t."""
    wide = torch.complex128 if log_A_bar.is_complex() else torch.float64
    powers = (log_A_bar.to(wide)[..., None] * t.double()).exp()
    return (powers if dtype.is_complex else powers.real).to(dtype)


class S4DBlock(nn.Module):
    """An S4D layer over (b, l, d): the state space model of each channel, GELU, and a gated linear map.

    Args:
        d: channels. n: states per channel (each complex state represents a conjugate pair).
        init: initial A: "lin", "inv" or "real". discretisation: "zoh" or "bilinear".
        step_range: range of the initial steps, log-uniform.

    `forward` convolves; `step` advances a state by one token, with the same result.

    Examples:
        >>> block = S4DBlock(4)
        >>> block(torch.randn(2, 10, 4)).shape
        torch.Size([2, 10, 4])
    """

    def __init__(
        self,
        d: int,
        n: int = 32,
        *,
        init: str = "lin",
        discretisation: str = "zoh",
        step_range: tuple[float, float] = (1e-3, 1e-1),
    ):
        super().__init__()
        Checker("S4DBlock").one_of("discretisation", discretisation, DISCRETISATIONS)
        rises = 0 < step_range[0] <= step_range[1]
        Checker("S4DBlock").that(rises, "step_range", "be two steps above 0, ascending", step_range)
        low, high = (math.log(step) for step in step_range)
        A = s4d_rates(n, init)
        self.discretisation = discretisation
        self.log_delta = nn.Parameter(torch.rand(d) * (high - low) + low)
        self.log_decay = nn.Parameter((-A.real).log().repeat(d, 1))
        self.frequency = nn.Parameter(A.imag.repeat(d, 1)) if A.is_complex() else None
        parts = 2 if A.is_complex() else 1
        self.C = nn.Parameter(torch.randn(d, n, parts) * parts**-0.5)
        self.D = nn.Parameter(torch.randn(d))
        self.out = nn.Linear(d, 2 * d)

    def matrices(self) -> tuple[Tensor, Tensor, Tensor]:
        """delta (d,), A (d, n) and C (d, n)."""
        delta, decay, C = self.log_delta.float().exp(), -self.log_decay.float().exp(), self.C.float()
        if self.frequency is None:
            return delta, decay, C[..., 0]
        return delta, torch.complex(decay, self.frequency.float()), torch.view_as_complex(C.contiguous())

    def forward(self, x: Tensor) -> Tensor:
        """y (b, l, d) of x (b, l, d)."""
        delta, A, C = self.matrices()
        y = s4d_scan(x.mT, delta, A, C, self.D, discretisation=self.discretisation)
        assert isinstance(y, Tensor)
        return F.glu(self.out(F.gelu(y.mT)))

    def init_state(self, b: int) -> Tensor:
        """The state before the first token, (b, d, n)."""
        _, A, _ = self.matrices()
        return A.new_zeros(b, *A.shape)

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """y (b, d) of one token x (b, d), and the state after it."""
        delta, A, C = self.matrices()
        log_A_bar, B_bar = discretise(delta, A, None, self.discretisation)
        A_bar = _powers(log_A_bar, torch.ones(1, device=x.device), C.dtype)[..., 0]
        state = A_bar * state + B_bar * x[..., None].float()
        y = (C * state).sum(-1)
        y = (2 * y.real if y.is_complex() else y) + self.D.float() * x
        return F.glu(self.out(F.gelu(y.to(x.dtype)))), state
