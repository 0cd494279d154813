"""Averages with other starts, strides and births, combined on one clock.

The iterate of step ``s`` is the unit vector ``e_s`` and the initial parameters are
``e_0``. An average is then the vector of its own weights, and so is what the store
makes of snapshots: the claimed residual can be compared with the true one.
"""

import contextlib
import itertools
import json
import shutil
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_avg as oa
from optax_avg.posthoc import SnapshotStore, _clock, _integrity

STEPS = 240
SAVED = {}  # averages by directory, step and name, as they went to the disk
POLYAK = {"polyak": oa.weights.uniform()}
TAIL = {"tail_average": oa.weights.uniform()}


def one_hot(step):
    return jnp.zeros(STEPS + 1).at[step].set(1)


def trained(tx, steps, state=None, begin=0, *, bad=(), save=None, stride=1, unit=1):
    """A run through the steps ``begin + 1 ... begin + steps``.

    Every ``stride``-th is saved, as ``unit`` times its number; the iterates of ``bad``
    have a NaN.
    """
    update = jax.jit(lambda state, x, new: tx.update(new - x, state, x)[1])
    params = one_hot(begin)
    state = tx.init(params) if state is None else state
    for step in range(begin + 1, begin + steps + 1):
        new = one_hot(step)
        wrong = step in bad
        state = update(state, params, new.at[0].set(jnp.nan) if wrong else new)
        params = new
        if save is not None and step % stride == 0:
            save(state, step * unit)
    return state


def mean_of(steps):
    return np.isin(np.arange(STEPS + 1), list(steps)) / len(list(steps))


