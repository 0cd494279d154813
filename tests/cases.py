"""Every public transformation, in the settings that the contract suite runs."""

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import optax_avg as oa


class Case(NamedTuple):
    """A factory, its arguments, and those that ``inject_hyperparams`` must leave.

    ``place`` is where it stands in a chain: "first", "last", or "alone"; ``calls``
    of ``update`` make one optimizer step, which ``counter`` in the state counts as so
    many ``samples``.
    """

    factory: Callable[..., optax.GradientTransformationExtraArgs]
    kwargs: Mapping[str, Any] = MappingProxyType({})
    static: tuple[str, ...] = ()
    place: str = "last"
    calls: int = 1
    samples: int = 1
    counter: str = "step"
    needs_params: bool = True
    counts_zeros: bool = True  # whether ``counter`` counts a gradient that is zero
    rests: bool = True  # whether it leaves a gradient of zero at zero
    takes_masks: bool = False  # whether one that stands first or alone may be masked

    def make(self) -> optax.GradientTransformationExtraArgs:
        return self.factory(**self.kwargs)


AVERAGES = {
    "average": Case(oa.average, {"weight": oa.weights.uniform()}, ("weight",)),
    "average_several": Case(
        oa.average,
        {"weight": {"a": oa.weights.ema(0.5), "b": oa.weights.mass(lambda t: t)}},
    ),
    "ema_params": Case(oa.ema_params, {"decay": 0.9}),
    "ema_params_biased": Case(oa.ema_params, {"decay": 0.9, "debias": False}),
    "ema_params_schedule": Case(
        oa.ema_params, {"decay": optax.linear_schedule(0.5, 0.9, 5)}, ("decay",)
    ),
    "ema_params_bf16": Case(
        oa.ema_params,
        {"decay": 0.9, "accumulator_dtype": jnp.bfloat16},
        ("accumulator_dtype",),
    ),
    "ema_params_stochastic": Case(
        oa.ema_params,
        {"decay": 0.9, "accumulator_dtype": jnp.bfloat16, "rounding": "stochastic"},
        ("accumulator_dtype",),
    ),
    "ema_params_fp16": Case(
        oa.ema_params,
        {"decay": 0.9, "accumulator_dtype": jnp.float16},
        ("accumulator_dtype",),
    ),
    "ema_params_compensated": Case(
        oa.ema_params,
        {"decay": 0.9, "accumulator_dtype": jnp.bfloat16, "rounding": "compensated"},
        ("accumulator_dtype",),
    ),
    "ema_params_host": Case(
        oa.ema_params, {"decay": 0.9, "memory_kind": "pinned_host"}
    ),
    "polyak_average": Case(oa.polyak_average),
    "swa": Case(oa.swa, {"start": 2, "every": 2}, ("start", "every")),
    "tail_average": Case(oa.tail_average, {"start": 2}, ("start",)),
    "power_ema": Case(oa.power_ema, {"sigma_rel": 0.1}),
    "power_ema_two": Case(oa.power_ema, {"sigma_rel": [0.05, 0.10]}),
    "lr_weighted_average": Case(
        oa.lr_weighted_average,
        {"learning_rate": optax.linear_schedule(1.0, 0.1, 10)},
        ("learning_rate",),
    ),
    "window_average": Case(oa.window_average, {"k": 3, "every": 2}, ("k", "every")),
    "bema": Case(oa.bema),
    "write_back": Case(
        lambda every=3: oa.write_back(oa.window_average(4), every), {}, ("every",)
    ),
    "switch_ema": Case(oa.switch_ema, {"decay": 0.9, "every": 3}, ("every",)),
    "lookahead": Case(
        oa.lookahead, {"sync_period": 3, "slow_step_size": 0.5}, ("sync_period",)
    ),
}


