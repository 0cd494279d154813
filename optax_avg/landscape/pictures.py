"""Pictures of planes, segments and slices, as in the papers on SWA and SAM.

    losses[i, j] at (u[j], v[i]),    losses[i] at t[i]

Every function draws into a Matplotlib ``Axes`` and returns it.
"""

from collections.abc import Mapping, Sequence

import jax
import numpy as np

from optax_avg.landscape.surface import Plane, Segment, Slice

try:
    import matplotlib.pyplot as plt
    from matplotlib.axes import Axes
    from matplotlib.colors import BoundaryNorm
except ImportError as error:
    raise ImportError(
        'pictures need matplotlib; write pip install "optax_avg[plot]".'
    ) from error

__all__ = ["draw_plane", "draw_segments", "draw_slices"]


def draw_plane(
    plane: Plane,
    labels: Sequence[str] = (),
    ax: Axes | None = None,
    *,
    title: str = "loss",
    num_levels: int = 12,
    ceiling: float | None = None,
) -> Axes:
    """Contours of the loss on a plane, levels in geometric progression.

    Args:
      plane: A plane from :func:`optax_avg.landscape.plane` or ``slice_2d``.
      labels: Names of the models of the plane, in their order.
      ax: Axes to draw into. By default those of a new figure.
      title: Title of the colour bar.
      num_levels: Number of contours.
      ceiling: Highest level, in units of the loss. By default the 95th percentile of
        the losses.

    Returns:
      The axes.

    Raises:
      ValueError: If there are more labels than models, or no loss is finite.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_avg import landscape
      >>> from optax_avg.landscape import pictures
      >>> axes = jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])
      >>> around = landscape.slice_2d(lambda x: x @ x, jnp.zeros(2), axes)
      >>> ax = pictures.draw_plane(around, ["minimum"])
      >>> [text.get_text() for text in ax.texts]
      ['minimum']

    References:
      Izmailov et al., "Averaging Weights Leads to Wider Optima and Better
      Generalization", 2018, 1803.05407.
    """
    if len(labels) > len(plane.models):
        raise ValueError(
            f"there are {len(labels)} labels for {len(plane.models)} models; pass one "
            "label for each model of the plane."
        )
    ax = _axes(ax)
    finite = plane.losses[np.isfinite(plane.losses)]
    if not finite.size:
        raise ValueError(
            "no loss on the plane is finite; make a smaller plane, or check the loss."
        )
    high = float(np.percentile(finite, 95)) if ceiling is None else ceiling
    # Losses may be zero or negative: levels grow from the lowest one.
    low = float(finite.min())
    span = max(high - low, 1e-6 * max(abs(low), 1.0))
    levels = np.array([low, *(low + span * np.geomspace(1e-2, 1, num_levels))])
    losses = np.where(np.isfinite(plane.losses), plane.losses, np.inf)
    shades = ax.contourf(
        plane.u,
        plane.v,
        np.minimum(losses, low + 2 * span),
        levels=levels,
        norm=BoundaryNorm(levels, 256, extend="max"),
        cmap="viridis_r",
        extend="max",
    )
    ax.figure.colorbar(shades, ax=ax, label=title, format="%.3g")
    for i, (x, y) in enumerate(plane.models):
        ax.plot(x, y, "o", color="white", markeredgecolor="black", zorder=3)
        if i < len(labels):
            ax.annotate(
                labels[i],
                (x, y),
                xytext=(6, 6),
                textcoords="offset points",
                bbox={"boxstyle": "round,pad=0.2", "color": "white", "alpha": 0.8},
            )
    ax.set(xlabel="u", ylabel="v")
    return ax


def draw_segments(segments: Mapping[str, Segment], ax: Axes | None = None) -> Axes:
    """Losses along segments, with the height of each barrier in the legend.

    Args:
      segments: Segments from :func:`optax_avg.landscape.barrier`, by label.
      ax: Axes to draw into. By default those of a new figure.

    Returns:
      The axes.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_avg import landscape
      >>> from optax_avg.landscape import pictures
      >>> well = lambda x: (x**2 - 1) ** 2
      >>> across = landscape.barrier(well, jnp.array(-1.0), jnp.array(1.0))
      >>> ax = pictures.draw_segments({"between the wells": across})
      >>> ax.get_legend().get_texts()[0].get_text()
      'between the wells (barrier 1)'

    References:
      Frankle et al., "Linear Mode Connectivity and the Lottery Ticket Hypothesis",
      2020, 1912.05671.
    """
    return _lines(
        {
            f"{label} (barrier {float(found.barrier):.2g})": (found.t, found.losses)
            for label, found in segments.items()
        },
        ax,
    )


def draw_slices(slices: Mapping[str, Slice], ax: Axes | None = None) -> Axes:
    """Losses along directions from several models, for comparing their widths.

    Args:
      slices: Slices from :func:`optax_avg.landscape.slice_1d`, by label.
      ax: Axes to draw into. By default those of a new figure.

    Returns:
      The axes.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_avg import landscape
      >>> from optax_avg.landscape import pictures
      >>> one = jnp.array(1.0)
      >>> along = landscape.slice_1d(lambda x: x**2, jnp.array(0.0), one)
      >>> ax = pictures.draw_slices({"parabola": along})
      >>> ax.get_legend().get_texts()[0].get_text()
      'parabola'

    References:
      Li et al., "Visualizing the Loss Landscape of Neural Nets", 2018, 1712.09913.
    """
    return _lines({name: (line.t, line.losses) for name, line in slices.items()}, ax)


_Line = tuple[jax.Array, jax.Array]  # positions and losses, each of shape (num,)


def _lines(lines: Mapping[str, _Line], ax: Axes | None) -> Axes:
    ax = _axes(ax)
    for label, (t, losses) in lines.items():
        ax.plot(np.asarray(t), np.asarray(losses), label=label)
    ax.set(xlabel="t", ylabel="loss")
    ax.legend(frameon=False)
    return ax


def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    return plt.subplots(figsize=(5.5, 4), layout="constrained")[1]
