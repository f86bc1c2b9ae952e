"""The pre-flight check, with a fake nvidia-smi."""

import json
import os
import re
import shutil
import sys
import textwrap

import pytest

from projecta.regress.project import preflight
from tests.regress.foreign import run

T4 = {
    "--query-gpu=index,uuid,name,driver_version,memory.total,memory.free,temperature.gpu": (
        "0, GPU-1, Tesla T4, 560.35.03, 15360, 15095, 41"
    ),
    "--query-compute-apps=gpu_uuid,pid,used_memory,process_name": "",
    "--query-gpu=clocks.current.graphics": "300",
    "--query-gpu=clocks.default_applications.graphics,clocks.default_applications.memory,clocks.max.graphics": (
        "585, 5001, 1590"
    ),
    "-pm": "Enabled persistence mode for GPU 0.",
    "-lgc": 'GPU clocks set to "(gpuClkMin 585, gpuClkMax 585)" for GPU 0\nAll done.',
}
GPUS, APPS, CLOCK, DEFAULTS, _, LOCK = T4
FORBIDDEN = "The current user does not have permission to change clocks for GPU 00000000:00:1E.0."


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """A function that puts a fake nvidia-smi on PATH. An answer is text, or (exit code, text)."""
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    monkeypatch.setenv("PATH", str(bin_))
    monkeypatch.chdir(tmp_path)

    def put(**changed):
        answers = T4 | {"-ac": (4, FORBIDDEN)} | {globals().get(k, k): v for k, v in changed.items()}
        path = bin_ / "nvidia-smi"
        code = f"""\
            #!{sys.executable} -I
            import sys
            with open({str(tmp_path / "asked")!r}, "a") as log:
                print(*sys.argv[1:], file=log)
            for word, answer in {answers!r}.items():
                if word in sys.argv:
                    code, text = (0, answer) if isinstance(answer, str) else answer
                    print(text)
                    sys.exit(code)
            sys.exit("asked in vain: " + str(sys.argv))
        """
        path.write_text(textwrap.dedent(code))
        path.chmod(0o755)
        return tmp_path / "asked"

    return put


IDLE = ("preflight", "--load", "1000", "--disk", "0")


def test_a_free_t4_is_found_and_locked(nvidia_smi, tmp_path):
    asked = nvidia_smi()
    code, said = run(*IDLE, "--gpu", "--lock", "--json", "results/t4/last.preflight")
    assert code == 0
    assert said.splitlines()[:2] == [
        "GPU 0: Tesla T4, driver 560.35.03, 15095 MiB of 15360 MiB free, 41 C, 0 process(es)",
        "GPU 0: clock 300 MHz, locked at 585 MHz (nvidia-smi -lgc 585,585)",
    ]
    facts = json.loads((tmp_path / "results/t4/last.preflight").read_text())
    assert facts["problems"] == []
    assert facts["gpus"][0]["driver"] == "560.35.03"
    assert facts["gpus"][0]["lock"].startswith("locked at 585 MHz")
    assert {"at", "disk", "load"} < set(facts)
    lines = asked.read_text().splitlines()
    assert "-i 0 -pm 1" in lines
    assert not any("-ac" in line.split() for line in lines)


@pytest.mark.parametrize(
    ("said", "noted"),
    [
        ((4, FORBIDDEN), "not locked: -lgc: nvidia-smi: " + FORBIDDEN.rstrip(".")),
        (
            "Setting locked clocks is not supported for GPU 0.\nTreating as warning and moving on.",
            "-lgc: Setting",
        ),
    ],
)
def test_a_lock_that_is_forbidden_is_noted_and_no_reason_to_refuse(nvidia_smi, said, noted):
    nvidia_smi(LOCK=said)
    code, told = run(*IDLE, "--gpu", "--lock")
    assert code == 0
    assert noted in told
    assert "; -ac: nvidia-smi: The current user" in told


def test_an_older_gpu_is_locked_by_application_clocks(nvidia_smi):
    asked = nvidia_smi(LOCK=(3, "not supported"), **{"-ac": "Applications clocks set"})
    assert "locked at 585 MHz (nvidia-smi -ac 5001,585)" in run(*IDLE, "--gpu", "--lock")[1]
    assert "-i 0 -ac 5001,585" in asked.read_text()


def test_a_gpu_that_names_no_clock_is_left_as_it_is(nvidia_smi):
    asked = nvidia_smi(DEFAULTS="[N/A], [N/A], [N/A]", CLOCK="[N/A]")
    code, told = run(*IDLE, "--gpu", "--lock")
    assert (code, told.splitlines()[1]) == (
        0, "GPU 0: clock unknown MHz, not locked: no clock is known (nvidia-smi names none)",
    )  # fmt: skip
    assert "-lgc" not in asked.read_text()


FACTS = "0, GPU-1, Tesla T4, 560.35.03, 15360, {}, {}"


