"""The example anytime.py, on a task of a few numbers."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import optax
import pytest
from optax import contrib

import optax_avg as oa

T = 40  # the shortest horizon, with two steps a chunk


@pytest.fixture
def example(load_example):
    return load_example("anytime")


@pytest.fixture
def task(example):
    """A quadratic whose gradients are noisy; a batch is what is added to them."""
    loss = lambda params, noise: jnp.sum(params["x"] ** 2) / 2 + noise @ params["x"]
    return example.Task(
        (0.05, 0.1, 0.2),
        lambda seed: {"x": 3 * jax.random.normal(jax.random.key(seed), (5,))},
        lambda key: jax.random.normal(key, (5,)),
        loss,
        jnp.zeros(5),
        jnp.full(5, 0.01),
    )


@pytest.fixture
def lab(example, task):
    return example.trainings.laboratory(task, T, lambda steps: None)


def test_run(example, task, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setitem(example.TASKS, "digits", lambda: task)
    monkeypatch.setattr(example.trainings, "EXTENSIONS", 0)
    explored, reported = example.trainings.explored, example.trainings.reported
    grids, tuned_on, reported_on = {}, set(), set()

    def explore(lab, name, seeds, rates):
        grids[name] = rates
        tuned_on.update(seeds)
        return explored(lab, name, seeds, rates)

    def report(lab, name, seeds, *chosen):
        reported_on.update(seeds)
        return reported(lab, name, seeds, *chosen)

    monkeypatch.setattr(example.trainings, "explored", explore)
    monkeypatch.setattr(example.trainings, "reported", report)
    small = ["--horizon", str(T), "--seeds", "2", "--tuning-seeds", "1"]
    these = [*small, "--tasks", "digits", "--methods", "schedule-free"]
    example.main([*these, "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    path = tmp_path / "anytime.json"
    numbers = json.loads(path.read_text())
    # All methods try the same rates; what is reported was not tuned on.
    assert set(grids) == {"constant", "cosine", "schedule-free"}
    assert all(list(rates) == [0.05, 0.1, 0.2] for rates in grids.values())
    assert len(tuned_on) == 1
    assert len(reported_on) == 2
    assert not tuned_on & reported_on

    found = numbers["tasks"]["digits"]
    rows = found["summary"]["rows"]
    ends = np.array(found["phases"]["report constant"]["losses"]["ends"])
    assert ends.shape == (2, 4)  # seeds, horizons
    cosine = np.array(found["phases"]["report cosine"]["losses"]["ends"])
    gaps = rows["cosine"]["minus warmup-stable-decay"]
    np.testing.assert_allclose(gaps, (cosine - ends).mean(axis=0))
    for label, row in rows.items():
        assert label in printed
        assert len(row["loss"]) == 4
    # Noise is most of the loss of the live parameters, and averages take it away.
    live, power = rows["constant, live"]["loss"], rows["constant, power EMA"]["loss"]
    assert power[-1] < live[-1] / 2
    for name in ("anytime", "anytime_widths"):
        image = matplotlib.image.imread(tmp_path / f"{name}.png")
        assert min(image.shape[:2]) > 300
        assert image.std() > 0.01

    # Stopped before the last phase, it makes this one alone, and the same again.
    stopped = json.loads(path.read_text())
    last = stopped["tasks"]["digits"]["phases"].pop("report schedule-free")
    stopped["tasks"]["digits"]["summary"] = None
    path.write_text(json.dumps(stopped))
    grids.clear()
    example.main([*these, "--resume", "--out", str(tmp_path)])
    assert not grids
    again = json.loads(path.read_text())["tasks"]["digits"]
    assert again["phases"]["report schedule-free"]["losses"] == last["losses"]
    assert again["summary"] == found["summary"]
    with pytest.raises(SystemExit):
        example.main([*these, "--seeds", "3", "--resume", "--out", str(tmp_path)])
    assert "other settings" in capsys.readouterr().err


def test_a_branch_is_the_schedule_from_the_start(example, lab):
    trainings = example.trainings
    lanes = [trainings.Lane(rate, 0.0, seed) for rate in (0.1, 0.3) for seed in (0, 1)]
    horizon = 2 * T
    option = trainings.COOLDOWNS.index(("1-sqrt", 0.4))
    since = trainings.begins(horizon, 0.4, T)
    assert since == 48
    method = trainings.METHODS["constant"]
    _, kept = trainings.measured(
        lab, method, lanes, [horizon], lab.task.valid, branches=[since]
    )
    found = trainings.cooled(lab, kept, lanes, horizon, option, lab.task.valid)
    schedule = lambda rate, knob: oa.schedules.warmup_stable_decay(
        rate, 4, 44, 32, cooldown="1-sqrt"
    )
    whole = trainings.trained(lab, trainings.adam, schedule, lanes, horizon)
    *_, (step, run) = whole
    assert step == horizon
    np.testing.assert_allclose(found, lab.score(run.params, lab.task.valid), rtol=1e-5)
    # Only some of the lanes give the same.
    some = {step: trainings.take(run, [1, 3]) for step, run in kept.items()}
    part = [lanes[1], lanes[3]]
    fewer = trainings.cooled(lab, some, part, horizon, option, lab.task.valid)
    np.testing.assert_allclose(fewer, found[[1, 3]], rtol=1e-5)


def test_averages_in_lanes(example, lab):
    """Each reading of each lane is the average of that lane's iterates."""
    trainings = example.trainings
    method = trainings.METHODS["horizon-free"]
    schedule = partial(method.schedule, T)
    lanes = [trainings.Lane(0.1, 0.25, 0), trainings.Lane(0.3, 4.0, 1)]
    stop = 2 * T
    run_to = partial(trainings.trained, lab, method.make, schedule, stop=stop)
    # With two steps a chunk these are the iterates that averages take.
    iterates, means = [], {}
    for step, run in run_to(lanes=lanes, rides=True):
        iterates.append(np.asarray(run.params["x"], float))
        means[step] = oa.averaged_params(run.averages, run.params, "mean")
    assert len(iterates) == stop // trainings.EVERY
    found = trainings.read(run, stop, means, T)
    assert list(found) == trainings.RIDING
    x = np.array(iterates)
    for (kind, width), params in found.items():
        if kind == "live":
            expected = x[-1]
        elif kind == "window":
            expected = x[-round(width * len(x)) :].mean(axis=0)
        else:
            weight = (
                oa.weights.power_function(sigma_rel=width)
                if kind == "power EMA"
                else oa.weights.ema(0.5 ** (2 / width))
            )
            weights = oa.weights.profile(weight, len(x), every=2).weights
            expected = np.tensordot(weights, x, axes=1)
        np.testing.assert_allclose(
            params["x"], expected, rtol=1e-3, atol=1e-5, err_msg=f"{kind} {width}"
        )
    *_, (_, alone) = run_to(lanes=lanes[1:])
    np.testing.assert_allclose(alone.params["x"][0], x[-1, 1], rtol=1e-4)


