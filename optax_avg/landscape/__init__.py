"""How flat is a minimum? Curvature, sharpness, barriers and planes of a loss.

    H v = d/dt grad L(x + t v) at t = 0,    L((1 - t) a + t b),    L(x + u d1 + v d2)

At a point: ``top_eigenvalues``, ``hessian_trace``, ``hessian_product``, ``sharpness``,
``m_sharpness``, ``gradient_norm_in_ball``. Between and around points: ``barrier``,
``plane``, ``slice_1d``, ``slice_2d``, ``filter_normalised``. No function forms the
Hessian. Every function takes ``loss: params -> scalar`` on any pytree of float leaves
and can be jitted unless its docstring says otherwise. Pictures are in
:mod:`optax_avg.landscape.pictures`, which needs matplotlib
(``pip install "optax_avg[plot]"``).

``progress`` is any function of two integers, the amount of work done and the total
amount; it is called during the computation. XLA's CPU backend runs gradients of
convolutions several times slower inside the loops used here.
"""

from optax_avg.landscape.curvature import (
    gradient_norm_in_ball,
    hessian_product,
    hessian_trace,
    m_sharpness,
    sharpness,
    top_eigenvalues,
)
from optax_avg.landscape.surface import (
    Plane,
    Segment,
    Slice,
    barrier,
    filter_normalised,
    plane,
    slice_1d,
    slice_2d,
)

__all__ = [
    "Plane",
    "Segment",
    "Slice",
    "barrier",
    "filter_normalised",
    "gradient_norm_in_ball",
    "hessian_product",
    "hessian_trace",
    "m_sharpness",
    "plane",
    "sharpness",
    "slice_1d",
    "slice_2d",
    "top_eigenvalues",
]
