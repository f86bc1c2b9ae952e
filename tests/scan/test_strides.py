"""Arguments with random strides: every backend against the reference. Memory outside of them is not read."""

import random

import pytest
import torch

from projecta import mrss_scan, selective_scan, selective_state_update
from projecta._cpu import memory
from tests.cases import make_scan, run_strided, strided, widen
from tests.scan.test_scan import TOLERANCE, assert_close

WAYS = [
    {}, {"g": 2}, {"constant": "B"}, {"constant": "C"}, {"constant": "BC"}, {"complex_A": True},
    {"complex_A": True, "constant": "BC"}, {"b": 1, "packed": [0, 3, 3, 8]}, {"without": ("z", "D")},
    {"dtype": torch.float16}, {"dtype": torch.bfloat16, "constant": "B"}, {"dtype": torch.float64},
]  # fmt: skip


def random_scan(draw: random.Random, ways: list[dict] = WAYS):
    """A small scan whose tensors have random strides, inside margins of NaN."""
    way = {
        "b": draw.choice((1, 2)),
        "l": draw.choice((1, 5, 8)),
        "n": draw.choice((1, 3, 4, 8)),
    } | draw.choice(ways)
    if "packed" in way:
        way["l"] = way["packed"][-1]
    arguments = make_scan(d=draw.choice((2, 4, 16, 18)), **way)
    return {name: strided(t, draw) for name, t in arguments.items()}


@pytest.mark.parametrize(("name", "calls"), [("cpu", 800), ("vectorised", 400)])
def test_scans_of_random_strides_agree_with_the_reference(name, calls):
    draw = random.Random(1)
    for seed in range(calls):
        arguments = random_scan(draw)
        truth = run_strided(
            selective_scan, {n: widen(t) for n, t in arguments.items()}, seed, backend="reference"
        )
        got = run_strided(selective_scan, arguments, seed, backend=name)
        assert_close(got, truth, TOLERANCE[arguments["u"].dtype])


def test_the_multi_resolution_scan_of_random_strides_agrees_with_the_reference():
    draw = random.Random(2)
    real = [way for way in WAYS if not way.keys() & {"complex_A", "dtype"}]
    for seed in range(80):
        arguments = random_scan(draw, [*real, {"dtype": torch.float16}])
        d, g = (
            arguments["A"].shape[0],
            max(arguments[k].shape[1] if arguments[k].dim() == 4 else 1 for k in "BC"),
        )
        first = draw.choice(range(1, g)) / g if g > 1 else draw.choice(range(1, d + 1)) / d
        options = {"bands": [(first, 1), (1 - first, 4)] if first < 1 else [(1.0, 4)]}
        truth = run_strided(
            mrss_scan, {n: widen(t) for n, t in arguments.items()}, seed, backend="reference", **options
        )
        got = run_strided(mrss_scan, arguments, seed, **options)
        assert_close(got, truth, TOLERANCE[arguments["u"].dtype])


@pytest.mark.parametrize("heads", [(), (3,)])
def test_steps_of_random_strides_agree_with_contiguous_ones(heads):
    draw = random.Random(3)
    for _ in range(200):
        b, d, n, pool = 2, 4, draw.choice((1, 3)), draw.choice((0, 5))
        shapes = {
            "state": (pool or b, *heads, d, n), "x": (b, *heads, d), "dt": (b, *heads, d), "A": (*heads, d, n),
            "B": (b, n), "C": (b, 1, n), "D": (*heads, d), "z": (b, *heads, d), "dt_bias": (*heads, d),
        }  # fmt: skip
        plain = {name: torch.randn(shape) for name, shape in shapes.items()}
        if pool:
            plain["state_batch_indices"] = torch.tensor(draw.sample(range(pool), b), dtype=torch.int32)
        lying = {name: strided(t, draw, expand=name != "state") for name, t in plain.items()}
        plain = {name: t.clone(memory_format=torch.contiguous_format) for name, t in lying.items()}
        truth, got = (selective_state_update(**a, dt_softplus=True) for a in (plain, lying))
        torch.testing.assert_close(got, truth, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lying["state"], plain["state"], rtol=1e-5, atol=1e-5)


def test_flat_refuses_memory_with_gaps_and_memory_gives_its_strides():
    for t in (torch.ones(4, 6)[:, ::2], torch.ones(3, 4).T, torch.ones(1, 1).expand(3, 2)):
        with pytest.raises(AssertionError, match="a kernel needs contiguous memory; got strides"):
            memory.flat(t)
        array, strides = memory.memory(t)
        rows, columns = t.shape
        lies = [[array[i * strides[0] + j * strides[1]] for j in range(columns)] for i in range(rows)]
        assert torch.equal(torch.tensor(lies), t)
