"""Large arrays of Orbax checkpoints, read and written by parts."""

import math
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore
from hypothesis import given
from hypothesis import strategies as st

from optax_avg import merging
from optax_avg._checkpoints import _orbax_reads, orbax_parts, sources
from optax_avg._checkpoints.leaves import Leaf
from optax_avg._checkpoints.opening import open_checkpoint
from optax_avg.cli._targets import target_of
from optax_avg.cli._writing import ORBAX, write_checkpoint

shapes = st.lists(st.integers(1, 5), max_size=4).map(tuple)


@given(shapes, st.data())
def test_boxes_make_a_range(shape, data):
    x = np.arange(math.prod(shape)).reshape(shape)
    begin = data.draw(st.integers(0, x.size))
    end = data.draw(st.integers(begin, x.size))
    found = [np.ravel(x[box]) for box in orbax_parts.boxes(shape, begin, end)]
    np.testing.assert_array_equal(np.concatenate([[], *found]), np.arange(begin, end))
    assert len(found) <= 2 * max(len(shape), 1)


@given(shapes, st.integers(1, 30), st.data())
def test_parts_are_regrouped_to_chunks(shape, most, data):
    x = np.arange(math.prod(shape))
    chunk = orbax_parts.chunk_of(shape, most)
    assert math.prod(chunk) <= most
    cuts = data.draw(st.lists(st.integers(0, x.size), max_size=5).map(sorted))
    parts = np.split(x, cuts)
    made, count = np.full(shape, -1), 0
    for box, elements in orbax_parts.in_chunks(shape, chunk, parts):
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
        args = jax.tree.map(lambda _: how, getattr(found, "tree", found))
        return reader.restore(path, args=ocp.args.PyTreeRestore(restore_args=args))


def no_copy():
    raise AssertionError("a part costs no more than the part")


@pytest.mark.parametrize(
    "shape", [(997,), (40, 25), (3, 1, 331), (1000, 1), (7, 11, 13)]
)
def test_orbax_reads_what_is_written_by_parts(shape, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "BATCH", 500)
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
        part = source.parts(i, no_copy)(3, leaf.size - 2)
        assert part.tobytes() == tree[leaf.name].reshape(-1)[3:-2].tobytes()


def devices(*mesh):
    if jax.device_count() < math.prod(mesh):
        pytest.skip("needs more devices")
    some = np.array(jax.devices()[: math.prod(mesh)]).reshape(mesh)
    return jax.sharding.Mesh(some, ("x", "y"))


def over(*mesh):
    spec = jax.sharding.PartitionSpec("x", "y")
    place = lambda: jax.sharding.NamedSharding(devices(*mesh), spec)
    return lambda x: jax.device_put(x, place())


# Of 40 rows of 120 bytes: how it is saved, and whether parts cost more than the part.
CHUNKS = {"chunk_byte_size": 200}
SAVED = {
    "in chunks": ({}, CHUNKS, np.asarray, False),
    "in files": ({"use_ocdbt": False}, CHUNKS, np.asarray, False),
    "as zarr3": ({"use_zarr3": True}, CHUNKS, np.asarray, False),
    "as it is": ({}, {}, np.asarray, True),
    "as it is, in zarr3": ({"use_zarr3": True}, {}, np.asarray, True),
    "over rows": ({}, {}, over(2, 1), True),
    "over columns": ({}, {}, over(1, 2), True),
    "over both": ({"use_ocdbt": False}, {}, over(2, 2), True),
    "over columns, in chunks": ({}, CHUNKS, over(1, 2), True),
}


def save(path, how, x):
    handler, saving, place, _ = SAVED[how]
    tree = {"a": {"b.c": place(x)}, "s": np.ones(())}
    args = {"a": {"b.c": ocp.SaveArgs(**saving)}, "s": ocp.SaveArgs()}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**handler)) as writer:
        writer.save(path.absolute(), args=ocp.args.PyTreeSave(tree, args))


