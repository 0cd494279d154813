"""Large arrays of Orbax checkpoints, read and written by parts."""

import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optax_avg.cli import _orbax_parts, _sources
from optax_avg.cli._checkpoints import open_checkpoint
from optax_avg.cli._sources import Leaf
from optax_avg.cli._targets import target_of
from optax_avg.cli._writing import ORBAX, write_checkpoint

shapes = st.lists(st.integers(1, 5), max_size=4).map(tuple)


@given(shapes, st.data())
def test_boxes_make_a_range(shape, data):
    x = np.arange(math.prod(shape)).reshape(shape)
    begin = data.draw(st.integers(0, x.size))
    end = data.draw(st.integers(begin, x.size))
    found = [np.ravel(x[box]) for box in _orbax_parts.boxes(shape, begin, end)]
    np.testing.assert_array_equal(np.concatenate([[], *found]), np.arange(begin, end))
    assert len(found) <= 2 * max(len(shape), 1)


@given(shapes, st.integers(1, 30), st.data())
def test_parts_are_regrouped_to_chunks(shape, most, data):
    x = np.arange(math.prod(shape))
    chunk = _orbax_parts.chunk_of(shape, most)
    assert math.prod(chunk) <= most
    cuts = data.draw(st.lists(st.integers(0, x.size), max_size=5).map(sorted))
    parts = np.split(x, cuts)
    made, count = np.full(shape, -1), 0
    for box, elements in _orbax_parts.in_chunks(shape, chunk, parts):
        assert elements.size <= math.prod(chunk)
        made[box] = elements.reshape(made[box].shape)
        count += 1
    np.testing.assert_array_equal(made.ravel(), x)
    assert count == math.prod(-(-n // c) for n, c in zip(shape, chunk, strict=True))


DTYPES = ("float32", "bfloat16", "float16", "int32", "bool", "complex64", "uint8")


def tree_of(shape):
    rng = np.random.default_rng(0)
    return {
        name: np.asarray(jnp.asarray(rng.normal(size=shape) * 9).astype(name))
        for name in DTYPES
    }


def written(tree, path, cut):
    """The checkpoint that is written of a tree whose leaves come in parts."""
    leaves = [Leaf((name,), x.shape, str(x.dtype)) for name, x in tree.items()]
    arrays = [*tree.values()]
    load = lambda i: iter(np.array_split(arrays[i].reshape(-1), cut))
    write_checkpoint(target_of(str(path), lambda path: ORBAX, [], False), leaves, load)


def restored(path):
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        found = reader.metadata(path)
        found = getattr(found, "item_metadata", found)
        how = ocp.RestoreArgs(restore_type=np.ndarray)
        args = dict.fromkeys(getattr(found, "tree", found), how)
        return reader.restore(path, args=ocp.args.PyTreeRestore(restore_args=args))


@pytest.mark.parametrize(
    "shape", [(997,), (40, 25), (3, 1, 331), (1000, 1), (7, 11, 13)]
)
def test_orbax_reads_what_is_written_by_parts(shape, tmp_path, monkeypatch):
    monkeypatch.setattr(_sources, "BATCH", 500)
    tree = tree_of(shape)
    written(tree, tmp_path / "made", 7)
    found = restored(tmp_path / "made")
    for name, x in tree.items():
        assert found[name].dtype == x.dtype
        assert found[name].shape == x.shape
        assert found[name].tobytes() == x.tobytes()
    assert ORBAX.stranger(str(tmp_path / "made")) == ""
    # It is read by parts, too.
    source = open_checkpoint(str(tmp_path / "made"))
    for i, leaf in enumerate(source.leaves):
        assert source.by_parts(i)
        part = source.read_part(i, 3, leaf.size - 2)
        assert part.tobytes() == tree[leaf.name].reshape(-1)[3:-2].tobytes()


SAVED = {
    "in chunks": ({}, {"chunk_byte_size": 400}),
    "in files": ({"use_ocdbt": False}, {"chunk_byte_size": 400}),
    "as zarr3": ({"use_zarr3": True}, {"chunk_byte_size": 400}),
    "as it is": ({}, {}),
}


@pytest.mark.parametrize("how", SAVED)
def test_checkpoints_of_orbax_are_read_by_parts(how, tmp_path, monkeypatch):
    """Where one chunk is the whole array, it is larger than what is read for a part."""
    monkeypatch.setattr(_orbax_parts, "LARGEST", 1000)
    handler, saving = SAVED[how]
    x = np.random.default_rng(0).normal(size=(40, 30))
    tree = {"a": {"b.c": x}, "s": np.ones(())}
    path = tmp_path / "saved"
    args = ocp.args.PyTreeSave(
        tree, {"a": {"b.c": ocp.SaveArgs(**saving)}, "s": ocp.SaveArgs()}
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**handler)) as writer:
        writer.save(path, args=args)
    source = open_checkpoint(str(path))
    where = {leaf.name: i for i, leaf in enumerate(source.leaves)}
    assert source.by_parts(where["a.b.c"]) == (how != "as it is")
    for begin, end in ((0, 1200), (7, 8), (29, 61), (1199, 1200), (5, 5)):
        found = source.read_part(where["a.b.c"], begin, end)
        np.testing.assert_array_equal(found, x.reshape(-1)[begin:end])
    np.testing.assert_array_equal(source.read_part(where["s"], 0, 1), [1.0])


def test_a_disk_that_fails_while_parts_are_written(tmp_path, monkeypatch):
    """The error is the disk's, and nothing stays."""
    monkeypatch.setattr(_sources, "BATCH", 500)
    write, count = _orbax_parts.write_parts, []

    def failing(store, chunk, parts):
        def some():
            for part in parts:
                count.append(part.size)
                if len(count) > 2:
                    raise OSError(28, "No space left on device")
                yield part

        write(store, chunk, some())

    monkeypatch.setattr("optax_avg.cli._writing.write_parts", failing)
    with pytest.raises(OSError, match=r"made was not written: No space left"):
        written({"w": np.ones((40, 30), np.float32)}, tmp_path / "made", 7)
    assert os.listdir(tmp_path) == []


MEMORY = r"""
    import re
    from optax_avg.cli import app
    try:
        app(["merge", "soup", "0", "1", "--out", "made"])
    except SystemExit as end:
        assert not end.code
    # Unlike ru_maxrss, this does not begin with the memory of the parent.
    print(re.search(r"VmHWM:\s*(\d+)", open("/proc/self/status").read())[1])
"""


def memory_of_a_soup(folder, megabytes):
    """Bytes that the command takes for two models of one leaf."""
    folder.mkdir()
    rng = np.random.default_rng(megabytes)
    models = [rng.random((megabytes, 2**18), np.float32) for _ in "01"]
    for i, x in enumerate(models):
        written({"w": x}, folder / str(i), megabytes)
    root = str(Path(__file__).resolve().parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEMORY)],
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": root},
    )
    assert done.returncode == 0, done.stderr
    found = restored(folder / "made")["w"]
    np.testing.assert_allclose(found[-1], (models[0] + models[1])[-1] / 2, rtol=1e-6)
    return int(done.stdout.split()[-1]) * 1024


@pytest.mark.skipif(
    not os.path.exists("/proc/self/status"), reason="memory is read from Linux's /proc"
)
def test_memory_does_not_grow_with_a_leaf(tmp_path):
    """Three whole leaves would be 750 MB."""
    small = memory_of_a_soup(tmp_path / "small", 1)
    large = memory_of_a_soup(tmp_path / "large", 250)
    assert large - small < 250e6
