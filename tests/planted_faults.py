"""Breaks the library in many ways and shows that a test falls for each.

    python tests/planted_faults.py [NAME ...]

Each fault replaces one piece of text in a copy of the tree; the named tests must fail
there. Before that they must pass without any fault. As many faults are tried at once as
there are processors. Exits with 1 if a fault survives.
"""

import os
import queue
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

ROOT = Path(__file__).resolve().parent.parent
QUOTE = "'"
T = TypeVar("T")


class Fault(NamedTuple):
    """One replacement in one file, and the tests that must notice."""

    path: str
    old: str
    new: str
    tests: str


CONTRACT = "tests/test_contract.py"
AVERAGING = "tests/test_averaging.py"
ROUNDING = "tests/test_rounding.py"
WEIGHTS = "tests/test_weights.py"
READOUT = "tests/test_readout.py"
WRITE_BACK = "tests/test_write_back.py"
SHARPNESS = "tests/test_sharpness.py"
FORMS = "tests/test_sharpness_forms.py"
MULTI_CALL = "tests/test_multi_call.py"
MIXUPS = "tests/test_mixups.py"
LANDSCAPE = "tests/test_landscape.py"
LOCATION = "tests/test_location.py"
CLIPPING = "tests/test_clipping.py"
AGGREGATION = "tests/test_aggregation.py"
ATTACKS = "tests/test_attacks.py"
SURGERY = "tests/test_surgery.py"
TAIL_INDEX = "tests/test_tail_index.py"
POSTHOC = "tests/test_posthoc.py"
SNAPSHOTS = "tests/test_snapshots.py"
DAMAGE = "tests/test_damage.py"
CLOCK = "tests/test_clock.py"
MERGING = "tests/test_merging.py"
CLI = "tests/test_cli.py"
CHAIN_CHECK = "tests/test_chain_check.py"
LAYOUT = "tests/test_layout.py"
WORKERS = "tests/test_workers.py"
OPTAX = "tests/test_optax_contract.py"
CLI_FILES = "tests/test_cli_files.py"
CLI_MERGE = "tests/test_cli_merge.py"
CLI_ORBAX = "tests/test_cli_orbax.py"
COLLECTIVES = "tests/test_collectives.py"
COOLDOWN = "tests/test_cooldown.py"
OVERVIEW = "tests/test_overview.py"
PRIMAL = "tests/test_primal.py"
SCHEDULES = "tests/test_schedules.py"
NORMS = "tests/test_optimizers_norms.py"
FREE = "tests/test_optimizers_free.py"
LOSSES = "tests/test_losses.py"
OPTIMIZERS_A = "tests/test_optimizers_adaptive.py"
FEEDBACK = "tests/test_error_feedback.py"
BSAM = "tests/test_bsam.py"
BATCH_STATS = "tests/test_batch_stats.py"
NNX = "tests/test_frameworks_nnx.py"
LINEN = "tests/test_frameworks_linen.py"
EQUINOX = "tests/test_frameworks_equinox.py"

