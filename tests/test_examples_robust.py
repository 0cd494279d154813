"""The example of robust aggregation, in tiny settings."""

import json

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import optax
import pytest
from test_examples_digits import write_folder


@pytest.fixture
def robust(load_example):
    return load_example("robust")


def test_run(robust, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    names = ("mean", "per-example clipping", "geometric median")
    monkeypatch.setattr(robust, "METHODS", {n: robust.METHODS[n] for n in names})
    monkeypatch.setattr(robust, "RADII", (1.0,))
    write_folder(tmp_path / "idx", count=64)
    argv = ["--data", str(tmp_path / "idx"), "--steps", "40", "--seeds", "2"]
    argv += ["--width", "8", "--batch-size", "9", "--bright", "0.1"]
    robust.main([*argv, "--out", str(tmp_path / "out")])
    numbers = json.loads((tmp_path / "out" / "robust.json").read_text())
    assert [*numbers["found"]] == ["true labels", "20% wrong", "20% wrong, 10% bright"]
    stdout = capsys.readouterr().out
    for method in names:
        found = numbers["found"]["true labels"][method]
        accuracy = np.array(found["test accuracy, %"])
        assert accuracy.shape == (2,)
        assert found["learning rate"] in robust.RATES
        assert (found["radius"] is None) == (method != "per-example clipping")
        row = next(x for x in stdout.splitlines() if f"│ {method} " in x)
        assert f"{accuracy.mean():.3g} ±" in row
    assert matplotlib.image.imread(tmp_path / "out" / "robust.png").std() > 0.01


def test_mean_of_clipped(robust):
    rows = {"a": jnp.array([[3.0], [0.3], [0.0]]), "b": jnp.array([4.0, 0.4, 0.0])}
    found, _ = robust.mean_of_clipped(1.0).update(rows, optax.EmptyState())
    np.testing.assert_allclose(found["a"], [(0.6 + 0.3) / 3], rtol=1e-6)
    np.testing.assert_allclose(found["b"], (0.8 + 0.4) / 3, rtol=1e-6)


def test_spoiled_images(robust, load_example):
    images = load_example("_data").load_images(None)
    clean = robust.spoiled(images, 3, 0.0, 0.0)
    bad = robust.spoiled(images, 3, 0.2, 0.02)
    assert len(bad["y"]) + len(bad["held_y"]) == len(images.train_y)
    assert 0.15 < np.mean(bad["y"] != clean["y"]) < 0.25
    bright = (bad["x"].max(axis=1) > 1).mean()
    assert 0.005 < bright < 0.04
    np.testing.assert_array_equal(bad["test_x"], clean["test_x"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--wrong-labels", "1.5"], "must be in [0, 1)"),
        (["--batch-size", "8"], "at least 9"),
        (["--data", "nowhere"], "cannot read the images"),
    ],
)
def test_bad_arguments(robust, argv, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        robust.main([*argv, "--out", str(tmp_path)])
    assert error.value.code == 2
    assert message in capsys.readouterr().err


@pytest.fixture
def byzantine(load_example):
    return load_example("byzantine")


def test_workers(byzantine, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    names = ("mean", "trimmed mean")
    some = {n: byzantine.AGGREGATORS[n] for n in names}
    monkeypatch.setattr(byzantine, "AGGREGATORS", some)
    argv = ["--steps", "30", "--seeds", "2", "--width", "8"]
    byzantine.main([*argv, "--out", str(tmp_path / "out")])
    numbers = json.loads((tmp_path / "out" / "byzantine.json").read_text())
    found = numbers["test accuracy, %"]
    assert [*found] == ["gradients", "momentum"]
    assert [*found["gradients"]] == [*names]
    assert [*found["gradients"]["mean"]] == [*byzantine.ATTACKS]
    # Three flipped signs of ten leave 4/10 of the mean, a slower start.
    mean = found["gradients"]["mean"]
    assert np.mean(mean["none"]) > np.mean(mean["sign flip"]) + 1
    assert "│ trimmed mean " in capsys.readouterr().out


def test_lies(byzantine):
    """Against the three attacks by hand, on two devices' worth of workers."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(10, 3))
    honest = rows[3:]
    lies = np.arange(10) < 3
    wanted = {
        "none": rows,
        "sign flip": np.concatenate([-rows[:3], honest]),
        "ALIE": np.concatenate(
            [np.tile(honest.mean(0) - 0.18 * honest.std(0), (3, 1)), honest]
        ),
        "inner product": np.concatenate(
            [np.tile(-0.1 * honest.mean(0), (3, 1)), honest]
        ),
    }
    for i, (name, expected) in enumerate(wanted.items()):
        found = jax.vmap(
            lambda r, lie, i=i: byzantine.sent(r, lie, jnp.asarray(i)),
            axis_name="workers",
        )(jnp.asarray(rows).reshape(5, 2, 3), jnp.asarray(lies).reshape(5, 2))
        np.testing.assert_allclose(
            found.reshape(10, 3), expected, rtol=1e-5, atol=1e-6, err_msg=name
        )
        assert [*byzantine.ATTACKS][i] == name
