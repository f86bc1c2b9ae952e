"""The suites' timing cases under pytest-benchmark: `nox -s quick`, then again with --benchmark-compare."""

import pytest

from benchmarks import common
from tests.cases import benchmarks, parameters

LONGEST = 2048  # steps: longer scans, and batches, are left to asv


def cases():
    for suite, kind, method in benchmarks("time_"):
        for chosen in parameters(kind):
            values = dict(zip(kind.param_names, chosen, strict=True))
            here = common.DEVICE_OF.get(values.get("backend"), common.device().type) == common.device().type
            if here and values.get("length", 0) <= LONGEST and values.get("batch", 1) == 1:
                label = ",".join(map(str, chosen))
                yield pytest.param(kind, method, chosen, id=f"{suite}.{kind.__name__}.{method}({label})")


@pytest.mark.parametrize(("kind", "method", "chosen"), list(cases()))
def test_speed(benchmark, kind, method, chosen):
    instance = kind()
    instance.setup(*chosen)
    call = getattr(instance, method)
    start = kind.timer()
    call(*chosen)
    rounds = max(3, min(15, int(0.5 / (kind.timer() - start))))
    benchmark.pedantic(call, chosen, rounds=rounds, iterations=1)
