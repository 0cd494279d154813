"""How often devices wait for each other in a step, for every public transformation.

Parameters, gradients and states lie in eight parts on eight devices. A gradient gathers
every leaf once and scatters its sum over the batch once. What a transformation adds are
sums over devices. A norm is one such sum, whatever the number of leaves.
"""

import collections
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest
from cases import AVERAGES, CASES, CLIPS, Case, beside, counted
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_avg as oa


class Needs(NamedTuple):
    """What a step needs of other devices.

    Attributes:
      gradients: Gradients and products with the Hessian.
      sums: Rounds of sums (or maxima) that always run, each after the one before.
      rare: The same in branches. A norm has one there, for sums of squares that
        leave the range of float32; ``project_out`` has three.
      gathered: Leaves that are gathered beyond one for each leaf and gradient.
    """

    gradients: int = 1
    sums: int = 0
    rare: int = 0
    gathered: int = 0


NORM = Needs(sums=1, rare=1)
SAM = Needs(gradients=2, sums=1, rare=1)
NEEDS = {
    # Every element of an average is on its own.
    **dict.fromkeys([*AVERAGES, "primal_average", "primal_average_at_z"], Needs()),
    # The second gradient is at an offset of known length.
    "sam": SAM,
    "asam": SAM,
    "fisher_sam": SAM,
    "esam": SAM,
    "gnp": SAM,
    "wsam": SAM,
    "decoupled_wsam": SAM,
    # One of four leaves is not perturbed and needs no second gathering.
    "sam_on": SAM._replace(gathered=-1),
    # No norm is taken.
    "usam": Needs(gradients=2),
    "dnsam": Needs(gradients=2),
    "gradient_regularisation": Needs(gradients=2),
    # A memory waits for the last gradient to be finite.
    "vasso": SAM._replace(sums=2),
    "friendly_sam": SAM._replace(sums=2),
    "momentum_sam": Needs(gradients=1, sums=2, rare=1),
    # The share of a mask is found by counting, bit by bit, when the mask is renewed.
    "sparse_sam": SAM._replace(sums=2, rare=7),
    "amp": SAM,
    # Norms of each matrix and of its gradient; the two vectors are not perturbed.
    "awp": Needs(gradients=2, sums=1, rare=4, gathered=-2),
    # Both offsets have one length.
    "cr_sam": Needs(gradients=3, sums=1, rare=2),
    # A projection is one sum more.
    "gsam": Needs(gradients=2, sums=2, rare=4),
    # Three offsets, one after another, and a projection.
    "gam": Needs(gradients=4, sums=4, rare=7),
    # Two directions and an offset. Each direction is gathered.
    "gam_hvp": Needs(gradients=4, sums=3, rare=4, gathered=4),
    # All but the first gradient is in the branch of the steps that are due.
    "as_link": Needs(gradients=2, sums=0, rare=6),
    "every_k": Needs(gradients=2, sums=0, rare=2),
    "look_sam": Needs(gradients=2, sums=0, rare=9),
    "multi_call": Needs(gradients=1, sums=0, rare=4),
    # The size of ``g - m``.
    "vclip": NORM,
    "clipped_ema": NORM,
    "clip_by_quantile": NORM,
    # The mean size of the elements of ``g - m``, and how many are within the radius.
    "cclip": Needs(sums=1),
    "clip_by_coordinate_quantile": Needs(sums=1),
    # A sum and a maximum, then in each round of Newton's method a sum and a count.
    "track_location": Needs(sums=5),
    # A singular value decomposition takes whole matrices.
    "track_location_spectral": Needs(gathered=4),
    "clip_by_zscore": NORM,
    "clip_by_percentile": NORM,
    "clip_by_ema_norm": NORM,
    "scale_by_clipped_adagrad_norm": NORM,
    "scale_by_induced_metric": NORM,
    # A norm, and the largest element of each leaf.
    "clip_redescending": NORM._replace(sums=2),
    # Both norms at once.
    "track_tail_index": NORM,
    # Two inner products at once.
    "perp_grad": Needs(sums=1, rare=12),  # leaf by leaf, three for each of four
    "perp_grad_global": Needs(sums=1, rare=3),
    "bloop": Needs(sums=1, rare=3),
    # The norms of the rows, then the Gram matrix of what is left of them.
    "adaptive_k_mean": NORM,
    "coordinate_median": NORM,
    "trimmed_mean": NORM,
    "flag": NORM._replace(sums=2),
    "mgda": NORM._replace(sums=2),
    "upgrad": NORM._replace(sums=2),
    "pcgrad": NORM._replace(sums=2),
    # The lengths of two combinations.
    "cagrad": Needs(sums=3, rare=2),
    # Distances from the most central row.
    "geometric_median": Needs(sums=3, rare=2),
    "krum": Needs(sums=3, rare=2),
    # The norms of the rows, and those of the means of groups.
    "median_of_means": Needs(sums=4, rare=3),
    # Distances from the location, and one round of clipping by the Gram matrix.
    "centered_clip": Needs(sums=2, rare=2),
    # One for each row, in a loop.
    "one_pass_location": NORM,
    # Optimizers that take every element on its own.
    **dict.fromkeys(
        [
            *("laprop", "adamomentum", "diffgrad", "aggregated_momentum", "nag_gs"),
            *("grams", "multi_momentum"),
            *(
                name
                for name in CASES
                if name.startswith("scale_by_") and name not in CLIPS
            ),
        ],
        Needs(),
    ),
    # The share of the elements that agree, of all leaves at once.
    "cautious": Needs(sums=1),
    "mars": NORM,
    # As clip_redescending.
    "gravity": NORM._replace(sums=2),
    # The inner products of the differences of gradients.
    "optimistic_amsgrad": Needs(sums=1),
    # The largest elements, then the products of each channel.
    **dict.fromkeys(["project_radial", "adamp", "sgdp"], Needs(sums=2)),
    # The norms of the weights and of the steps; the radial parts of the gradients and
    # of the steps.
    "norm_preserving": Needs(sums=5, rare=2),
    # The norms of the columns of two matrices.
    "norm_loss": Needs(sums=1, rare=2),
    # The norm of ``W v``, then ``W'u``.
    "spectral_regularisation": Needs(sums=3, rare=2),
    # The second gradient is that of a product with the Hessian.
    **dict.fromkeys(["adahessian", "scale_by_adahessian"], Needs(gradients=2)),
    # The norms of the gradient and of its change at once, then the distance.
    "u_dog": Needs(sums=2, rare=2),
    "preconditioned_polyak": Needs(gradients=2, sums=1),
    "spl_plus": Needs(sums=1),
    # The largest elements are found in whole leaves; their values are a sum.
    "error_feedback": Needs(sums=2, gathered=4),
    "error_feedback_random": Needs(sums=2),
    # Of the two matrices one factor is a sum, and one is gathered.
    "error_feedback_control": Needs(sums=2, gathered=2),
    # Whether the worker is finite on all of its devices, in the steps that are due.
    "sync_params": Needs(rare=1),
    **dict.fromkeys(["gossip_params", "sync_state"], Needs()),
    # Gradients at a sample and at the ascent; both are finite, or nothing changes.
    "bsam": Needs(gradients=2, sums=1),
}
MORE = {
    "amp": Case(lambda: oa.as_link(oa.rules.amp())),
    "awp": Case(lambda: oa.as_link(oa.rules.awp())),
    "every_k": Case(lambda: oa.as_link(oa.rules.every_k(oa.rules.sam(), 2))),
    "perp_grad_global": Case(counted(oa.perp_grad)),
}
ALL = CASES | {name: case._replace(place="first") for name, case in MORE.items()}
# The eight bits of a byte lie on several devices, and XLA brings them together.
del ALL["error_feedback_sign"]
MESH = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
SHAPES = {"bias": (32,), "norm": (32,), "w": (16, 32), "z": (32, 16)}
COLLECTIVE = r"\b(all-\w+|reduce-scatter|collective-\w+)(?:-start)?\("
CALLED = r"\b(?:calls|to_apply|body|condition)=%?([\w.\-]+)"


