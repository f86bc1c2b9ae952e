"""S4D (Gu, Gupta, Goel, Re: arXiv 2206.11893): the diagonal state space model that does not select.

    x' = A x + B u,   y = 2 Re(C x) + D u        (Re(C x) once where A is real)

with steps that do not depend on the input, so that the whole map is one convolution:

    x_t = A_bar x_{t-1} + B_bar u_t
    zoh:       A_bar = exp(delta A)                              B_bar = (A_bar - 1) / A * B
    bilinear:  A_bar = (1 + delta A / 2) / (1 - delta A / 2)     B_bar = delta B / (1 - delta A / 2)
    K_t = 2 Re(sum over n of C_n A_bar_n^t B_bar_n),             y = K * u + D u

The baseline of selective scans: the same recurrence, run by `selective_scan` itself, with constant delta, B
and C.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from projecta._checks import Checker
from projecta.scan import selective_scan

INITS = ("lin", "inv", "real")
DISCRETISATIONS = ("zoh", "bilinear")


def s4d_rates(n: int, init: str = "lin", device: torch.device | str | None = None) -> Tensor:
    """Initial A of n states: those of conjugate pairs, one of each (complex64), or real ones (float32).

        lin:   A_k = -1/2 + i pi k                          (section 4.2)
        inv:   A_k = -1/2 + i N / pi (N / (2 k + 1) - 1)    with N = 2 n
        real:  A_k = -(k + 1)

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

    The logarithm, since powers of A_bar are wanted: A_bar^t = exp(t log A_bar).
    """
    Checker("discretise").one_of("discretisation", discretisation, DISCRETISATIONS)
    z = delta[:, None] * A
    B_bar = delta[:, None] * (torch.ones_like(A) if B is None else B)
    if discretisation == "zoh":
        small = z.abs() < 1e-4  # (exp(z) - 1) / z by its series, where the difference would cancel
        safe = torch.where(small, torch.ones_like(z), z)
        return z, B_bar * torch.where(small, 1 + z / 2, (safe.exp() - 1) / safe)
    return torch.log(1 + z / 2) - torch.log(1 - z / 2), B_bar / (1 - z / 2)


def s4d_kernel(log_A_bar: Tensor, B_bar: Tensor, C: Tensor, l: int) -> Tensor:
    """K (d, l) = 2 Re(sum over n of C B_bar A_bar^t), t = 0...l - 1.

    t is written r s + q, so that no (d, n, l) tensor is formed: powers for all r and all q, then one product
    of matrices. Powers are taken in float64: their phase grows with t.
    """
    side = max(1, math.isqrt(max(l - 1, 0)) + 1)
    wide = torch.complex128 if log_A_bar.is_complex() else torch.float64
    exponent = log_A_bar.to(wide)[..., None]  # (d, n, 1)
    q = torch.arange(side, device=C.device, dtype=torch.float64)
    fine = (exponent * q).exp().to(C.dtype)  # (d, n, s)
    coarse = (exponent * (side * q)).exp().to(C.dtype) * (C * B_bar)[..., None]
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
        u: input (b, d, l), float32 or narrower.
        delta: step sizes (d,), positive.
        A, B, C: (d, n), complex64 or float32; B is ones if not given. D: (d,).
        discretisation: "zoh" or "bilinear".
        initial_state: (b, d, n).
        mode: "convolution", by FFT, O(l log l) and parallel in time, or "recurrence", by `selective_scan`:
            the same result to 1e-5 of the largest value.
        backend: of the recurrence, as in `selective_scan`.

    Returns:
        y (b, d, l) in u's dtype; with `return_last_state` also the last state (b, d, n).

    Raises:
        ValueError: a shape or value is wrong. TypeError: a dtype is wrong.

    >>> u = torch.tensor([[[1.0, 0.0, 0.0]]])
    >>> s4d_scan(u, torch.ones(1), -torch.ones(1, 1), torch.ones(1, 1))[0, 0]
    tensor([0.6321, 0.2325, 0.0855])
    """
    check = Checker("s4d_scan")
    check.tensor("u", u)
    check.that(u.dim() == 3, "u", "have shape (b, d, l)", tuple(u.shape))
    b, d, l = u.shape
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
    log_A_bar, B_bar = discretise(delta, A, B, discretisation)
    if mode == "recurrence":  # delta u B is what the scan adds at a step: B_bar = delta B
        steps = delta[None, :, None].expand(b, d, l)
        wide = torch.float64 if u.dtype == torch.float64 else torch.float32
        return selective_scan(
            u, steps.to(wide), log_A_bar / delta[:, None], B_bar / delta[:, None], C, D,
            return_last_state=return_last_state, initial_state=initial_state, backend=backend,
        )  # fmt: skip
    wide = torch.float64 if A.dtype in (torch.float64, torch.complex128) else torch.float32
    x = u.to(wide)
    size = 2 * l
    kernel = s4d_kernel(log_A_bar, B_bar, C, l)
    y = torch.fft.irfft(torch.fft.rfft(x, n=size) * torch.fft.rfft(kernel, n=size), n=size)[..., :l]
    if initial_state is not None:
        shift = torch.ones_like(B_bar) * log_A_bar.exp()
        free = _powers(log_A_bar, l, C.dtype) * (C * shift)[..., None]  # (d, n, l)
        carried = torch.einsum("bdn,dnl->bdl", initial_state.to(C.dtype), free)
        y = y + (2 * carried.real if carried.is_complex() else carried)
    if D is not None:
        y = y + D[:, None] * x
    y = y.to(u.dtype)
    if not return_last_state:
        return y
    back = _powers(log_A_bar, l, C.dtype).flip(-1)  # A_bar^(l - 1 - t)
    last = torch.einsum("bdl,dnl->bdn", x.to(back.dtype), back) * B_bar
    if initial_state is not None:
        last = last + initial_state * (l * log_A_bar).exp()
    return y, last


def _powers(log_A_bar: Tensor, l: int, dtype: torch.dtype) -> Tensor:
    wide = torch.complex128 if log_A_bar.is_complex() else torch.float64
    t = torch.arange(l, device=log_A_bar.device, dtype=torch.float64)
    return (log_A_bar.to(wide)[..., None] * t).exp().to(dtype)


class S4DBlock(nn.Module):
    """An S4D layer over (b, l, d): the state space model of each channel, GELU, and a gated linear map.

    Args:
        d: channels. n: states of a channel (complex ones stand for a conjugate pair each).
        init: of A: "lin", "inv" or "real". discretisation: "zoh" or "bilinear".
        step_range: steps start spread over it, on a log scale.

    `forward` convolves; `step` takes one token on from a state, with the same result.

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
        decay = -self.log_decay.exp()
        if self.frequency is None:
            return self.log_delta.exp(), decay, self.C[..., 0]
        return self.log_delta.exp(), torch.complex(decay, self.frequency), torch.view_as_complex(self.C)

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
        state = log_A_bar.exp() * state + B_bar * x[..., None]
        y = (C * state).sum(-1)
        y = (2 * y.real if y.is_complex() else y) + self.D * x
        return F.glu(self.out(F.gelu(y))), state