LINKS = {
    "as_link": Case(
        oa.as_link, {"rule": oa.rules.every_k(oa.rules.gsam(), 2)}, ("rule",)
    ),
    "asam": Case(oa.asam),
    "cr_sam": Case(oa.cr_sam),
    "dnsam": Case(oa.dnsam, {"norm": 2.0}),
    "esam": Case(oa.esam, {}, ("key",)),
    "fisher_sam": Case(oa.fisher_sam),
    "friendly_sam": Case(oa.friendly_sam),
    "sparse_sam": Case(oa.sparse_sam, {"refresh": 2}, ("refresh",)),
    "gam": Case(oa.gam),
    "gam_hvp": Case(oa.gam_hvp),
    "gnp": Case(oa.gnp),
    "gradient_regularisation": Case(oa.gradient_regularisation),
    "gsam": Case(oa.gsam),
    "look_sam": Case(oa.look_sam, {"k": 2}, ("k",)),
    "momentum_sam": Case(oa.momentum_sam),
    "sam": Case(oa.sam),
    "sam_on": Case(
        oa.sam_on, {"where": lambda path, _: "w" not in str(path)}, ("where",)
    ),
    "usam": Case(oa.usam),
    "vasso": Case(oa.vasso),
    "wsam": Case(oa.wsam),
}
LINKS = {
    name: case._replace(place="first", counter="rule_step")
    for name, case in LINKS.items()
}
LOCATIONS = {
    "track_location": Case(
        oa.track_location, {"distance": oa.distances.linf(), "tau": 0.5}, ("distance",)
    ),
    "track_location_spectral": Case(
        oa.track_location,
        {"distance": oa.distances.spectral(), "tau": oa.adaptive_radius()},
        ("distance", "tau"),
    ),
    "vclip": Case(oa.vclip, {"tau": oa.adaptive_radius()}, ("tau",)),
    "cclip": Case(oa.cclip, {"tau": 0.05}),
    "clip_by_quantile": Case(oa.clip_by_quantile, {}, ("quantile", "rate")),
    "clip_by_coordinate_quantile": Case(
        oa.clip_by_coordinate_quantile, {}, ("quantile", "rate")
    ),
    "clipped_ema": Case(oa.clipped_ema, {"decay": 0.9, "max_norm": 0.5}),
}
LOCATIONS = {
    name: case._replace(place="first", counter="location_step", needs_params=False)
    for name, case in LOCATIONS.items()
}


def bloop(lam, ema_rate):
    """Bloop whose auxiliary gradient is the negative of the main one."""
    tx = oa.bloop(lam, ema_rate)

    def update(updates, state, params=None, **extra_args):
        aux = jax.tree.map(jnp.negative, updates)
        return tx.update(updates, state, params, aux_grads=(aux,), **extra_args)

    return optax.GradientTransformationExtraArgs(tx.init, update)


CALLS = {
    "bloop": Case(
        bloop,
        {"lam": 0.5, "ema_rate": 0.1},
        place="first",
        counter="bloop_step",
        needs_params=False,
    ),
    "multi_call": Case(
        lambda: oa.multi_call(oa.rules.sam(), optax.sgd(0.1)),
        place="alone",
        calls=2,
        counter="rule_step",
    ),
    "decoupled_wsam": Case(
        oa.decoupled_wsam,
        {"optimizer": optax.sgd(0.1), "learning_rate": 0.1, "gamma": 0.5},
        ("optimizer",),
        place="alone",
        counter="rule_step",
    ),
}
CALLS["primal_average"] = Case(
    oa.primal_average,
    {
        "optimizer": optax.sgd(0.1),
        "weight": oa.weights.mass(lambda t: t),
        "beta": 0.9,
    },
    ("optimizer", "weight"),
    place="alone",
    takes_masks=True,
)
CALLS["primal_average_at_z"] = CALLS["primal_average"]._replace(
    kwargs={
        "optimizer": optax.sgd(0.1),
        "weight": oa.weights.ema(0.9, debias=False),
        "beta": optax.linear_schedule(0.5, 0.9, 4),
        "decay_at": "z",
    },
    static=("optimizer", "weight", "beta"),
)
CLIPS = {
    "clip_by_zscore": Case(oa.clip_by_zscore, {"warmup_steps": 2}, ("warmup_steps",)),
    "clip_by_percentile": Case(oa.clip_by_percentile, {"window": 3}, ("window",)),
    "clip_by_ema_norm": Case(
        oa.clip_by_ema_norm, {"warmup_steps": 2}, ("warmup_steps",)
    ),
    "clip_redescending": Case(oa.clip_redescending),
    "scale_by_clipped_adagrad_norm": Case(
        oa.scale_by_clipped_adagrad_norm, {}, ("delay",)
    ),
    "scale_by_induced_metric": Case(oa.scale_by_induced_metric),
}
CLIPS["track_tail_index"] = Case(
    oa.track_tail_index, {"num_largest": 4, "block": 2}, ("num_largest", "block")
)
CLIPS = {
    name: case._replace(
        place="first",
        counter="tail_step" if name == "track_tail_index" else "clip_step",
        needs_params=False,
        counts_zeros=name
        not in ("clip_by_zscore", "clip_by_percentile", "clip_by_ema_norm"),
    )
    for name, case in CLIPS.items()
}


