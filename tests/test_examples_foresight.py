"""The example foresight.py, on a task of a few numbers."""

import json

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest


@pytest.fixture
def example(load_example):
    return load_example("foresight")


def noisy_quadratic(example):
    """A quadratic whose gradients are noisy, so that cooling down pays."""
    value = lambda params: jnp.sum(params["x"] ** 2) / 2
    return example.Task(
        "loss",
        (1e-2, 0.7),
        lambda seed: {"x": 3 * jax.random.normal(jax.random.key(seed), (5,))},
        lambda key: jax.random.normal(key, (5,)),
        lambda params, noise: value(params) + jnp.sum(noise * params["x"]),
        value,
    )


def test_run(example, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setitem(example.TASKS, "digits", lambda: noisy_quadratic(example))
    small = ["--steps", "160", "--checkpoints", "4", "--seeds", "2"]
    example.main([*small, "--tasks", "digits", "--out", str(tmp_path)])
    numbers = json.loads((tmp_path / "foresight.json").read_text())
    assert numbers["settings"]["steps"] == 160
    found = numbers["tasks"]["digits"]
    assert found["steps"] == [40, 80, 120, 160]
    printed = capsys.readouterr().out
    live, cooled = np.array(found["live"]), found["cooled"]
    assert live.shape == (4, 2, 2)  # checkpoints, seeds, rates
    for name, curve in found["foreseen"].items():
        assert name in printed
        cooldown = name.split(": ")[1]
        gaps = np.array(curve) - np.array(cooled[f"branch: {cooldown}"])
        np.testing.assert_allclose(found["gap"][name], gaps.mean(axis=(1, 2)))
    # Both are the mean of the same ten iterates.
    np.testing.assert_allclose(
        found["foreseen"]["window: linear over 20"],
        found["foreseen"]["snapshots: linear over 20"],
        rtol=1e-4,
    )
    # At the larger rate the noise is most of the loss, and a cooldown takes it away.
    late = slice(1, None)
    branch = np.array(cooled["branch: linear over 40"])[late, :, 1].mean()
    window = np.array(found["foreseen"]["window: linear over 40"])[late, :, 1].mean()
    assert branch < live[late, :, 1].mean() / 2
    assert window < live[late, :, 1].mean() / 2
    image = matplotlib.image.imread(tmp_path / "foresight.png")
    assert min(image.shape[:2]) > 300
    assert image.std() > 0.01


def test_what_is_judged(example):
    steps = np.array([10, 20, 40, 80])
    line = np.log(steps)[:, None, None] * np.ones((1, 2, 2))
    bend = np.array([1.0, -1.0, -1.0, 1.0])[:, None, None] * np.ones((1, 2, 2))
    falling = -line + 0.1 * bend
    # Curves that only fall correlate; what is left of these does not.
    assert np.corrcoef(falling.ravel(), (-line - 0.1 * bend).ravel())[0, 1] > 0.9
    assert example.correlation(falling, -line - 0.1 * bend, steps) < -0.999
    assert example.correlation(falling, 3 * line + 2 * bend, steps) > 0.999
    a = np.zeros((4, 2, 2))
    a[:, :, 1] = 1.0
    b = a.copy()
    b[0, :, 0] = 2.0
    assert example.agreement(a, a + 5) == 1.0
    assert example.agreement(a, b) == 0.75
    mean, half = example.gap(a + np.array([1.0, 3.0])[:, None], a)
    np.testing.assert_allclose(mean, 2.0)
    # 12.7062 is the 97.5 % point of Student's t with one degree of freedom.
    np.testing.assert_allclose(half, 12.7062, rtol=1e-5)


def test_arguments_that_are_wrong(example, tmp_path, capsys):
    for wrong in (["--steps", "50"], ["--checkpoints", "2"], ["--tasks", "chess"]):
        with pytest.raises(SystemExit):
            example.main([*wrong, "--out", str(tmp_path)])
    assert "20 steps apart" in capsys.readouterr().err
