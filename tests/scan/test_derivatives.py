"""A derivative that a backend does not support raises an error; it is never zero."""

import pytest
import torch
from torch.autograd import forward_ad

from projecta import mrss_scan, selective_scan, selective_state_update
from tests.cases import make_scan

pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.jit.script` is deprecated"
)  # torch warns at a dual number
BANDS = ((0.5, 1), (0.5, 4))
FIXED = make_scan(b=1, d=16, l=8, n=4, without=("z", "initial_state"))
U = FIXED.pop("u")
SCANS = {
    "selective_scan, vectorised": lambda u: selective_scan(u, **FIXED, backend="vectorised"),
    "selective_scan, cpu": lambda u: selective_scan(u, **FIXED, backend="cpu"),
    "mrss_scan, vectorised": lambda u: mrss_scan(u, **FIXED, bands=BANDS, backend="vectorised"),
    "mrss_scan, cpu": lambda u: mrss_scan(u, **FIXED, bands=BANDS, backend="cpu"),
}
REFERENCES = {
    "selective_scan": lambda u: selective_scan(u, **FIXED, backend="reference"),
    "mrss_scan": lambda u: mrss_scan(u, **FIXED, bands=BANDS, backend="reference"),
}


def by_dual_numbers(scan):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(scan(forward_ad.make_dual(U, torch.ones_like(U)))).tangent


def by_jvp(scan):
    return torch.func.jvp(scan, (U,), (torch.ones_like(U),))[1]


def by_jvp_of_vmap(scan):
    return torch.func.jvp(torch.func.vmap(scan), (U[None],), (torch.ones_like(U)[None],))[1]


def by_second_reverse(scan):
    u = U.clone().requires_grad_()
    (once,) = torch.autograd.grad(scan(u).square().sum(), u, create_graph=True)
    return torch.autograd.grad(once.square().sum(), u, allow_unused=True)[0]


def by_two_reverse_passes(scan):  # the gradient of a sum does not depend on the incoming gradient
    u = U.clone().requires_grad_()
    (once,) = torch.autograd.grad(scan(u).sum(), u, create_graph=True)
    return torch.autograd.grad(once.square().sum() + 0 * u.sum(), u)[0]


def by_functional(scan):
    return torch.autograd.functional.jvp(scan, (U,), (torch.ones_like(U),))[1]


FORWARD = {"tangent": by_dual_numbers, "jvp": by_jvp, "jvp of vmap": by_jvp_of_vmap}
SECOND = {"grad of grad": by_second_reverse, "of a sum": by_two_reverse_passes, "functional": by_functional}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("way", FORWARD)
@pytest.mark.parametrize("scan", SCANS)
def test_forward_mode_raises(scan, way):
    function, name = scan.split(", ")
    with pytest.raises(
        RuntimeError, match=f"^{function}: backend must be 'reference' for forward-mode .* {name!r}"
    ) as caught:
        FORWARD[way](SCANS[scan])
    assert not isinstance(caught.value, NotImplementedError)
    if way != "jvp of vmap":
        assert FORWARD[way](REFERENCES[function]).abs().sum() > 0


@pytest.mark.parametrize("way", SECOND)
@pytest.mark.parametrize("scan", SCANS)
def test_second_derivatives_raise(scan, way):
    function, name = scan.split(", ")  # MRSS on "vectorised" is composed of the scan's operator
    with pytest.raises(
        RuntimeError, match=f"^(selective|mrss)_scan: backend must be 'reference' for second .* {name!r}"
    ):
        SECOND[way](SCANS[scan])
    assert SECOND[way](REFERENCES[function]) is not None


def test_compiled_forward_mode_raises():
    jvp = torch.compile(
        lambda u: torch.func.jvp(SCANS["selective_scan, cpu"], (u,), (u,))[1], backend="eager"
    )
    with pytest.raises(Exception, match="backend must be 'reference' for forward-mode derivatives"):
        jvp(U)
    torch._dynamo.reset()


@pytest.mark.parametrize("scan", SCANS)
def test_first_derivatives_work_at_dual_level_and_with_create_graph(scan):
    u = U.clone().requires_grad_()
    truth = torch.autograd.grad(SCANS[scan](u).sum(), u)[0]
    with forward_ad.dual_level():  # no tensor has a tangent
        torch.testing.assert_close(torch.autograd.grad(SCANS[scan](u).sum(), u)[0], truth)
    kept = torch.autograd.grad(SCANS[scan](u).sum(), u, create_graph=True)[0]  # the graph is not used
    torch.testing.assert_close(kept.detach(), truth)


def test_a_step_is_differentiable_forward():
    state, x = torch.zeros(1, 16, 4, dtype=torch.float64), U[..., 0]
    B, C = FIXED["B"][..., 0], FIXED["C"][..., 0]
    tangent = torch.func.jvp(
        lambda x: selective_state_update(state.clone(), x, x, FIXED["A"], B, C), (x,), (torch.ones_like(x),)
    )[1]
    assert tangent.abs().sum() > 0


@pytest.mark.parametrize("complex_A", [False, True])
@pytest.mark.parametrize("function", [selective_scan, mrss_scan])
@pytest.mark.parametrize("on", ["reference", "vectorised", "cpu"])
def test_lazily_conjugated_and_negated_gradients(function, complex_A, on):
    arguments = make_scan(complex_A=complex_A)
    leaves = [t.requires_grad_() for t in arguments.values()]
    outputs = function(**arguments, delta_softplus=True, return_last_state=True, backend=on)
    drawn = [torch.randn(t.shape, dtype=torch.complex64).conj() for t in outputs]
    lazy = [g if t.is_complex() else g.imag for g, t in zip(drawn, outputs, strict=True)]
    plain = [g.resolve_conj().resolve_neg() for g in lazy]
    found, truth = (torch.autograd.grad(outputs, leaves, g, retain_graph=True) for g in (lazy, plain))
    for name, got, wanted in zip(arguments, found, truth, strict=True):
        torch.testing.assert_close(got, wanted, msg=lambda m, n=name: f"{n}: {m}")
