"""The import names: what is found, what is refused, and that nothing is left behind."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(code, *arguments, ok=True):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode == 0) == ok, done.stderr
    return done.stdout + done.stderr


def test_every_name_is_there_and_goes():
    run("""
    import importlib, importlib.util, sys
    from projecta import compat
    from projecta.compat._names import MODULES
    before = set(sys.modules)
    with compat.install():
        with compat.install():  # a second call removes nothing
            pass
        for name, names in MODULES.items():
            module = importlib.import_module(name)
            assert module.__spec__ is not None and importlib.util.find_spec(name) is not None, name
            for attribute in names:
                assert getattr(module, attribute) is not None, (name, attribute)
        import mamba_ssm
        assert mamba_ssm.ops.selective_scan_interface.selective_scan_fn
        assert getattr(mamba_ssm, "nothing", None) is None
        assert mamba_ssm.Mamba.__module__ == "projecta.compat.mamba"
    assert not {m for m in set(sys.modules) - before if m.partition(".")[0] in ("mamba_ssm", "causal_conv1d")}
    assert importlib.util.find_spec("mamba_ssm") is None
    """)


UNKNOWN = {
    "from mamba_ssm import Mamba2": "Mamba2: it is Mamba-2, which is out of projecta's scope. The names of",
    "import mamba_ssm.ops.triton.ssd_combined": "out of projecta's scope. The names of mamba_ssm.ops.triton",
    "from mamba_ssm.modules.mamba3 import Mamba3": "it is Mamba-3",
    "from mamba_ssm.modules.mha import MHA": "not a part of Mamba-1",
    "from causal_conv1d import nothing": (
        "projecta does not have it. The names of causal_conv1d are: causal"
    ),
    "import mamba_ssm.nothing": "MambaLMHeadModel, ops, modules, models, utils.",
}


def test_an_unknown_name_says_what_there_is():
    text = run(f"""
    from projecta import compat
    compat.install()
    for code in {list(UNKNOWN)}:
        try:
            exec(code)
        except ImportError as error:
            print(error)
        else:
            raise AssertionError(code)
    """)
    said = text.splitlines()
    assert len(said) == len(UNKNOWN)
    for line, message in zip(said, UNKNOWN.values(), strict=True):
        assert message in line


def test_it_refuses_beside_the_real_packages(tmp_path):
    (tmp_path / "causal_conv1d.py").write_text("")
    text = run(
        "import sys; sys.path.insert(0, sys.argv[1])\nfrom projecta import compat\ncompat.install()",
        str(tmp_path), ok=False,
    )  # fmt: skip
    assert "RuntimeError: compat.install: causal_conv1d is installed here already." in text


def test_it_refuses_after_transformers_has_chosen():
    pytest.importorskip("transformers")
    text = run("""
    import transformers.models.mamba.modeling_mamba
    from projecta import compat
    compat.install()
    """, ok=False)  # fmt: skip
    assert "modeling_mamba is imported already" in text


def test_a_script_runs_with_its_arguments(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom causal_conv1d import causal_conv1d_fn\nimport helper\n"
        "print(__name__, sys.argv[1:], callable(causal_conv1d_fn), helper.x)\n"
    )
    (tmp_path / "helper.py").write_text("x = 7\n")
    command = [sys.executable, "-m", "projecta.compat"]
    done = subprocess.run([*command, str(script), "-a", "b"], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "__main__ ['-a', 'b'] True 7\n", done.stderr
    done = subprocess.run([*command, "missing.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "projecta.compat: there is no file missing.py.\n"
