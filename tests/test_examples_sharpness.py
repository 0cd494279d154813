"""The examples of the sharpness family, in tiny settings."""

import functools
import json
import re
import runpy
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import optax
import pytest
from flax import nnx
from test_examples_digits import write_folder

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
METHODS = ["SGD", "SAM", "ASAM", "GAM", "SAM + EMA", "SWA"]


@pytest.fixture
def sharpness(load_example):
    return load_example("sharpness")


def test_run(sharpness, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    # Two methods: compiling all six takes minutes.
    monkeypatch.setattr(
        sharpness,
        "METHODS",
        {name: sharpness.METHODS[name] for name in ("SGD", "SAM", "SWA")},
    )
    write_folder(tmp_path / "idx", count=64)
    out = tmp_path / "new" / "folder"
    argv = ["--data", str(tmp_path / "idx"), "--epochs", "4", "--seeds", "2"]
    argv += ["--width", "8", "--batch-size", "16", "--wrong-labels", "0.25"]
    sharpness.main([*argv, "--out", str(out)])
    numbers = json.loads((out / "sharpness.json").read_text())
    assert list(numbers["measures"]) == ["true labels", "25% wrong"]
    stdout = capsys.readouterr().out
    for found in numbers["measures"].values():
        assert list(found) == ["SGD", "SAM", "SWA"]
        assert found["SGD"]["barrier to SGD"] == [None, None]
        for name, values in found.items():
            assert list(values) == list(sharpness.MEASURES)
            rest = [v for key, v in values.items() if key != "barrier to SGD"]
            assert np.isfinite(np.array(rest)).all()
            assert len(values["trace"]) == 2
            trace = f"{np.mean(values['trace']):.3g} ±"
            assert any(f"│ {name} " in x and trace in x for x in stdout.splitlines())
    true, wrong = numbers["measures"].values()
    assert np.mean(true["SGD"]["training loss"]) < np.log(4)  # chance
    assert np.mean(wrong["SGD"]["training loss"]) > np.mean(
        true["SGD"]["training loss"]
    )
    image = matplotlib.image.imread(out / "sharpness.png")
    assert min(image.shape[:2]) > 300
    assert image.std() > 0.01


def test_methods_are_those_that_the_docstring_names(sharpness):
    assert list(sharpness.METHODS) == METHODS


def test_wrong_labels_are_as_many_as_asked(sharpness):
    labels = np.arange(200) % 10
    found = sharpness.wrong_labels(labels, 0.2, 10, np.random.default_rng(0))
    assert (found != labels).sum() == 40
    assert set(found) <= set(range(10))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--data", "{tmp}/absent"], "no such folder"),
        (["--out", "{tmp}/file"], "cannot write to --out"),
        (["--wrong-labels", "1.5"], "must be below 1"),
        (["--batch-size", "99999"], "only 1437 images"),
        (["--seeds", "0"], "not a positive number"),
    ],
)
def test_bad_flags_exit_with_2(args, message, sharpness, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    argv = [arg.format(tmp=tmp_path) for arg in args]
    with pytest.raises(SystemExit) as raised:
        sharpness.main(["--out", str(tmp_path / "out"), *argv])
    assert raised.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("script", ["sharpness_linen.py", "sharpness_nnx.py"])
def test_loop_learns(script, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", [script, "--epochs", "5"])
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    rows = re.findall(
        r"^ +(\d+) +(\d\.\d+) +(\d\.\d+)$", capsys.readouterr().out, re.MULTILINE
    )
    assert [int(epoch) for epoch, _, _ in rows] == [1, 2, 3, 4, 5]
    assert float(rows[-1][1]) < float(rows[0][1])
    assert float(rows[-1][2]) > 0.8  # chance is 0.1


def numbers_of(tree):
    """PRNG keys as the numbers they are made of."""
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return jax.tree.map(lambda x: jax.random.key_data(x) if is_key(x) else x, tree)


def check_step(sharp, loss, params, *rest):
    """Aux is that of the clean pass; the same dropout in both passes."""
    (value, aux), grads, _ = jax.jit(
        lambda params: sharp(params, sharp.init(params), *rest)
    )(params)
    value_and_grad = jax.value_and_grad(loss, has_aux=True)
    (wanted, wanted_aux), g0 = value_and_grad(params, *rest)
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    chex.assert_trees_all_close(
        *map(numbers_of, (aux, wanted_aux)), rtol=1e-5, atol=1e-6
    )
    norm = optax.tree.norm(g0)
    perturbed = jax.tree.map(lambda x, g: x + 0.5 * g / norm, params, g0)
    (_, other_aux), gd = value_and_grad(perturbed, *rest)
    chex.assert_trees_all_close(grads, gd, rtol=1e-3, atol=1e-4)
    moved = jax.tree.map(
        lambda a, b: (
            jnp.issubdtype(a.dtype, jnp.floating) and not np.allclose(a, b, atol=1e-5)
        ),
        wanted_aux,
        other_aux,
    )
    assert any(jax.tree.leaves(moved))  # the perturbed pass has other statistics


X = np.random.default_rng(0).uniform(size=(16, 64)).astype(np.float32)
Y = np.arange(16) % 10


def test_linen_statistics_and_dropout(load_example, monkeypatch):
    example = load_example("sharpness_linen")
    sharp = example.make_gradient(0.5)
    state = example.create_state(0, 1e-3, sharp)
    rest = (state.batch_stats, X, Y, jax.random.key(3))
    check_step(sharp, example.loss, state.params, *rest)


def test_nnx_statistics_and_dropout(load_example):
    example = load_example("sharpness_nnx")
    graphdef, params, rest = nnx.split(
        example.Network(rngs=nnx.Rngs(0)), nnx.Param, ...
    )
    loss = example.loss
    check_step(example.make_gradient(0.5), loss, params, rest, X, Y, graphdef)
    first, second = (
        functools.partial(loss, params)(r, X, Y, graphdef)
        for r in (rest, loss(params, rest, X, Y, graphdef)[1])
    )
    assert float(first[0]) != float(second[0])  # the next step drops other units