def test_schedule_free_in_lanes(example, lab):
    trainings = example.trainings
    method = trainings.METHODS["schedule-free"]
    schedule = partial(method.schedule, T)
    lanes = [trainings.Lane(0.05, 0.9, 0), trainings.Lane(0.1, 0.98, 1)]
    *_, (_, run) = trainings.trained(lab, method.make, schedule, lanes, T)
    (found,) = trainings.read(run, T, {}, T).values()

    def expected(rate, beta, seed):
        of_step = schedule(rate, beta)
        # Optax counts steps from 0 in Adam, and from 1 in schedule_free.
        weighed = lambda count: of_step(count - 1)
        tx = contrib.schedule_free(optax.adam(of_step, b1=0.0), weighed, b1=beta)

        def step(carry, number):
            params, state = carry
            noise = lab.task.batch(jax.random.fold_in(jax.random.key(seed), number))
            grads = jax.grad(lab.task.loss)(params, noise)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        start = lab.task.start(seed)
        (y, state), _ = jax.lax.scan(step, (start, tx.init(start)), jnp.arange(T))
        return contrib.schedule_free_eval_params(state, y)

    for i, lane in enumerate(lanes):
        reference = jax.jit(partial(expected, lane.rate, lane.knob, lane.seed))()
        np.testing.assert_allclose(found["x"][i], reference["x"], rtol=1e-3, atol=1e-5)


def test_what_is_chosen(example):
    trainings = example.trainings
    # Rates, knobs, seeds, horizons, readings: two readings of one kind.
    losses = np.ones((3, 1, 2, 2, 3))
    losses[0, 0, :, 0, 0] = -5.0  # good at one horizon, bad at the other
    losses[0, 0, :, 1, 0] = 9.0
    losses[1, 0, :, :, 1] = 0.5
    losses[2, 0, 0, 0] = np.nan  # diverged
    losses[2, 0, 1] = -100.0
    readings = [("live", 0.0), ("window", 0.1), ("window", 0.2)]
    found = trainings.choose_anytime(losses, readings)
    assert found["window"] == (1, (0, 1))
    assert found["live"] == (1, (0, 0))
    # Rates, options, seeds, horizons: every horizon has its own.
    ends = np.ones((3, 2, 2, 2))
    ends[0, 1, :, 0] = 0.0
    ends[2, 0, :, 1] = 0.0
    assert trainings.choose_ends(ends) == [(0, (1,)), (2, (0,))]


