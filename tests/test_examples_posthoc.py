"""The example of widths chosen after training, in tiny settings."""

import json
import warnings

import matplotlib.image
import numpy as np
import pytest
from test_examples_digits import write_folder

import optax_avg as oa


@pytest.fixture
def posthoc(load_example):
    return load_example("posthoc")


def test_run(posthoc, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setattr(posthoc, "COUNTS", (2, 8))
    monkeypatch.setattr(posthoc, "SWEPT", (0.08,))
    write_folder(tmp_path / "idx", count=64)
    argv = ["--data", str(tmp_path / "idx"), "--steps", "64", "--seeds", "2"]
    out = tmp_path / "out"
    posthoc.main([*argv, "--out", str(out)])
    numbers = json.loads((out / "posthoc.json").read_text())
    few, many = (
        np.array(numbers["distances"]["sigma_rel 0.08"][count]) for count in ("2", "8")
    )
    assert many.shape == (2,)
    assert (many > 0).all()
    assert (many < few / 2).all()
    loss = numbers["loss"]
    store = oa.posthoc.SnapshotStore(out / "snapshots" / "1")
    assert store.steps() == list(range(8, 65, 8))
    assert store.plan(sigma_rel=0.05).residual < 1e-6
    made, true = loss["made afterwards, 0.08"], loss["true average, 0.08"]
    np.testing.assert_allclose(made, true, rtol=2e-2)
    assert loss["live parameters"] != true
    stdout = capsys.readouterr().out
    row = next(x for x in stdout.splitlines() if "│ sigma_rel 0.08 " in x)
    assert f"{few.mean():.3g} ±" in row
    assert matplotlib.image.imread(out / "posthoc.png").std() > 0.01

    # A second run into the same folder starts from nothing.
    monkeypatch.setattr(posthoc, "COUNTS", (4,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        posthoc.main([*argv[:-2], "--seeds", "1", "--out", str(out)])
    store = oa.posthoc.SnapshotStore(out / "snapshots" / "0")
    assert store.steps() == [16, 32, 48, 64]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--steps", "100"], "must be a multiple of 64, got 100"),
        (["--seeds", "0"], "0 is not a positive number"),
    ],
)
def test_arguments(posthoc, argv, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        posthoc.main([*argv, "--out", str(tmp_path)])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