def of_rows(factory):
    """An aggregator as a link: its five rows lie around the gradient."""

    @functools.wraps(factory)
    def make(*args, **kwargs):
        tx = factory(*args, **kwargs)

        def update(updates, state, params=None, **extra_args):
            near = lambda g, i: ((1 + 0.5 * jnp.sin(i + 7 * g)) * g).astype(g.dtype)
            rows = jax.tree.map(
                lambda g: jnp.stack([near(g, i) for i in range(5)]), updates
            )
            return tx.update(rows, state, params, **extra_args)

        return optax.GradientTransformationExtraArgs(tx.init, update)

    return make


def adaptive_k_mean(beta1=0.9, beta2=0.999):
    """Two of five rows have a large loss."""
    tx = oa.adaptive_k_mean(beta1, beta2)
    losses = jnp.array([0.5, 1.0, 9.0, 2.0, 5.0])

    def update(updates, state, params=None, **extra_args):
        return tx.update(updates, state, params, losses=losses, **extra_args)

    return optax.GradientTransformationExtraArgs(tx.init, update)


AGGREGATORS = {
    "adaptive_k_mean": Case(adaptive_k_mean),
    "coordinate_median": Case(oa.coordinate_median),
    "trimmed_mean": Case(oa.trimmed_mean, {"trim": 1}, ("trim",)),
    "geometric_median": Case(oa.geometric_median, {}, ("num_iters",)),
    "median_of_means": Case(oa.median_of_means, {"groups": 5}, ("groups", "num_iters")),
    "centered_clip": Case(
        oa.centered_clip, {"tau": 0.5, "num_iters": 2}, ("num_iters",)
    ),
    "krum": Case(
        oa.krum,
        {"num_byzantine": 1, "num_selected": 2},
        ("num_byzantine", "num_selected"),
    ),
    "flag": Case(oa.flag_aggregator, {"rank": 3}, ("rank", "num_iters")),
    "one_pass_location": Case(
        oa.one_pass_location, {"distance": oa.distances.l2(), "tau": 0.5}, ("distance",)
    ),
    "mgda": Case(oa.mgda),
    "upgrad": Case(oa.upgrad),
    "cagrad": Case(oa.cagrad, {"c": 0.5}),
    "pcgrad": Case(oa.pcgrad, {"key": 0}, ("key",)),
}
AGGREGATORS = {
    name: case._replace(
        factory=of_rows(case.factory),
        place="first",
        counter="aggregation_step",
        needs_params=False,
    )
    for name, case in AGGREGATORS.items()
}
# Its state is that of a location, which counts samples: five a step.
AGGREGATORS["one_pass_location"] = AGGREGATORS["one_pass_location"]._replace(
    counter="location_step", samples=5
)


class Counted(NamedTuple):
    """Calls of a transformation that counts none itself, and its state."""

    counted_step: jax.Array
    counted_state: Any