@pytest.mark.parametrize("how", SAVED)
def test_checkpoints_of_orbax_are_read_by_parts(how, tmp_path, monkeypatch):
    """From a copy where a part would take chunks that are much larger."""
    monkeypatch.setattr(_orbax_reads, "SLAB", 1200)
    x = np.random.default_rng(0).normal(size=(40, 30)).astype(np.float32)
    save(tmp_path / "saved", how, x)
    source = open_checkpoint(str(tmp_path / "saved"))
    where = {leaf.name: i for i, leaf in enumerate(source.leaves)}
    for copied in (250, 3000, 2**24):
        monkeypatch.setattr(_orbax_reads, "COPIED", copied)
        with tempfile.TemporaryFile() as file:
            asked = []
            scratch = lambda file=file, asked=asked: asked.append(1) or file
            read = source.parts(where["a.b.c"], scratch)
            assert bool(asked) == SAVED[how][-1]
            for begin, end in ((0, 1200), (7, 8), (29, 61), (95, 742), (5, 5)):
                found = read(begin, end)
                assert found.tobytes() == x.reshape(-1)[begin:end].tobytes()
    np.testing.assert_array_equal(source.parts(where["s"], no_copy)(0, 1), [1.0])


ZSTANDARD, LITTLE, BIG = (
    {"name": "zstd"},
    {"name": "bytes", "configuration": {"endian": "little"}},
    {"name": "bytes", "configuration": {"endian": "big"}},
)


def shard(chunk, *codecs, **more):
    index = [LITTLE, {"name": "crc32c"}]
    options = {"chunk_shape": chunk, "codecs": [*codecs], "index_codecs": index}
    return {"name": "sharding_indexed", "configuration": options | more}


def zarr(shape, chunk, **metadata):
    """How TensorStore writes an array in version 2 of zarr."""
    metadata = {"shape": shape, "chunks": chunk, "dtype": "<i4"} | metadata
    return {"driver": "zarr", "metadata": metadata}


def zarr3(shape, chunk, *codecs, **metadata):
    grid = {"name": "regular", "configuration": {"chunk_shape": chunk}}
    known = {"shape": shape, "chunk_grid": grid, "data_type": "int32"}
    metadata = known | {"codecs": [*codecs]} | metadata
    return {"driver": "zarr3", "metadata": metadata}


STORED = {
    "blosc": lambda shape, chunk: zarr(shape, chunk),
    "zstd": lambda shape, chunk: zarr(shape, chunk, compressor={"id": "zstd"}),
    "zlib": lambda shape, chunk: zarr(shape, chunk, compressor={"id": "zlib"}),
    "plain": lambda shape, chunk: zarr(shape, chunk, compressor=None),
    "columns first": lambda shape, chunk: zarr(
        shape, chunk, compressor={"id": "zstd"}, order="CF"[len(shape) > 1]
    ),
    "big": lambda shape, chunk: zarr(
        shape, chunk, compressor={"id": "zstd"}, dtype=">i4"
    ),
    "slashes": lambda shape, chunk: zarr(
        shape, chunk, compressor={"id": "zstd"}, dimension_separator="/"
    ),
    "shards": lambda shape, chunk: zarr3(shape, chunk, shard(chunk, LITTLE, ZSTANDARD)),
    "shards of elements": lambda shape, chunk: zarr3(
        shape, chunk, shard([1] * len(chunk), LITTLE, ZSTANDARD)
    ),
    "shards with the index first": lambda shape, chunk: zarr3(
        shape, chunk, shard(chunk, LITTLE, ZSTANDARD, index_location="start")
    ),
    "big shards": lambda shape, chunk: zarr3(
        shape, chunk, shard(chunk, BIG, ZSTANDARD)
    ),
    "without shards": lambda shape, chunk: zarr3(shape, chunk, LITTLE, ZSTANDARD),
    "under other keys": lambda shape, chunk: zarr3(
        shape,
        chunk,
        shard(chunk, LITTLE, ZSTANDARD),
        chunk_key_encoding={"name": "v2"},
    ),
}


def stored(kind, shape, chunk):
    """An array that counts its elements, and its TensorStore."""
    x = np.arange(math.prod(shape), dtype=np.int32).reshape(shape)
    spec = STORED[kind](list(shape), list(chunk)) | {"kvstore": {"driver": "memory"}}
    store = tensorstore.open(spec, create=True).result()
    store.write(x).result()
    return x, store


