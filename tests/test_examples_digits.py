"""The main example in a tiny setting, and the files that it reads."""

import gzip
import json

import matplotlib.image
import numpy as np
import pytest

NAMES = [
    "train-images-idx3",
    "train-labels-idx1",
    "t10k-images-idx3",
    "t10k-labels-idx1",
]
CANDIDATES = ["live", "ema", "lawa", "power_ema", "swa"]


@pytest.fixture
def digits(load_example):
    return load_example("digits")


def idx(array):
    """IDX bytes: two zeros, type 8, rank, big-endian shape, data."""
    shape = np.array(array.shape, ">u4").tobytes()
    return bytes([0, 0, 8, array.ndim]) + shape + array.astype(np.uint8).tobytes()


def write_folder(folder, compress=False, count=48):
    """Images whose brightness tells the label."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, count)
    images = labels[:, None, None] * 60 + rng.integers(0, 20, (count, 8, 8))
    folder.mkdir(exist_ok=True)
    for name, array in zip(NAMES, [images, labels, images, labels], strict=True):
        raw = idx(array)
        if compress:
            (folder / f"{name}-ubyte.gz").write_bytes(gzip.compress(raw))
        else:
            (folder / f"{name}-ubyte").write_bytes(raw)
    return images, labels


def test_run(digits, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    out = tmp_path / "new" / "folder"
    digits.main(
        ["--epochs", "4", "--seeds", "2", "--batch-size", "64", "--out", str(out)]
    )
    numbers = json.loads((out / "digits.json").read_text())
    assert numbers["steps"] == [22, 44, 66, 88]
    assert numbers["settings"]["schedule"] == "constant"
    assert set(numbers["versions"]) >= {"jax", "optax", "flax", "optax_avg", "python"}
    for measure in ("loss", "accuracy"):
        curves = {name: np.array(curve) for name, curve in numbers[measure].items()}
        assert list(curves) == CANDIDATES
        assert all(curve.shape == (2, 4) for curve in curves.values())
        final = numbers["final"][f"test {measure}"]
        for name, curve in curves.items():
            assert final[name]["mean"] == pytest.approx(curve[:, -1].mean())
            assert final[name]["std"] == pytest.approx(np.std(curve[:, -1], ddof=1))
    losses = {name: np.array(curve) for name, curve in numbers["loss"].items()}
    assert (losses["live"][:, -1] < losses["live"][:, 0]).all()
    assert numbers["final"]["test accuracy"]["live"]["mean"] > 0.5  # chance is 0.1
    for name in CANDIDATES[1:]:
        assert (np.abs(losses[name] - losses["live"])[:, -1] > 1e-6).all(), name
    # SWA starts at half of the training and reads the live parameters before.
    np.testing.assert_allclose(losses["swa"][:, 1], losses["live"][:, 1], rtol=1e-5)
    stdout = capsys.readouterr().out
    for name in CANDIDATES:
        row = next(line for line in stdout.splitlines() if f"│ {name} " in line)
        assert f"{numbers['final']['test accuracy'][name]['mean']:.4f}" in row
    image = matplotlib.image.imread(out / "digits.png")
    assert min(image.shape[:2]) > 300
    assert image.std() > 0.01


def test_swa_schedule_on_idx_files(digits, tmp_path):
    write_folder(tmp_path / "idx", compress=True)
    argv = ["--data", str(tmp_path / "idx"), "--schedule", "swa", "--epochs", "2"]
    digits.main([*argv, "--seeds", "1", "--out", str(tmp_path)])
    numbers = json.loads((tmp_path / "digits.json").read_text())
    assert np.isfinite(numbers["loss"]["swa"]).all()
    assert numbers["steps"] == [3, 6]


@pytest.mark.parametrize("compress", [False, True])
def test_idx_round_trip(load_example, tmp_path, compress):
    images, labels = write_folder(tmp_path, compress)
    read = load_example("_data").load_images(tmp_path)
    np.testing.assert_allclose(read.train_x[..., 0], images / 255, rtol=1e-6)
    np.testing.assert_array_equal(read.test_y, labels)


def test_shift_moves_by_one_pixel_at_most(digits):
    image = np.zeros((200, 5, 5, 1), np.float32)
    image[:, 2, 2] = 1
    moved = digits.shift(image, np.random.default_rng(0))
    assert moved.shape == image.shape
    where = np.argwhere(moved[..., 0])[:, 1:]
    assert {tuple(place) for place in where} == {
        (i, j) for i in (1, 2, 3) for j in (1, 2, 3)
    }


def damage(folder, kind):
    """Spoils one file of a sound folder."""
    write_folder(folder, compress=kind == "gzip")
    path = folder / "train-labels-idx1-ubyte"
    if kind == "missing":
        path.unlink()
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    elif kind == "header":
        path.write_bytes(b"\x00\x00\x08")
    elif kind == "cut header":
        path.write_bytes(path.read_bytes()[:6])
    elif kind == "too long":
        path.write_bytes(path.read_bytes() + b"!")
    elif kind == "empty":
        path.write_bytes(idx(np.zeros(0)))
    elif kind == "magic":
        path.write_bytes(b"PNG?" + path.read_bytes())
    elif kind == "count":
        path.write_bytes(idx(np.zeros(7)))
    elif kind == "gzip":
        packed = folder / "train-labels-idx1-ubyte.gz"
        packed.write_bytes(packed.read_bytes()[:20])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "no train-labels-idx1-ubyte"),
        ("truncated", "truncated, its header says shape"),
        ("header", "not an IDX file"),
        ("cut header", "truncated in its header"),
        ("too long", "too long, its header says shape"),
        ("empty", "empty, its header says shape"),
        ("magic", "not an IDX file"),
        ("count", "but train-labels-idx1"),
        ("gzip", "damaged gzip file"),
    ],
)
def test_malformed_data_exits_with_2(kind, message, digits, tmp_path, capsys):
    damage(tmp_path / "idx", kind)
    with pytest.raises(SystemExit) as raised:
        digits.main(["--data", str(tmp_path / "idx"), "--out", str(tmp_path)])
    assert raised.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--data", "{tmp}/absent"], "no such folder"),
        (["--out", "{tmp}/file"], "cannot write to --out"),
        (["--out", "{tmp}/file/below"], "cannot write to --out"),
        (["--epochs", "0"], "not a positive number"),
        (["--learning-rate", "inf"], "not a positive number"),
        (["--batch-size", "99999"], "only 1437 images"),
        (["--schedule", "step"], "invalid choice"),
        (["--no-such-flag"], "unrecognized arguments"),
    ],
)
def test_bad_flags_exit_with_2(args, message, digits, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    argv = [arg.format(tmp=tmp_path) for arg in args]
    with pytest.raises(SystemExit) as raised:
        digits.main(["--out", str(tmp_path / "out"), *argv])
    assert raised.value.code == 2
    assert message in capsys.readouterr().err