def test_grids_are_continued_until_the_best_is_inside(example):
    trainings = example.trainings
    at = lambda log2: lambda rates: {"ends": (np.log2(rates) - log2)[:, None] ** 2}
    choose = lambda losses: [trainings.least(losses["ends"])]
    rates, losses = trainings.widened([0.25, 0.5, 1.0], at(-4), choose)
    np.testing.assert_array_equal(rates, 2.0 ** np.arange(-5, 1))
    np.testing.assert_array_equal(losses["ends"][:, 0], np.arange(-1, 5) ** 2)
    rates, _ = trainings.widened([0.25, 0.5, 1.0], at(20), choose)
    assert rates == [0.25, 0.5, 1.0, 2.0, 4.0, 8.0]  # and the table has a star
    rates, _ = trainings.widened([0.25, 0.5, 1.0], at(-1), choose)
    assert rates == [0.25, 0.5, 1.0]


def test_differences_and_verdicts(example):
    pages = example.pages
    base = np.array([[1.0, 2.0], [3.0, 2.0]])
    found = pages.gap(base + np.array([[0.0, 0.1], [0.2, 0.1]]), base)
    np.testing.assert_allclose(found.mean, [0.1, 0.1])
    # 12.7062 is the 97.5 % point of Student's t with one degree of freedom.
    np.testing.assert_allclose(found.half, [12.7062 * 0.1, 0.0], rtol=1e-5, atol=1e-12)
    of = lambda mean, half: pages.verdict(pages.Gap(np.array(mean), np.array(half)))
    assert of([-0.5, 0.004], [0.1, 0.005]) == "yes"
    assert of([-0.5, 0.004], [0.1, 0.007]) == "open"
    assert of([0.02, 0.0], [0.005, 0.001]) == "no"
    assert pages.starred(0.5, 1, 3) == "0.5"
    assert pages.starred(0.5, 2, 3) == "0.5*"


def test_horizons_and_points(example):
    trainings = example.trainings
    assert trainings.horizons_of(240) == [240, 480, 960, 1920]
    points = trainings.curve_points(240)
    assert points[0] == 120
    assert points[-1] == 1920
    assert set(trainings.horizons_of(240)) <= set(points)
    steps = [*points, *trainings.branches_of(240)]
    assert all(step % 12 == 0 for step in steps)
    assert min(trainings.branches_of(240)) >= 240 // trainings.WARMUP


def test_parts_of_the_data_are_disjoint(example):
    train, valid, test = example.text_parts()
    whole = valid.tobytes(), test.tobytes()
    task = example.text()
    for part, text in zip((task.valid, task.test), whole):
        for window in np.asarray(part)[:: len(part) // 8]:
            assert window.tobytes() in text
    # Held-out text is none of the text to train on.
    for part in (valid, test):
        assert part[:2000].tobytes() not in train.tobytes()
    assert valid[-2000:].tobytes() not in test.tobytes()
    images = [{row.tobytes() for row in x} for x, _ in example.digit_parts()]
    assert [len(part) for part in images] == [1077, 360, 360]
    assert len(set.union(*images)) == 1797


def test_labels_are_wrong_as_often_as_the_loss_says(example):
    task = example.digits()
    images, targets = task.batch(jax.random.key(0))
    assert images.shape == (example.IMAGES, 8, 8, 1)
    np.testing.assert_array_equal(targets.sum(axis=1), 1.0)
    # The entropy of a label that is right with 0.82: the least possible loss.
    of_label = -0.82 * np.log(0.82) - 0.18 * np.log(0.02)
    _, truth = task.test
    entropy = -(truth * jnp.log(truth)).sum(axis=1)
    np.testing.assert_allclose(entropy, of_label, rtol=1e-5)
    assert of_label == pytest.approx(0.87, abs=0.005)


def test_arguments_that_are_wrong(example, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for wrong in (["--horizon", "50"], ["--tasks", "chess"], ["--seeds", "0"]):
        with pytest.raises(SystemExit):
            example.main([*wrong, "--out", str(tmp_path)])
    assert "multiple of 40" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        example.main(["--out", str(tmp_path / "file" / "below")])
    assert "cannot write" in capsys.readouterr().err