FAULTS = {
    "pre-update parameters are averaged": Fault(
        "optax_avg/_leaves.py",
        "optax.apply_updates(x, u)\n",
        "x\n",
        f"{AVERAGING} -k polynomial_average",
    ),
    "init aliases the parameters": Fault(
        "optax_avg/_numerics.py",
        "jnp.array(x, dtype=dtype, copy=True)",
        "jnp.asarray(x, dtype=dtype)",
        f"{CONTRACT} -k init_copies",
    ),
    "decay is cast to bf16": Fault(
        "optax_avg/weights.py",
        'd = _checks.within("decay", decay, 0, 1)',
        'd = float(jnp.bfloat16(_checks.within("decay", decay, 0, 1)))',
        f"{WEIGHTS} -k equations",
    ),
    "arguments of the mix are swapped": Fault(
        "optax_avg/averages/_rounding.py",
        "a_wide + w * (x - a_wide))",
        "x + w * (a_wide - x))",
        f"{AVERAGING} -k polynomial_average",
    ),
    "the debiased weight starts one late": Fault(
        "optax_avg/averages/_rule.py",
        "optax.safe_increment(state.absorbed), jnp.float32)",
        "state.absorbed + 2, jnp.float32)",
        f"{AVERAGING} -k uniform_averages",
    ),
    "every micro-step counts": Fault(
        "optax_avg/averages/_rule.py",
        "(step - start) % every == 0",
        "(step - start) % every >= 0",
        f"{AVERAGING} -k window_is",
    ),
    "start is absorbed": Fault(
        "optax_avg/averages/_rule.py",
        "jnp.where(is_base, state.absorbed, count)",
        "count",
        f"{AVERAGING} -k normalised_sum",
    ),
    "elements that are not finite are averaged by default": Fault(
        "optax_avg/averages/_rule.py",
        '~is_base if nonfinite == "skip" else False',
        "False",
        f"{CONTRACT} -k only_elements",
    ),
    "the iterate from which an average starts leaves elements out": Fault(
        "optax_avg/averages/_rule.py",
        '~is_base if nonfinite == "skip" else False',
        '~(step < 0) if nonfinite == "skip" else False',
        f"{AVERAGING} -k start_that_is_not_finite",
    ),
    "a broken element of an average stays broken": Fault(
        "optax_avg/averages/_rounding.py",
        "(broken if skip is not False else first & broken)",
        "(first & broken)",
        f"{AVERAGING} -k heals",
    ),
    "an iterate that is left out counts as zero": Fault(
        "optax_avg/averages/_rounding.py",
        "x = jnp.where(_left_out(x, skip), a_wide, x)",
        "x = jnp.where(_left_out(x, skip), 0, x)",
        f"{CONTRACT} -k elements_that_are_not_finite_are_left_out",
    ),
    "a NaN gets into a window": Fault(
        "optax_avg/averages/memories.py",
        "jnp.where(jnp.isfinite(leaf) | ~turn.skip, leaf, old)",
        "leaf",
        f"{CONTRACT} -k 'only_elements and window'",
    ),
    "the correction takes a NaN": Fault(
        "optax_avg/averages/memories.py",
        "return jnp.where(skip & ~jnp.isfinite(x), old, new)",
        "return new",
        f"{CONTRACT} -k 'only_elements and bema'",
    ),
    "non-finite iterates pass": Fault(
        "optax_avg/_numerics.py",
        "lax.optimization_barrier(s) == 0 for",
        "lax.optimization_barrier(s) != 1 for",
        f"{CONTRACT} -k left_out_whole",
    ),
    "finiteness is judged leaf by leaf": Fault(
        "optax_avg/_numerics.py",
        "leaves = [x for x in jax.tree.leaves(tree) if x.size]",
        "leaves = [x for x in jax.tree.leaves(tree) if x.size][:1]",
        f"{AVERAGING} -k counters_of",
    ),
    "shards judge finiteness alone": Fault(
        "optax_avg/_mesh.py",
        "if axes else condition",
        "if axes and False else condition",
        f"{CONTRACT} -k agrees_on_finiteness",
    ),
    "averages take the dtype of the parameters": Fault(
        "optax_avg/_numerics.py",
        "dtype = jnp.promote_types(float32_or_wider(x.dtype), dtype or jnp.float32)",
        "dtype = x.dtype",
        f"{CONTRACT} -k keep_their_own_dtypes",
    ),
    "bf16 rounding of the iterate is forgotten": Fault(
        "optax_avg/_leaves.py",
        "optax.apply_updates(x, u)\n",
        "x + u.astype(jnp.float32)\n",
        f"{AVERAGING} -k training_holds",
    ),
    "dithered rounding cuts what was not raised": Fault(
        "optax_avg/averages/_dither.py",
        "bits + below_cut.astype(whole), bits)",
        "bits, bits)",
        f"{ROUNDING} -k 'raised or mean_over'",
    ),
    "dither carries the largest numbers to infinity": Fault(
        "optax_avg/averages/_dither.py",
        "jnp.where(fits, bits + below_cut.astype(whole), bits)",
        "(bits + below_cut.astype(whole))",
        f"{ROUNDING} -k ends_of_the_range",
    ),
    "subnormal numbers are dithered like normal ones": Fault(
        "optax_avg/averages/_dither.py",
        "jnp.copysign(smallest, x), 0)",
        "jnp.zeros_like(x), 0)",
        f"{ROUNDING} -k 'raised or small'",
    ),
    "the dither comes round with a period": Fault(
        "optax_avg/averages/_dither.py",
        "g = _hash((from_j >> 1) ^ _hash(j ^ jnp.asarray(seed, jnp.uint32)))",
        "g = jnp.zeros_like(j)",
        f"{ROUNDING} -k 'digits or orders or period'",
    ),
    "the dither's order within a run depends on the run's own digits": Fault(
        "optax_avg/averages/_dither.py",
        "_hash((from_j >> 1) ^",
        "_hash(from_j ^",
        f"{ROUNDING} -k every_run",
    ),
    "all elements have one dither": Fault(
        "optax_avg/averages/_dither.py",
        "_hash(_numerics.place(shape, jnp.uint32) ^ jnp.asarray(seed, jnp.uint32))",
        "jnp.full(shape, seed, jnp.uint32)",
        f"{ROUNDING} -k 'elements'",
    ),
    "all leaves have one dither": Fault(
        "optax_avg/averages/_rounding.py",
        "seeds = jnp.asarray([_seed(name, path) for path, _ in old], jnp.uint32)\n"
        "    times",
        "seeds = jnp.asarray([_seed(name) for path, _ in old], jnp.uint32)\n    times",
        f"{ROUNDING} -k independent",
    ),
    "all averages have one dither": Fault(
        "optax_avg/averages/_rounding.py",
        'f"{name}{jax.tree_util.keystr(path)}".encode()',
        "jax.tree_util.keystr(path).encode()",
        f"{ROUNDING} -k independent",
    ),
    "the dither stands still": Fault(
        "optax_avg/averages/_rounding.py",
        "in_axes=(None, 0))(absorbed, seeds)",
        "in_axes=(None, 0))(0 * absorbed, seeds)",
        f"{ROUNDING} -k walk",
    ),
    "narrow accumulators round at random by default": Fault(
        "optax_avg/averages/memories.py",
        'return "dithered" if rounding is None',
        'return "stochastic" if rounding is None',
        f"{ROUNDING} -k default",
    ),
    "stochastic rounding rounds down": Fault(
        "optax_avg/averages/_rounding.py",
        "p.dtype) < p, far, near)",
        "p.dtype) < 0, far, near)",
        f"{AVERAGING} -k 'unbiased or moves'",
    ),
    "the compensation is dropped": Fault(
        "optax_avg/averages/_rounding.py",
        "return new, (y - (new.astype(wide) - a_wide)).astype(c.dtype)",
        "return new, jnp.zeros_like(c)",
        f"{AVERAGING} -k 'compensation or moves'",
    ),
    "the window forgets to wrap": Fault(
        "optax_avg/averages/memories.py",
        "row = turn.absorbed % k",
        "row = turn.absorbed",
        f"{AVERAGING} -k window_is",
    ),
    "an unfilled window is averaged whole": Fault(
        "optax_avg/averages/memories.py",
        "jnp.clip(absorbed, 1, ring.shape[0])",
        "ring.shape[0]",
        f"{AVERAGING} -k window_is",
    ),
    "bema corrects with the wrong power": Fault(
        "optax_avg/averages/memories.py",
        "s**-eta",
        "s**-kappa",
        f"{AVERAGING} -k test_bema",
    ),
    "half-life is per iterate": Fault(
        "optax_avg/weights.py",
        "jnp.expm1(-_LN2 * dt / h_t)",
        "jnp.expm1(-_LN2 / h_t)",
        f"{AVERAGING} -k half_life_does",
    ),
    "mass forgets the past": Fault(
        "optax_avg/weights.py",
        "high, low = _numerics.sum_and_error(kept, change)",
        "high, low = _numerics.sum_and_error(0 * kept, change)",
        f"{AVERAGING} -k lr_weighted",
    ),
    "read before the first iterate": Fault(
        "optax_avg/averages/readout.py",
        "jax.tree.leaves(node.absorbed)[0] > 0",
        "jax.tree.leaves(node.absorbed)[0] >= 0",
        f"{CONTRACT} -k reads_params_exactly",
    ),
    "same names overwrite each other": Fault(
        "optax_avg/averages/readout.py",
        "if found[i] is not None:",
        "if False:",
        f"{READOUT} -k two_averages",
    ),
    "write-back touches what is not averaged": Fault(
        "optax_avg/averages/write_back.py",
        "u if average is None or u is None else",
        "0 * u if average is None or u is None else",
        f"{WRITE_BACK} -k not_averaged",
    ),
    "a default of the user's is the stride": Fault(
        "optax_avg/weights.py",
        'places[1].name == "dt" or places',
        "places[1].name or places",
        f"{WEIGHTS} -k strides",
    ),
    "masks are renewed at common multiples": Fault(
        "optax_avg/sharpness/offsets.py",
        "due = (passed >= refresh) | (passed < 0)",
        "due = state.rule_step % refresh == 0",
        f"{SHARPNESS} -k renewed",
    ),
    "averages of some micro-steps are not seen": Fault(
        "optax_avg/chain_check.py",
        "np.any(old.step != new.step)",
        "np.any(old.absorbed != new.absorbed)",
        f"{CHAIN_CHECK} -k some_micro",
    ),
    "bema is rounded to nearest": Fault(
        "optax_avg/averages/memories.py",
        "        if narrow:",
        "        if not narrow:",
        f"{AVERAGING} -k 'bema_moves'",
    ),
    "write-back before there is an average": Fault(
        "optax_avg/averages/write_back.py",
        "jnp.where(is_there, step, u)",
        "step",
        f"{WRITE_BACK} -k before_the_first",
    ),
    "migration starts the optimizer anew": Fault(
        "optax_avg/averages/migration.py",
        "moved.append(rest.pop(0)[1])",
        "moved.append(rest.pop(0)[1] * 0)",
        f"{READOUT} -k migration_keeps_the_optimizer",
    ),
    "migration takes any shape": Fault(
        "optax_avg/averages/migration.py",
        "_check_leaves(where, new, inner)\n    return",
        "return",
        f"{READOUT} -k 'migration_refuses_what'",
    ),
    "migration lets a new average share old counters": Fault(
        "optax_avg/averages/migration.py",
        "if missing and len(missing) < len(new):",
        "if missing and len(missing) > len(new):",
        f"{READOUT} -k 'migration_refuses_what'",
    ),
    "migration drops averages without a word": Fault(
        "optax_avg/averages/migration.py",
        "    if dropped:",
        "    if dropped and not dropped:",
        f"{READOUT} -k 'afresh or drops'",
    ),
    "two links share one array after migration": Fault(
        "optax_avg/averages/migration.py",
        "return value if _leaves.is_abstract(value) else jnp.array(value, copy=True)",
        "return value",
        f"{READOUT} -k migration_splits",
    ),
    "averages draw the same random bits": Fault(
        "optax_avg/averages/_rounding.py",
        'zlib.crc32(f"{name}{jax.tree_util.keystr(path)}".encode())',
        "zlib.crc32(jax.tree_util.keystr(path).encode())",
        f"{AVERAGING} -k random_bits",
    ),
    "leaves draw the same random bits": Fault(
        "optax_avg/averages/_rounding.py",
        'zlib.crc32(f"{name}{jax.tree_util.keystr(path)}".encode())',
        "zlib.crc32(name.encode())",
        f"{AVERAGING} -k random_bits",
    ),
    "an average keeps the NaN that it starts from": Fault(
        "optax_avg/averages/_rounding.py",
        "broken = ~jnp.isfinite(a)",
        "broken = ~jnp.isfinite(w)",
        f"{AVERAGING} -k not_finite_is_the_first",
    ),
    "the clock stands still at the largest integer": Fault(
        "optax_avg/_numerics.py",
        "last - (stride - 1)",
        "last - 0 * (stride - 1)",
        f"{AVERAGING} -k keeps_its_stride",
    ),
    "the number of iterates wraps": Fault(
        "optax_avg/averages/_rule.py",
        "jnp.asarray(optax.safe_increment(state.absorbed), jnp.float32)",
        "jnp.asarray(state.absorbed + 1, jnp.float32)",
        f"{AVERAGING} -k do_not_wrap",
    ),
    "a window forgets its row at the largest integer": Fault(
        "optax_avg/averages/memories.py",
        "period=k)",
        "period=1)",
        f"{AVERAGING} -k goes_round",
    ),
    "schedules get a float": Fault(
        "optax_avg/weights.py",
        "value(_numerics.step_of(t, dt))",
        "value((t - 1) * dt)",
        f"{AVERAGING} -k index_a_table",
    ),
    "sums of masses lose what is rounded": Fault(
        "optax_avg/_numerics.py",
        "return total, (a - (total - of_b)) + (b - of_b)",
        "return total, 0 * of_b",
        f"{AVERAGING} -k masses_do_not_stop",
    ),
    "masses are kept by a product that rounds": Fault(
        "optax_avg/weights.py",
        "near = r >= 0.5",
        "near = r >= 2",
        f"{WEIGHTS} -k decays_near_one",
    ),
    "the first decay is bounded from below": Fault(
        "optax_avg/weights.py",
        "return jnp.where(t > 1, w, 1)",
        "return w",
        f"{WEIGHTS} -k equations",
    ),
    "widths are broadcast over coordinates": Fault(
        "optax_avg/_checks.py",
        "if is_array and value.ndim and not elementwise:",
        "if is_array and value.ndim and elementwise:",
        f"{AVERAGING} -k bad_arguments",
    ),
    "8-bit floats are promoted": Fault(
        "optax_avg/_numerics.py",
        "jnp.finfo(dtype).bits < 16:",
        "jnp.finfo(dtype).bits < 8:",
        f"{AVERAGING} -k 'non_finite_parameters_of_8_bits'",
    ),
    "shapes are taken for arrays": Fault(
        "optax_avg/averages/_rule.py",
        ("_leaves.shapes_for_shapes(init), update\n    )"),
        "init, update)",
        f"{AVERAGING} -k 'shapes_without_values and ema_params'",
    ),
    "the mask comes after the norm": Fault(
        "optax_avg/sharpness/_ascent.py",
        "n = _numerics.norm(tg)",
        "n = _numerics.norm(grads)",
        f"{SHARPNESS} -k 'reference and sam_mask'",
    ),
    "the metric is applied once": Fault(
        "optax_avg/sharpness/_ascent.py",
        "_leaves.over(lambda g, t: t * g, params, tg, t)",
        "tg",
        f"{SHARPNESS} -k 'reference and asam'",
    ),
    "the offset is divided by a zero norm": Fault(
        "optax_avg/sharpness/_ascent.py",
        "jnp.where(n > 0, r, 0) * (v / jnp.where(n > 0, n, 1))",
        "r / n * v",
        f"{FORMS} -k zero_gradients",
    ),
    "gsam removes the wrong part": Fault(
        "optax_avg/sharpness/combinations.py",
        "_numerics.project_out(g0, gd)",
        "_numerics.project_out(gd, g0)",
        f"{SHARPNESS} -k 'reference and gsam'",
    ),
    "friendly sam uses the new mean": Fault(
        "optax_avg/sharpness/combinations.py",
        "(-sigma, state.rule_memory[1])",
        "(-sigma, _ema(state.rule_memory, decay, g0)[1])",
        f"{SHARPNESS} -k 'reference and friendly'",
    ),
    "momentum sam ascends": Fault(
        "optax_avg/sharpness/combinations.py",
        "return _numerics.scale(-1, ascent(params, v, radius_at(rho, state)))",
        "return ascent(params, v, radius_at(rho, state))",
        f"{SHARPNESS} -k 'reference and momentum'",
    ),
    "gam mixes up its gradients": Fault(
        "optax_avg/sharpness/combinations.py",
        "plus = _linear((alpha, g1), (1 - alpha, g3))",
        "plus = _linear((alpha, g3), (1 - alpha, g1))",
        f"{SHARPNESS} -k 'reference and gam'",
    ),
    "a NaN stays in memory": Fault(
        "optax_avg/sharpness/_rule.py",
        "jnp.where(finite, new, old)",
        "jnp.where(finite | True, new, old)",
        f"{FORMS} -k does_not_stay",
    ),
    "each device remembers gradients of its own": Fault(
        "optax_avg/sharpness/_rule.py",
        "memory = rule.combine(params, grads, state)[1]",
        "pass",
        f"{FORMS} -k 'rules_in_shard_map and vasso'",
    ),
    "names of strings are not checked": Fault(
        "optax_avg/_checks.py",
        "if value not in choices:",
        "if False:",
        f"{SHARPNESS} -k unknown_names",
    ),
    "states in a TrainState are not found": Fault(
        "optax_avg/_leaves.py",
        'state = getattr(state, "opt_state", state)',
        "pass",
        f"{MULTI_CALL} -k any_nesting",
    ),
    "devices share the gradients of replicated parameters": Fault(
        "optax_avg/sharpness/forms.py",
        "x = jax.tree.map(lambda leaf: _mesh.vary(leaf, axes), x)",
        "pass",
        f"{FORMS} -k m_sharpness",
    ),
    "every step takes all gradients": Fault(
        "optax_avg/sharpness/_rule.py",
        "return lax.cond(due, full, skip, operand)",
        "return jax.tree.map("
        "lambda a, b: jnp.where(due, a, b), full(operand), skip(operand))",
        f"{FORMS} -k evaluations_per_step",
    ),
    "the clean copy is not kept": Fault(
        "optax_avg/sharpness/multi_call.py",
        "target, reached = _reached(clean, offset)",
        "target, reached = _reached(params, offset)",
        f"{SHARPNESS} -k 'three_forms and gam'",
    ),
    "handed parameters overwrite the clean ones": Fault(
        "optax_avg/sharpness/multi_call.py",
        "return clean if _trained(x, u) else jnp.array(x, copy=True)",
        "return jnp.array(x, copy=True)",
        f"{MULTI_CALL} -k moves_no_bit",
    ),
    "a bad gradient is stepped on": Fault(
        "optax_avg/sharpness/multi_call.py",
        "sound = state.sound & _finite(gradient, updates)",
        "sound = state.sound | True",
        f"{MULTI_CALL} -k 'leaves_the_step_out and friendly'",
    ),
    "a bad gradient in between is moved along": Fault(
        "optax_avg/sharpness/multi_call.py",
        "sound = state.sound & reached & _finite(updates)",
        "sound = jnp.asarray(True)",
        f"{MULTI_CALL} -k 'leaves_the_step_out and usam'",
    ),
    "updates are rounded to the dtype of the gradient": Fault(
        "optax_avg/sharpness/multi_call.py",
        "jnp.promote_types(u.dtype, x.dtype)",
        "u.dtype",
        f"{MULTI_CALL} -k come_back_themselves",
    ),
    "the gradient of the ascent enters the result": Fault(
        "optax_avg/sharpness/_rule.py",
        "taken(grad_at) if in_result(rule, i) else ascents[-1]",
        "ascents[-1]",
        f"{SHARPNESS} -k 'ascent_on_another and gam'",
    ),
    "a step that is not due follows the ascent": Fault(
        "optax_avg/sharpness/forms.py",
        "g = loss_at(start)[1]\n        return",
        "g = ascent_at(start)[1]\n        return",
        f"{SHARPNESS} -k 'ascent_on_another and every_k'",
    ),
    "equal entries are all kept": Fault(
        "optax_avg/_numerics.py",
        "(tied & (places >= first))",
        "tied",
        f"{SHARPNESS} -k ties",
    ),
    "the state holds the user's key": Fault(
        "optax_avg/_keys.py",
        "return lambda: jnp.array(key, copy=True)",
        "return lambda: key",
        f"{SHARPNESS} -k keys_of",
    ),
    "radii may be infinite": Fault(
        "optax_avg/_checks.py",
        "open_low=open_low, closed_high=False",
        "open_low=open_low, closed_high=True",
        f"{SHARPNESS} -k not_finite",
    ),
    "words that begin with norm are normalisations": Fault(
        "optax_avg/sharpness/offsets.py",
        r'r"\w*norms?|',
        r'r"\w*norm\w*|',
        f"{SHARPNESS} -k names_of",
    ),
    "complex leaves pass": Fault(
        "optax_avg/_checks.py",
        "if _leaves.is_float(leaf) and jnp.iscomplexobj(leaf):",
        "if False:",
        f"{MIXUPS} -k complex",
    ),
    "a forgotten aux is taken for the value": Fault(
        "optax_avg/_mixups.py",
        "if not has_aux and _is_pair(out):",
        "if False:",
        f"{MIXUPS} -k forgotten",
    ),
    "lanczos loses what is small": Fault(
        "optax_avg/landscape/curvature.py",
        "beta = _numerics.norm(w)",
        "beta = jnp.linalg.norm(w)",
        f"{LANDSCAPE} -k any_size",
    ),
    "lanczos forgets what it has seen": Fault(
        "optax_avg/landscape/curvature.py",
        "w = w - basis.T @ (basis @ w)",
        "w = w - 0 * basis.T @ (basis @ w)",
        f"{LANDSCAPE} -k eigenvalues",
    ),
    "the barrier has no line to stand on": Fault(
        "optax_avg/landscape/surface.py",
        "line = (1 - t) * losses[0] + t * losses[-1]",
        "line = 0 * losses",
        f"{LANDSCAPE} -k barrier",
    ),
    "hutch++ samples what the basis has seen": Fault(
        "optax_avg/landscape/curvature.py",
        "z = z - basis @ (basis.T @ z)",
        "z = z - 0 * basis @ (basis.T @ z)",
        f"{LANDSCAPE} -k hutch",
    ),
    "a bad sample moves the location": Fault(
        "optax_avg/robust/location.py",
        "jnp.where(finite, m[i] + s, m[i])",
        "(m[i] + s)",
        f"{LOCATION} -k bad_samples",
    ),
    "huber forgets its share": Fault(
        "optax_avg/robust/distances.py",
        "found._replace(leaves=[_share(tau) * d for d in found.leaves])",
        "found",
        f"{LOCATION} -k 'reference and huber'",
    ),
    "leaves are joined for a distance that works by leaf": Fault(
        "optax_avg/robust/location.py",
        "if not distance.by_leaf:",
        "if True:",
        f"{LOCATION} -k 'your_own or unless'",
    ),
    "a step size adapts like a radius": Fault(
        "optax_avg/robust/location.py",
        "if not distance.tau_is_radius:",
        "if False:",
        f"{LOCATION} -k 'bad_samples and mean'",
    ),
    "an uncalled distance passes for one of your own": Fault(
        "optax_avg/robust/location.py",
        "elif factories.get(name) is distance:",
        "elif False:",
        f"{LOCATION} -k refused",
    ),
    "shared options are missing from signatures": Fault(
        "optax_avg/_options.py",
        "named_make.__signature__ = signature",
        "named_make.signed = signature",
        f"{AGGREGATION} -k shared_options",
    ),
    "shared options ignore the default of a factory": Fault(
        "optax_avg/_options.py",
        "defaults.get(key, shared[key].default)",
        "shared[key].default",
        f"{AGGREGATION} -k not_there",
    ),
    "newton stops after one step": Fault(
        "optax_avg/robust/distances.py",
        "lambda pair: pair[1] > pair[0], ascend",
        "lambda pair: pair[1] < pair[0], ascend",
        f"{LOCATION} -k 'reference and linf'",
    ),
    "the radius moves the wrong way": Fault(
        "optax_avg/robust/location.py",
        "jnp.exp(-tau.rate",
        "jnp.exp(tau.rate",
        f"{LOCATION} -k adaptive",
    ),
    "a spike enters the statistics": Fault(
        "optax_avg/robust/clipping.py",
        "n = jnp.minimum(n, high)\n        # A square",
        "# A square",
        f"{CLIPPING} -k zscore",
    ),
    "a spike in the warm-up counts": Fault(
        "optax_avg/robust/clipping.py",
        "jnp.where(first <= UNUSUAL * median, first, jnp.nan)",
        "first",
        f"{CLIPPING} -k spike_in_the_warm_up",
    ),
    "stationary points depend on lengths": Fault(
        "optax_avg/robust/objectives.py",
        "return w @ cosines @ w <= STATIONARY**2",
        "return w @ cosines @ w <= 0.1",
        f"{SURGERY} -k other_lengths",
    ),
    "a later link may change the updates": Fault(
        "optax_avg/chain_check.py",
        "if _differ(sight.emitted, out, passed_on):",
        "if False:",
        f"{CHAIN_CHECK} -k wrong_chains",
    ),
    "the probe is always large": Fault(
        "optax_avg/chain_check.py",
        "for size in (_LARGE, _SMALL):",
        "for size in (_LARGE, _LARGE):",
        f"{CHAIN_CHECK} -k small_weight_decay",
    ),
    "labels at another pace are believed": Fault(
        "optax_avg/posthoc/_timeline.py",
        "if doubt and all(",
        "if doubt and not all(",
        f"{CLOCK} -k doubted",
    ),
    "another optimizer with the same fields is taken": Fault(
        "optax_avg/averages/migration.py",
        "owner = type(node).__name__",
        "owner = 'state'",
        f"{READOUT} -k whose_fields",
    ),
    "the accumulator is not delayed": Fault(
        "optax_avg/robust/clipping.py",
        "b if delay else after",
        "after if delay else b",
        f"{CLIPPING} -k 'reference and adagrad'",
    ),
    "a leaf stays at zero for ever": Fault(
        "optax_avg/robust/clipping.py",
        "jnp.where(known, lambda_rel * gamma, INFINITY)",
        "lambda_rel * gamma",
        f"{CLIPPING} -k wakes_up",
    ),
    "decoupled sharpness has the wrong sign": Fault(
        "optax_avg/sharpness/decoupled.py",
        "_numerics.wide(step) - lr",
        "_numerics.wide(step) + lr",
        f"{SHARPNESS} -k decoupled",
    ),
    "the Gram matrix is not centred": Fault(
        "optax_avg/robust/_gram_rules.py",
        "_stack.gram(stack, scales(distance, unit), i)",
        "_stack.gram(stack, scales(distance, unit))",
        f"{AGGREGATION} -k near_identical",
    ),
    "far rows overflow": Fault(
        "optax_avg/robust/_gram_rules.py",
        "return jnp.minimum(1 / unit, FAR / distance)",
        "return 1 / unit + 0 * distance",
        f"{AGGREGATION} -k how_far",
    ),
    "the farthest row sets the unit": Fault(
        "optax_avg/robust/_gram_rules.py",
        "typical = distance[_ranks.nth(distance, valid, rank(jnp.sum(valid)))]",
        "typical = jnp.max(distance)",
        f"{ATTACKS} -k 'minority and krum or majority'",
    ),
    "far rows do not pull": Fault(
        "optax_avg/robust/_gram_rules.py",
        "weights = jnp.where(far, c * NEAR * unit, c)",
        "weights = jnp.where(far, 0, c)",
        f"{ATTACKS} -k direction",
    ),
    "gradients that are already summed pass": Fault(
        "optax_avg/_mesh.py",
        "typed = [a for a in axes if a in",
        "typed = [a for a in axes if a not in",
        f"{AGGREGATION} -k already_summed",
    ),
    "stacked gradients are not checked": Fault(
        "optax_avg/robust/_gradients.py",
        "if tuple(row) != shape:",
        "if len(row) < 0:",
        f"{AGGREGATION} -k must_have",
    ),
    "CAGrad goes too far at Pareto-stationary points": Fault(
        "optax_avg/robust/objectives.py",
        "jnp.where(near & stationary, closest, best)",
        "jnp.where(near & (common < -1), closest, best)",
        f"{SURGERY} -k pareto_stationary",
    ),
    "gradients that are zero count for limits": Fault(
        "optax_avg/robust/clipping.py",
        "counted = finite if zeros_count else finite & telling",
        "counted = finite",
        f"{CLIPPING} -k zeros_leave",
    ),
    "one huge norm fills the z-score": Fault(
        "optax_avg/robust/clipping.py",
        "n = jnp.minimum(n, 0.25 *",
        "n = jnp.minimum(n, 4 *",
        f"{CLIPPING} -k 'recovers and zscore'",
    ),
    "a bad row is multiplied by zero": Fault(
        "optax_avg/robust/_stack.py",
        "return product(jnp.where(per_row(stack.valid, x), x, 0))",
        "return product(x)",
        f"{AGGREGATION} -k bad_rows",
    ),
    "the last chunk counts columns twice": Fault(
        "optax_avg/robust/_stack.py",
        "fresh = begin + jnp.arange(width) >= i * width",
        "fresh = begin + jnp.arange(width) >= 0",
        f"{AGGREGATION} -k chunks",
    ),
    "the network leaves out its last stage": Fault(
        "optax_avg/robust/_ranks.py",
        "            if q == p:\n",
        "            if q == p or p == 1 == q // 2:\n",
        f"{AGGREGATION} -k zeros_and_ones",
    ),
    "Krum counts itself among its neighbours": Fault(
        "optax_avg/robust/_gram_rules.py",
        "others = valid[None] & ~jnp.eye(n, dtype=bool)",
        "others = valid[None] & jnp.ones((n, n), dtype=bool)",
        f"{AGGREGATION} -k krum_scores",
    ),
    "centered clipping forgets its location": Fault(
        "optax_avg/robust/aggregation.py",
        "return leaves, _layout.place(stack.layout, leaves, memory)",
        "return leaves, memory",
        f"{AGGREGATION} -k vclip",
    ),
    "the solver keeps negative coordinates": Fault(
        "optax_avg/robust/_quadratic.py",
        "low = jnp.where(free, v < -tolerance * length, slope < -tolerance * most)",
        "low = jnp.where(free, False, slope < -tolerance * most)",
        f"{SURGERY} -k equals_the_definition",
    ),
    "Bloop projects on the first gradient": Fault(
        "optax_avg/robust/surgery.py",
        "reference = {i: jnp.where(first, 0, r) for i, r in reference.items()}",
        "reference = {i: jnp.where(False, 0, r) for i, r in reference.items()}",
        f"{SURGERY} -k bloop_by_hand",
    ),
    "differences of overlapping pairs": Fault(
        "optax_avg/robust/tail_index.py",
        "counts = finite & (state.tail_step % 2 == 1)",
        "counts = finite & (state.tail_step >= 1)",
        f"{TAIL_INDEX} -k stream",
    ),
    "weights of snapshots need not sum to one": Fault(
        "optax_avg/posthoc/_profiles.py",
        "x = x + ones * (1 - np.sum(x)) / np.sum(ones)",
        "x = x + 0 * ones",
        f"{POSTHOC} -k least_squares",
    ),
    "the exponent of the earlier profile": Fault(
        "optax_avg/posthoc/_profiles.py",
        "e = np.where(ta < tb, gb, ga)",
        "e = np.where(ta < tb, ga, gb)",
        f"{POSTHOC} -k quadrature",
    ),
    "discrete power functions lose an order": Fault(
        "optax_avg/posthoc/_clock.py",
        "(kind.gamma + 1) * np.log1p(-1 / i)",
        "kind.gamma * np.log1p(-1 / i)",
        f"{POSTHOC} -k equal_profiles",
    ),
    "a window has one iterate more": Fault(
        "optax_avg/posthoc/_clock.py",
        "k = min(kind.k, count)",
        "k = min(kind.k + 1, count)",
        f"{POSTHOC} -k windows",
    ),
    "fingerprints forget places": Fault(
        "optax_avg/posthoc/_integrity.py",
        "_mixed(bits + place * jnp.uint32(0x9E3779B9))",
        "_mixed(bits)",
        f"{SNAPSHOTS} -k exchanged",
    ),
    "what comes back is not checked": Fault(
        "optax_avg/posthoc/_disk.py",
        "if leaf.fingerprint not in (None, number):",
        "if leaf.fingerprint == -1:",
        f"{SNAPSHOTS} -k another_step",
    ),
    "records are believed": Fault(
        "optax_avg/posthoc/_records.py",
        'if not old and found["checksum"] != digest(content):',
        'if not old and not found["checksum"]:',
        f"{DAMAGE} -k changed_record",
    ),
    "a snapshot stands for the step of its directory": Fault(
        "optax_avg/posthoc/_disk.py",
        "if record.step != step:",
        "if record.step < 0:",
        f"{DAMAGE} -k names_of_others",
    ),
    "weights of another run are believed": Fault(
        "optax_avg/posthoc/_disk.py",
        "whole = record.digests.get(name) == _integrity.digest(found)",
        "whole = name in record.digests",
        f"{DAMAGE} -k weights_of_another",
    ),
    "round numbers hide damage": Fault(
        "optax_avg/posthoc/_integrity.py",
        "    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)\n"
        "    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)\n"
        "    return x ^ (x >> 16)",
        "    return x",
        f"{DAMAGE} -k round_numbers",
    ),
    "a step is deleted before it is replaced": Fault(
        "optax_avg/posthoc/_writer.py",
        "return int(path.exists())",
        "return path.rmtree(missing_ok=True) or 0",
        f"{SNAPSHOTS} -k full_disk",
    ),
    "a replacement counts only in its place": Fault(
        "optax_avg/posthoc/_disk.py",
        "if not is_snapshot(path):\n            path =",
        "if path:\n            path =",
        f"{SNAPSHOTS} -k while_a_step",
    ),
    "directories of others are replaced": Fault(
        "optax_avg/posthoc/_writer.py",
        "if path.exists() and not _disk.is_snapshot(path):",
        "if path.exists() and path.is_symlink():",
        f"{SNAPSHOTS} -k not_a_snapshot",
    ),
    "windows of a stack are averaged over its members": Fault(
        "optax_avg/averages/readout.py",
        "if jnp.ndim(absorbed):",
        "if jnp.ndim(absorbed) < 0:",
        f"{READOUT} -k stacked",
    ),
    "sums of snapshots in their own dtype": Fault(
        "optax_avg/posthoc/streaming.py",
        "return [a + x * _numerics.wide(leaf) for a",
        "return [(a + x * _numerics.wide(leaf)).astype(leaf.dtype) for a",
        f"{SNAPSHOTS} -k half_precision",
    ),
    "later snapshots than the step count": Fault(
        "optax_avg/posthoc/_plan.py",
        "if step is None or record.step <= step\n",
        "if step is None or record.step != -step\n",
        f"{SNAPSHOTS} -k earlier",
    ),
    "averages are where their states began": Fault(
        "optax_avg/posthoc/_timeline.py",
        "origin = clock[record.step] - own_step(record, name) + grid.start",
        "origin = grid.start",
        f"{CLOCK} -k added_later",
    ),
    "averages start with the training": Fault(
        "optax_avg/posthoc/_timeline.py",
        "own_step(record, name) + grid.start",
        "own_step(record, name)",
        f"{CLOCK} -k other_starts",
    ),
    "averages hold every step": Fault(
        "optax_avg/posthoc/_timeline.py",
        "record.absorbed[name], origin, grid.every)",
        "record.absorbed[name], origin, 1)",
        f"{CLOCK} -k other_strides",
    ),
    "iterates that were left out take a place": Fault(
        "optax_avg/posthoc/_timeline.py",
        "return grid.step - grid.every * (due - record.absorbed[name])",
        "return grid.step",
        f"{CLOCK} -k left_out_do_not",
    ),
    "earlier runs are combined": Fault(
        "optax_avg/posthoc/_timeline.py",
        "return new < old or",
        "return False and",
        f"{CLOCK} -k newest_run",
    ),
    "windows are in iterates": Fault(
        "optax_avg/posthoc/_target.py",
        "Window(-(-k // every))",
        "Window(k)",
        f"{CLOCK} -k one_grid",
    ),
    "half-lives are in iterates": Fault(
        "optax_avg/posthoc/_target.py",
        "weights.scale_decay(decay, every)",
        "decay",
        f"{CLOCK} -k half_lives",
    ),
    "the solver forgets rounding": Fault(
        "optax_avg/posthoc/_profiles.py",
        "np.asarray(rounding) ** 2 * np.maximum",
        "0 * np.asarray(rounding) ** 2 * np.maximum",
        f"{POSTHOC} -k twice_what",
    ),
    "what is rounded alike is claimed as if by chance": Fault(
        "optax_avg/posthoc/_profiles.py",
        "lost = max(float(squares @ x**2), together)",
        "lost = float(squares @ x**2)",
        f"{POSTHOC} -k underflows_is_claimed",
    ),
    "underflow is not claimed": Fault(
        "optax_avg/posthoc/_plan.py",
        "return spacing + record.underflow.get(name, 0.0)",
        "return spacing",
        f"{SNAPSHOTS} -k underflows_on_disk",
    ),
    "a leaf that underflows is not named": Fault(
        "optax_avg/posthoc/_contents.py",
        "max(shares, default=0.0) > TOLERANCE",
        "whole > TOLERANCE",
        f"{SNAPSHOTS} -k too_small_for_the_disk",
    ),
    "snapshots of other stores are combined": Fault(
        "optax_avg/posthoc/_timeline.py",
        "if r.store != numbered[-1].store]",
        "if r.store < 0]",
        f"{CLOCK} -k 'another_store or one_store'",
    ),
    "a store is another one after a restart": Fault(
        "optax_avg/posthoc/_disk.py",
        "        if number:\n            return number\n",
        "",
        f"{CLOCK} -k another_store",
    ),
    "snapshots from before are of another store": Fault(
        "optax_avg/posthoc/_timeline.py",
        "key=lambda r: r.step) if r.store]",
        "key=lambda r: r.step)]",
        f"{CLOCK} -k one_store",
    ),
    "renamed snapshots disappear": Fault(
        "optax_avg/posthoc/_reading.py",
        "    if misnamed:\n",
        "    if not reader:\n",
        f"{SNAPSHOTS} -k under_other_names",
    ),
    "why nothing was saved is forgotten": Fault(
        "optax_avg/posthoc/store.py",
        "if whys and not _disk",
        "if not whys and not _disk",
        f"{SNAPSHOTS} -k why_nothing",
    ),
    "rounding is not claimed": Fault(
        "optax_avg/posthoc/_clock.py",
        "math.hypot(profile, found.rounding)",
        "profile",
        f"{POSTHOC} -k twice_what",
    ),
    "inner products forget what came between": Fault(
        "optax_avg/posthoc/_clock.py",
        "inner[early, a_i, a] * np.exp(decay)",
        "inner[early, a_i, a]",
        f"{CLOCK} -k dense",
    ),
    "a run is mixed with the one it replaces": Fault(
        "optax_avg/posthoc/store.py",
        "if step < self._last:",
        "if step < -1:",
        f"{SNAPSHOTS} -k replaced",
    ),
    "rejected iterates make a new run": Fault(
        "optax_avg/posthoc/_timeline.py",
        "new = before.grids[name].step, after.grids[name].step\n    if",
        "new = own_step(before, name), own_step(after, name)\n    if",
        f"{CLOCK} -k no_new_run",
    ),
    "a replaced snapshot is taken for damaged": Fault(
        "optax_avg/posthoc/_reading.py",
        "failed[step] == 1\n",
        "failed[step] == 0\n",
        f"{SNAPSHOTS} -k fails_once",
    ),
    "a snapshot is read anew once at most": Fault(
        "optax_avg/posthoc/_reading.py",
        "renewed != records[step] and failed",
        "renewed is None and failed",
        f"{SNAPSHOTS} -k that_is_replaced_while",
    ),
    "checkpoints of others are cleared up": Fault(
        "optax_avg/posthoc/_writer.py",
        "LEFT_OVER.fullmatch(entry.name) and _is_ours(entry)",
        "LEFT_OVER.fullmatch(entry.name) and entry.is_dir()",
        f"{SNAPSHOTS} -k being_written",
    ),
    "scales of wide leaves overflow in narrow ones": Fault(
        "optax_avg/robust/_stack.py",
        "part = per_row(scale, x) * x",
        "part = per_row(scale.astype(x.dtype), x) * x",
        f"{ATTACKS} -k mixed_width",
    ),
    "norms are scaled in the dtype of each leaf": Fault(
        "optax_avg/_numerics.py",
        "factors = factors.astype(plain.dtype)",
        "factors = factors + 0",
        f"{LOCATION} -k mixed_width",
    ),
    "what dare drops is rounded to the model": Fault(
        "optax_avg/merging/task_vectors.py",
        "jnp.asarray(x, jnp.promote_types(own, of_base))",
        "jnp.asarray(x, own)",
        f"{MERGING} -k dare_drops",
    ),
    "counters of a device lose an axis": Fault(
        "optax_avg/robust/_layout.py",
        "    if axis is None:\n        return x\n    check_axis",
        "    axis = axis or 0\n    check_axis",
        f"{ATTACKS} -k counters_on",
    ),
    "the step of resumption is removed": Fault(
        "optax_avg/posthoc/_writer.py",
        "if s > step]",
        "if s >= step]",
        f"{SNAPSHOTS} -k replaced",
    ),
    "dependent objectives are pivoted for ever": Fault(
        "optax_avg/robust/_quadratic.py",
        "slope < -tolerance * most",
        "slope < -tolerance",
        f"{SURGERY} -k more_objectives",
    ),
    "dependent objectives keep the shift of the ridge": Fault(
        "optax_avg/robust/_quadratic.py",
        "PROXIMAL_ROUNDS = 3",
        "PROXIMAL_ROUNDS = 1",
        f"{SURGERY} -k more_objectives",
    ),
    "Model Stock counts pairs wrongly": Fault(
        "optax_avg/merging/task_vectors.py",
        "pairs / (n * (n - 1))",
        "pairs / n**2",
        f"{MERGING} -k equals_the_reference",
    ),
    "re-basin forgets the inputs of the layer after": Fault(
        "optax_avg/merging/basin.py",
        "channels.append(_Place(i, -2, blocks))",
        "pass",
        f"{MERGING} -k 'permut or matching'",
    ),
    "re-basin takes pixels for channels": Fault(
        "optax_avg/merging/basin.py",
        "x = np.moveaxis(x.reshape(place.blocks, -1, *x.shape[1:]), 1, 0)",
        "x = x.reshape(-1, place.blocks, *x.shape[1:])",
        f"{MERGING} -k pixel",
    ),
    "re-basin matches against the first order for ever": Fault(
        "optax_avg/merging/basin.py",
        "order[:] = order[new]",
        "order[:] = new",
        f"{MERGING} -k matching_goes",
    ),
    "TIES lets the first model elect": Fault(
        "optax_avg/merging/task_vectors.py",
        "elected = jnp.sign(sum(kept[1:], kept[0]))",
        "elected = jnp.sign(kept[0])",
        f"{MERGING} -k equals_the_reference",
    ),
    "DARE does not rescale": Fault(
        "optax_avg/merging/task_vectors.py",
        "(x - x0) / density",
        "(x - x0)",
        f"{MERGING} -k dare",
    ),
    "Karcher means along chords": Fault(
        "optax_avg/merging/spheres.py",
        "pull = w * jnp.where(sine > 1e-4, angle / jnp.maximum(sine, 1e-4), 1)",
        "pull = w * jnp.where(sine > 2, angle, 1)",
        f"{MERGING} -k equals_the_reference",
    ),
    "slerp of vectors that are not of unit length": Fault(
        "optax_avg/merging/spheres.py",
        "x / unit / jnp.where(norm > 0, norm, 1)\n",
        "x / unit\n",
        f"{MERGING} -k equals_the_reference",
    ),
    "Fisher merging forgets its weights": Fault(
        "optax_avg/merging/curvature.py",
        "weighted = [a * f for a, f in zip(w, shares, strict=True)]",
        "weighted = shares",
        f"{MERGING} -k equals_the_reference",
    ),
    "gradient matching forgets the base": Fault(
        "optax_avg/merging/curvature.py",
        "(h + h0) / bar",
        "h / bar",
        f"{MERGING} -k equals_the_reference",
    ),
    "the examples that fill the last batch count": Fault(
        "optax_avg/merging/curvature.py",
        "(place < n).reshape(rounds, batch)",
        "(place >= 0).reshape(rounds, batch)",
        f"{MERGING} -k squared_gradients",
    ),
    "a greedy soup takes everything": Fault(
        "optax_avg/merging/soups.py",
        "if found >= best:",
        "if found > -math.inf:",
        f"{MERGING} -k greedy",
    ),
    "variance correction revives pruned weights": Fault(
        "optax_avg/merging/soups.py",
        "return jnp.where(pruned, 0, moved)",
        "return moved",
        f"{MERGING} -k shared_mask",
    ),
    "variance correction takes rounding for variance": Fault(
        "optax_avg/_numerics.py",
        "rounding = 4 * jnp.finfo(got.dtype).eps",
        "rounding = 0",
        f"{MERGING} -k only_rounding",
    ),
    "opposite directions have a mean": Fault(
        "optax_avg/merging/spheres.py",
        "straight = cancels(w) | opposite | cancels(last)",
        "straight = jnp.asarray(False)",
        f"{MERGING} -k 'without_a_mean or finite_models'",
    ),
    "TIES keeps all that stand at its limit": Fault(
        "optax_avg/merging/_slices.py",
        "(size == largest.limit) & (_place(size) < largest.end)",
        "size == largest.limit",
        f"{MERGING} -k keeps_exactly",
    ),
    "compiled TIES keeps too many at its limit": Fault(
        "optax_avg/merging/_slices.py",
        "left = jnp.maximum(left - jnp.sum(hits), 0)",
        "pass",
        f"{MERGING} -k keeps_exactly",
    ),
    "Fisher merging takes negative information": Fault(
        "optax_avg/merging/curvature.py",
        "~jnp.all((x >= 0) & jnp.isfinite(x))",
        "~jnp.all(jnp.isfinite(x))",
        f"{MERGING} -k that_is_none",
    ),
    "the command replaces what is there": Fault(
        "optax_avg/cli/_targets.py",
        "    if not force:\n",
        "    if force is None:\n",
        f"{CLI} -k without_force",
    ),
    "the command writes under the final name": Fault(
        "optax_avg/cli/_writing.py",
        'new = os.path.join(folder, "new")',
        "new = target.path",
        f"{CLI} -k on_the_way",
    ),
    "an output path keeps its dots and links": Fault(
        "optax_avg/cli/_targets.py",
        "path = os.path.realpath(out)",
        "path = out",
        f"{CLI_FILES} -k 'normalised or follow'",
    ),
    "an empty output path is the current directory": Fault(
        "optax_avg/cli/_targets.py",
        "    if not out:\n",
        "    if out is None:\n",
        f"{CLI_FILES} -k 'result_may_have and nothing'",
    ),
    "force replaces a directory of notes": Fault(
        "optax_avg/cli/_targets.py",
        'return "" if empty else form.stranger(path)',
        'return ""',
        f"{CLI_FILES} -k result_may_have",
    ),
    "force replaces what is read": Fault(
        "optax_avg/cli/_targets.py",
        "any(_holds(path, part) for part in _all_of(given))",
        "False",
        f"{CLI_FILES} -k result_may_have",
    ),
    "a file that appears meanwhile is overwritten": Fault(
        "optax_avg/cli/_commit.py",
        "        os.link(new, path)\n",
        "        os.replace(new, path)\n",
        f"{CLI_FILES} -k last_moment",
    ),
    "an empty directory that appears meanwhile is replaced": Fault(
        "optax_avg/cli/_commit.py",
        "        os.mkdir(path)\n",
        "        os.makedirs(path, exist_ok=True)\n",
        f"{CLI_FILES} -k last_moment",
    ),
    "force is for whatever comes": Fault(
        "optax_avg/cli/_commit.py",
        "elif now != target.found or odd_at",
        "elif odd_at",
        f"{CLI_FILES} -k 'at_first or changes_meanwhile'",
    ),
    "the old checkpoint goes before the new one comes": Fault(
        "optax_avg/cli/_commit.py",
        "    os.rename(path, aside)\n",
        "    shutil.rmtree(path)\n",
        f"{CLI_FILES} -k cannot_be_replaced",
    ),
    "signals tear a commit": Fault(
        "optax_avg/cli/_commit.py",
        "    with held():\n        try:\n",
        "    with contextlib.nullcontext():\n        try:\n",
        f"{CLI_FILES} -k disturb_the_commit",
    ),
    "the first signal is not heard": Fault(
        "optax_avg/cli/_signals.py",
        "    if signals:\n",
        "    if len(signals) > 1:\n",
        f"{CLI_FILES} -k a_signal_leaves",
    ),
    "a signal that is ignored stops the command": Fault(
        "optax_avg/cli/_signals.py",
        "[n for n in NUMBERS if signal.getsignal(n) != signal.SIG_IGN]",
        "NUMBERS",
        f"{CLI_FILES} -k stays_so",
    ),
    "a dry run writes": Fault(
        "optax_avg/cli/_output.py",
        "        print(_plan(target, reads, leaves, what))\n        return\n",
        "        print(_plan(target, reads, leaves, what))\n",
        f"{CLI_FILES} -k a_dry_run",
    ),
    "two runs that exchange one directory are not told apart": Fault(
        "optax_avg/cli/_commit.py",
        "if error.errno in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST):",
        "if error.errno == errno.EEXIST:",
        f"{CLI_FILES} -k another_run_replaces",
    ),
    "a long name leaves no room for a suffix": Fault(
        "optax_avg/cli/_targets.py",
        "if len(os.fsencode(name)) <= LONGEST:",
        "if name:",
        f"{CLI_FILES} -k longest_names",
    ),
    "one model of a folder becomes two": Fault(
        "optax_avg/cli/_targets.py",
        "if own or name in _words",
        "if name in _words",
        f"{CLI_FILES} -k 'result_may_have and shards'",
    ),
    "a shard of any name is replaced": Fault(
        "optax_avg/cli/_targets.py",
        "if own or name in _words(os.path.join(folder, other)):",
        "if own:",
        f"{CLI_FILES} -k 'result_may_have and any'",
    ),
    "a copy is taken for a merge": Fault(
        "optax_avg/cli/_merge_options.py",
        "    if len(models) == 1:\n",
        "    if len(models) == 0:\n",
        f"{CLI_MERGE} -k a_single_model",
    ),
    "a file is taken for a store": Fault(
        "optax_avg/cli/_averages.py",
        "or os.path.isdir(store):",
        "or os.path.exists(store):",
        f"{CLI} -k 'bad_input and reconstruct'",
    ),
    "a disk that is too small is found out late": Fault(
        "optax_avg/cli/_targets.py",
        "    if certain:\n",
        "    if not certain:\n",
        f"{CLI_FILES} -k too_small",
    ),
    "the command merges four batches at once": Fault(
        "optax_avg/cli/_output.py",
        "for i in order], sources.BATCH)",
        "for i in order], 4 * sources.BATCH)",
        f"{CLI} -k few_leaves",
    ),
    "a window's box does not learn of the new axis": Fault(
        "optax_avg/_leaves.py",
        'node.add_axis(0, {"partition_name": None})',
        "node",
        f"{LAYOUT} -k logical_partitioning",
    ),
    "zeros of a jitted init lie whole on every device": Fault(
        "optax_avg/_numerics.py",
        "if not isinstance(x, core.Tracer):",
        "if True:",
        f"{CONTRACT} -k 'jitted_init and vclip'",
    ),
    "init asks shapes for values": Fault(
        "optax_avg/_leaves.py",
        "jax.eval_shape(init, params) if is_abstract(params) else init(params)",
        "init(params)",
        f"{OPTAX} -k 'of_shapes and multi_call'",
    ),
    "a location grows as wide as the norm": Fault(
        "optax_avg/robust/location.py",
        "m[i] + s, m[i]).astype(m[i].dtype)",
        "m[i] + s, m[i])",
        f"{OPTAX} -k 'mixed and vclip'",
    ),
    "the radius of a float64 location is float32": Fault(
        "optax_avg/robust/location.py",
        "jnp.full(count, tau.init or 0.0, dtype)",
        "jnp.full(count, tau.init or 0.0, jnp.float32)",
        f"{LOCATION} -k keeps_its_range",
    ),
    "statistics of float64 norms are float32": Fault(
        "optax_avg/robust/clipping.py",
        "jnp.where(counted, new, old).astype(old.dtype)",
        "jnp.where(counted, new, old).astype(jnp.float32)",
        f"{CLIPPING} -k float64_norms",
    ),
    "statistics of norms take the dtype of the gradient": Fault(
        "optax_avg/robust/clipping.py",
        "jnp.where(counted, new, old).astype(old.dtype)",
        "jnp.where(counted, new, old).astype(jnp.result_type(*leaves))",
        f"{OPTAX} -k 'complex and clip_by_ema_norm'",
    ),
    "pairs of gradients end at the largest count": Fault(
        "optax_avg/robust/tail_index.py",
        "_numerics.advance_clock(state.tail_step, 2)",
        "_numerics.advance_clock(state.tail_step, 1)",
        f"{TAIL_INDEX} -k go_on_beyond",
    ),
    "a scan over rows forgets their sharding": Fault(
        "optax_avg/robust/aggregation.py",
        "jnp.zeros_like(x.sum(axis=0), x.dtype)",
        "jnp.zeros(x.shape[1:], x.dtype)",
        f"{CONTRACT} -k 'sharded_params and one_pass and Explicit'",
    ),
    "the command merges what is not finite": Fault(
        "optax_avg/cli/_leafwise.py",
        "finite = job.allow_nonfinite",
        "finite = True",
        f"{CLI_MERGE} -k 'not_finite_is and soup'",
    ),
    "the command forgets the metadata": Fault(
        "optax_avg/cli/_writing.py",
        "{METADATA: metadata} if metadata else {}",
        "{}",
        f"{CLI_MERGE} -k metadata",
    ),
    "every part of a leaf is taken for its first": Fault(
        "optax_avg/cli/_leafwise.py",
        "start += made.size",
        "start += 0",
        f"{CLI_MERGE} -k 'parts_make and ties'",
    ),
    "inner products of parts have no unit": Fault(
        "optax_avg/merging/_slices.py",
        "return p.gram * jnp.outer(ratio, ratio)",
        "return p.gram",
        f"{CLI_MERGE} -k 'parts_make and (karcher or stock)'",
    ),
    "means of parts are taken for one": Fault(
        "optax_avg/merging/soups.py",
        "squares += a.size * share * jnp.abs(apart) ** 2",
        "squares += 0",
        f"{CLI_MERGE} -k 'parts_make and variance'",
    ),
    "a chunk that was lost is read as zeros": Fault(
        "optax_avg/_checkpoints/_orbax_reads.py",
        '"fill_missing_data_reads": not metadata.get(',
        '"fill_missing_data_reads": True or metadata.get(',
        f"{CLI_ORBAX} -k was_lost",
    ),
    "a large Orbax chunk is decoded as a whole": Fault(
        "optax_avg/_checkpoints/_orbax_reads.py",
        "yield from streamed or _pieces(store, whole, most)",
        "yield from _pieces(store, whole, most)",
        f"{CLI_ORBAX} -k decoded_as_a_stream",
    ),
    "pieces of two checkpoints make one array": Fault(
        "optax_avg/_checkpoints/_orbax_reads.py",
        "if found.stamp.generation != now.stamp.generation:",
        "if False:",
        f"{CLI_ORBAX} -k replaced_while",
    ),
    "a frame that ends early is taken": Fault(
        "optax_avg/_checkpoints/_orbax_reads.py",
        'raise ValueError(f"a chunk ends {count:,} bytes early.")',
        "break",
        f"{CLI_ORBAX} -k 'damaged and cut'",
    ),
    "bytes beyond the elements of a chunk are ignored": Fault(
        "optax_avg/_checkpoints/_orbax_reads.py",
        "if frame.read(1):",
        "if False:",
        f"{CLI_ORBAX} -k 'damaged and longer'",
    ),
    "the index of a shard is decoded as elements": Fault(
        "optax_avg/_checkpoints/_orbax_reads.py",
        "end = begin + length",
        "end = None",
        f"{CLI_ORBAX} -k decoded_as_a_stream",
    ),
    "chunks that the array cuts off are taken for whole ones": Fault(
        "optax_avg/_checkpoints/_orbax_reads.py",
        "if frames is None or _extent(whole) != frames.chunk:",
        "if frames is None:",
        f"{CLI_ORBAX} -k larger_than_a_piece",
    ),
    "the order of bytes is not looked at": Fault(
        "optax_avg/_checkpoints/_orbax_reads.py",
        ' or metadata["dtype"].startswith(">"):',
        ":",
        f"{CLI_ORBAX} -k larger_than_a_piece",
    ),
    "the path of a checkpoint is taken for an address": Fault(
        "optax_avg/_checkpoints/_orbax_reads.py",
        'base = {"driver": "file", "path": f"{path}/"}',
        'base = f"file://{path}/"',
        f"{CLI_ORBAX} -k percent",
    ),
    "chunks that cross a part are decoded for each part": Fault(
        "optax_avg/_checkpoints/_orbax_reads.py",
        "    axis = next((i for i, n in enumerate(chunk) if n > 1), len(chunk))\n",
        "    axis = len(chunk) - 1 if chunk else 0\n",
        f"{CLI_ORBAX} -k 'are_read_by_parts and over'",
    ),
    "a chunk is copied as a whole": Fault(
        "optax_avg/_checkpoints/_orbax_reads.py",
        "for begin in range(0, math.prod(own), most):",
        "for most in [math.prod(own)]:\n            begin = 0",
        f"{CLI_ORBAX} -k group_by_group",
    ),
    "writes go on after an error": Fault(
        "optax_avg/_checkpoints/orbax_parts.py",
        "    except BaseException:\n        for written in writing:",
        "    except BaseException:\n        for written in ():",
        f"{CLI_ORBAX} -k waited_for",
    ),
    "an index names files outside its folder": Fault(
        "optax_avg/_checkpoints/safetensors.py",
        "os.path.basename(shard) != shard or not shard",
        "not shard",
        f"{CLI_MERGE} -k broken_folders",
    ),
    "an uncalled factory runs as a weight": Fault(
        "optax_avg/weights.py",
        "    _refuse_uncalled(weight)\n",
        "",
        f"{MIXUPS} -k factory_was_not",
    ),
    "gradients pass for their function": Fault(
        "optax_avg/_mixups.py",
        "if not callable(grad_fn):",
        "if False:",
        f"{MIXUPS} -k function_should",
    ),
    "an aggregator does not ask for stacked gradients": Fault(
        "optax_avg/robust/_gradients.py",
        "if axis is not None and stacked == shape",
        "if axis is None and stacked == shape",
        f"{CHAIN_CHECK} -k stacked_gradients",
    ),
    "a radius may be None": Fault(
        "optax_avg/sharpness/_ascent.py",
        "if not jax.tree.leaves(radius):",
        "if False:",
        f"{SHARPNESS} -k no_radius",
    ),
    "a bool is a seed": Fault(
        "optax_avg/_keys.py",
        "None if isinstance(key, (bool, np.bool_)) else operator",
        "operator",
        f"{SHARPNESS} -k no_key",
    ),
    "swapped states are migrated": Fault(
        "optax_avg/averages/migration.py",
        "if _has_counted(new_state) and not",
        "if False and not",
        f"{READOUT} -k swapped",
    ),
    "a chain is written back": Fault(
        "optax_avg/averages/write_back.py",
        "if not is_average_state(state):",
        "if False:",
        f"{WRITE_BACK} -k itself",
    ),
    "a global perturbation over no axis is local": Fault(
        "optax_avg/sharpness/forms.py",
        "if not found or not",
        "if not",
        f"{FORMS} -k over_no_axis",
    ),
    "cagrad trusts the Gram matrix": Fault(
        "optax_avg/robust/objectives.py",
        "factor = clip_factor(c * g0, pull)",
        "factor = jnp.ones_like(pull)",
        f"{SURGERY} -k cancel_stays",
    ),
    "cagrad measures what lies on one device": Fault(
        "optax_avg/robust/objectives.py",
        "_stack.row_norms(both, stack.layout.axis_name)",
        "_stack.row_norms(both)",
        f"{SURGERY} -k same_ball",
    ),
    "the ridge weighs rows beside a zero one": Fault(
        "optax_avg/robust/_quadratic.py",
        "jnp.where(jnp.any(zero > 0), zero, v)",
        "v",
        f"{SURGERY} -k exactly_zero",
    ),
    "the sum of AdaGrad-Norm stalls": Fault(
        "optax_avg/robust/clipping.py",
        "_numerics.sum_and_error(b, rest + risen)",
        "(b + risen, rest)",
        f"{CLIPPING} -k long_runs",
    ),
    "means of logarithms stall": Fault(
        "optax_avg/robust/tail_index.py",
        "_numerics.sum_and_error(mean, rest + change)",
        "(mean + change, rest)",
        f"{TAIL_INDEX} -k long_runs",
    ),
    "rules are due no more beyond the largest integer": Fault(
        "optax_avg/sharpness/_rule.py",
        "_numerics.advance_clock(state.rule_step, rule.period)",
        "_numerics.advance_clock(state.rule_step)",
        f"{FORMS} -k beyond",
    ),
    "write-back keeps to the clock of its average": Fault(
        "optax_avg/averages/write_back.py",
        "state = state._replace(step=step)\n",
        "",
        f"{WRITE_BACK} -k goes_on",
    ),
    "a projection takes its two sums one after the other": Fault(
        "optax_avg/_numerics.py",
        "lax.cond(both, quick, scaled)",
        "scaled()",
        f"{COLLECTIVES} -k perp_grad",
    ),
    "a projection trusts a product that underflows": Fault(
        "optax_avg/_numerics.py",
        "both = safe(square) & safe(jnp.abs(product))",
        "both = safe(square)",
        f"{SURGERY} -k any_size",
    ),
    "a clip counts elements in integers beside its sizes": Fault(
        "optax_avg/robust/distances.py",
        "dtype=d.dtype",
        "dtype=jnp.int32",
        f"{COLLECTIVES} -k 'cclip or coordinate_quantile'",
    ),
    "a sum of a block waits for what counts": Fault(
        "optax_avg/robust/tail_index.py",
        "_numerics.norms([list(x.values()), list(total.values())])",
        "jnp.stack([n := _numerics.norm(x), _numerics.norm([n, total])])",
        f"{COLLECTIVES} -k tail_index",
    ),
    "differences that do not count enter a block": Fault(
        "optax_avg/robust/tail_index.py",
        "jnp.where(counts, total[i], sums[i])",
        "total[i]",
        f"{TAIL_INDEX} -k stream",
    ),
    "a program for steps that are not due takes all gradients": Fault(
        "optax_avg/sharpness/_rule.py",
        "full(operand) if due else skip(operand)",
        "full(operand)",
        f"{FORMS} -k 'known or chosen'",
    ),
    "the gap of a primal average rounds to one side": Fault(
        "optax_avg/averages/primal.py",
        "return m - kept.weight * m",
        "return (1 - kept.weight) * m",
        f"{PRIMAL} -k hundred_thousand",
    ),
    "a primal step forgets the weight": Fault(
        "optax_avg/averages/primal.py",
        "(new - d) + bw * new",
        "(new - d) + b * new",
        f"{PRIMAL} -k equations",
    ),
    "decay looks at the other parameters": Fault(
        "optax_avg/averages/primal.py",
        'seen = params if decay_at == "y"',
        'seen = params if decay_at == "z"',
        f"{PRIMAL} -k equations",
    ),
    "a primal average loses what rounding took": Fault(
        "optax_avg/averages/primal.py",
        "whole = r + step",
        "whole = step",
        f"{PRIMAL} -k narrow_parameters",
    ),
    "a primal average is read as z": Fault(
        "optax_avg/averages/primal.py",
        "(self.beta - 1) * _gap",
        "self.beta * _gap",
        f"{PRIMAL} -k equations",
    ),
    "a primal average takes NaN": Fault(
        "optax_avg/averages/primal.py",
        'if nonfinite == "skip":',
        'if nonfinite == "never":',
        f"{PRIMAL} -k left_out",
    ),
    "y stays where beta changes": Fault(
        "optax_avg/averages/primal.py",
        "else kept.beta - b",
        "else 0 * b",
        f"{PRIMAL} -k changes",
    ),
    "beta zero is no special case": Fault(
        "optax_avg/averages/primal.py",
        "if isinstance(beta, float) and beta == 0:",
        "if isinstance(beta, float) and beta < 0:",
        f"{PRIMAL} -k bit_for_bit",
    ),
    "a primal average is read without the parameters": Fault(
        "optax_avg/averages/readout.py",
        "if is_offset:",
        "if is_offset is None:",
        f"{PRIMAL} -k equations",
    ),
    "a cooldown skips its first update": Fault(
        "optax_avg/weights.py",
        "float(np.asarray(f(i / k))) for i in range(k)",
        "float(np.asarray(f((i + 1) / k))) for i in range(k)",
        f"{COOLDOWN} -k linear_one",
    ),
    "a rising shape is no error": Fault(
        "optax_avg/weights.py",
        "if not np.all(c >= -1e-6):",
        "if not np.all(c >= -9e9):",
        f"{COOLDOWN} -k does_not_fall",
    ),
    "a cooldown counts iterates": Fault(
        "optax_avg/posthoc/_target.py",
        "k = -(-steps // every)",
        "k = steps",
        f"{COOLDOWN} -k stride",
    ),
    "parameters saved now and then are iterates among others": Fault(
        "optax_avg/posthoc/_timeline.py",
        "if len(steps) == 1 or not all(single):",
        "if len(steps) >= 1 or not all(single):",
        f"{COOLDOWN} -k now_and_then",
    ),
    "checkpoints cool down backwards": Fault(
        "optax_avg/merging/soups.py",
        "found.weights[:n])",
        "found.weights[:n][::-1])",
        f"{COOLDOWN} -k merged_checkpoints",
    ),
    "any order of checkpoints will do": Fault(
        "optax_avg/cli/_merge_options.py",
        "if numbers != sorted(numbers):",
        "if len(numbers) < 0:",
        f"{COOLDOWN} -k order_of_a_shell",
    ),
    "the horizon-free rate starts late": Fault(
        "optax_avg/schedules.py",
        "(jnp.maximum(count, 0) + alpha)",
        "(jnp.maximum(count, 0) + 1 + alpha)",
        f"{SCHEDULES} -k horizon_free_by_hand",
    ),
    "a NaN score is never beaten": Fault(
        "optax_avg/averages/overview.py",
        "if _checks.rank(found) > _checks.rank(best.score):",
        "if found > best.score:",
        f"{OVERVIEW} -k not_finite",
    ),
    "a window is as wide as it will be": Fault(
        "optax_avg/averages/overview.py",
        'k = min(profile["window"], n)',
        'k = profile["window"]',
        f"{OVERVIEW} -k widths_and_ages",
    ),
    "the cosine is not divided by the size of the weight": Fault(
        "optax_avg/optimizers/projections.py",
        "delta / math.sqrt(w.size // xx.size)",
        "delta",
        f"{NORMS} -k threshold_falls",
    ),
    "a projected weight decays whole": Fault(
        "optax_avg/optimizers/projections.py",
        "jnp.where(is_radial, wd_ratio, ratio)",
        "ratio",
        f"{NORMS} -k adamp_and_sgdp",
    ),
    "a leaf is projected again after its channels": Fault(
        "optax_avg/optimizers/projections.py",
        "jnp.where(invariant & ~is_radial, tangent, q)",
        "jnp.where(invariant, tangent, q)",
        f"{NORMS} -k adamp_and_sgdp",
    ),
    "squares of weights overflow": Fault(
        "optax_avg/optimizers/projections.py",
        "x, y = _with_largest_one(w), _with_largest_one(g)",
        "x, y = w, g",
        f"{NORMS} -k whatever_the_scale",
    ),
    "the radius follows the weight": Fault(
        "optax_avg/optimizers/weight_norms.py",
        "jnp.where(step == start, sizes[i], c)",
        "jnp.where(step >= start, sizes[i], c)",
        f"{NORMS} -k drift_in_bfloat16",
    ),
    "norms are kept from the beginning": Fault(
        "optax_avg/optimizers/weight_norms.py",
        "due = step >= start",
        "due = step >= 0 * start",
        f"{NORMS} -k test_norm_preserving",
    ),
    "the gradient of the norm loss is that without the square": Fault(
        "optax_avg/optimizers/weight_norms.py",
        "slope = 2 * lam * (x - _matrices.unit(x, axes))",
        "slope = lam * (x - _matrices.unit(x, axes))",
        f"{NORMS} -k norm_loss_is_the_gradient",
    ),
    "power iterations start anew": Fault(
        "optax_avg/optimizers/weight_norms.py",
        "return gradients, SpectralState(vectors)",
        "return gradients, state",
        f"{NORMS} -k test_spectral_regularisation",
    ),
    "the signs of a step are those of the last one": Fault(
        "optax_avg/optimizers/hessian_diagonals.py",
        "jax.random.fold_in(state.hessian_key, step)",
        "state.hessian_key",
        f"{FREE} -k test_adahessian",
    ),
    "the diagonal is averaged without its signs": Fault(
        "optax_avg/optimizers/hessian_diagonals.py",
        "diagonal = _numerics.wide(z) * _numerics.wide(hz)",
        "diagonal = jnp.abs(_numerics.wide(hz))",
        f"{FREE} -k test_adahessian",
    ),
    "the second gradient of U-DoG takes the first one's step size": Fault(
        "optax_avg/optimizers/accelerated.py",
        "jnp.where(odd, jnp.hypot(state.surprise, error), state.surprise)",
        "state.surprise",
        f"{FREE} -k test_u_dog",
    ),
    "the extrapolated point leads": Fault(
        "optax_avg/optimizers/accelerated.py",
        "y[i] = jnp.where(odd, x, y[i])",
        "y[i] = x",
        f"{FREE} -k test_u_dog",
    ),
    "the weights of U-DoG do not grow": Fault(
        "optax_avg/optimizers/accelerated.py",
        "now = state.weight_now + jnp.where(odd, distance, 0)",
        "now = state.weight_now",
        f"{FREE} -k test_u_dog",
    ),
    "Polyak's step is divided by the plain norm": Fault(
        "optax_avg/optimizers/polyak_steps.py",
        "n = _numerics.dot(*_float_leaves(updates, made))",
        "n = _numerics.dot(*_float_leaves(updates, updates))",
        f"{FREE} -k in_other_units",
    ),
    "the slack does not move": Fault(
        "optax_avg/optimizers/polyak_steps.py",
        "return gamma, h * (s + gamma)",
        "return gamma, s",
        f"{FREE} -k slack_solves",
    ),
    "the step of SPL+ has no bound": Fault(
        "optax_avg/optimizers/polyak_steps.py",
        "eta = jnp.minimum(eta, 1 / (1 - beta))",
        "eta = jnp.minimum(eta, jnp.inf)",
        f"{FREE} -k subgradient_method",
    ),
    "the quantile takes the rate of the weights": Fault(
        "optax_avg/optimizers/polyak_steps.py",
        "(a - rate_a * (1 - eta))",
        "(a - rate * (1 - eta))",
        f"{FREE} -k minimises_its_model",
    ),
    "the threshold of adaptive-k is the mean of the losses": Fault(
        "optax_avg/losses.py",
        "new.loss_mean / (jnp.sqrt(new.loss_square) + eps)",
        "new.loss_mean",
        f"{LOSSES} -k adaptive_k",
    ),
    "CVaR weighs whole examples alone": Fault(
        "optax_avg/losses.py",
        "jnp.clip(k - place, 0, 1) / k",
        "(place < k) / jnp.sum(place < k)",
        f"{LOSSES} -k cvar",
    ),
    "a z-score is among all classes": Fault(
        "optax_avg/losses.py",
        "(labels[:, None] == labels[None, :]) & finite[None, :]",
        "(labels[:, None] == labels[:, None]) & finite[None, :]",
        f"{LOSSES} -k logits_by_class",
    ),
    "LaProp adds eps within the root": Fault(
        "optax_avg/optimizers/adaptive.py",
        "optax.scale_by_rms(b2, eps, eps_in_sqrt=False, bias_correction=True)",
        "optax.scale_by_rms(b2, eps, eps_in_sqrt=True, bias_correction=True)",
        f"{OPTIMIZERS_A} -k special_cases",
    ),
    "LaProp's second moment is biased": Fault(
        "optax_avg/optimizers/adaptive.py",
        "eps_in_sqrt=False, bias_correction=True)",
        "eps_in_sqrt=False, bias_correction=False)",
        f"{OPTIMIZERS_A} -k equals_the_paper",
    ),
    "AdaMomentum squares the gradient": Fault(
        "optax_avg/optimizers/adaptive.py",
        "update_moment_per_elem_norm(m, state.momentum_square, b2, 2)",
        "update_moment_per_elem_norm(updates, state.momentum_square, b2, 2)",
        f"{OPTIMIZERS_A} -k equals_the_paper",
    ),
    "AdaMomentum forgets eps": Fault(
        "optax_avg/optimizers/adaptive.py",
        "lambda x: x + eps, v)",
        "lambda x: x + 0 * eps, v)",
        f"{OPTIMIZERS_A} -k equals_the_paper",
    ),
    "diffGrad remembers an alias of the gradient": Fault(
        "optax_avg/optimizers/adaptive.py",
        "            state.last_gradient,\n            updates,\n",
        "            updates,\n            updates,\n",
        f"{OPTIMIZERS_A} -k 'equals_the_paper or half_of_adam'",
    ),
    "the last velocity is the only one": Fault(
        "optax_avg/optimizers/momenta.py",
        "lambda *v: sum(v) / len(v)",
        "lambda *v: v[-1]",
        f"{OPTIMIZERS_A} -k equals_the_paper",
    ),
    "Gravity counts from one": Fault(
        "optax_avg/optimizers/momenta.py",
        "weights.advance(weight, state.gravity_step, 1,",
        "weights.advance(weight, state.gravity_step + 1, 1,",
        f"{OPTIMIZERS_A} -k equals_the_paper",
    ),
    "Gravity begins at rest": Fault(
        "optax_avg/optimizers/momenta.py",
        "lambda n: (std * n).astype(n.dtype), noise)",
        "lambda n: (0 * std * n).astype(n.dtype), noise)",
        f"{OPTIMIZERS_A} -k random_steps",
    ),
    "NAG-GS takes gamma before its update": Fault(
        "optax_avg/optimizers/momenta.py",
        "b = a / new_gamma",
        "b = a / state.nag_gamma",
        f"{OPTIMIZERS_A} -k iterates_of_the_paper",
    ),
    "NAG-GS does not pull v to x": Fault(
        "optax_avg/optimizers/momenta.py",
        "/ (1 + b * mu)).astype(d.dtype)",
        "/ (1 + 0 * b * mu)).astype(d.dtype)",
        f"{OPTIMIZERS_A} -k 'iterates_of_the_paper or special_cases'",
    ),
    "the step ahead stays": Fault(
        "optax_avg/optimizers/optimistic.py",
        "lambda old, step, new: old - step - new,",
        "lambda old, step, new: 0 * old - step - new,",
        f"{OPTIMIZERS_A} -k 'equals_the_paper or undoes_its_last_step'",
    ),
    "the step ahead takes the newest momentum": Fault(
        "optax_avg/optimizers/optimistic.py",
        "h = optax.tree.update_moment(m, state.theta, b1, 1)",
        "h = optax.tree.update_moment(m, theta, b1, 1)",
        f"{OPTIMIZERS_A} -k equals_the_paper",
    ),
    "the second moment may fall": Fault(
        "optax_avg/optimizers/optimistic.py",
        "largest = jax.tree.map(jnp.maximum, state.largest_square, v)",
        "largest = jax.tree.map(lambda _, new: new, state.largest_square, v)",
        f"{OPTIMIZERS_A} -k equals_the_paper",
    ),
    "the prediction is made one gradient early": Fault(
        "optax_avg/optimizers/optimistic.py",
        "r, reg, t >= r)",
        "r, reg, t >= r - 1)",
        f"{OPTIMIZERS_A} -k equals_the_paper",
    ),
    "the prediction weighs the older gradients": Fault(
        "optax_avg/optimizers/optimistic.py",
        "_along_first(c, gs) * gs[1:], 0), known)",
        "_along_first(c, gs) * gs[:-1], 0), known)",
        f"{OPTIMIZERS_A} -k equals_the_paper",
    ),
    "a system without a solution is solved": Fault(
        "optax_avg/optimizers/optimistic.py",
        "solved = enough & jnp.all(jnp.isfinite(c))",
        "solved = enough | jnp.all(jnp.isfinite(c))",
        f"{OPTIMIZERS_A} -k 'equals_the_paper or are_finite'",
    ),
    "predictions from dependent gradients are noise": Fault(
        "optax_avg/optimizers/optimistic.py",
        "jnp.maximum(reg, least) * eye",
        "reg * eye",
        f"{OPTIMIZERS_A} -k dependent_gradients",
    ),
    "cautious steps oppose the gradient": Fault(
        "optax_avg/optimizers/signs.py",
        "~(jnp.sign(u) * jnp.sign(g).astype(u.dtype) >= 0)",
        "~(jnp.sign(u) * jnp.sign(g).astype(u.dtype) <= 0)",
        f"{OPTIMIZERS_A} -k 'equals_the_paper or never_oppose'",
    ),
    "cautious steps are not enlarged": Fault(
        "optax_avg/optimizers/signs.py",
        "wide / jnp.maximum(share, LEAST_SHARE), 0)",
        "wide, 0)",
        f"{OPTIMIZERS_A} -k 'equals_the_paper or thousandfold'",
    ),
    "cautious steps grow without a bound": Fault(
        "optax_avg/optimizers/signs.py",
        "LEAST_SHARE = 1e-3",
        "LEAST_SHARE = 1e-9",
        f"{OPTIMIZERS_A} -k thousandfold",
    ),
    "cautious steps hide NaN": Fault(
        "optax_avg/optimizers/signs.py",
        "~(jnp.sign(u) * jnp.sign(g).astype(u.dtype) >= 0)",
        "jnp.sign(u) * jnp.sign(g).astype(u.dtype) < 0",
        f"{OPTIMIZERS_A} -k not_finite_on",
    ),
    "Grams keeps the sign of the update": Fault(
        "optax_avg/optimizers/signs.py",
        "turned = -jnp.sign(g).astype(u.dtype) * jnp.abs(u)",
        "turned = u",
        f"{OPTIMIZERS_A} -k equals_the_paper",
    ),
    "MARS corrects the first gradient": Fault(
        "optax_avg/optimizers/variance.py",
        "first = state.mars_step == 0",
        "first = state.mars_step < 0",
        f"{OPTIMIZERS_A} -k equals_the_paper",
    ),
    "MARS does not clip": Fault(
        "optax_avg/optimizers/variance.py",
        "factor = jnp.where(n > 1, 1 / jnp.where(n > 1, n, 1), 1)",
        "factor = jnp.where(n > 1, 1.0, 1)",
        f"{OPTIMIZERS_A} -k 'equals_the_paper or special_cases'",
    ),
    "exact MARS compares with the last batch": Fault(
        "optax_avg/optimizers/variance.py",
        "before = _like_gradients(grads_at_previous, updates)",
        "before = state.mars_gradient",
        f"{OPTIMIZERS_A} -k exact_mars",
    ),
    "multi-momentum forgets the other clusters": Fault(
        "optax_avg/optimizers/variance.py",
        " + jnp.sum(p * m, 0)",
        " + 0 * jnp.sum(p * m, 0)",
        f"{OPTIMIZERS_A} -k multi_momentum",
    ),
    "multi-momentum moves all clusters": Fault(
        "optax_avg/optimizers/variance.py",
        "return jnp.where(own(m), new, m).astype(m.dtype)",
        "return jnp.where(own(m) | True, new, m).astype(m.dtype)",
        f"{OPTIMIZERS_A} -k multi_momentum",
    ),
    "memories of the optimizers are as narrow as the parameters": Fault(
        "optax_avg/optimizers/_wide.py",
        "return _numerics.wide(jnp.asarray(leaf)) if there else optax.MaskedNode()",
        "return jnp.asarray(leaf) if there else optax.MaskedNode()",
        f"{OPTIMIZERS_A} -k memories_are_wide",
    ),
    "updates of the optimizers are wide": Fault(
        "optax_avg/optimizers/_wide.py",
        "else made.astype(jnp.result_type(update))",
        "else made",
        f"{OPTIMIZERS_A} -k memories_are_wide",
    ),
    "a missing gradient is not named": Fault(
        "optax_avg/optimizers/_wide.py",
        "if _leaves.is_gradient(x) and not _leaves.is_gradient(g):",
        "if _leaves.is_gradient(x) and False:",
        f"{OPTIMIZERS_A} -k missing_gradient",
    ),
    "NAG-GS spends its first gradient on nothing": Fault(
        "optax_avg/optimizers/momenta.py",
        "((d - b * g) / (1 + b * mu))",
        "((d - (state.nag_step > 0) * b * g) / (1 + b * mu))",
        f"{OPTIMIZERS_A} -k 'number_of_its_authors or iterates_of_the_paper'",
    ),
    "the last gradient of an optimizer is an alias": Fault(
        "optax_avg/optimizers/_wide.py",
        "copy = lambda x, old: jnp.array(x, old.dtype, copy=True)",
        "copy = lambda x, old: x.astype(old.dtype)",
        f"{OPTIMIZERS_A} -k last_gradient",
    ),
    "the last gradient of an optimizer is as narrow as the newest": Fault(
        "optax_avg/optimizers/_wide.py",
        "copy = lambda x, old: jnp.array(x, old.dtype, copy=True)",
        "copy = lambda x, old: jnp.array(x, copy=True)",
        f"{OPTIMIZERS_A} -k last_gradient",
    ),
    "Grams takes a direction where the optimizer takes no step": Fault(
        "optax_avg/optimizers/signs.py",
        "return jnp.where(u == 0, u, turned)",
        "return turned",
        f"{OPTIMIZERS_A} -k skips",
    ),
    "multi-momentum takes a vector of clusters": Fault(
        "optax_avg/optimizers/variance.py",
        "one = jnp.ndim(cluster) == 0",
        "one = True",
        f"{OPTIMIZERS_A} -k needs_a_cluster",
    ),
    "shares of clusters may be NaN": Fault(
        "optax_avg/optimizers/variance.py",
        "np.all(shares >= 0) and abs(shares.sum() - 1) <= 1e-5",
        "np.all(~(shares < 0)) and not abs(shares.sum() - 1) > 1e-5",
        f"{OPTIMIZERS_A} -k wrong_arguments",
    ),
    "exact MARS compares with gradients of any shape": Fault(
        "optax_avg/optimizers/variance.py",
        "jnp.shape(part) == g.shape",
        "True",
        f"{OPTIMIZERS_A} -k parameters_before_must",
    ),
    "memories of the optimizers lie whole on every device": Fault(
        "optax_avg/optimizers/_wide.py",
        "return memory + jnp.broadcast_to(zeros, memory.shape)",
        "return memory",
        f"{CONTRACT} -k 'jitted_init_keeps_sharding and nag_gs'",
    ),
    "error feedback forgets older errors": Fault(
        "optax_avg/optimizers/feedback.py",
        "error = errors[i] + drift - sent",
        "error = drift - sent",
        f"{FEEDBACK} -k test_reference",
    ),
    "EF21 forgets its estimate": Fault(
        "optax_avg/optimizers/feedback.py",
        "estimates[i] = estimates[i] + sent",
        "estimates[i] = sent",
        f"{FEEDBACK} -k test_reference",
    ),
    "EControl weakens the gradient, not the error": Fault(
        "optax_avg/optimizers/feedback.py",
        "drift + strength * errors[i] if errors",
        "strength * drift + errors[i] if errors",
        f"{FEEDBACK} -k test_reference",
    ),
    "the mean of the estimates moves by what one worker sends": Fault(
        "optax_avg/optimizers/feedback.py",
        "means[i] = means[i] + result",
        "means[i] = means[i] + sent",
        f"{FEEDBACK} -k without_compression",
    ),
    "gathered messages are summed": Fault(
        "optax_avg/optimizers/feedback.py",
        "total(messages) / messages[0].shape[0]",
        "total(messages)",
        f"{FEEDBACK} -k test_reference",
    ),
    "a worker sends what is not finite": Fault(
        "optax_avg/optimizers/feedback.py",
        "signal = jnp.where(finite, signal, 0)",
        "signal = jnp.where(finite, signal, signal)",
        f"{FEEDBACK} -k not_finite_waits",
    ),
    "all workers wait for the one whose gradient is not finite": Fault(
        "optax_avg/optimizers/feedback.py",
        "_numerics.all_finite_here(",
        "_numerics.all_finite(",
        f"{FEEDBACK} -k not_finite_waits",
    ),
    "sums of a gradient that a worker sends may overflow": Fault(
        "optax_avg/optimizers/feedback.py",
        "jnp.abs(v) < limit",
        "jnp.isfinite(v)",
        f"{FEEDBACK} -k 'too_large and low_rank'",
    ),
    "the rows of every leaf are its first axis": Fault(
        "optax_avg/optimizers/compressors.py",
        "splits = range(1, len(shape))",
        "splits = [1]",
        f"{FEEDBACK} -k 'rows_and_columns or kernels_of'",
    ),
    "the noise of Bayes-SAM keeps the first number of examples": Fault(
        "optax_avg/optimizers/bayes.py",
        "num_examples=jnp.asarray(num_data, jnp.float32)",
        "num_examples=state.num_examples",
        f"{BSAM} -k injected",
    ),
    "memories of workers are broadcast": Fault(
        "optax_avg/optimizers/feedback.py",
        "if jnp.shape(g) != jnp.shape(memory):",
        "if False:",
        f"{FEEDBACK} -k not_broadcast",
    ),
    "the random places are those of the first step": Fault(
        "optax_avg/optimizers/feedback.py",
        "jax.random.fold_in(jax.random.fold_in(key, step), leaf)",
        "jax.random.fold_in(key, leaf)",
        f"{FEEDBACK} -k places_change",
    ),
    "the largest elements are those with the largest sign": Fault(
        "optax_avg/optimizers/compressors.py",
        "lax.top_k(jnp.abs(flat), count(flat.size))",
        "lax.top_k(flat, count(flat.size))",
        f"{FEEDBACK} -k contraction_of_the_largest",
    ),
    "signs have the largest size": Fault(
        "optax_avg/optimizers/compressors.py",
        "jnp.sum(jnp.abs(flat)) / max(flat.size, 1)",
        "jnp.max(jnp.abs(flat), initial=0)",
        f"{FEEDBACK} -k contraction_of_signs",
    ),
    "the columns of a factor are not orthonormal": Fault(
        "optax_avg/optimizers/compressors.py",
        'jnp.linalg.qr(jnp.dot(matrix, q, precision="highest"))[0]',
        'jnp.dot(matrix, q, precision="highest")',
        f"{FEEDBACK} -k sent_exactly",
    ),
    "bits are counted as numbers": Fault(
        "optax_avg/optimizers/compressors.py",
        "x.size * x.dtype.itemsize",
        "x.size * 4",
        f"{FEEDBACK} -k 'test_bytes or travels'",
    ),
    "Bayes-SAM ascends along the gradient": Fault(
        "optax_avg/optimizers/bayes.py",
        "radius * (g / s)",
        "radius * g",
        f"{BSAM} -k algorithm_of_the_paper",
    ),
    "Bayes-SAM steps by the precision from before": Fault(
        "optax_avg/optimizers/bayes.py",
        "-lr * (m / s), 0), m, s)",
        "-lr * (m / s), 0), m, state.precision)",
        f"{BSAM} -k algorithm_of_the_paper",
    ),
    "the precision follows the gradient without its root": Fault(
        "optax_avg/optimizers/bayes.py",
        "jnp.sqrt(s) * jnp.abs(g)",
        "jnp.abs(g)",
        f"{BSAM} -k 'settles or algorithm_of_the_paper'",
    ),
    "every sample of Bayes-SAM has the same noise": Fault(
        "optax_avg/optimizers/bayes.py",
        "jax.random.fold_in(state.noise_key, state.bayes_step)",
        "state.noise_key",
        f"{BSAM} -k variance_of_the_posterior",
    ),
    "devices draw one sample": Fault(
        "optax_avg/optimizers/bayes.py",
        "key = jax.random.fold_in(key, lax.axis_index(name))",
        "del name",
        f"{BSAM} -k samples_of_their_own",
    ),
    "bsam does not report its place": Fault(
        "optax_avg/optimizers/bayes.py",
        '_sight.report("bsam", received=updates, emitted=steps)',
        "pass",
        f"{BSAM} -k check_of_chains",
    ),
    "variances of batches are averaged without their means": Fault(
        "optax_avg/frameworks/_pooling.py",
        "pool.pool_within / var_scale + pool.pool_between / scale**2",
        "pool.pool_within / var_scale",
        f"{BATCH_STATS} -k two_batches_of_one_feature",
    ),
    "spread between batches is scaled once": Fault(
        "optax_avg/frameworks/_pooling.py",
        "pool.pool_between / scale**2",
        "pool.pool_between / scale",
        f"{BATCH_STATS} -k two_batches_of_one_feature",
    ),
    "all batches weigh the same": Fault(
        "optax_avg/frameworks/_pooling.py",
        "    count = seen / features\n",
        "    count = 1.0 + 0 * seen / features\n",
        f"{BATCH_STATS} -k two_batches_of_one_feature",
    ),
    "an empty batch is absorbed": Fault(
        "optax_avg/frameworks/_pooling.py",
        "jnp.where(w > 0, new, old)",
        "jnp.where(w > -1, new, old)",
        f"{BATCH_STATS} -k pool_is_the_population",
    ),
    "momenta are those that float32 has": Fault(
        "optax_avg/frameworks/_pooling.py",
        "[float(str(number)) for number in numbers]",
        "[float(number) for number in numbers]",
        f"{BATCH_STATS} -k as_they_were_written",
    ),
    "masked values count": Fault(
        "optax_avg/frameworks/_pooling.py",
        "x.size if mask is None else jnp.sum(jnp.broadcast_to(mask, x.shape))",
        "x.size",
        f"{BATCH_STATS} -k masked",
    ),
    "exact is the one pass": Fault(
        "optax_avg/frameworks/_pooling.py",
        "[[name] for name in called] if exact else",
        "[[name] for name in called] if not stats else",
        f"{BATCH_STATS} -k later_layers",
    ),
    "an iterator loses its first batch": Fault(
        "optax_avg/frameworks/_pooling.py",
        "itertools.chain([first], iterator)",
        "iterator",
        f"{BATCH_STATS} -k read_once",
    ),
    "a layer of nnx keeps what its last call left": Fault(
        "optax_avg/frameworks/nnx.py",
        "    layer.mean[...], layer.var[...] = start\n    return out",
        "    return out",
        f"{BATCH_STATS} -k shared_layers_of_nnx",
    ),
    "statistics of nnx are computed with Dropout": Fault(
        "optax_avg/frameworks/nnx.py",
        "        copy.eval()\n",
        "        copy.train()\n",
        f"{BATCH_STATS} -k shared_layers_of_nnx",
    ),
    "a call within a call of linen counts twice": Fault(
        "optax_avg/frameworks/linen.py",
        "            or layer.path in inside\n",
        "",
        f"{BATCH_STATS} -k counts_once",
    ),
    "a layer of linen keeps what its last call left": Fault(
        "optax_avg/frameworks/linen.py",
        'kept = {"mean": start[0], "var": start[1], **pool._asdict()}',
        "kept = pool._asdict()",
        f"{BATCH_STATS} -k shared_layers_of_linen",
    ),
    "Equinox divides the statistics by a count of zero": Fault(
        "optax_avg/frameworks/equinox.py",
        "jnp.full_like(entries[marker], 2**30)",
        "jnp.full_like(entries[marker], 1)",
        f"{BATCH_STATS} -k two_batches_in_equinox",
    ),
    "the perturbed pass leaves its statistics": Fault(
        "optax_avg/frameworks/nnx.py",
        "        nnx.update(pieces.nodes, _known(after, rest))\n",
        "        there = jax.tree.map(lambda x: x + 0.1, params)\n"
        "        nnx.update(pieces.nodes, at(there, rest, pieces)[0][1][1])\n",
        f"{NNX} -k clean_pass",
    ),
    "the clean pass leaves nothing": Fault(
        "optax_avg/frameworks/nnx.py",
        "        nnx.update(pieces.nodes, _known(after, rest))\n",
        "",
        f"{NNX} -k clean_pass",
    ),
    "rules with a schedule start anew at each step": Fault(
        "optax_avg/frameworks/_memory.py",
        "any(x is clock for line in traced.eqns for x in line.invars)",
        "False",
        f"{NNX} -k rules_with_a_state",
    ),
    "the state of any rule will do": Fault(
        "optax_avg/frameworks/_memory.py",
        '[getattr(x, "shape", None) for x in given] != [x.shape for x in wanted]',
        "given is wanted",
        f"{EQUINOX} -k state_of_another_rule",
    ),
    "variables of a rule stay as they were": Fault(
        "optax_avg/frameworks/nnx.py",
        "                variable[...] = leaf\n",
        "                _ = leaf\n",
        f"{NNX} -k rules_with_a_state",
    ),
    "an averaged model shares arrays with the model": Fault(
        "optax_avg/frameworks/nnx.py",
        'return leaf.copy() if hasattr(leaf, "copy") else leaf',
        "return leaf",
        f"{NNX} -k shares_no_array",
    ),
    "an averaged model shares the parameters that are not averaged": Fault(
        "optax_avg/frameworks/nnx.py",
        "averages, rest = jax.tree.map(_copied, (averages, rest))",
        "rest = jax.tree.map(_copied, rest)",
        f"{NNX} -k leaves_out_are_copied",
    ),
    "passes of Equinox share a state": Fault(
        "optax_avg/frameworks/equinox.py",
        "        args, kwargs = jax.tree.map(lambda x: x, (args, kwargs))\n",
        "",
        f"{EQUINOX} -k every_pass_uses_up",
    ),
    "derived layers of Equinox lose what they add": Fault(
        "optax_avg/frameworks/equinox.py",
        "_recording_kind(type(layer))",
        "_recording_kind(eqx.nn.BatchNorm)",
        f"{BATCH_STATS} -k derived_layer_of_equinox",
    ),
    "the counts of an ensemble of Equinox are one": Fault(
        "optax_avg/frameworks/equinox.py",
        "jnp.full_like(entries[marker], 2**30)",
        "jnp.array(2**30)",
        f"{BATCH_STATS} -k stacked_models_of_equinox",
    ),
    "reading the momenta multiplies zero by infinity": Fault(
        "optax_avg/frameworks/_pooling.py",
        "(1 - w) * pool.pool_between + (1 - w) * w * e * e",
        "(1 - w) * (pool.pool_between + w * e**2)",
        f"{BATCH_STATS} -k nothing_on_the_way",
    ),
    "a model that is not called keeps its statistics": Fault(
        "optax_avg/frameworks/_pooling.py",
        "    if not called:\n",
        "    if not called and exact:\n",
        f"{BATCH_STATS} -k models_that_are_not_called",
    ),
    "an averaged model has all parameters averaged": Fault(
        "optax_avg/frameworks/nnx.py",
        "nnx.split(model, optimizer.wrt, ...)",
        "nnx.split(model, nnx.Param, ...)",
        f"{NNX} -k averaged_model_of_some_variables",
    ),
    "extra arguments are lost in linen": Fault(
        "optax_avg/frameworks/linen.py",
        "functools.partial(tx.update, **extra)",
        "tx.update",
        f"{LINEN} -k extra_arguments_reach",
    ),
    "statistics go to the optimizer": Fault(
        "optax_avg/frameworks/linen.py",
        "        if _STATS in extra:\n",
        "        if _STATS in replaced:\n",
        f"{LINEN} -k no_field_takes",
    ),
    "a step of linen keeps the optimizer of one call": Fault(
        "optax_avg/frameworks/linen.py",
        "return stepped.replace(tx=tx)",
        "return stepped",
        f"{LINEN} -k extra_arguments_reach",
    ),
    "Equinox forgets the state of a rule": Fault(
        "optax_avg/frameworks/equinox.py",
        "return inner(params, rule_state, rest, args, kwargs)",
        "return inner(params, inner.init(params), rest, args, kwargs)",
        f"{EQUINOX} -k rule_with_a_state",
    ),
    "models of nnx get no hint": Fault(
        "optax_avg/_leaves.py",
        'if "flax" in origins and not hasattr(params, "unfreeze"):',
        'if "haiku" in origins and not hasattr(params, "unfreeze"):',
        f"{NNX} -k told_what_to_pass",
    ),
    "narrow statistics are summed as narrow": Fault(
        "optax_avg/frameworks/_pooling.py",
        "jnp.full(jnp.shape(like), start, _numerics.float32_or_wider(like.dtype))",
        "jnp.full(jnp.shape(like), start, like.dtype)",
        f"{BATCH_STATS} -k narrow_statistics",
    ),
    "a hidden order is any order": Fault(
        "optax_avg/frameworks/_pooling.py",
        "    if hidden and exact:\n",
        "    if hidden and not exact:\n",
        f"{BATCH_STATS} -k compiled_program_hides",
    ),
    "devices count their own values": Fault(
        "optax_avg/frameworks/_pooling.py",
        "return count if axes is None else lax.psum(count, axes)",
        "return count",
        f"{BATCH_STATS} -k join_a_mapped_axis",
    ),
    "a tree of bools that can be called is a function": Fault(
        "optax_avg/_leaves.py",
        "return callable(where) and not is_tree",
        "return callable(where)",
        f"{EQUINOX} -k like_the_model",
    ),
    "a worker that does not take part counts": Fault(
        "optax_avg/workers/sync.py",
        "counts = finite & takes_part",
        "counts = finite",
        f"{WORKERS} -k 'fedau or nobody'",
    ),
    "a worker that is not finite counts": Fault(
        "optax_avg/workers/sync.py",
        "counts = finite & takes_part",
        "counts = takes_part",
        f"{WORKERS} -k 'comes_to_the_others or stays_out'",
    ),
    "the outer optimizer sees the displacement, not its negative": Fault(
        "optax_avg/workers/sync.py",
        "jax.tree.map(jnp.negative, z), outer_state, anchor",
        "z, outer_state, anchor",
        f"{WORKERS} -k 'reference and diloco'",
    ),
    "weights are divided by the number of workers": Fault(
        "optax_avg/workers/sync.py",
        "return weight, _rounds.total(jnp.where(counts, weight, 0), axes), ()",
        "return weight, jnp.asarray(_rounds.number(axes)), ()",
        f"{WORKERS} -k 'reference and fedavg'",
    ),
    "FedAU forgets that a round without its worker has passed": Fault(
        "optax_avg/workers/participation.py",
        "waited=jnp.where(ends, 0, waited)",
        "waited=jnp.where(ends, 0, 0)",
        f"{WORKERS} -k weights_of_fedau",
    ),
    "FedAU has no cutoff": Fault(
        "optax_avg/workers/participation.py",
        "ends = takes_part | (waited >= cutoff)",
        "ends = jnp.asarray(takes_part)",
        f"{WORKERS} -k weights_of_fedau",
    ),
    "a round without workers moves the outer optimizer": Fault(
        "optax_avg/workers/sync.py",
        "after = _rounds.chosen(present, after, state)",
        "after = after",
        f"{WORKERS} -k changes_nothing_common",
    ),
    "the displacement begins at the common point before rounding": Fault(
        "optax_avg/workers/sync.py",
        "_numerics.widen(p) - _numerics.widen(a.astype(p.dtype))",
        "_numerics.widen(p) - a",
        f"{WORKERS} -k small_outer_steps",
    ),
    "the collectives of a round run in every step": Fault(
        "optax_avg/workers/_rounds.py",
        "return lax.cond(due, meet, stay, updates, state, x)",
        "return chosen(due, meet(updates, state, x), (updates, state))",
        f"{WORKERS} -k 'between_rounds and gossip'",
    ),
    "gossip hears one neighbour twice": Fault(
        "optax_avg/workers/gossip.py",
        "for shift in (1, -1)",
        "for shift in (1, 1)",
        f"{WORKERS} -k 'reference and gossip'",
    ),
    "the share of a neighbour that is not finite is lost": Fault(
        "optax_avg/workers/gossip.py",
        'kept = 1 - share * (left["finite"] + right["finite"])',
        "kept = 1 - 2 * share + 0 * left['finite']",
        f"{WORKERS} -k gossip_leaves_out",
    ),
    "the variance of a mean is not restored": Fault(
        "optax_avg/workers/_rounds.py",
        "* (z - m)\n\n",
        "* 0 + z\n\n",
        f"{WORKERS} -k 'reference and variance'",
    ),
    "variances of a worker's parts are taken part by part": Fault(
        "optax_avg/workers/_rounds.py",
        "average = lambda v: lax.pmean(jnp.mean(v), others) if others else jnp.mean(v)",
        "average = jnp.mean",
        f"{WORKERS} -k several_devices",
    ),
    "one device of a worker decides alone whether it is finite": Fault(
        "optax_avg/workers/_rounds.py",
        "return lax.pmin(finite.astype(jnp.int32), others) > 0 if others else finite",
        "return finite",
        f"{WORKERS} -k several_devices",
    ),
    "the common point is not rounded as the parameters are": Fault(
        "optax_avg/workers/_rounds.py",
        "goal = _numerics.widen(target.astype(x.dtype))",
        "goal = target",
        f"{WORKERS} -k rounded_once",
    ),
    "momentum is never averaged": Fault(
        "optax_avg/workers/states.py",
        "return jnp.where(divisor > 0, z.astype(x.dtype), x)",
        "return x",
        f"{WORKERS} -k 'reference and momentum'",
    ),
    "new workers of FedAU have the past of others": Fault(
        "optax_avg/workers/states.py",
        "lambda x, first: jnp.where(is_new, first, x)",
        "lambda x, first: x",
        f"{WORKERS} -k no_past",
    ),
    "an average in host memory comes back to the device": Fault(
        "optax_avg/averages/_rule.py",
        "            return put(state, jax.memory.Space.Host)\n\n        known",
        "            return state\n\n        known",
        f"{LAYOUT} -k host_memory_stays",
    ),
    "a learning rate makes integers float32": Fault(
        "optax_avg/optimizers/hessian_diagonals.py",
        "in_float32(optax.scale_by_learning_rate(rate))",
        "optax.scale_by_learning_rate(rate)",
        "tests/test_optimizers_adaptive.py -k integer_leaves",
    ),
    "each device has a threshold of its own": Fault(
        "optax_avg/robust/example_losses.py",
        "_mesh.everywhere(own, axis_name).reshape(-1)",
        "jnp.resize(own, n)",
        "tests/test_example_losses.py -k all_devices",
    ),
    "the loss of a row that is not finite counts": Fault(
        "optax_avg/robust/example_losses.py",
        "given = jnp.where(stack.valid, given, jnp.nan)",
        "given = jnp.where(True, given, jnp.nan)",
        "tests/test_example_losses.py -k counts_nowhere",
    ),
    "stacks have the axis names of one row": Fault(
        "optax_avg/optimizers/_wide.py",
        "stacks = _leaves.with_first_axis(getattr(state, field))",
        "stacks = getattr(state, field)",
        f"{LAYOUT} -k 'names_of_their_parameters and multi_momentum'",
    ),
    "norms of leaves have the axis names of the leaves": Fault(
        "optax_avg/optimizers/weight_norms.py",
        "_leaves.unboxed(radii)",
        "radii",
        f"{LAYOUT} -k 'names_of_their_parameters and norm_preserving'",
    ),
    "missing host memory is not named": Fault(
        "optax_avg/averages/_rule.py",
        "_mesh.require_memory(memory_kind)",
        "pass",
        f"{LAYOUT} -k without_host_memory",
    ),
}


