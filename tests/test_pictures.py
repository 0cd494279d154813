"""What the pictures of a landscape hold; how they look is for eyes to judge."""

import importlib
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

from optax_avg import landscape
from optax_avg.landscape import pictures

AXES = jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])


def axes():
    return Figure().subplots()


def test_plane_spans_its_losses_and_names_its_models():
    corners = [jnp.array(x) for x in ([0.0, 0.0], [2.0, 0.0], [0.0, 1.0])]
    drawn = landscape.plane(lambda x: x @ x - 3, corners, num=9, margin=0.25)
    ax = pictures.draw_plane(drawn, ["a", "b", "c"], axes())
    assert [text.get_text() for text in ax.texts] == ["a", "b", "c"]
    np.testing.assert_allclose(
        [line.get_xydata()[0] for line in ax.lines], [[0, 0], [2, 0], [0, 1]], atol=1e-6
    )
    np.testing.assert_allclose(
        [*ax.get_xlim(), *ax.get_ylim()], [-0.5, 2.5, -0.25, 1.25]
    )
    levels = ax.collections[0].levels
    assert levels[0] == drawn.losses.min()
    np.testing.assert_allclose(levels[-1], np.percentile(drawn.losses, 95), rtol=1e-6)
    capped = pictures.draw_plane(drawn, ax=axes(), ceiling=-1.0)
    np.testing.assert_allclose(capped.collections[0].levels[-1], -1.0)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_plane_with_losses_that_are_not_finite(bad):
    loss = lambda x: jnp.where(x[0] > 0.5, bad, x @ x)
    drawn = landscape.slice_2d(loss, jnp.zeros(2), AXES, num=5)
    ax = pictures.draw_plane(drawn, ax=axes())
    assert np.isfinite(ax.collections[0].levels).all()
    with pytest.raises(ValueError, match="no loss on the plane is finite"):
        pictures.draw_plane(drawn._replace(losses=drawn.losses * np.nan), ax=axes())


def test_plane_of_a_constant_loss():
    drawn = landscape.slice_2d(lambda x: 0 * x[0] + 2, jnp.zeros(2), AXES, num=3)
    ax = pictures.draw_plane(drawn, ["model"], axes())
    assert np.all(np.diff(ax.collections[0].levels) > 0)
    with pytest.raises(ValueError, match="2 labels for 1 models"):
        pictures.draw_plane(drawn, ["a", "b"], axes())


def test_lines_hold_the_losses():
    well = lambda x: (x**2 - 1) ** 2
    across = landscape.barrier(well, jnp.array(-1.0), jnp.array(1.0))
    ax = pictures.draw_segments({"wells": across}, axes())
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), across.losses)
    assert ax.lines[0].get_label() == "wells (barrier 1)"
    along = landscape.slice_1d(well, jnp.array(0.0), jnp.array(1.0))
    ax = pictures.draw_slices({"a": along, "b": along}, axes())
    np.testing.assert_array_equal(ax.lines[1].get_xdata(), along.t)
    assert [line.get_label() for line in ax.lines] == ["a", "b"]


def test_without_matplotlib_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    monkeypatch.delitem(sys.modules, "optax_avg.landscape.pictures")
    with pytest.raises(ImportError, match=r'pip install "optax_avg\[plot\]"'):
        importlib.import_module("optax_avg.landscape.pictures")