@pytest.mark.parametrize(
    ("answers", "words", "message"),
    [
        (
            {"APPS": "GPU-1, 1234, 900, /usr/bin/python"}, [],
            "projecta: cannot measure here: process 1234 (python, 900 MiB) uses the GPU. Wait for it, or end it.",
        ),
        (
            {"APPS": "GPU-1, 7, [N/A], a, b"}, [],
            "projecta: cannot measure here: process 7 (a, b, unknown MiB) uses the GPU. Wait for it, or end it.",
        ),
        (
            {"GPUS": FACTS.format("9000", "41")}, [],
            "projecta: cannot measure here: the GPU has 9000 MiB free and 13824 MiB are needed. "
            "A container or a display may hold it.",
        ),
        (
            {"GPUS": FACTS.format("15095", "83")}, [],
            "projecta: cannot measure here: the GPU has 83 C, more than 70 C. Let it cool down: --wait SECONDS.",
        ),
        ({}, ["--temperature", "40"], "projecta: cannot measure here: the GPU has 41 C, more than 40 C. Let it cool down: --wait SECONDS."),
    ],
)  # fmt: skip
def test_a_refusal_takes_one_line(nvidia_smi, answers, words, message):
    asked = nvidia_smi(**answers)
    code, said = run(*IDLE, *words)
    assert code == 3
    assert said.splitlines()[-1] == message
    assert "-lgc" not in asked.read_text()  # a GPU in use is not changed


def test_messages_distinguish_two_gpus(nvidia_smi):
    lines = (FACTS.format("15095", "41"), FACTS.format("15095", "90").replace("0, GPU-1", "1, GPU-2"))
    nvidia_smi(GPUS="\n".join(lines), APPS="GPU-2, 9, 5, x")
    assert run(*IDLE)[1].splitlines()[-2:] == [
        "projecta: cannot measure here: process 9 (x, 5 MiB) uses GPU 1. Wait for it, or end it.",
        "projecta: cannot measure here: GPU 1 has 90 C, more than 70 C. Let it cool down: --wait SECONDS.",
    ]


def test_a_full_disk_and_a_busy_machine_are_refused():
    found = preflight.Findings([], "no nvidia-smi", disk=2.25, load=1.5)
    assert found.problems(preflight.Limits(), demanded=False) == [
        "projecta: cannot measure here: the disk has 2.2 GiB free, less than 10 GiB. Free some space.",
        "projecta: cannot measure here: the load is 1.50 runnable processes per processor, more than 0.5. "
        "End what runs beside.",
    ]
    assert found.problems(preflight.Limits(disk=2, load=1.5), demanded=False) == []
    unknown = preflight.Findings([], "no nvidia-smi", disk=20.0, load=None)
    assert unknown.problems(preflight.Limits(), demanded=False) == []


def test_disk_and_load_are_read(nvidia_smi, tmp_path):
    nvidia_smi()
    before, found, after = os.getloadavg()[0], preflight.look(tmp_path), os.getloadavg()[0]
    assert found.load in [average / os.cpu_count() for average in (before, after)]
    assert found.disk == pytest.approx(shutil.disk_usage(tmp_path).free / 2**30, abs=1)
    code, said = run("preflight", "--disk", "1e9", "--load", "1000")
    assert code == 3
    assert re.fullmatch(
        r"projecta: cannot measure here: the disk has [\d.]+ GiB free, less than 1e\+09 GiB\. Free some space\.",
        said.splitlines()[-1],
    )


def test_a_machine_without_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    code, said = run(*IDLE)
    assert (code, said.splitlines()[0]) == (0, "GPU: none (no nvidia-smi)")
    code, said = run(*IDLE, "--gpu", "--lock")
    assert (code, said.splitlines()[-1]) == (
        3, "projecta: cannot measure here: no GPU (no nvidia-smi). Install the driver, or leave out --gpu.",
    )  # fmt: skip


def test_a_driver_that_does_not_answer(nvidia_smi):
    nvidia_smi(GPUS=(9, "Failed to initialize NVML: Driver/library version mismatch"))
    reason = "nvidia-smi: Failed to initialize NVML: Driver/library version mismatch"
    assert run(*IDLE)[1].splitlines()[0] == f"GPU: none ({reason})"
    assert run(*IDLE, "--gpu", "--lock")[0] == 3


def test_it_waits_for_the_gpu_to_cool(nvidia_smi, tmp_path):
    nvidia_smi(GPUS=FACTS.format("15095", "83"))
    limits, waits = preflight.Limits(disk=0, load=1000), []

    def cool(seconds):
        waits.append(seconds)
        nvidia_smi()

    found, problems = preflight.examine_machine(tmp_path, limits, True, patience=60.0, sleep=cool)
    assert (problems, waits) == ([], [preflight.INTERVAL])
    assert found.gpus[0].temperature == 41
    nvidia_smi(GPUS=FACTS.format("15095", "83"))
    assert len(preflight.examine_machine(tmp_path, limits, True)[1]) == 1  # without patience it looks once


def test_clocks_are_left_alone_unless_asked_for(nvidia_smi):
    asked = nvidia_smi()
    code, told = run(*IDLE, "--gpu")
    assert code == 0
    assert "not locked: not asked to" in told
    assert "-lgc" not in asked.read_text()
    assert "-pm" not in asked.read_text()