def passes(tree: Path, tests: str) -> bool:
    """Runs tests in a copy of the tree."""
    options = "-x -q -n 0 -p no:cacheprovider --hypothesis-profile=no_shrinking"
    command = f"{sys.executable} -m pytest {options} {tests}"
    done = subprocess.run(command, shell=True, cwd=tree, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise SystemExit(f"{tests} did not run:\n{done.stdout[-2000:]}")
    return done.returncode == 0


def unsound(path: str, names: list[str], tree: Path) -> list[str]:
    """Faults of one file of tests whose tests fail before anything is broken."""
    selections = [FAULTS[name].tests.partition(" -k ")[2] for name in names]
    union = " or ".join(f"({selection.strip(QUOTE)})" for selection in selections)
    if all(selections) and passes(tree, f"{path} -k '{union}'"):
        return []
    return [name for name in names if not passes(tree, FAULTS[name].tests)]


def survives(name: str, tree: Path) -> bool:
    """Whether the tests of a fault pass in a tree with it."""
    fault = FAULTS[name]
    target = tree / fault.path
    text = target.read_text()
    if text.count(fault.old) != 1:
        raise SystemExit(
            f"{name}: the text to break stands {text.count(fault.old)} times"
        )
    target.write_text(text.replace(fault.old, fault.new))
    survived = passes(tree, fault.tests)
    target.write_text(text)
    return survived


def main() -> None:
    chosen = sys.argv[1:] or list(FAULTS)
    files: dict[str, list[str]] = {}
    for name in chosen:
        files.setdefault(FAULTS[name].tests.partition(" -k ")[0], []).append(name)
    workers = min(len(chosen), os.cpu_count() or 1)
    trees: queue.SimpleQueue[Path] = queue.SimpleQueue()

    def in_a_tree(work: Callable[..., T], *arguments: Any) -> T:
        tree = trees.get()
        try:
            return work(*arguments, tree)
        finally:
            trees.put(tree)

    failed = 0
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(workers) as pool:
        keep = shutil.ignore_patterns(".git", "out", ".venv*", "__pycache__", "docs")
        for i in range(workers):
            trees.put(shutil.copytree(ROOT, Path(folder) / str(i), ignore=keep))
        for found in pool.map(lambda x: in_a_tree(unsound, *x), files.items()):
            failed += len(found)
            for name in found:
                print(f"UNSOUND   {name}", flush=True)
        verdicts = pool.map(lambda name: in_a_tree(survives, name), chosen)
        for name, survived in zip(chosen, verdicts, strict=True):
            failed += survived
            print(f"{'SURVIVED' if survived else 'caught':9} {name}", flush=True)
    print(f"{len(chosen)} faults; {failed} survived or were unsound")
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
