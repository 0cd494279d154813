"""A training run that is killed at random moments, and what its snapshots are then."""

import multiprocessing
import os
import random
import re
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_avg as oa
from optax_avg.posthoc import SnapshotStore

EVERY = 5
NAME = "power_ema_0.05"


def training():
    """Parameters and averages of a deterministic run: ``(first, advance)``."""
    tx = optax.chain(optax.sgd(0.1), oa.power_ema([0.05, 0.10]))
    params = {"w": jnp.ones((300, 100)), "b": jnp.zeros(7)}

    @jax.jit
    def advance(step, params, state):
        grads = jax.tree.map(lambda x: jnp.sin(step + x), params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return params, tx.init(params), advance


def train(directory, told):
    """Resumes after the newest snapshot; tells which snapshots are safe."""
    params, state, advance = training()
    store = SnapshotStore(directory)
    newest = max(store.steps(), default=0)
    step, before = 0, None
    with open(told, "a", buffering=1) as notes:
        while True:
            step += 1
            params, state = advance(step, params, state)
            if step <= newest or step % EVERY:
                continue
            store.save(state, step)
            # A save waits for the one before it.
            notes.write(f"{before}\n" if before else "begun\n")
            before = step


def rewrite(directory, told):
    """Saves step 2 over and over; each snapshot holds its turn."""
    turn, before = max(told_turns(told).values(), default=0), None
    with open(told, "a", buffering=1) as notes, SnapshotStore(directory) as store:
        while True:
            turn += 1
            store.save(None, 2, {"w": jnp.full(300_000, float(turn))})
            notes.write(f"2 {before}\n" if before else "begun\n")
            before = turn


def told_turns(told):
    """The newest turn of each step that is known to be safe."""
    lines = told.read_text().splitlines() if told.exists() else []
    pairs = [line.split() for line in lines if line != "begun"]
    return {int(step): int(turn) for step, turn in pairs}


def take_turns(directory, told, seed):
    """Saves a few steps whenever the other process has not opened the store."""
    rng = random.Random(seed)
    with open(told, "a", buffering=1) as notes:
        while True:
            store = SnapshotStore(directory)
            try:
                newest = max(store.steps(), default=0) + rng.randrange(1, 4)
                for step in range(max(store.steps(), default=0) + 1, newest + 1):
                    store.save(None, step, {"w": jnp.full(200_000, float(step))})
                store.close()
                notes.write(f"{newest}\n")
            except (RuntimeError, ValueError) as error:
                # The other one holds the lock, or came in between.
                if not re.search("already has a writer|of later steps", str(error)):
                    raise
                store.close()
            time.sleep(rng.uniform(0, 0.02))


def killed_after(seconds, directory, told, run=train):
    """One run, killed that long after its first snapshot began."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["orbax.checkpoint", "optax_avg.posthoc", "filelock"]
    )
    begun = told.read_text().count("begun") if told.exists() else 0
    process = context.Process(target=run, args=(str(directory), told))
    process.start()
    deadline = time.monotonic() + 120
    while not told.exists() or told.read_text().count("begun") == begun:
        assert process.is_alive(), "the run ended by itself"
        assert time.monotonic() < deadline, "no snapshot in two minutes"
        time.sleep(0.01)
    time.sleep(seconds)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL


def killed_often(times, tmp_path):
    directory, told = tmp_path / "store", tmp_path / "told"
    rng = random.Random(0)
    for _ in range(times):
        killed_after(rng.uniform(0, 0.6), directory, told)
        safe = {int(line) for line in told.read_text().split() if line.isdigit()}
        with SnapshotStore(directory) as store:
            steps = store.steps()
            # At most the one in flight is missing: all before the newest are there.
            assert safe <= set(steps)
            assert steps == list(range(EVERY, max(steps, default=0) + 1, EVERY))
            if steps:
                store.reconstruct(sigma_rel=0.1, step=max(steps))  # no warning
    with SnapshotStore(directory) as store:
        steps = store.steps()
        assert len(steps) >= times // 2
        params, state, advance = training()
        for step in range(1, max(steps) + 1):
            params, state = advance(step, params, state)
            if step in steps:
                found = store.mean(steps=[step], name=NAME)
                wanted = oa.averaged_params(state, params, NAME)
                jax.tree.map(np.testing.assert_array_equal, found, wanted)


def killed_while_rewriting(times, tmp_path):
    directory, told = tmp_path / "store", tmp_path / "told"
    with SnapshotStore(directory) as store:
        for step in (1, 2):
            store.save(None, step, {"w": jnp.zeros(300_000)})
    told.write_text("1 0\n2 0\n")
    rng = random.Random(1)
    for _ in range(times):
        killed_after(rng.uniform(0, 0.6), directory, told, rewrite)
        with SnapshotStore(directory) as store:
            for step, turn in told_turns(told).items():
                values = np.unique(store.mean(steps=[step])["w"])  # no warning
                assert values.size == 1
                assert values[0] >= turn


@pytest.mark.slow
def test_two_processes_that_save_in_turns_are_killed_often(tmp_path):
    """What either of them said to be safe is there, and of one store."""
    directory, told, rng = tmp_path / "store", tmp_path / "told", random.Random(2)
    told.touch()
    context = multiprocessing.get_context("forkserver")
    both = [None, None]
    for _ in range(20):
        for i, process in enumerate(both):
            if process is None:
                args = str(directory), told, rng.randrange(10**9)
                both[i] = context.Process(target=take_turns, args=args)
                both[i].start()
        before, deadline = len(told.read_text()), time.monotonic() + 60
        while len(told.read_text()) == before:
            assert time.monotonic() < deadline, "nothing was saved in a minute"
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.5))
        for i in rng.choice([[0], [1], [0, 1]]):
            assert both[i].is_alive(), "the run ended by itself"
            both[i].kill()
            both[i].join()
            both[i] = None
        safe = max(map(int, told.read_text().split()))
        steps = SnapshotStore(directory).steps()
        assert steps == list(range(1, len(steps) + 1))
        assert len(steps) >= safe
    for process in filter(None, both):
        process.kill()
        process.join()
    store = SnapshotStore(directory)
    for step in store.steps():
        assert set(np.unique(store.mean(steps=[step])["w"])) == {step}
    count = len(store.steps())
    np.testing.assert_allclose(store.mean()["w"][0], (count + 1) / 2, rtol=1e-5)


def test_killed_three_times(tmp_path):
    killed_often(3, tmp_path)


def test_killed_three_times_while_steps_are_replaced(tmp_path):
    killed_while_rewriting(3, tmp_path)


@pytest.mark.slow
def test_killed_fifty_times(tmp_path):
    killed_often(50, tmp_path)


@pytest.mark.slow
def test_killed_fifty_times_while_steps_are_replaced(tmp_path):
    killed_while_rewriting(50, tmp_path)