def copied(store, file, most, pieces=_orbax_reads._pieces):
    """What reads ranges of a copy, and the number of bytes of each piece of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_orbax_reads, "COPIED", most)
        patch.setattr(_orbax_reads, "_opened", lambda path, name, cached: store)
        patch.setattr(_orbax_reads, "_pieces", pieces)
        sizes, append = [], _orbax_reads._append
        counted = lambda file, piece: (sizes.append(piece.nbytes), append(file, piece))
        patch.setattr(_orbax_reads, "_append", counted)
        return _orbax_reads._copied("here", "", store, file), sizes


@pytest.mark.parametrize("kind", STORED)
@given(shapes.filter(bool), st.data())
def test_an_array_is_copied_group_by_group(kind, shape, data):
    """However it is stored; no more than the limit, and each element once."""
    x, store = stored(kind, shape, [data.draw(st.integers(1, n)) for n in shape])
    most = 4 * data.draw(st.integers(1, 40))
    with tempfile.TemporaryFile() as file:
        read, sizes = copied(store, file, most)
        assert max(sizes) <= most
        assert sum(sizes) == x.nbytes
        begin = data.draw(st.integers(0, x.size))
        end = data.draw(st.integers(begin, x.size))
        np.testing.assert_array_equal(read(begin, end), np.arange(begin, end))


@pytest.mark.parametrize("chunk", [(20, 15), (17, 13)])
@pytest.mark.parametrize("kind", STORED)
def test_chunks_larger_than_a_piece(kind, chunk):
    """Whether or not the array cuts some of them off."""
    x, store = stored(kind, (40, 30), chunk)
    with tempfile.TemporaryFile() as file:
        read, sizes = copied(store, file, 300)
        assert max(sizes) <= 300
        assert sum(sizes) == x.nbytes
        np.testing.assert_array_equal(read(0, x.size), x.reshape(-1))


def not_as_a_whole(store, whole, most):
    raise AssertionError("the chunk is decoded as a stream")


@pytest.mark.parametrize("kind", ["zstd", "slashes", "shards"])
def test_a_large_chunk_is_decoded_as_a_stream(kind):
    x, store = stored(kind, (40, 30), (20, 30))
    with tempfile.TemporaryFile() as file:
        read, sizes = copied(store, file, 700, not_as_a_whole)
        assert sizes == 2 * [700, 700, 700, 300]
        np.testing.assert_array_equal(read(0, x.size), x.reshape(-1))


@pytest.mark.parametrize("kind", ["zstd", "shards"])
@pytest.mark.parametrize("hurt", ["cut", "longer", "flipped", "another"])
def test_a_stream_that_was_damaged_is_an_error(kind, hurt):
    _, store = stored(kind, (40, 30), (40, 30))
    _, other = stored(kind, (40, 31), (40, 31))
    key = "0.0" if kind == "zstd" else "c/0/0"
    value = store.kvstore[key]
    index = value[-20:] if kind == "shards" else b""
    longer = value + value
    if kind == "shards":  # the index says where the frame begins and how long it is
        frame, length = value[:-20], 2 * (len(value) - 20)
        longer = frame + frame + bytes(8) + length.to_bytes(8, "little") + index[-4:]
    store.kvstore[key] = {
        "cut": value[: len(value) // 2] + index,
        "longer": longer,
        "flipped": bytes([value[0] ^ 1]) + value[1:],
        "another": other.kvstore[key],
    }[hurt]
    with tempfile.TemporaryFile() as file, pytest.raises(ValueError, match="here"):
        copied(store, file, 700, not_as_a_whole)


@pytest.mark.parametrize("kind", ["zstd", "shards"])
def test_a_chunk_that_is_replaced_while_it_is_read(kind):
    """Frames of random numbers have the same places and lengths everywhere."""
    rng = np.random.default_rng(0)
    x, store = stored(kind, (400, 300), (400, 300))
    draw = lambda: rng.integers(-(2**31), 2**31, x.shape, np.int32)
    store.write(draw()).result()
    append = _orbax_reads._append

    def replacing(file, piece):
        append(file, piece)
        store.write(draw()).result()

    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryFile() as file:
        patch.setattr(_orbax_reads, "_append", replacing)
        with pytest.raises(ValueError, match="here: an array was replaced while"):
            copied(store, file, 2**16)


def test_a_disk_that_is_full_is_not_the_fault_of_the_checkpoint():
    _, store = stored("zstd", (40, 30), (40, 30))

    def full(file, piece):
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryFile() as file:
        patch.setattr(_orbax_reads, "_append", full)
        with pytest.raises(OSError, match="No space left"):
            copied(store, file, 700)


def test_a_damaged_index_of_a_shard_is_named_by_tensorstore():
    _, store = stored("shards", (40, 30), (40, 30))
    value = store.kvstore["c/0/0"]
    store.kvstore["c/0/0"] = value[:-20] + b"\xff" * 16 + value[-4:]
    with tempfile.TemporaryFile() as file:
        with pytest.raises(ValueError, match="here") as error:
            copied(store, file, 700)
        assert "incompatible function arguments" not in str(error.value)


@pytest.mark.parametrize("method", ["soup", "task-arithmetic", "slerp", "karcher"])
def test_however_it_is_saved_the_same_comes_out(method, tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_orbax_reads, "SLAB", 1200)
    monkeypatch.setattr(_orbax_reads, "COPIED", 1000)
    rng = np.random.default_rng(0)
    models = [rng.normal(size=(40, 30)).astype(np.float32) for _ in range(2)]
    options = {"task-arithmetic": ["0", "--base", "1"]}
    made = set()
    monkeypatch.setattr(sources, "BATCH", 1000)
    for how in ("in chunks", "as it is", "over columns"):
        for i, x in enumerate(models):
            save(Path(str(i)), how, x)
        command = ["merge", method, *options.get(method, ["0", "1"])]
        code, _, errors = run(*command, "--out", "out", "--force")
        assert code == 0, errors
        made.add(restored(tmp_path / "out")["a"]["b.c"].tobytes())
        for i in range(2):
            shutil.rmtree(str(i))
    assert len(made) == 1
    if method == "soup":
        wanted = merging.uniform([{"w": x} for x in models])["w"]
        assert made == {np.asarray(wanted).tobytes()}


def test_a_chunk_that_was_lost_is_not_zeros(tmp_path):
    save(tmp_path / "saved", "in files", np.ones((40, 30), np.float32))
    chunks = [x for x in (tmp_path / "saved" / "a.b.c").iterdir() if x.name[0] != "."]
    chunks[-1].unlink()
    source = open_checkpoint(str(tmp_path / "saved"))
    i = next(i for i, leaf in enumerate(source.leaves) if leaf.shape)
    with pytest.raises(ValueError, match="is missing"):
        source.parts(i, no_copy)(0, 1200)


def test_a_percent_sign_in_a_path_is_one(tmp_path):
    for name, value in (("a b", 1), ("a%20b", 2)):
        save(tmp_path / name, "in chunks", np.full((40, 30), value, np.float32))
    for name, value in (("a b", 1), ("a%20b", 2)):
        source = open_checkpoint(str(tmp_path / name))
        i = next(i for i, leaf in enumerate(source.leaves) if leaf.shape)
        assert source.parts(i, no_copy)(0, 1)[0] == value


def test_what_is_being_written_is_waited_for():
    """Or it would write to a directory that is deleted after an error."""
    waited = []

    class Place:
        shape = (1,)

        def __getitem__(self, box):
            return self

        def write(self, x):
            return types.SimpleNamespace(result=lambda: waited.append(float(x[0])))

    class Store(Place):
        shape = (9,)

        def __getitem__(self, box):
            return Place()

    def parts():
        yield np.arange(3.0)
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        orbax_parts.write_parts(Store(), (1,), parts())
    assert waited == [0, 1, 2]


def test_a_disk_that_fails_while_parts_are_written(tmp_path, monkeypatch):
    """The error is the disk's, and nothing stays."""
    monkeypatch.setattr(sources, "BATCH", 500)
    write, count = orbax_parts.write_parts, []

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


