"""Snapshots of a training that runs in two processes."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from optax_avg.posthoc import SnapshotStore

TRAINING = """
    import sys, jax, jax.numpy as jnp, numpy as np
    from jax.sharding import NamedSharding, PartitionSpec as P
    from optax_avg.posthoc import SnapshotStore
    address, me, directory = sys.argv[1:]
    jax.distributed.initialize(address, 2, int(me))
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = NamedSharding(mesh, P("d"))

    def params(value):
        local = np.full((1, 3), value, np.float32)
        return {"w": jax.make_array_from_process_local_data(rows, local, (2, 3))}

    store = SnapshotStore(directory)
    try:
        store.save(None, 1, params(1.0))
    except RuntimeError as error:
        print("refused:", error, flush=True)
    sys.stdin.readline()
    for step, value in ((1, 1.0), (2, 2.0), (2, 4.0), (3, 3.0)):
        store.save(None, step, params(value))
    store.delete_after(2)
    like = {"w": jax.ShapeDtypeStruct((2, 3), jnp.float32, sharding=rows)}
    mean = store.mean(like)["w"]
    if me == "0":  # reading alone must not wait for the others
        assert store.steps() == [1, 2]
    print("steps", store.steps(), mean.addressable_shards[0].data.tolist(), flush=True)
    store.close()
    with SnapshotStore(directory + "/half", dtype=jnp.float16) as half:
        half.save(None, 1, params(1e-5))
"""


def started(directory, me, port):
    root = str(Path(__file__).resolve().parent.parent)
    settings = {"PYTHONPATH": root, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    script = textwrap.dedent(TRAINING)
    return subprocess.Popen(
        [sys.executable, "-c", script, f"127.0.0.1:{port}", str(me), directory],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | settings,
        text=True,
    )


def said(process, word):
    """The first line of the output that begins with a word; Gloo has lines as well."""
    for line in process.stdout:
        if line.startswith(word):
            return line
    raise AssertionError(process.stderr.read()[-3000:])


def test_both_are_refused_and_both_write(tmp_path):
    """The lock is held by a third one, first."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with contextlib.ExitStack() as stack:
        other = stack.enter_context(SnapshotStore(tmp_path))
        other.save(None, 9, {"w": jnp.ones((2, 3))})
        both = [started(tmp_path, me, port) for me in (0, 1)]
        for process in both:
            stack.callback(process.kill)
        refusals = [said(process, "refused") for process in both]
        assert refusals[0].startswith(f"refused: {tmp_path} already has a writer")
        assert refusals[0] == refusals[1]
        other.delete_after(0)
        other.close()
        for process in both:
            process.stdin.write("go\n")
            process.stdin.flush()
        for process in both:
            assert said(process, "steps") == "steps [1, 2] [[2.5, 2.5, 2.5]]\n"
            process.communicate(timeout=60)
            assert process.returncode == 0
    places = ("1", "2", "half/1")
    paths = [tmp_path / place / "record" / "metadata" for place in places]
    one, two, half = [json.loads(path.read_text()) for path in paths]
    assert one["store"] == two["store"] != half["store"]
    np.testing.assert_allclose(half["underflow"]["parameters"], 2.0**-25 / 1e-5, 1e-3)
