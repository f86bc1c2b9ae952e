"""Measures one benchmark of two builds in interleaved pairs of worker processes.

On a machine that others use too, a process may be slow for seconds on end while the one after it is not. So
both workers are alive at once, and each takes samples for some hundredths of a second in turn (base, head,
base, head, ...) while the other waits: interference slows both. Each request follows one of the other side,
which leaves the caches alike for both. Both set up at once, so that neither has the memory that was free
first: large weights in it are read some per cent more slowly for as long as the process lives.
"""

import time
from collections.abc import Mapping

from projecta.regress.run.case import Case, Outcome
from projecta.regress.run.launch import Worker

REQUEST = 0.04  # seconds of samples, or one sample if that takes longer
MOST, LEAST, TOTAL = 20, 4, 4.0  # requests to each side; after TOTAL seconds only the least are made


def measure_pair(workers: Mapping[str, Worker], cases: Mapping[str, Case]) -> dict[str, Outcome]:
    """Outcomes by side; the first side starts. Each side has its own case, because indices may differ."""
    for worker in workers.values():  # their processes start at once
        worker.prepare()
    if not all(case.timed for case in cases.values()):
        return {name: worker.run(cases[name]) for name, worker in workers.items()}
    for name, worker in workers.items():
        worker.set_up_cache(cases[name])
    ended = {name: worker.begin(cases[name], paired=True) for name, worker in workers.items()}
    for name, worker in workers.items():
        ended[name] = ended[name] or worker.ready()
    for name, worker in workers.items():  # by itself: it may find how many calls a sample takes
        ended[name] = ended[name] or worker.warm_up()
    running = [name for name in workers if ended[name] is None]
    start = time.monotonic()
    for i in range(MOST if len(running) == len(workers) else 0):
        if i >= LEAST and time.monotonic() - start > TOTAL:
            break
        for name, worker in workers.items():
            ended[name] = ended[name] or worker.sample(REQUEST)
    return {name: ended[name] or worker.finish() for name, worker in workers.items()}
