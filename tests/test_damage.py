"""Damage to snapshots on disk: what is hurt is skipped by name, the rest is right."""

import contextlib
import gc
import io
import json
import random
import shutil
import sys
import warnings
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_avg as oa
from optax_avg.cli import _averages
from optax_avg.posthoc import SnapshotStore, _integrity

STEPS = [8, 12]
HURT = 12  # the last one, whose weight sequence stands for those before


@pytest.fixture(autouse=True)
def _abandoned_reads(monkeypatch):
    """Where one read of Orbax fails, it leaves coroutines behind, which complain."""
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: None)
    yield
    gc.collect()


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    """Snapshots of a power function, a recorded average, and parameters."""
    directory = tmp_path_factory.mktemp("intact")
    recorded = {"fast": oa.weights.ema(0.8)}
    tx = optax.chain(oa.power_ema(0.1, name="power_ema_0.1"), oa.average(recorded))
    params = {"a": jnp.arange(12.0).reshape(4, 3), "b": {"c": jnp.ones(3)}}
    state = tx.init(params)
    with SnapshotStore(directory, weights=recorded) as store:
        for step in range(1, max(STEPS) + 1):
            updates = jax.tree.map(jnp.cos, params)
            updates, state = tx.update(updates, state, params)
            params = optax.apply_updates(params, updates)
            if step in STEPS:
                store.save(state, step, params)
    return directory


QUERIES = {
    "reconstruct": lambda store: store.reconstruct(sigma_rel=0.08),
    "plan": lambda store: store.plan(half_life=3.0),
    "mean": lambda store: store.mean(),
    "steps named": lambda store: store.mean(
        steps=[s for s in (8, 12) if Path(store.directory, str(s)).exists()]
    ),
    "steps": lambda store: store.steps(),
    "inspect": lambda store: printed(store.directory),
}


def printed(directory):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        _averages.inspect(directory)
    return out.getvalue()


def answers(directory):
    """What a store says to each query, and what it warns of."""
    store, found = SnapshotStore(directory), {}
    for name, query in QUERIES.items():
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            answer = query(store)
        said = [str(w.message) for w in seen if "skipped" in str(w.message)]
        found[name] = jax.tree.map(np.asarray, answer), said
    return found


def equal(some, others):
    leaves, structure = jax.tree.flatten(some)
    rest, other = jax.tree.flatten(others)
    return structure == other and all(map(np.array_equal, leaves, rest))


@pytest.fixture(scope="module")
def known(intact, tmp_path_factory):
    """The right answers, and those of a store without the snapshot that is hurt."""
    copy = tmp_path_factory.mktemp("without") / "store"
    shutil.copytree(intact, copy)
    shutil.rmtree(copy / str(HURT))
    return answers(intact), answers(copy)


def check(directory, known, *steps):
    """Each answer is the right one, or says which snapshot it is without."""
    right, without = known
    for name, (answer, said) in answers(directory).items():
        assert all(any(f"step {s} " in line for s in steps) for line in said), said
        if not equal(answer, right[name][0]):
            assert said, f"{name} is another, and nothing is said"
            assert equal(answer, without[name][0]), (name, said)


def flip_a_bit(data, rng):
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def change_a_digit(data, rng):
    places = [i for i, byte in enumerate(data) if byte in b"0123456789"]
    if places:
        place = rng.choice(places)
        data[place] = ord(str((int(chr(data[place])) + rng.randrange(1, 10)) % 10))


def change_a_letter(data, rng):
    places = [i for i, byte in enumerate(data) if chr(byte).isalpha() and byte < 128]
    if places:
        data[rng.choice(places)] = rng.choice(b"abcdefghijklmnopqrstuvwxyz")


def cut_off(data, rng):
    del data[rng.randrange(len(data)) :]


def blank_out(data, rng):
    begin = rng.randrange(len(data))
    end = min(begin + 64, len(data))
    data[begin:end] = bytes(end - begin)


IN_A_FILE = [flip_a_bit, change_a_digit, change_a_letter, cut_off, blank_out]


def counterpart(path):
    """The file that is to another snapshot what this one is to its own."""
    here = next(p for p in path.parents if p.name == str(HURT))
    there = here.parent / "8"
    in_folder = lambda folder: sorted(p for p in folder.iterdir() if p.is_file())
    rank = in_folder(path.parent).index(path)
    files = in_folder(there / path.parent.relative_to(here))
    return files[min(rank, len(files) - 1)]


def hurt_files(intact, known, tmp_path, rng, each):
    """Hurts one file after another in ways that ``each`` chooses."""
    names = sorted(p.relative_to(intact) for p in (intact / str(HURT)).rglob("*"))
    for name in names:
        if not (intact / name).is_file():
            continue
        for harm in each([*IN_A_FILE, "delete", "exchange"], rng):
            shutil.rmtree(tmp_path / "copy", ignore_errors=True)
            shutil.copytree(intact, tmp_path / "copy")
            path = tmp_path / "copy" / name
            if harm == "delete":
                path.unlink()
            elif harm == "exchange":
                shutil.copy(counterpart(path), path)
            else:
                data = bytearray(path.read_bytes())
                if data:
                    harm(data, rng)
                path.write_bytes(data)
            try:
                check(tmp_path / "copy", known, HURT)
            except Exception as error:
                error.add_note(f"{harm} of {name}")
                raise


