"""The examples text.py, linen_loop.py and equinox_loop.py, in tiny settings."""

import functools
import json
import re
import runpy
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
TINY = [
    *("--steps", "24", "--evaluations", "3", "--context", "16", "--width", "16"),
    *("--layers", "1", "--batch-size", "4"),
]
AVERAGES = ["ema", "lawa", "power_ema", "swa"]


@pytest.fixture
def text(load_example):
    return load_example("text")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(10):
        words = " ".join(f"file {i} says that {n} is {n * n};" for n in range(60))
        (folder / f"{i}.txt").write_text(words)
    return folder


def test_text_run(text, corpus, tmp_path, capsys, monkeypatch):
    # One test: under xdist a shared fixture would run once per worker.
    monkeypatch.setenv("COLUMNS", "100")
    # One optimizer, so that the second run need not compile again.
    monkeypatch.setattr(text, "make_optimizer", functools.cache(text.make_optimizer))
    out = tmp_path / "new" / "folder"
    text.main([*TINY, "--data", str(corpus), "--out", str(out)])
    numbers = json.loads((out / "text.json").read_text())
    check_json(numbers)
    check_losses(numbers["curves"])
    check_table(capsys.readouterr().out, numbers["final"])
    image = matplotlib.image.imread(out / "text.png")
    assert min(image.shape[:2]) > 300
    assert image.std() > 0.01
    text.main([*TINY, "--seeds", "1", "--data", str(corpus), "--out", str(tmp_path)])
    again = json.loads((tmp_path / "text.json").read_text())["curves"]
    for name, curve in again.items():
        np.testing.assert_allclose(curve[0], numbers["curves"][name][0], rtol=1e-6)


def check_json(numbers):
    assert numbers["settings"]["steps"] == 24
    assert numbers["data"]["files"] == 10
    assert numbers["data"]["held_out"] < numbers["data"]["train"]
    assert numbers["steps"] == [8, 16, 24]
    assert list(numbers["curves"]) == ["live", *AVERAGES] == list(numbers["final"])
    live = np.array(numbers["curves"]["live"])
    for name, row in numbers["final"].items():
        curve = np.array(numbers["curves"][name])
        assert curve.shape == (3, 3)
        assert np.isfinite(curve).all()
        assert row["mean"] == pytest.approx(curve[:, -1].mean())
        assert row["std"] == pytest.approx(np.std(curve[:, -1], ddof=1))
        assert row["std"] > 0
        difference = curve[:, -1] - live[:, -1]
        assert row["minus_live_mean"] == pytest.approx(difference.mean())


def check_losses(curves):
    live = np.array(curves["live"])
    assert (live[:, -1] < live[:, 0] - 0.2).all()
    assert (live[:, -1] < 8).all()  # bits of a uniform guess
    for name in AVERAGES:
        assert (np.abs(np.array(curves[name]) - live)[:, -1] > 1e-4).all(), name
    # Before its start (step 18) SWA reads the live parameters.
    np.testing.assert_allclose(np.array(curves["swa"])[:, 0], live[:, 0], rtol=1e-5)


def check_table(stdout, final):
    for name in ["live", *AVERAGES]:
        row = next(line for line in stdout.splitlines() if f"│ {name} " in line)
        assert f"{final[name]['mean']:.4f} ± {final[name]['std']:.4f}" in row


def test_text_splits_by_file(text, corpus):
    read = text.read_corpus(corpus, 16)
    train, held_out = read.train.tobytes(), read.held_out.tobytes()
    for i in range(10):
        inside = [f"file {i} says".encode() in part for part in (train, held_out)]
        assert sorted(inside) == [False, True]
    everything = len(b"\n".join(path.read_bytes() for path in corpus.iterdir()))
    assert len(train) + len(held_out) + 1 == everything


def test_text_reads_the_standard_library_by_default(text):
    paths = text.source_files(None)
    assert any(path.name == "argparse.py" for path in paths)
    assert not any("site-packages" in path.parts for path in paths)
    corpus = text.read_corpus(None, 64)
    total = len(corpus.train) + len(corpus.held_out)
    assert 1_000_000 < total <= text.MAX_BYTES + corpus.files
    assert b"import" in corpus.train.tobytes()


def test_text_splits_one_file_by_bytes(text, tmp_path):
    path = tmp_path / "one.txt"
    path.write_bytes(bytes(range(100)) * 10)
    corpus = text.read_corpus(path, 16)
    assert len(corpus.held_out) == 100
    assert len(corpus.train) == 900


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--data", "{tmp}/absent"], "neither a file nor a folder"),
        (["--data", "{tmp}/small.txt"], "a window takes 17"),
        (["--data", "{tmp}/empty"], "0 bytes to train on"),
        (["--data", "{corpus}", "--out", "{tmp}/small.txt"], "cannot write to --out"),
        (["--data", "{corpus}", "--out", "{tmp}/small.txt/x"], "cannot write to --out"),
        (["--steps", "0"], "not a positive number"),
        (["--steps", "ten"], "invalid int value"),
        (["--learning-rate", "nan"], "not a positive number"),
        (["--schedule", "step"], "invalid choice"),
        (["--heads", "3"], "not a multiple of --heads 3"),
        (["--no-such-flag"], "unrecognized arguments"),
    ],
)
def test_text_bad_input_exits_with_2(args, message, text, corpus, tmp_path, capsys):
    (tmp_path / "small.txt").write_text("too small")
    (tmp_path / "empty").mkdir()
    argv = [arg.format(tmp=tmp_path, corpus=corpus) for arg in args]
    with pytest.raises(SystemExit) as raised:
        text.main([*TINY, "--out", str(tmp_path / "out"), *argv])
    assert raised.value.code == 2
    assert message in capsys.readouterr().err


def test_text_unreadable_data_exits_with_2(text, corpus, tmp_path, monkeypatch, capsys):

    def denied(path, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(SystemExit) as raised:
        text.main([*TINY, "--data", str(corpus), "--out", str(tmp_path)])
    assert raised.value.code == 2
    assert "Permission denied" in capsys.readouterr().err


@pytest.mark.parametrize("script", ["linen_loop.py", "equinox_loop.py"])
def test_loop_learns_and_averages(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, "--epochs", "5"])
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    stdout = capsys.readouterr().out
    rows = re.findall(r"^ +(\d+) +(\d\.\d+) +(\d\.\d+)$", stdout, re.MULTILINE)
    assert [int(epoch) for epoch, _, _ in rows] == [1, 2, 3, 4, 5]
    live, averaged = np.array([row[1:] for row in rows], float).T
    assert min(live[-1], averaged[-1]) > 0.8  # chance is 0.1
    assert (live != averaged).any()


def test_resnet_reads_the_average_in_three_ways(monkeypatch, capsys):
    monkeypatch.syspath_prepend(EXAMPLES)
    tiny = ["--epochs", "2", "--width", "8"]
    monkeypatch.setattr(sys, "argv", ["resnet_nnx.py", *tiny])
    runpy.run_path(str(EXAMPLES / "resnet_nnx.py"), run_name="__main__")
    rows = capsys.readouterr().out.splitlines()[1:]
    found = np.array([row.split() for row in rows], float)
    assert found.shape == (2, 5)
    _, live, stale, averaged, recomputed = found[-1]
    assert recomputed > 0.6  # chance is 0.1; 0.82 to 0.90 with three seeds
    assert len({live, stale, averaged, recomputed}) == 4