def counted(factory):
    """A transformation whose state counts its calls."""

    @functools.wraps(factory)
    def make(*args, **kwargs):
        tx = factory(*args, **kwargs)
        init = lambda params: Counted(jnp.zeros([], jnp.int32), tx.init(params))

        def update(updates, state, params=None, **extra_args):
            out, inner = tx.update(updates, state.counted_state, params, **extra_args)
            return out, Counted(state.counted_step + 1, inner)

        return optax.GradientTransformationExtraArgs(init, update)

    return make


SURGERY = {
    "perp_grad": Case(
        counted(oa.perp_grad), {"scope": "leaf"}, ("scope", "rescale"), place="first"
    )._replace(counter="counted_step"),
}


def with_value(factory):
    """A transformation that needs the loss: that of which the gradient is 2 x."""

    @functools.wraps(factory)
    def make(*args, **kwargs):
        tx = factory(*args, **kwargs)

        def update(updates, state, params=None, *, value=None, **extra_args):
            del value
            square = lambda g: jnp.sum(jnp.abs(g).astype(jnp.float32) ** 2)
            f = sum(map(square, jax.tree.leaves(updates)), jnp.zeros([])) / 4
            return tx.update(updates, state, params, value=f, **extra_args)

        return optax.GradientTransformationExtraArgs(tx.init, update)

    return make


# Optimizers, constraints and penalties of single papers: norms, and free of tuning.
RECIPES_B = {
    "project_radial": Case(
        counted(oa.optimizers.project_radial),
        {"optimizer": optax.scale(1.5)},
        ("optimizer", "channel_axis"),
        place="first",
        counter="counted_step",
    ),
    "adamp": Case(
        counted(oa.optimizers.adamp),
        {"learning_rate": 0.05, "b2": 0.9},
        ("channel_axis",),
        place="alone",
        counter="counted_step",
    ),
    "sgdp": Case(
        counted(oa.optimizers.sgdp),
        {"learning_rate": 0.05},
        ("channel_axis",),
        place="alone",
        counter="counted_step",
    ),
    "norm_preserving": Case(
        oa.optimizers.norm_preserving,
        {"optimizer": optax.sgd(0.1), "start": 1},
        ("optimizer",),
        place="alone",
        counter="preserving_step",
    ),
    "norm_loss": Case(
        counted(oa.optimizers.norm_loss),
        {},
        ("out_axis",),
        place="first",
        counter="counted_step",
        rests=False,
    ),
    "spectral_regularisation": Case(
        counted(oa.optimizers.spectral_regularisation),
        {},
        ("num_iters", "out_axis", "key"),
        place="first",
        counter="counted_step",
        rests=False,
    ),
    "scale_by_adahessian": Case(
        oa.optimizers.scale_by_adahessian,
        {"b2": 0.9},
        ("key",),
        place="first",
        counter="hessian_step",
    ),
    "adahessian": Case(
        oa.optimizers.adahessian,
        {"learning_rate": 0.15},
        ("key",),
        place="alone",
        counter="hessian_step",
    ),
    "u_dog": Case(oa.optimizers.u_dog, place="alone", counter="udog_step"),
    "preconditioned_polyak": Case(
        with_value(oa.optimizers.preconditioned_polyak),
        {
            "preconditioner": oa.optimizers.scale_by_adahessian(0.0),
            "slack": "l2",
            "lam": 100.0,
        },
        ("preconditioner",),
        place="alone",
        counter="polyak_step",
    ),
    "spl_plus": Case(
        with_value(oa.optimizers.spl_plus),
        {"learning_rate": 0.1, "beta": 0.5},
        place="alone",
        counter="spl_step",
        needs_params=False,
    ),
}
RECIPES_B = {name: case._replace(takes_masks=True) for name, case in RECIPES_B.items()}


def multi_momentum(num_clusters, beta):
    """Multi-momentum whose batches are all of one cluster."""
    tx = oa.optimizers.multi_momentum(num_clusters, beta)

    def update(updates, state, params=None, **extra_args):
        return tx.update(updates, state, params, cluster=1, **extra_args)

    return optax.GradientTransformationExtraArgs(tx.init, update)