def made(store, **target):
    """What the plan's sum is, and the plan; the residual may be large."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        plan = store.plan(**target)
    seen = SAVED[store.directory]
    return sum(x * seen[step, name] for step, name, x, *_ in plan.parts), plan


def check(store, wanted, **target):
    """That the claimed error is the true one; returns it."""
    found, plan = made(store, **target)
    true = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
    np.testing.assert_allclose(plan.residual, true, rtol=1e-3, atol=1e-6)
    return true


@pytest.fixture
def store_of(tmp_path):
    with contextlib.ExitStack() as stack:

        def make(**options):
            store = stack.enter_context(SnapshotStore(tmp_path, **options))
            seen = SAVED.setdefault(store.directory, {})

            def save(opt_state, step):
                done = store.save(opt_state, step)
                for name in oa.average_names(opt_state) if done else []:
                    found = oa.averaged_params(opt_state, one_hot(step), name)
                    seen[step, name] = np.asarray(found, np.float64)
                return done

            return store, save

        yield make


def test_means_from_other_starts(store_of):
    """``(200 polyak - 100 tail)/100`` is the mean of the first half."""
    tx = optax.chain(oa.polyak_average(), oa.tail_average(100))
    store, save = store_of(weights=POLYAK | TAIL)
    trained(tx, 200, save=save, stride=40)
    found, plan = made(store, window=200)
    np.testing.assert_allclose(found, mean_of(range(1, 201)), atol=1e-7)
    assert plan.residual < 1e-6
    found, plan = made(store, window=100)
    np.testing.assert_allclose(found, mean_of(range(101, 201)), atol=1e-7)
    assert plan.residual < 1e-6
    parts = {(part.step, part.name): part for part in plan.parts}
    assert parts[200, "polyak"][3:] == (0, 1, 200)
    assert parts[200, "tail_average"][3:] == (100, 1, 100)
    # Window of 60: snapshots at 120 and 160 and 200 hold the ends of 80 and 40.
    assert check(store, mean_of(range(121, 201)), window=80) < 1e-6
    assert check(store, mean_of(range(141, 201)), window=60) > 0.1


@pytest.mark.parametrize(("every", "start"), [(1, 0), (1, 7), (10, 0), (4, 7)])
def test_targets_of_one_grid_are_averages_of_its_iterates(every, start, store_of):
    """What a live average of that stride and start would have given."""
    options = {"every": every, "start": start}
    live = {
        "power": ({"sigma_rel": 0.12}, oa.weights.power_function(sigma_rel=0.12)),
        "ema": ({"half_life": 20}, oa.weights.ema(0.5 ** (every / 20))),
        "window": ({"window": 60}, None),
        "weight": ({"weight": oa.weights.half_life(30)}, oa.weights.half_life(30)),
    }
    tx = optax.chain(
        oa.power_ema([0.05, 0.10], **options),
        oa.average({n: w for n, (_, w) in live.items() if w}, **options),
        oa.window_average(-(-60 // every), name="window", **options),
    )
    store, save = store_of(weights={"ema": live["ema"][1], "weight": live["weight"][1]})
    state = trained(tx, 200, save=save, stride=20)
    for name, (target, _) in live.items():
        wanted = np.asarray(oa.averaged_params(state, one_hot(200), name), np.float64)
        found, plan = made(store, **target)
        assert plan.residual < 2e-6
        np.testing.assert_allclose(found, wanted, atol=2e-6)
        kept = ["power_ema_0.05", "power_ema_0.1"]
        residual = check(store, wanted, names=kept, **target)
        assert residual < (0.6 if name == "window" else 0.3)


def test_other_strides_are_other_iterates(store_of):
    """A mean of every tenth is no mean of all, and the residual says so."""
    tx = optax.chain(oa.polyak_average(), oa.power_ema(0.1, every=10))
    store, save = store_of(weights=POLYAK)
    trained(tx, 200, save=save, stride=40)
    assert check(store, mean_of(range(1, 201)), window=200) < 1e-6
    assert check(store, mean_of(range(161, 201)), window=40) < 1e-6
    target = {"sigma_rel": 0.1}
    with pytest.warns(UserWarning, match=r"names=\['power_ema'\] alone miss .* 0\.0%"):
        store.reconstruct(**target)
    wanted = np.zeros(STEPS + 1)
    power = oa.weights.power_function(sigma_rel=0.1)
    wanted[10:201:10] = oa.weights.profile(power, 20).weights
    assert check(store, wanted, names=["power_ema"], **target) < 1e-6
    wanted[1:201] = oa.weights.profile(power, 200).weights
    assert check(store, wanted, **target) > 0.3


def test_averages_added_later_are_where_they_were_begun(store_of):
    """By ``migrate_state``: their own steps count from there."""
    old = optax.chain(oa.polyak_average())
    new = optax.chain(oa.polyak_average(), oa.average(oa.weights.uniform(), name="new"))
    store, save = store_of(weights=POLYAK | {"new": oa.weights.uniform()})
    state = trained(old, 120, save=save, stride=40)
    state = oa.migrate_state(new.init(one_hot(120)), state)
    trained(new, 80, state, 120, save=save, stride=40)
    assert check(store, mean_of(range(1, 201)), window=200) < 1e-6
    found, plan = made(store, window=80, names=["polyak", "new"])
    np.testing.assert_allclose(found, mean_of(range(121, 201)), atol=1e-7)
    assert plan.parts[-1][3:] == (120, 1, 80)
    assert check(store, mean_of(range(161, 201)), window=40) < 1e-6


def test_an_average_made_anew_beside_one_that_went_on(store_of):
    tx = optax.chain(oa.polyak_average(), oa.average(lambda t: 1 / t, name="b"))
    weights = POLYAK | {"b": oa.weights.uniform()}
    store, save = store_of(weights=weights)
    state = trained(tx, 80, save=save, stride=40)
    state = (state[0], tx.init(one_hot(80))[1])
    trained(tx, 120, state, 80, save=save, stride=40)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = np.asarray(
            store.reconstruct(window=120, names=["b", "polyak"])["value"]
        )
    np.testing.assert_allclose(found, mean_of(range(81, 201)), atol=1e-7)
    assert check(store, mean_of(range(1, 201)), window=200) < 1e-6


def test_each_life_of_an_average_has_its_own_weights(store_of):
    """It is made anew for a shorter time, and with another weight."""
    tx = optax.chain(oa.polyak_average(), oa.ema_params(0.9))
    store, save = store_of(weights=POLYAK | {"ema": oa.weights.ema(0.9)})
    state = trained(tx, 120, save=save, stride=40)
    store.close()
    tx = optax.chain(oa.polyak_average(), oa.ema_params(0.5))
    store, again = store_of(weights=POLYAK | {"ema": oa.weights.ema(0.5)})
    state = (state[0], tx.init(one_hot(120))[1])
    trained(tx, 80, state, 120, save=again, stride=40)
    assert check(store, mean_of(range(1, 201)), window=200) < 1e-6
    assert check(store, mean_of(range(41, 201)), window=160) < 1e-6
    check(store, mean_of(range(101, 201)), window=100)
    check(store, mean_of(range(191, 201)), window=10)


@pytest.mark.parametrize("labels", [1, 3])
@pytest.mark.parametrize("again", [40, 100])
def test_only_the_newest_run_is_combined(labels, again, store_of):
    """After a restart without its state an average counts from nothing."""
    tx = optax.chain(oa.power_ema([0.05, 0.10]))
    store, save = store_of()
    trained(tx, 80, save=save, stride=20, unit=labels)
    trained(tx, again, None, 80, save=save, stride=20, unit=labels)
    with pytest.warns(UserWarning, match="created anew after step 80|after step 240"):
        plan = store.plan(sigma_rel=0.1)
    assert min(part.step for part in plan.parts) == 100 * labels
    assert plan.residual < 1e-6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = store.plan(sigma_rel=0.1, step=80 * labels)
    assert [part.step for part in before.parts[::2]] == [
        s * labels for s in (20, 40, 60, 80)
    ]


def test_a_restart_with_one_snapshot_of_each_run(store_of):
    """The steps of the state rise, less than those of the training."""
    tx = optax.chain(oa.power_ema([0.05, 0.10]))
    store, save = store_of()
    save(trained(tx, 40), 40)
    save(trained(tx, 100, None, 40), 140)
    with pytest.warns(UserWarning, match="created anew after step 40"):
        plan = store.plan(sigma_rel=0.1)
    assert {part.step for part in plan.parts} == {140}


def test_a_state_saved_twice_is_one_run(store_of):
    tx = optax.chain(oa.power_ema([0.05, 0.10]))
    store, save = store_of()
    state = trained(tx, 80, save=save, stride=40)
    save(state, 81)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = store.plan(sigma_rel=0.1)
    assert {part.step for part in plan.parts} == {40, 80, 81}


@pytest.mark.parametrize("every", [1, 5])
def test_iterates_that_were_left_out_do_not_count(every, store_of):
    options = {"every": every, "nonfinite": "reject"}
    tx = optax.chain(
        oa.polyak_average(**options),
        oa.average(lambda t: 1 / t, name="late", start=100, **options),
    )
    store, save = store_of(weights=POLYAK | {"late": oa.weights.uniform()})
    bad = {30, 110, 115, 200}
    trained(tx, 200, bad=bad, save=save, stride=40)
    good = [s for s in range(every, 201, every) if s not in bad]
    late = [s for s in good if s > 100]
    found, plan = made(store, window=len(late) * every)
    np.testing.assert_allclose(found, mean_of(late), atol=1e-7)
    assert plan.residual < 1e-6
    found, plan = made(store, window=200)
    np.testing.assert_allclose(found, mean_of(good), atol=1e-7)


@pytest.mark.parametrize(
    ("every", "saved", "bad"),
    [(50, (50, 240), {100, 150}), (4, (11, 13, 40), {12}), (1, (5, 60), range(9, 40))],
)
def test_many_iterates_that_were_left_out_are_no_new_run(every, saved, bad, store_of):
    """Without them a state counts hardly more steps than before, or fewer."""
    tx = oa.polyak_average(every=every, nonfinite="reject")
    store, save = store_of(weights=POLYAK)
    keep = lambda state, step: save(state, step) if step in saved else None
    trained(tx, saved[-1], bad=bad, save=keep)
    good = [s for s in range(every, saved[-1] + 1, every) if s not in bad]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = store.plan(window=every * len(good))
    assert {part.step for part in found.parts} == set(saved)
    check(store, mean_of(good), window=every * len(good))
    if len(saved) == 2:
        later = [s for s in good if s > saved[0]]
        found, plan = made(store, window=every * len(later))
        np.testing.assert_allclose(found, mean_of(later), atol=1e-6)
        assert plan.residual < 1e-5


def test_averages_that_left_out_other_iterates_are_named(store_of):
    strict = {"nonfinite": "reject"}
    tx = optax.chain(oa.polyak_average(**strict), oa.swa(0, 10, **strict))
    store, save = store_of(weights=POLYAK | {"swa": oa.weights.uniform()})
    trained(tx, 200, bad={55, 60}, save=save, stride=40)
    with pytest.warns(UserWarning, match=r"\['swa'\] do not count the same"):
        store.plan(window=200)


def test_steps_of_the_training_may_count_something_else(store_of):
    """Micro-steps or epochs: the states know how many steps passed."""
    tx = optax.MultiSteps(
        optax.chain(oa.polyak_average(), oa.tail_average(20)), every_k_schedule=3
    )
    store, save = store_of(weights=POLYAK | TAIL)
    params, state = one_hot(0), tx.init(one_hot(0))
    step = jax.jit(tx.update)
    for micro in range(1, 3 * 40 + 1):
        new = one_hot(-(-micro // 3))
        updates, state = step(new - one_hot((micro - 1) // 3), state, params)
        params = optax.apply_updates(params, updates)
        if micro % 15 == 0:
            save(state, micro)
    found, plan = made(store, window=20)
    np.testing.assert_allclose(found, mean_of(range(21, 41)), atol=1e-6)
    assert plan.residual < 1e-6


def test_the_state_knows_a_single_width(store_of):
    store, save = store_of()
    state = trained(oa.power_ema(0.07), 200, save=save, stride=40)
    found, plan = made(store, sigma_rel=0.07)
    assert plan.residual < 1e-6
    wanted = oa.averaged_params(state, one_hot(200))
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_a_name_does_not_make_a_power_function(store_of):
    store, save = store_of()
    tx = oa.average(oa.weights.ema(0.9), name="power_ema_0.1")
    with pytest.warns(UserWarning, match=r"'power_ema_0\.1' are kept: its weights"):
        assert not save(trained(tx, 10), 10)
    assert store.steps() == []


def test_what_is_not_known_does_not_stop_the_training(store_of):
    """It is named once, and the rest is kept."""
    tx = optax.chain(
        oa.power_ema([0.05, 0.10]),
        oa.ema_params(0.9),
        oa.bema(),
        oa.window_average(3),
    )
    store, save = store_of()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        trained(tx, 40, save=save, stride=20)
    messages = sorted(str(w.message) for w in seen if w.category is UserWarning)
    assert len(messages) == 2
    assert "'bema' are kept: it is not a mean" in messages[0]
    assert "weights={'ema': optax_avg.weights.ema(" in messages[1]
    names = {part.name for part in store.plan(sigma_rel=0.1).parts}
    assert names == {"power_ema_0.05", "power_ema_0.1", "window"}


def test_an_average_whose_stride_changed_is_not_kept(store_of):
    state = trained(oa.power_ema(0.1), 20)
    state = trained(oa.power_ema(0.1, every=4), 20, state, 20)
    with pytest.warns(UserWarning, match="do not lie every 1 steps after 0"):
        assert not store_of()[1](state, 40)


def test_weights_that_contradict_those_on_disk_are_refused(store_of):
    """A store opened again with other weights than those of the snapshots it holds."""
    store, save = store_of(weights={"ema": oa.weights.ema(0.9)})
    state = trained(oa.ema_params(0.9), 100, save=save, stride=50)
    store.close()
    store, save = store_of(weights={"ema": oa.weights.ema(0.99)})
    trained(oa.ema_params(0.99), 50, state, 100, save=save, stride=50)
    with pytest.raises(ValueError, match="'ema' that were recorded at step 100 differ"):
        store.plan(window=100)
    assert store.plan(window=100, step=100).parts


def copied(step, other, store):
    shutil.copytree(Path(other, str(step)), Path(store.directory, str(step)))


def test_snapshots_of_another_store_are_not_combined(store_of, tmp_path):
    """A run of the same shapes in another directory, from which two were copied."""
    tx = oa.power_ema([0.05, 0.10])
    store, save = store_of()
    state = trained(tx, 80, save=save, stride=20)
    with SnapshotStore(tmp_path / "other") as other:
        trained(tx, 80, save=other.save, stride=10)
    wanted = store.plan(sigma_rel=0.08)
    for step in (30, 50):
        copied(step, other.directory, store)
    with pytest.warns(
        UserWarning, match=r"steps \[30, 50\] .* another store wrote them"
    ):
        assert store.plan(sigma_rel=0.08) == wanted
    with pytest.warns(
        UserWarning, match=r"steps \[20, 40\] are skipped.* step=40 uses"
    ):
        plan = store.plan(sigma_rel=0.08, step=50)
    assert {part.step for part in plan.parts} == {30, 50}
    # A process that goes on with the run writes what belongs to it.
    store.close()
    again, save = store_of()
    trained(tx, 20, state, 80, save=save, stride=20)
    with pytest.warns(
        UserWarning, match=r"steps \[30, 50\] .* another store wrote them"
    ):
        plan = again.plan(sigma_rel=0.08)
    assert {part.step for part in plan.parts} == {20, 40, 60, 80, 100}


def test_means_are_of_one_store_unless_steps_are_named(tmp_path):
    """Which of two stores wrote a snapshot; those from before may be of either."""
    for name, steps in (("one", (1, 2, 4)), ("other", (3,))):
        with SnapshotStore(tmp_path / name) as store:
            for step in steps:
                store.save(None, step, {"w": jnp.full(2, float(step))})
    store = SnapshotStore(tmp_path / "one")
    copied(3, tmp_path / "other", store)
    with pytest.warns(UserWarning, match=r"snapshots of steps \[3\] are skipped"):
        np.testing.assert_allclose(store.mean()["w"], 7 / 3, rtol=1e-6)
    assert store.mean(steps=[3, 4])["w"][0] == 3.5
    path = tmp_path / "one" / "1" / "record" / "metadata"
    record = json.loads(path.read_text())
    del record["store"], record["underflow"]
    record["checksum"] = _integrity.digest(record | {"checksum": ""})
    path.write_text(json.dumps(record))
    with pytest.warns(UserWarning, match=r"snapshots of steps \[3\] are skipped"):
        np.testing.assert_allclose(store.mean()["w"], 7 / 3, rtol=1e-6)


@pytest.mark.parametrize("labels", [(400, 1200), (1, 3), (1100, 1300)])
def test_a_run_begun_anew_under_other_labels_is_doubted(labels, store_of):
    """The new state has counted more steps than the old one had."""
    store, save = store_of(weights=POLYAK)
    save(trained(oa.polyak_average(), 60), labels[0])
    save(trained(oa.polyak_average(), 120, begin=60), labels[1])
    with pytest.warns(UserWarning, match=f"steps {labels[0]} and {labels[1]} the ave"):
        store.plan(window=50)


@pytest.mark.parametrize("label", [lambda s: 4 * s, lambda s: s + 1000, lambda s: s])
def test_labels_that_advance_with_the_steps_are_not_doubted(label, store_of):
    store, save = store_of(weights=POLYAK)
    state = None
    for begin in (0, 40, 60, 100):
        steps = {0: 40, 40: 20, 60: 40, 100: 20}[begin]
        state = trained(oa.polyak_average(), steps, state, begin)
        save(state, label(begin + steps))
    assert store.plan(window=120).residual < 1e-6  # warnings are errors here


def test_names_that_are_not_there_are_refused(store_of):
    store, save = store_of()
    trained(oa.power_ema([0.05, 0.1]), 40, save=save, stride=20)
    with pytest.raises(ValueError, match="no snapshot of typo; there are those of"):
        store.plan(sigma_rel=0.07, names=["power_ema_0.05", "typo"])
    with pytest.raises(ValueError, match=r"write names=\['power_ema_0.05'\]"):
        store.plan(sigma_rel=0.07, names="power_ema_0.05")


def test_half_lives_are_those_of_the_weights(store_of):
    """In optimizer steps, whatever the stride; without the initial parameters."""
    tx = optax.chain(oa.power_ema([0.05, 0.10], every=5))
    store, save = store_of()
    trained(tx, 200, save=save, stride=20)
    by_name, plan = made(store, half_life=12)
    by_weight, _ = made(store, weight=oa.weights.half_life(12))
    # 2^(-200/12) of the initial parameters are all that differs.
    np.testing.assert_allclose(by_name, by_weight, atol=1e-4)
    assert plan.residual < 0.3
    for half_life in (12, 60):
        p = oa.weights.profile(oa.weights.half_life(half_life), 40, every=5).weights
        wanted = np.zeros(STEPS + 1)
        wanted[5:201:5] = p / p.sum()
        found, plan = made(store, half_life=half_life)
        true = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
        np.testing.assert_allclose(plan.residual, true, rtol=1e-2)


def test_float64_keeps_its_digits(tmp_path):
    weights = POLYAK | TAIL
    with jax.enable_x64(True), SnapshotStore(tmp_path, weights=weights) as store:
        iterates = np.random.default_rng(0).normal(size=(7, 5))
        tx = optax.chain(oa.polyak_average(), oa.tail_average(2))
        state = tx.init(jnp.asarray(iterates[0]))
        for old, new in itertools.pairwise(iterates):
            state = tx.update(jnp.asarray(new - old), state, jnp.asarray(old))[1]
        store.save(state, 6)
        with pytest.warns(UserWarning, match="miss"):
            found = store.reconstruct(window=5)["value"]
        plan = store.plan(window=5)
        kept = {n: oa.averaged_params(state, iterates[0], n) for n in weights}
    assert found.dtype == np.float64
    wanted = sum(part.weight * np.asarray(kept[part.name]) for part in plan.parts)
    np.testing.assert_allclose(found, wanted, rtol=1e-14)
    assert 0 < plan.rounding < 1e-15


def test_parameters_beside_averages_have_their_step(store_of):
    store, _ = store_of()
    tx = oa.power_ema(0.1)
    state = tx.init(one_hot(0))
    for step in range(1, 7):
        state = tx.update(one_hot(step) - one_hot(step - 1), state, one_hot(step - 1))
        state = state[1]
        store.save(state, 10 * step, one_hot(step))
    plan = store.plan(window=3, names=["parameters"])
    parts = [(p.step, round(p.weight, 6)) for p in plan.parts]
    assert [weight for _, weight in parts] == [0, 0, 0, *[round(1 / 3, 6)] * 3]
    assert plan.residual < 1e-6
    assert plan.parts[-1].start + plan.parts[-1].iterates == 6


def test_records_from_before_are_read_with_a_warning(store_of):
    store, save = store_of()
    trained(oa.power_ema([0.05, 0.1]), 40, save=save, stride=20)
    wanted = store.plan(sigma_rel=0.08)
    for step in (20, 40):
        path = Path(store.directory) / str(step) / "record" / "metadata"
        record = json.loads(path.read_text())
        kept = ("step", "absorbed", "kinds", "leaves")
        path.write_text(json.dumps({name: record[name] for name in kept}))
    with pytest.warns(RuntimeWarning, match=r"\[20, 40\] .* all steps from the first"):
        found = store.plan(sigma_rel=0.08)
    assert found == wanted


def dense(average, last):
    """Weights on the steps ``0 ... last``, one by one."""
    p = _clock.weights_on_iterates(average.kind, average.iterates)
    row = np.zeros(last + 1)
    row[average.origin + average.every * np.arange(average.iterates + 1)] = p
    return row


@pytest.mark.parametrize("chunk", [7, 2**16])
@pytest.mark.parametrize("seed", range(10))
def test_inner_products_equal_dense_ones(chunk, seed, monkeypatch):
    monkeypatch.setattr(_clock, "CHUNK", chunk)
    monkeypatch.setattr(_clock, "ROWS", 3)
    rng = np.random.default_rng(seed)
    w = rng.uniform(0, 1, 100) ** 3
    w[rng.integers(0, 100, 4)] = 1
    kinds = [
        _clock.Power(0.0),
        _clock.Power(6.9),
        _clock.Recorded(w),
        _clock.Recorded(w * 0.1),
        _clock.Window(6),
    ]
    kept = [
        _clock.Placed(
            kinds[rng.integers(len(kinds))],
            int(rng.integers(1, 40)),
            int(rng.integers(0, 4)),
            int(rng.integers(1, 4)),
        )
        for _ in range(8)
    ]
    target = _clock.Placed(_clock.Power(3.0), 100)
    rows = np.stack([dense(average, 130) for average in (*kept, target)])
    found = _clock.combination(kept, target, rounding=1e-3)
    averages, terms = _clock._expanded([*kept, target])
    ends = np.unique([term.step for row in terms for term in row])
    gram = _clock._gram(averages, terms, ends)
    np.testing.assert_allclose(gram, rows @ rows.T, rtol=1e-9, atol=1e-13)
    left = np.linalg.norm(rows[-1] - found.weights @ rows[:-1])
    size = np.linalg.norm(rows[-1])
    lost = 1e-3 * np.sqrt(
        np.sum(found.weights**2 * np.maximum(1, (rows[:-1] ** 2).sum(1) / size**2))
    )
    lost = max(lost, 1e-3 * abs(found.weights.sum()))  # where all are rounded alike
    np.testing.assert_allclose(found.rounding, lost, rtol=1e-9)
    np.testing.assert_allclose(found.residual, np.hypot(left / size, lost), rtol=1e-9)
    np.testing.assert_allclose(found.weights.sum(), 1)
