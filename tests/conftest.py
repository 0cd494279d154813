"""Strict settings, and eight host devices for the sharding tests."""

import gc
import importlib.metadata
import importlib.util
import itertools
import os
import signal
import sys
import threading
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "XLA_FLAGS" not in os.environ:
    # The suite compiles thousands of tiny programs; set XLA_FLAGS="" to optimise them.
    quick = (
        "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
    )
    if importlib.metadata.version("jaxlib").startswith(("0.8.", "0.9.", "0.10.")):
        quick += " --xla_cpu_use_fusion_emitters=false"  # unknown to later ones
    os.environ["XLA_FLAGS"] = quick
os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=8"

# A run in the background may ignore the signals that tests send.
if threading.current_thread() is threading.main_thread():
    for number, handler in (
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGHUP, signal.SIG_DFL),
    ):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)

import hypothesis
import jax
import pytest

gc.set_threshold(50_000)  # tracing makes objects by the thousand, few of them garbage
jax.config.update("jax_numpy_rank_promotion", "raise")
hypothesis.settings.register_profile(
    "suite", max_examples=12, deadline=None, derandomize=True
)
hypothesis.settings.register_profile(
    "no_shrinking",
    hypothesis.settings.get_profile("suite"),
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
)
hypothesis.settings.load_profile("suite")

TESTS_SO_FAR = itertools.count(1)
MAPPINGS = Path("/proc/self/maps")  # only on Linux


@pytest.fixture(autouse=True)
def programs_are_dropped():
    """Every program takes mappings of memory, of which Linux allows 65,530.

    The programs take memory, too: 2.5 to 4 GB at 8,000 mappings.
    """
    yield
    tests = next(TESTS_SO_FAR)
    if MAPPINGS.exists():
        full = tests % 50 == 0 and MAPPINGS.read_bytes().count(b"\n") > 5_000
    else:
        full = tests % 200 == 0
    if full:
        jax.clear_caches()


@pytest.fixture
def load_example(monkeypatch):
    """Imports an example by name, with its folder on the path as when it is run."""
    folder = Path(__file__).resolve().parent.parent / "examples"

    def load(name):
        monkeypatch.syspath_prepend(str(folder))
        spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command ``optax-avg``; its exit code, output and errors."""
    from optax_avg import cli

    def one(*args):
        monkeypatch.setattr(sys, "argv", ["optax-avg", *map(str, args)])
        monkeypatch.setenv("COLUMNS", "200")
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code
        out, errors = capsys.readouterr()
        return code, out, errors

    return one