# Injected numbers are float32, which has few digits of 1 - 0.999.
OPTIMIZERS = {
    "laprop": Case(counted(oa.optimizers.laprop), {"learning_rate": 0.01}),
    "adamomentum": Case(
        oa.optimizers.adamomentum,
        {"learning_rate": 0.01, "b2": 0.9},
        counter="adamomentum_step",
    ),
    "diffgrad": Case(
        counted(oa.optimizers.diffgrad), {"learning_rate": 0.05, "b2": 0.9}
    ),
    "optimistic_amsgrad": Case(
        oa.optimizers.optimistic_amsgrad,
        {"learning_rate": 0.05, "b2": 0.9, "r": 2},
        ("r",),
        counter="optimistic_step",
    ),
    "aggregated_momentum": Case(
        counted(oa.optimizers.aggregated_momentum), {"learning_rate": 0.005}
    ),
    # Its first steps are random and not zero at gradients of zero, but for alpha = 0.
    "gravity": Case(
        oa.optimizers.gravity, {"alpha": 0.0}, ("key",), counter="gravity_step"
    ),
    "nag_gs": Case(oa.optimizers.nag_gs, counter="nag_step"),
    "cautious": Case(
        counted(oa.optimizers.cautious),
        {"inner": oa.optimizers.laprop(0.01)},  # Optax's Adam is NaN in float16
        ("inner",),
    ),
    "grams": Case(
        counted(oa.optimizers.grams),
        {"inner": oa.optimizers.laprop(0.01)},
        ("inner",),
    ),
}
OPTIMIZERS = {
    name: case._replace(place="alone", needs_params=False)
    for name, case in OPTIMIZERS.items()
}
FIRST = {
    "mars": Case(oa.optimizers.mars, {"gamma": 0.1}, ("scope",), counter="mars_step"),
    "multi_momentum": Case(
        counted(multi_momentum), {"num_clusters": 2, "beta": 0.9}, ("num_clusters",)
    ),
    "scale_by_laprop": Case(counted(oa.optimizers.scale_by_laprop), {"b2": 0.9}),
    "scale_by_adamomentum": Case(
        oa.optimizers.scale_by_adamomentum, {"b2": 0.9}, counter="adamomentum_step"
    ),
    "scale_by_diffgrad": Case(counted(oa.optimizers.scale_by_diffgrad), {"b2": 0.9}),
    "scale_by_aggregated_momentum": Case(
        counted(oa.optimizers.scale_by_aggregated_momentum), {"betas": (0.0, 0.5)}
    ),
}
OPTIMIZERS |= {
    name: case._replace(place="first", needs_params=False)
    for name, case in FIRST.items()
}
OPTIMIZERS = {
    name: case._replace(counter="counted_step") if case.counter == "step" else case
    for name, case in OPTIMIZERS.items()
}