def memory_of_a_soup(folder, megabytes, save):
    """Bytes that the command takes for two models of one leaf."""
    folder.mkdir()
    rng = np.random.default_rng(megabytes)
    models = [rng.random((megabytes, 2**18), np.float32) for _ in "01"]
    for i, x in enumerate(models):
        save(x, folder / str(i))
    root = str(Path(__file__).resolve().parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEMORY)],
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": root},
    )
    assert done.returncode == 0, done.stderr
    found = restored(folder / "made")
    found = found["w"] if "w" in found else found["a"]["b.c"]
    np.testing.assert_allclose(found[-1], (models[0] + models[1])[-1] / 2, rtol=1e-6)
    return int(done.stdout.split()[-1]) * 1024


def by_parts(x, path):
    written({"w": x}, path, len(x))


def in_one_chunk(x, path):
    save(path, "as it is", x)


@pytest.mark.skipif(
    not os.path.exists("/proc/self/status"), reason="memory is read from Linux's /proc"
)
@pytest.mark.parametrize(
    "how",
    # After the copy that one chunk takes, the same parts are read and written.
    [in_one_chunk, pytest.param(by_parts, marks=pytest.mark.slow)],
)
def test_memory_does_not_grow_with_a_leaf(how, tmp_path):
    """Three whole leaves would be 750 MB more; parts, caches and the allocator 200."""
    small = memory_of_a_soup(tmp_path / "small", 1, how)
    large = memory_of_a_soup(tmp_path / "large", 250, how)
    assert large - small < 450e6
