"""Compiled code on disk is as new as every source that it was compiled from."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("numba")

KERNEL = """
from inner import number
from projecta._cpu.threads import compiled

@compiled
def kernel(x):
    return number() + x
"""
INNER = """
from projecta._cpu.threads import inner

@inner
def number():
    return {}
"""


def test_a_changed_inner_function_is_compiled_again(tmp_path):
    (tmp_path / "kernel.py").write_text(KERNEL)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    environment.pop("NUMBA_CACHE_DIR", None)
    code = "from kernel import kernel; print(kernel(1), sum(kernel.stats.cache_hits.values()))"

    def run():
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    (tmp_path / "inner.py").write_text(INNER.format(1))
    assert run() == ["2", "0"]
    assert run() == ["2", "1"]  # from the cache
    (tmp_path / "inner.py").write_text(INNER.format(5))
    assert run() == ["6", "0"]