def test_any_file_may_be_hurt(intact, known, tmp_path):
    rng = random.Random(0)
    hurt_files(intact, known, tmp_path, rng, lambda harms, rng: [rng.choice(harms)])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_any_file_may_be_hurt_in_any_way(seed, intact, known, tmp_path):
    hurt_files(
        intact, known, tmp_path, random.Random(1 + seed), lambda harms, rng: harms
    )


def copy_over(item):
    def harm(directory):
        shutil.rmtree(directory / str(HURT) / item)
        shutil.copytree(directory / "8" / item, directory / str(HURT) / item)

    return harm


def remove(item):
    return lambda directory: shutil.rmtree(directory / str(HURT) / item)


ITEMS = ["averages", "sequences", "record"]


@pytest.mark.parametrize("item", ITEMS)
@pytest.mark.parametrize("harm", [copy_over, remove])
def test_items_of_other_snapshots_and_none(item, harm, intact, known, tmp_path):
    shutil.copytree(intact, tmp_path / "copy")
    harm(item)(tmp_path / "copy")
    check(tmp_path / "copy", known, HURT)


def test_snapshots_under_the_names_of_others(intact, tmp_path):
    shutil.copytree(intact, tmp_path / "moved")
    (tmp_path / "moved" / "12").rename(tmp_path / "moved" / "16")
    store = SnapshotStore(tmp_path / "moved")
    with pytest.warns(RuntimeWarning, match="step 16 is skipped .* of step 12"):
        found = store.mean()
    chex.assert_trees_all_equal(found, SnapshotStore(intact).mean(steps=[8]))
    (tmp_path / "moved" / "8").rename(tmp_path / "moved" / "12")
    (tmp_path / "moved" / "16").rename(tmp_path / "moved" / "8")
    with (
        pytest.warns(RuntimeWarning, match="its record is that of step"),
        pytest.raises(ValueError, match="no snapshot of 'parameters' could be read"),
    ):
        store.mean()


def record_of(directory, step):
    return directory / str(step) / "record" / "metadata"


@pytest.mark.parametrize("part", ["absorbed", "kinds", "leaves", "digests"])
def test_a_changed_record_is_noticed(part, intact, known, tmp_path):
    """Changes that leave a record which reads well, its checksum apart."""
    shutil.copytree(intact, tmp_path / "copy")
    path = record_of(tmp_path / "copy", HURT)
    record = json.loads(path.read_text())
    record[part] = dict(reversed(record[part].items())) | {"fast": 11}
    if part == "kinds":
        record["kinds"]["fast"] = {"power": 16.97}
    path.write_text(json.dumps(record))
    check(tmp_path / "copy", known, HURT)


def test_weights_of_another_run_are_noticed(intact, known, tmp_path):
    """As many of them, all finite, of an average that forgets faster."""
    weight = {"fast": oa.weights.ema(0.5)}
    tx = oa.average(weight)
    params = {"a": jnp.ones((4, 3)), "b": {"c": jnp.ones(3)}}
    state = tx.init(params)
    for _ in range(HURT):
        state = tx.update(params, state, params)[1]
    with SnapshotStore(tmp_path / "other", weights=weight) as store:
        store.save(state, HURT)
    shutil.copytree(intact, tmp_path / "copy")
    place = tmp_path / "copy" / str(HURT) / "sequences"
    shutil.rmtree(place)
    shutil.copytree(tmp_path / "other" / str(HURT) / "sequences", place)
    check(tmp_path / "copy", known, HURT)


def test_snapshots_without_checksums_are_read_with_a_warning(intact, tmp_path):
    shutil.copytree(intact, tmp_path / "copy")
    for step in STEPS:
        path = record_of(tmp_path / "copy", step)
        record = json.loads(path.read_text())
        old = {key: record[key] for key in ("step", "absorbed", "kinds", "leaves")}
        path.write_text(json.dumps(old))
    store = SnapshotStore(tmp_path / "copy")
    with pytest.warns(RuntimeWarning, match=r"steps \[8, 12\] were saved without chec"):
        found = store.reconstruct(sigma_rel=0.08)
    wanted = SnapshotStore(intact).reconstruct(sigma_rel=0.08)
    chex.assert_trees_all_equal(found, wanted)


@pytest.mark.parametrize("width", [256, 1024])
def test_round_numbers_hide_no_damage(width):
    """Rows of ones and twos that change places, and a block of ones that is lost."""
    x = np.ones((8, width), np.float32)
    x[3] = 2
    swapped, lost = x[[0, 3, 2, 1, 4, 5, 6, 7]], x.copy()
    lost[6] = 0
    number = lambda x: int(_integrity.signature([jnp.asarray(x)])[0][0])
    assert len({number(x), number(swapped), number(lost)}) == 3