def test_every_public_transformation_has_a_line():
    assert NEEDS.keys() == ALL.keys()
    assert set(oa.rules.__all__) <= NEEDS.keys()


def whole_gradient(params, batch):
    """A gradient of parameters in parts: gathered, differentiated and scattered."""

    def loss(params, x):
        h = jnp.tanh(x @ params["w"] + params["bias"][None]) + params["norm"][None]
        return jnp.mean((h @ params["z"]) ** 2)

    def local(params, x):
        gather = lambda p: jax.lax.all_gather(p, "d", tiled=True)
        scatter = lambda g: jax.lax.psum_scatter(g, "d", tiled=True) / 8
        return jax.tree.map(scatter, jax.grad(loss)(jax.tree.map(gather, params), x))

    parts = {"in_specs": (P("d"), P("d")), "out_specs": P("d"), "check_vma": False}
    return jax.shard_map(local, mesh=MESH, **parts)(params, batch)


def compiled(init, step):
    """The text of the compiled step, in which all arrays stay where they lie."""
    params = {name: jnp.ones(shape) for name, shape in SHAPES.items()}
    parts, everywhere = NamedSharding(MESH, P("d")), NamedSharding(MESH, P())
    params, batch = jax.device_put((params, jnp.ones((64, 16))), parts)
    state = jax.tree.map(
        lambda x: x if len(x.devices()) > 1 else jax.device_put(x, everywhere),
        jax.jit(init)(params),
    )
    places = jax.tree.map(lambda x: x.sharding, (params, state))
    run = jax.jit(step, out_shardings=places)
    return run.lower(params, state, batch).compile().as_text()


