"""The example many_processes.py: equal to one process, and killed while it saves."""

import contextlib
import random
import time
from pathlib import Path

import numpy as np
import pytest

STEPS, EVERY = 6, 2


def arguments(out, steps=STEPS, every=EVERY):
    return ["--out", str(out), "--steps", str(steps), "--every", str(every)]


@pytest.fixture
def example(load_example, monkeypatch):
    root = Path(__file__).resolve().parent.parent
    monkeypatch.setenv("PYTHONPATH", str(root))
    return load_example("many_processes")


def finished(processes):
    """Waits for all of them; what process 0 has said."""
    with contextlib.ExitStack() as stack:
        for process in processes:
            stack.callback(process.kill)
        said = [process.communicate(timeout=240) for process in processes]
    codes = [process.returncode for process in processes]
    assert codes == [0] * len(processes), said
    return said[0][0]


def result(out):
    with np.load(out / "result.npz") as found:
        return dict(found)


def check_equal(found, wanted, **tolerance):
    assert found.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_allclose(found[name], wanted[name], **tolerance)


def test_two_processes_are_as_one(example, tmp_path):
    """They also go on from where the one has stopped."""
    alone, many = tmp_path / "alone", tmp_path / "many"
    example.main(arguments(alone))
    example.main(arguments(many, steps=2))
    (many / "result.npz").unlink()
    said = finished(example.start(2, arguments(many)))
    assert "begin 2" in said
    check_equal(result(many), result(alone), rtol=2e-4, atol=2e-5)
    for folder in ("averages", "checkpoints"):
        assert steps_in(many / folder) == steps_in(alone / folder)


def steps_in(folder):
    """The steps that are complete in a folder of checkpoints or snapshots."""
    found = folder.iterdir() if folder.exists() else ()
    return sorted(int(path.name) for path in found if path.name.isdigit())


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_many_processes_are_as_one(example, tmp_path, processes):
    alone, many = tmp_path / "alone", tmp_path / "many"
    example.main(arguments(alone))
    finished(example.start(processes, arguments(many)))
    check_equal(result(many), result(alone), rtol=2e-4, atol=2e-5)
    example.main(arguments(alone, steps=8))
    example.main(arguments(many, steps=8))  # one goes on from where many have stopped
    check_equal(result(many), result(alone), rtol=2e-4, atol=2e-5)


def killed(processes, rank, save, seconds):
    """Kills one process some time after a save has begun, then the others.

    Returns the step from which this run began.
    """
    begun, saves = 0, 0
    for line in processes[0].stdout:
        words = line.split()
        if words[:1] == ["begin"]:
            begun = int(words[1])
        saves += words[:1] == ["save"]
        if saves == save:
            break
    else:
        raise AssertionError(processes[0].stderr.read()[-3000:])
    time.sleep(seconds)
    processes[rank].kill()
    processes[rank].wait()
    # A scheduler ends the others, which would wait for the one that is gone.
    for process in processes:
        process.kill()
        process.communicate()
    return begun


def killed_often(example, tmp_path, times, seed):
    """Each begins at the newest checkpoint, before which no snapshot is missing."""
    steps, every = 400, 2
    alone, many = tmp_path / "alone", tmp_path / "many"
    rng, newest = random.Random(seed), 0
    for i in range(times):
        processes = example.start(rng.choice([2, 4]), arguments(many, steps, every))
        save = rng.randrange(1, 4)
        begun = killed(processes, i % len(processes), save, rng.uniform(0, 0.15))
        assert begun == newest
        newest = max(steps_in(many / "checkpoints"), default=0)
        # A checkpoint waits for the one before it.
        assert newest >= begun + every * max(save - 2, 0)
        wanted = range(every, newest + 1, every)
        assert set(wanted) <= set(steps_in(many / "averages"))
    last = newest + every * 3
    finished(example.start(2, arguments(many, last, every)))
    example.main(arguments(alone, last, every))
    check_equal(result(many), result(alone), rtol=2e-3, atol=2e-4)
    assert steps_in(many / "averages") == steps_in(alone / "averages")


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_killed_at_random_moments_of_a_save(example, tmp_path, seed):
    killed_often(example, tmp_path, 10, seed)
