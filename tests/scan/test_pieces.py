"""Pieces of a sequence that hand their states on during a pass have the numbers of the whole sequence."""

import pytest
import torch
from torch import Tensor

B, D = 1, 4


def _random(n, l, log_A):
    torch.manual_seed(0)
    rates = torch.rand(D, n)
    given = {name: torch.randn(B, D, l) for name in ("u", "delta", "z", "grad_y")}
    given |= {name: torch.randn(B, 1, n, l) for name in ("B", "C")}
    given |= {"D": torch.randn(D), "delta_bias": torch.randn(D) - 1, "A": rates.log() if log_A else -rates}
    return given | {name: torch.randn(B, D, n) for name in ("initial_state", "grad_last")}


def _passes(given, log_A, forward_link, backward_link):
    """Yield after the forward pass, then outputs and gradients by name."""
    from projecta.scan._operator import Inputs
    from projecta.scan.triton import launch

    inputs = Inputs(**{name: given[name] for name in Inputs._fields if name in given})
    y, last = torch.empty_like(inputs.u), torch.empty(B, D, inputs.A.shape[1])
    saved = torch.empty(launch.saved_states(inputs, B, 8))
    launch.forward_pass(inputs, True, y, last, saved, False, log_A, link=forward_link)
    yield {}
    grads = Inputs(*(torch.empty_like(t) for t in inputs[:9]))
    launch.backward_pass(
        given["grad_y"], given["grad_last"], saved, inputs, True, grads, torch.empty_like(y), log_A,
        link=backward_link,
    )  # fmt: skip
    yield {"y": y, "last": last} | grads._asdict()


def _check_pieces(n, l, log_A, in_chunks):
    from projecta.scan.triton.launch import Link

    given, sent = _random(n, l, log_A), dict[str, Tensor]()
    pieces = []
    for first, end in ((0, l // 2), (l // 2, l)):
        along = {name: t[..., first:end].contiguous() for name, t in given.items() if t.shape[-1] == l}
        pieces.append(given | along)
    pieces[0]["grad_last"] = torch.full_like(given["grad_last"], torch.nan)  # overwritten by what arrives
    pieces[1]["initial_state"] = torch.full_like(given["initial_state"], torch.nan)
    sender = [lambda t, name=name: sent.update({name: t}) for name in ("state", "last", "start", "grad")]
    runs = (
        _passes(
            pieces[0], log_A, Link(lambda: None, sender[0]),
            Link(lambda: pieces[0]["grad_last"].copy_(sent["grad"]), sender[2]),
        ),
        _passes(
            pieces[1], log_A, Link(lambda: pieces[1]["initial_state"].copy_(sent["state"]), sender[1]),
            Link(lambda: None, sender[3]),
        ),
    )  # fmt: skip
    for run in runs:
        next(run)
    second, first = next(runs[1]), next(runs[0])
    *_, whole = _passes(given, log_A, None, None)
    assert (sent["state"].data_ptr() != first["last"].data_ptr()) == in_chunks  # sent before it is written
    found = {"last": second["last"], "initial_state": first["initial_state"]}
    if in_chunks:
        found["initial_state"] = sent["start"]
    for name in ("y", "u", "delta", "B", "C", "z"):
        found[name] = torch.cat([first[name], second[name]], -1)
    found |= {name: first[name] + second[name] for name in ("A", "D", "delta_bias")}
    torch.testing.assert_close(sent["state"], first["last"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sent["last"], second["last"], rtol=1e-5, atol=1e-6)
    for name, t in found.items():
        error = ((t - whole[name]).abs().max() / whole[name].abs().max()).item()
        assert error < 2e-6, (name, error)


@pytest.mark.parametrize(
    ("n", "l", "log_A", "in_chunks"),
    [(2, 260, False, True), (3, 263, True, True), (2, 30, True, False)],
    ids=["chunks", "chunks, the last slab not whole", "one chunk"],
)
def test_pieces_that_hand_on_their_states(interpreter, n, l, log_A, in_chunks):
    interpreter.submit(_check_pieces, n, l, log_A, in_chunks).result(timeout=300)
