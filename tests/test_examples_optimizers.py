"""The example optimizers.py, in tiny settings."""

import json

import numpy as np
import pytest

import optax_avg as oa

TINY = ["--steps", "6", "--seeds", "2"]


@pytest.fixture
def example(load_example):
    return load_example("optimizers")


def test_run(example, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    monkeypatch.setattr(example, "RATES", (1e-3, 1e-2))
    methods = ["adamw", "cautious, adamw", "u_dog"]
    arguments = ["--tasks", "digits", "quadratic", "--methods", *methods]
    example.main([*TINY, *arguments, "--out", str(tmp_path)])
    numbers = json.loads((tmp_path / "optimizers.json").read_text())
    assert numbers["settings"]["rates"] == [1e-3, 1e-2]
    assert list(numbers["found"]) == methods
    printed = capsys.readouterr().out
    assert example.NOTES in printed
    for name, tasks in numbers["found"].items():
        assert name in printed
        for kinds in tasks.values():
            for kind in ("live", "ema"):
                scores = np.array(kinds["scores"][kind])
                choice = np.array(kinds["scores"][f"{kind}_choice"])
                assert scores.shape == (2, 2)
                assert np.isfinite(scores).all()
                at = choice.mean(axis=1).argmin()
                assert kinds[kind]["rate"] == pytest.approx((1e-3, 1e-2)[at])
                assert kinds[kind]["mean"] == pytest.approx(scores[at].mean())
    # The tasks are no constants: a larger rate leads elsewhere.
    of = numbers["found"]["adamw"]["quadratic"]["scores"]["live"]
    assert abs(of[0][0] - of[1][0]) > 1e-4


def test_the_best_rate(example):
    choice = np.array([[2.0, 2.0], [1.0, 1.2], [0.0, np.nan], [1.0, 1.3]])
    score = np.array([[9.0, 9.0], [4.0, 6.0], [1.0, 1.0], [2.0, 2.0]])
    row = example.best(choice, score, (0.1, 0.2, 0.3, 0.4))
    # 12.7062 is the 97.5 % point of Student's t with one degree of freedom.
    half = 12.7062 * np.sqrt(2) / np.sqrt(2)
    assert row == (5.0, pytest.approx(half, rel=1e-5), 0.2, False)
    assert example.best(choice[:2], score[:2], (0.1, 0.2)).at_end_of_grid


def test_the_rates(example):
    """They reach 10, in steps of half a power of ten, and hold u_dog's default of 1."""
    assert (min(example.RATES), max(example.RATES)) == (1e-4, 10.0)
    assert 1.0 in example.RATES
    np.testing.assert_allclose(np.diff(np.log10(example.RATES)), 0.5)


def test_every_optimizer_is_compared(example):
    """But for what needs more than a gradient at the parameters and a loss."""
    made = {
        name
        for name in oa.optimizers.__all__
        if name.islower() and not name.startswith(("scale_by", "posterior", "bytes"))
    }
    parts = {"identity", "top_k", "random_k", "sign", "low_rank"}  # of error feedback
    elsewhere = {"multi_momentum", "project_radial", "spl_plus"} | parts
    compared = {word.strip(",") for name in example.METHODS for word in name.split()}
    assert made - elsewhere <= compared


def test_arguments_that_are_wrong(example, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for wrong in (["--steps", "0"], ["--tasks", "chess"], ["--methods", "sgdd"]):
        with pytest.raises(SystemExit):
            example.main([*wrong, "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        example.main(["--out", str(tmp_path / "file" / "below")])
    assert "cannot write" in capsys.readouterr().err