def collectives(text):
    """Numbers of collectives by kind: of what always runs, and of branches."""
    bodies, body, entry = {}, [], ""
    for line in text.splitlines():
        if found := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            body = bodies.setdefault(found[2], [])
            entry = found[2] if found[1] else entry
        body.append(line)
    always, waiting = set(), [entry]
    while waiting:
        name = waiting.pop()
        if name not in always:
            always.add(name)
            waiting += re.findall(CALLED, "\n".join(bodies[name]))
    found = collections.Counter(), collections.Counter()
    for name, body in bodies.items():
        found[name not in always].update(re.findall(COLLECTIVE, "\n".join(body)))
    return found


def needs_of(text):
    always, branches = collectives(text)
    both = always + branches
    assert both.keys() <= {"all-reduce", "all-gather", "reduce-scatter"}
    gradients = round(both["reduce-scatter"] / len(SHAPES))
    return Needs(
        gradients,
        always["all-reduce"],
        branches["all-reduce"],
        both["all-gather"] - gradients * len(SHAPES),
    )


@pytest.mark.parametrize("name", ALL)
def test_a_step_talks_to_other_devices_as_often_as_it_needs(name):
    if name == "ema_params_host" and jax.__version_info__ < (0, 9):
        pytest.skip("XLA of jax 0.8: 'Side-effect HLO must have sharding'")
    tx = beside(ALL[name], optax.sgd(0.1))

    def step(params, state, batch):
        grad_fn = lambda params: whole_gradient(params, batch)
        updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), state

    assert needs_of(compiled(tx.init, step)) == NEEDS[name]


@pytest.mark.parametrize("name", ["sam", "asam", "gam", "look_sam"])
def test_the_wrapper_talks_as_often_as_the_link(name):
    loss = lambda params, batch: (0.0, whole_gradient(params, batch))
    rule = CASES[name].kwargs
    sharp = oa.sharpness_aware(loss, getattr(oa.rules, name)(**rule))

    def step(params, state, batch):
        _, grads, state = sharp(params, state, batch)
        return optax.apply_updates(params, grads), state

    assert needs_of(compiled(sharp.init, step)) == NEEDS[name]


@pytest.mark.parametrize("name", ["vclip", "cclip", "perp_grad_global"])
def test_the_number_of_sums_does_not_grow_with_the_number_of_leaves(name):
    """Gradients are given here, in twelve leaves."""
    tx = ALL[name].make()
    parts = NamedSharding(MESH, P("d"))
    params = jax.device_put([jnp.ones((8, 2 + i)) for i in range(12)], parts)
    update = lambda grads, state: tx.update(grads, state, grads)
    state = jax.jit(tx.init)(params)
    text = jax.jit(update).lower(params, state).compile().as_text()
    assert collectives(text)[0]["all-reduce"] == 1