FEEDBACK = {
    "error_feedback": Case(
        oa.optimizers.error_feedback,
        {"compressor": oa.optimizers.top_k(0.5), "variant": "ef"},
    ),
    "error_feedback_sign": Case(
        oa.optimizers.error_feedback, {"compressor": oa.optimizers.sign()}
    ),
    "error_feedback_random": Case(
        oa.optimizers.error_feedback, {"compressor": oa.optimizers.random_k(0.5)}
    ),
    "error_feedback_control": Case(
        oa.optimizers.error_feedback,
        {
            "compressor": oa.optimizers.low_rank(1),
            "variant": "econtrol",
            "eta": 0.25,
        },
    ),
}
FEEDBACK = {
    name: case._replace(
        static=("compressor", "variant"),
        place="first",
        counter="feedback_step",
        needs_params=False,
    )
    for name, case in FEEDBACK.items()
}
CALLS["bsam"] = Case(
    oa.optimizers.bsam,
    {"learning_rate": 0.05, "num_data": 1e6, "prior_precision": 0.0},
    ("key",),
    place="alone",
    counter="bayes_step",
)
# One worker alone: rounds of several are tested with devices.
MEETINGS = {
    "sync_params": Case(
        oa.sync_params,
        {"axis_name": None, "every": 3, "outer": optax.sgd(0.7)},
        ("axis_name", "every", "outer"),
        counter="sync_step",
    ),
    "gossip_params": Case(
        oa.gossip_params,
        {"axis_name": None},
        ("axis_name", "every"),
        counter="gossip_step",
    ),
    "sync_state": Case(
        oa.sync_state,
        {"optimizer": optax.sgd(0.1), "axis_name": None, "every": 3},
        ("optimizer", "axis_name", "every", "how"),
        place="alone",
        counter="synced_step",
        needs_params=False,
        takes_masks=True,
    ),
}
CASES = AVERAGES | LINKS | CALLS | LOCATIONS | CLIPS | AGGREGATORS | SURGERY
CASES |= OPTIMIZERS | RECIPES_B | FEEDBACK | MEETINGS
# They share all code with another case but a formula, which has tests of its own: the
# suite runs the longer parts of the contract on them only with the slow tests.
SIBLINGS = {
    *("ema_params_biased", "polyak_average", "tail_average", "power_ema"),
    *("asam", "cr_sam", "dnsam", "esam", "friendly_sam", "gam_hvp", "gnp"),
    *("gsam", "sam_on", "usam", "wsam"),
    *("cclip", "clipped_ema", "clip_by_coordinate_quantile"),
    *("clip_by_zscore", "clip_redescending", "scale_by_induced_metric"),
    *("trimmed_mean", "median_of_means", "krum", "flag", "cagrad", "upgrad"),
    *("mgda", "pcgrad", "primal_average_at_z"),
    *("adamp", "sgdp", "adahessian", "norm_loss", "spl_plus"),
    *("adamomentum", "diffgrad", "aggregated_momentum", "grams"),
    *(name for name in OPTIMIZERS if name.startswith("scale_by")),
    *("error_feedback_sign", "error_feedback_random"),
    *("gossip_params", "sync_state"),
}


def beside(case: Case, *links: Any) -> Any:
    """A chain of links and a case in its place."""
    if case.place == "alone":
        return case.make()
    if case.place == "first":
        return optax.chain(case.make(), *links)
    return optax.chain(*links, case.make())


def params_of(dtype: Any) -> dict[str, Any]:
    """A small tree with a matrix, a vector and a scalar."""
    w = jnp.linspace(-1.0, 2.0, 16).reshape(8, 2)
    return {
        "w": w.astype(dtype),
        "b": jnp.full(8, 0.5, dtype),
        "scale": jnp.asarray(1.0, dtype),
    }


def grads_of(params: Any, i: Any = 0) -> Any:
    """Gradients that differ from step to step and from leaf to leaf."""
    return jax.tree.map(
        lambda x: jnp.asarray(jnp.sin(3.0 * x + i) + 0.1, x.dtype), params
    )


def step(tx: Any, params: Any, state: Any, i: Any = 0) -> tuple[Any, Any]:
    """One optimizer step."""
    grad_fn = lambda params: grads_of(params, i)
    updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
    return optax.apply_updates(params, updates), state


@functools.cache
def jitted(tx: Any) -> Any:
    """``step``, compiled once per transformation and shape."""
    return jax.jit(functools.partial(step, tx))


def run(tx: Any, params: Any, steps: int) -> tuple[Any, Any]:
    """Several jitted optimizer steps."""
    advance = jitted(tx)
    state = tx.init(params)
    for i in range(steps):
        params, state = advance(params, state, i)
    return params, state


def read(state: Any, params: Any) -> dict[str, Any]:
    """All averages in a state."""
    return {
        name: oa.averaged_params(state, params, name)
        for name in oa.average_names(state)
    }


def observe(state: Any, params: Any) -> dict[str, Any]:
    """All that a user sees: the parameters and the averages."""
    return {"live": params, **read(state, params)}
