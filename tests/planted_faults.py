"""Breaks the library in many ways and shows that a test falls for each.

    python tests/planted_faults.py [NAME ...]

Each fault replaces one piece of text in a copy of the tree; the named tests must fail
there, and pass without it. Exits with 1 if a fault survives.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Fault(NamedTuple):
    """One replacement in one file, and the tests that must notice."""

    path: str
    old: str
    new: str
    tests: str


CONTRACT = "tests/test_contract.py"
AVERAGING = "tests/test_averaging.py"
WEIGHTS = "tests/test_weights.py"
READOUT = "tests/test_readout.py"
WRITE_BACK = "tests/test_write_back.py"
SHARPNESS = "tests/test_sharpness.py"
FORMS = "tests/test_sharpness_forms.py"
LANDSCAPE = "tests/test_landscape.py"
LOCATION = "tests/test_location.py"
CLIPPING = "tests/test_clipping.py"
AGGREGATION = "tests/test_aggregation.py"
SURGERY = "tests/test_surgery.py"
TAIL_INDEX = "tests/test_tail_index.py"
POSTHOC = "tests/test_posthoc.py"
SNAPSHOTS = "tests/test_snapshots.py"
MERGING = "tests/test_merging.py"
CLI = "tests/test_cli.py"

FAULTS = {
    "pre-update parameters are averaged": Fault(
        "optax_avg/_tree.py",
        "optax.apply_updates(x, u)\n",
        "x\n",
        f"{AVERAGING} -k polynomial_average",
    ),
    "init aliases the parameters": Fault(
        "optax_avg/_tree.py",
        "jnp.array(x, dtype=dtype, copy=True)",
        "jnp.asarray(x, dtype=dtype)",
        f"{CONTRACT} -k init_copies",
    ),
    "decay is cast to bf16": Fault(
        "optax_avg/weights.py",
        'd = _tree.within("decay", decay, 0, 1)',
        'd = float(jnp.bfloat16(_tree.within("decay", decay, 0, 1)))',
        f"{WEIGHTS} -k equations",
    ),
    "arguments of the mix are swapped": Fault(
        "optax_avg/_accumulate.py",
        "a + w * (x - a))",
        "x + w * (a - x))",
        f"{AVERAGING} -k polynomial_average",
    ),
    "the debiased weight starts one late": Fault(
        "optax_avg/averaging.py",
        "t = (state.absorbed + 1)",
        "t = (state.absorbed + 2)",
        f"{AVERAGING} -k uniform_averages",
    ),
    "every micro-step counts": Fault(
        "optax_avg/_absorb.py",
        "(step - start) % every == 0",
        "(step - start) % every >= 0",
        f"{AVERAGING} -k window_is",
    ),
    "start is absorbed": Fault(
        "optax_avg/_absorb.py",
        "state.absorbed + (step > start)",
        "state.absorbed + 1",
        f"{AVERAGING} -k normalised_sum",
    ),
    "non-finite iterates pass": Fault(
        "optax_avg/_tree.py",
        "lax.optimization_barrier(s) == 0 for",
        "lax.optimization_barrier(s) != 1 for",
        f"{CONTRACT} -k left_out_whole",
    ),
    "finiteness is judged leaf by leaf": Fault(
        "optax_avg/_tree.py",
        "leaves = [x for x in jax.tree.leaves(tree) if x.size]",
        "leaves = [x for x in jax.tree.leaves(tree) if x.size][:1]",
        f"{AVERAGING} -k counters_of",
    ),
    "shards judge finiteness alone": Fault(
        "optax_avg/_tree.py",
        "if axes else condition",
        "if axes and False else condition",
        f"{CONTRACT} -k agrees_on_finiteness",
    ),
    "averages take the dtype of the parameters": Fault(
        "optax_avg/_tree.py",
        "dtype = float32_or_wider(x.dtype)\n    return",
        "dtype = x.dtype\n    return",
        f"{CONTRACT} -k keep_their_own_dtypes",
    ),
    "bf16 rounding of the iterate is forgotten": Fault(
        "optax_avg/_tree.py",
        "optax.apply_updates(x, u)\n",
        "x + u.astype(jnp.float32)\n",
        f"{AVERAGING} -k training_holds",
    ),
    "stochastic rounding rounds down": Fault(
        "optax_avg/_accumulate.py",
        "p.dtype) < p, far, near)",
        "p.dtype) < 0, far, near)",
        f"{AVERAGING} -k 'unbiased or moves'",
    ),
    "the compensation is dropped": Fault(
        "optax_avg/_accumulate.py",
        "return new, (y - (new.astype(wide) - a_wide)).astype(c.dtype)",
        "return new, jnp.zeros_like(c)",
        f"{AVERAGING} -k 'compensation or moves'",
    ),
    "the window forgets to wrap": Fault(
        "optax_avg/windows.py",
        "row = state.absorbed % k",
        "row = state.absorbed",
        f"{AVERAGING} -k window_is",
    ),
    "an unfilled window is averaged whole": Fault(
        "optax_avg/readout.py",
        "jnp.clip(absorbed, 1, ring.shape[0])",
        "ring.shape[0]",
        f"{AVERAGING} -k window_is",
    ),
    "bema corrects with the wrong power": Fault(
        "optax_avg/windows.py",
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
        "weight.retain(t, dt) * total + m",
        "0 * total + m",
        f"{AVERAGING} -k lr_weighted",
    ),
    "read before the first iterate": Fault(
        "optax_avg/readout.py",
        "found[i] = absorbed > 0,",
        "found[i] = absorbed >= 0,",
        f"{CONTRACT} -k reads_params_exactly",
    ),
    "same names overwrite each other": Fault(
        "optax_avg/readout.py",
        "if found[i] is not None:",
        "if False:",
        f"{READOUT} -k two_averages",
    ),
    "write-back touches what is not averaged": Fault(
        "optax_avg/write_back.py",
        "u if average is None else",
        "0 * u if average is None else",
        f"{WRITE_BACK} -k not_averaged",
    ),
    "write-back before there is an average": Fault(
        "optax_avg/write_back.py",
        "jnp.where(is_there, step.astype(u.dtype), u)",
        "step.astype(u.dtype)",
        f"{WRITE_BACK} -k before_the_first",
    ),
    "migration starts the optimizer anew": Fault(
        "optax_avg/migration.py",
        "moved.append(rest.pop(0)[1])",
        "moved.append(rest.pop(0)[1] * 0)",
        f"{READOUT} -k migration_keeps_the_optimizer",
    ),
    "the mask comes after the norm": Fault(
        "optax_avg/rules/offsets.py",
        "n = _tree.norm(tg)",
        "n = _tree.norm(grads)",
        f"{SHARPNESS} -k 'reference and sam_mask'",
    ),
    "the metric is applied once": Fault(
        "optax_avg/rules/offsets.py",
        "_tree.over(lambda g, t: t * g, params, tg, t)",
        "tg",
        f"{SHARPNESS} -k 'reference and asam'",
    ),
    "the offset is divided by a zero norm": Fault(
        "optax_avg/rules/offsets.py",
        "jnp.where(n > 0, r, 0) * (v / jnp.where(n > 0, n, 1))",
        "r / n * v",
        f"{FORMS} -k zero_gradients",
    ),
    "gsam removes the wrong part": Fault(
        "optax_avg/rules/combinations.py",
        "_tree.project_out(g0, gd)",
        "_tree.project_out(gd, g0)",
        f"{SHARPNESS} -k 'reference and gsam'",
    ),
    "friendly sam uses the new mean": Fault(
        "optax_avg/rules/combinations.py",
        "(-sigma, state.rule_memory[1])",
        "(-sigma, _ema(state.rule_memory, decay, g0)[1])",
        f"{SHARPNESS} -k 'reference and friendly'",
    ),
    "momentum sam ascends": Fault(
        "optax_avg/rules/combinations.py",
        "return _tree.scale(-1, ascent(params, v, radius_at(rho, state)))",
        "return ascent(params, v, radius_at(rho, state))",
        f"{SHARPNESS} -k 'reference and momentum'",
    ),
    "gam mixes up its gradients": Fault(
        "optax_avg/rules/combinations.py",
        "plus = _linear((alpha, g1), (1 - alpha, g3))",
        "plus = _linear((alpha, g3), (1 - alpha, g1))",
        f"{SHARPNESS} -k 'reference and gam'",
    ),
    "a NaN stays in memory": Fault(
        "optax_avg/sharpness.py",
        "jnp.where(finite, new, old)",
        "jnp.where(finite | True, new, old)",
        f"{FORMS} -k does_not_stay",
    ),
    "devices share the gradients of replicated parameters": Fault(
        "optax_avg/sharpness.py",
        "x = jax.tree.map(lambda leaf: _tree.vary(leaf, axes), x)",
        "pass",
        f"{FORMS} -k m_sharpness",
    ),
    "every step takes all gradients": Fault(
        "optax_avg/sharpness.py",
        "return lax.cond(rule.due(state), full, skip, g)",
        "return jax.tree.map("
        "lambda a, b: jnp.where(rule.due(state), a, b), full(g), skip(g))",
        f"{FORMS} -k evaluations_per_step",
    ),
    "the clean copy is not kept": Fault(
        "optax_avg/multi_call.py",
        "return displaced(state.clean_params, offset), state._replace(",
        "return displaced(params, offset), state._replace(",
        f"{SHARPNESS} -k 'three_forms and gam'",
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
        "optax_avg/location.py",
        "new[i] = jnp.where(finite, old[i] + taken, old[i])",
        "new[i] = old[i] + taken",
        f"{LOCATION} -k bad_samples",
    ),
    "huber forgets its share": Fault(
        "optax_avg/_proximal.py",
        "found._replace(leaves=[share(tau) * d for d in found.leaves])",
        "found",
        f"{LOCATION} -k 'reference and huber'",
    ),
    "newton stops after one step": Fault(
        "optax_avg/_proximal.py",
        "lambda pair: pair[1] > pair[0], ascend",
        "lambda pair: pair[1] < pair[0], ascend",
        f"{LOCATION} -k 'reference and linf'",
    ),
    "the radius moves the wrong way": Fault(
        "optax_avg/location.py",
        "jnp.exp(-tau.rate",
        "jnp.exp(tau.rate",
        f"{LOCATION} -k adaptive",
    ),
    "a spike enters the statistics": Fault(
        "optax_avg/clipping.py",
        "n = jnp.minimum(n, high)\n        # The plain",
        "n = jnp.minimum(n, jnp.inf)\n        # The plain",
        f"{CLIPPING} -k zscore",
    ),
    "the accumulator is not delayed": Fault(
        "optax_avg/clipping.py",
        "b if delay else after",
        "after if delay else b",
        f"{CLIPPING} -k 'reference and adagrad'",
    ),
    "a leaf stays at zero for ever": Fault(
        "optax_avg/clipping.py",
        "jnp.where(known, lambda_rel * gamma, INFINITY)",
        "lambda_rel * gamma",
        f"{CLIPPING} -k wakes_up",
    ),
    "decoupled sharpness has the wrong sign": Fault(
        "optax_avg/links.py",
        "_tree.wide(step) - lr",
        "_tree.wide(step) + lr",
        f"{SHARPNESS} -k decoupled",
    ),
    "the Gram matrix is not centred": Fault(
        "optax_avg/aggregation.py",
        "_stack.gram(stack._replace(valid=valid), shrink / unit, i)",
        "_stack.gram(stack._replace(valid=valid), shrink / unit)",
        f"{AGGREGATION} -k near_identical",
    ),
    "far rows overflow": Fault(
        "optax_avg/aggregation.py",
        "far = valid & (distance > FAR * unit)",
        "far = valid & False & (distance > FAR * unit)",
        f"{AGGREGATION} -k how_far",
    ),
    "a bad row is multiplied by zero": Fault(
        "optax_avg/_stack.py",
        "return product(jnp.where(like(stack.valid, x), x, 0))",
        "return product(x)",
        f"{AGGREGATION} -k bad_rows",
    ),
    "the last chunk counts columns twice": Fault(
        "optax_avg/_stack.py",
        "fresh = begin + jnp.arange(width) >= i * width",
        "fresh = begin + jnp.arange(width) >= 0",
        f"{AGGREGATION} -k chunks",
    ),
    "the network leaves out its last stage": Fault(
        "optax_avg/_stack.py",
        "            if q == p:\n",
        "            if q == p or p == 1 == q // 2:\n",
        f"{AGGREGATION} -k zeros_and_ones",
    ),
    "Krum counts itself among its neighbours": Fault(
        "optax_avg/aggregation.py",
        "others = valid[None] & ~jnp.eye(n, dtype=bool)",
        "others = valid[None] & jnp.ones((n, n), dtype=bool)",
        f"{AGGREGATION} -k krum_scores",
    ),
    "centered clipping forgets its location": Fault(
        "optax_avg/aggregation.py",
        "return leaves, stack.place(leaves, memory)",
        "return leaves, memory",
        f"{AGGREGATION} -k vclip",
    ),
    "the solver keeps negative coordinates": Fault(
        "optax_avg/surgery.py",
        "return v, jnp.where(free, v, slope) < -tolerance",
        "return v, jnp.where(free, 0, slope) < -tolerance",
        f"{SURGERY} -k equals_the_definition",
    ),
    "Bloop projects on the first gradient": Fault(
        "optax_avg/surgery.py",
        "reference = {i: jnp.where(first, 0, r) for i, r in reference.items()}",
        "reference = {i: jnp.where(False, 0, r) for i, r in reference.items()}",
        f"{SURGERY} -k bloop_by_hand",
    ),
    "differences of overlapping pairs": Fault(
        "optax_avg/tail_index.py",
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
        "optax_avg/posthoc/_profiles.py",
        "(j / t) ** g * newest",
        "(j / t) ** kind.gamma * newest",
        f"{POSTHOC} -k equal_profiles",
    ),
    "a window has one iterate more": Fault(
        "optax_avg/posthoc/_profiles.py",
        "(i > t - k)",
        "(i >= t - k)",
        f"{POSTHOC} -k windows",
    ),
    "fingerprints forget places": Fault(
        "optax_avg/posthoc/_integrity.py",
        "bits * (2 * place + 1)",
        "bits",
        f"{SNAPSHOTS} -k exchanged",
    ),
    "what comes back is not checked": Fault(
        "optax_avg/posthoc/_disk.py",
        "if number != leaf.fingerprint:",
        "if number < 0:",
        f"{SNAPSHOTS} -k another_step",
    ),
    "sums of snapshots in their own dtype": Fault(
        "optax_avg/posthoc/_reconstruct.py",
        "return [a + x * _tree.wide(leaf) for a",
        "return [(a + x * _tree.wide(leaf)).astype(leaf.dtype) for a",
        f"{SNAPSHOTS} -k half_precision",
    ),
    "later snapshots than the step count": Fault(
        "optax_avg/posthoc/_reconstruct.py",
        "and (step is None or record.step <= step)",
        "and (step is None or record.step != -step)",
        f"{SNAPSHOTS} -k earlier",
    ),
    "the step of resumption is removed": Fault(
        "optax_avg/posthoc/store.py",
        "if later > step:",
        "if later >= step:",
        f"{SNAPSHOTS} -k replaced",
    ),
    "dependent objectives are pivoted for ever": Fault(
        "optax_avg/surgery.py",
        "slope < -tolerance * most",
        "slope < -tolerance",
        f"{SURGERY} -k more_objectives",
    ),
    "dependent objectives keep the shift of the ridge": Fault(
        "optax_avg/surgery.py",
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
        "(xs[0] - x0) / density",
        "(xs[0] - x0)",
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
        "u, v = unit(a), unit(b)",
        "u, v = a, b",
        f"{MERGING} -k equals_the_reference",
    ),
    "Fisher merging forgets its weights": Fault(
        "optax_avg/merging/curvature.py",
        "total = sum(a * f for a, f in zip(w, shares, strict=True))",
        "total = sum(shares)",
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
    "the command replaces what is there": Fault(
        "optax_avg/cli/_checkpoints.py",
        "if os.path.lexists(out) and not force:",
        "if os.path.islink(out) and not force:",
        f"{CLI} -k without_force",
    ),
    "the command writes under the final name": Fault(
        "optax_avg/cli/_checkpoints.py",
        "new = Path(folder) / target.name",
        "new = target",
        f"{CLI} -k on_the_way",
    ),
    "the command merges four batches at once": Fault(
        "optax_avg/cli/_output.py",
        "total + leaves[i].nbytes > BATCH",
        "total + leaves[i].nbytes > 4 * BATCH",
        f"{CLI} -k few_leaves",
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


def main() -> None:
    chosen = sys.argv[1:] or list(FAULTS)
    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        keep = shutil.ignore_patterns(".git", "out", ".venv*", "__pycache__", "docs")
        shutil.copytree(ROOT, tree, ignore=keep)
        for name in chosen:
            fault = FAULTS[name]
            target = tree / fault.path
            text = target.read_text()
            if text.count(fault.old) != 1:
                raise SystemExit(
                    f"{name}: the text to break stands {text.count(fault.old)} times"
                )
            sound = passes(tree, fault.tests)
            target.write_text(text.replace(fault.old, fault.new))
            caught = not passes(tree, fault.tests)
            target.write_text(text)
            verdict = (
                "caught" if sound and caught else "SURVIVED" if sound else "UNSOUND"
            )
            print(f"{verdict:9} {name}", flush=True)
            if verdict != "caught":
                survivors.append(name)
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} faults caught")
    raise SystemExit(bool(survivors))


if __name__ == "__main__":
    main()
