"""Measures one benchmark of two builds in interleaved pairs of worker processes.

On a machine that others use too, a process may be slow for seconds on end while the one after it is not. So
both workers are alive at once, and each takes samples for some hundredths of a second in turn (base, head,
base, head, ...) while the other waits: interference slows both. Each request follows one of the other side,
which leaves the caches alike for both.
"""

import time
from collections.abc import Mapping

from projecta.regress.run.case import Case, Outcome
from projecta.regress.run.launch import Worker

REQUEST = 0.04  # seconds of samples, or one sample if that takes longer
MOST, LEAST, TOTAL = 20, 4, 4.0  # requests to each side; after TOTAL seconds only the least are made


def measure_pair(
    workers: Mapping[str, Worker], cases: Mapping[str, Case], first: bool = False
) -> dict[str, Outcome]:
    """Outcomes by side; the first side starts. Each side has its own case, because indices may differ.

    `first`: the sides' first pair, in which both set up at once: they may compile for long.
    """
    for worker in workers.values():  # their processes start at once
        worker.prepare()
    if not all(case.timed for case in cases.values()):
        return {name: worker.run(cases[name]) for name, worker in workers.items()}
    found: dict[str, Outcome] = {}
    ready, begun = [], {}
    for name, worker in workers.items() if first else ():
        begun[name] = worker.begin(cases[name], paired=True)
    for name, worker in workers.items():  # one after the other: two that spin for the same cores take longer
        ended = (begun[name] if first else worker.begin(cases[name], paired=True)) or worker.ready()
        if ended is None:
            ready.append(name)
        else:
            found[name] = ended
    start = time.monotonic()
    for i in range(MOST if len(ready) == len(workers) else 0):
        if i >= LEAST and time.monotonic() - start > TOTAL:
            break
        for name in [name for name in workers if name not in found]:
            ended = workers[name].sample(REQUEST)
            if ended is not None:
                found[name] = ended
    return found | {name: workers[name].finish() for name in ready if name not in found}
