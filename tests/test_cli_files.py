"""The command and the user's files: what it must not touch, and how it ends."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy

from optax_avg._checkpoints import opening
from optax_avg._checkpoints.leaves import Leaf
from optax_avg.cli import (
    _commit,
    _leafwise,
    _merge,
    _output,
    _targets,
    _writing,
)

ROOT = Path(__file__).resolve().parent.parent
MODELS = ["a.safetensors", "b.safetensors"]
SOUP = ["merge", "soup", *MODELS]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """``a``, ``b`` in the working directory, which is one of two in ``tmp_path``."""
    (tmp_path / "other").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for number, path in enumerate(MODELS):
        rng = np.random.default_rng(number)
        leaves = {"w": rng.normal(size=(300, 200)), "b": np.arange(7.0)}
        save(path, leaves)
    return tmp_path


def save(path, leaves):
    safetensors.numpy.save_file({n: np.float32(x) for n, x in leaves.items()}, path)


def save_orbax(path, **options):
    handler = ocp.PyTreeCheckpointHandler(**options)
    with ocp.Checkpointer(handler) as writer:
        tree = {"w": np.zeros((3, 2), np.float32)}
        writer.save(Path(path).absolute(), args=ocp.args.PyTreeSave(tree))


def everything(folder):
    """All that is in a directory, with the bytes of its files."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        if path.is_file() and not path.is_symlink()
        else path.lstat().st_mode
        for path in folder.rglob("*")
    }


def names():
    return sorted(os.listdir())


def number_of(path):
    """The first element of ``b``, by which a result is told from others."""
    return float(opening.open_checkpoint(str(path)).read([0])[0].flat[1])


# --- paths that no result may have ---


def model_in_a_directory():
    Path("models").mkdir()
    shutil.copy("a.safetensors", "models")
    return ["models/a.safetensors"]


def model_of_orbax():
    save_orbax("in_dir")
    return ["in_dir"]


def checkpoint_and(name):
    def make():
        save_orbax("out")
        Path("out", name).touch()

    return make


def checkpoint_and_link():
    save_orbax("out")
    shutil.rmtree("out/d")
    os.symlink("/tmp", "out/d")


def directory_of_notes():
    Path("out").mkdir()
    Path("out/notes").touch()


def step_of_a_run():
    with ocp.CheckpointManager(Path("run").absolute()) as manager:
        manager.save(3, args=ocp.args.StandardSave({"w": np.zeros(3)}))


def store():
    """The names in a SnapshotStore."""
    for item in ("record", "averages"):
        Path("store/28", item).mkdir(parents=True)
    Path("store/28/_CHECKPOINT_METADATA").touch()


def index(folder):
    """A Hugging Face folder of one shard; the path of its index."""
    Path(folder).mkdir()
    shutil.copy("a.safetensors", f"{folder}/model-00001-of-00001.safetensors")
    path = Path(folder, "model.safetensors.index.json")
    shard = "model-00001-of-00001.safetensors"
    path.write_text(json.dumps({"weight_map": {"w": shard, "b": shard}}))
    return [str(path)]


def folder_of_links():
    """A folder whose files are links into another one, as in a cache."""
    index("blobs")
    Path("hf").mkdir()
    for name in os.listdir("blobs"):
        os.symlink(f"../blobs/{name}", f"hf/{name}")
    return ["hf"]


def another_model(shard="model-00001-of-00001.safetensors"):
    """A Hugging Face folder that is no input."""
    index("other_hf")
    path = Path("other_hf/model-00001-of-00001.safetensors")
    path.rename(path.with_name(shard))
    path = Path("other_hf/model.safetensors.index.json")
    path.write_text(json.dumps({"weight_map": {"w": shard, "b": shard}}))


def text(name):
    return lambda: Path(name).write_text("mine") and None


REFUSED = {
    "nothing": ("", None, "--out is empty"),
    "the current directory": (".", None, "the current directory"),
    "the current directory by its name": ("../work/", None, "the current directory"),
    "a parent": ("..", None, "the current directory"),
    "a parent behind what is not there": ("no/../..", None, "the current directory"),
    "the root": ("/", None, "the current directory"),
    "a bucket": ("gs://bucket/model", None, "not on a local disk"),
    "an input": ("a.safetensors", None, "a.safetensors is an input, which is read"),
    "an input behind dots": (
        "no/../a.safetensors",
        None,
        "a.safetensors is an input",
    ),
    "an input with a slash": ("a.safetensors/", None, "a.safetensors is an input"),
    "a link to an input": (
        "link.safetensors",
        lambda: os.symlink("a.safetensors", "link.safetensors"),
        "is a symbolic link; pass --out",
    ),
    "another name of an input": (
        "hard.safetensors",
        lambda: os.link("a.safetensors", "hard.safetensors"),
        "hard.safetensors is an input",
    ),
    "what holds an input": (
        "models",
        model_in_a_directory,
        "models is, or holds, a part of the input models/a",
    ),
    "within an input": (
        "in_dir/x",
        model_of_orbax,
        "in_dir/x lies in in_dir, an input",
    ),
    "an input of Orbax": ("in_dir", model_of_orbax, "in_dir is an input"),
    "a shard of an input": (
        "hf/model-00001-of-00001.safetensors",
        lambda: index("hf"),
        "lies in hf, an input",
    ),
    "the folder of an index": ("hf", lambda: index("hf"), "hf is an input"),
    "where links of an input go": (
        "blobs",
        folder_of_links,
        "blobs is, or holds, a part of the input hf",
    ),
    "a file to which a link of an input goes": (
        "blobs/model-00001-of-00001.safetensors",
        folder_of_links,
        "is, or holds, a part of the input hf",
    ),
    "a link to nothing": ("gone", lambda: os.symlink("no", "gone"), "a symbolic link"),
    "a link to a directory": (
        "link/",
        lambda: os.symlink("../other", "link"),
        "a symbolic link",
    ),
    "a device": ("/dev/null", None, "is neither a file nor a directory"),
    "a pipe": ("pipe", lambda: os.mkfifo("pipe"), "is neither a file nor a directory"),
    "a text": (
        "out.safetensors",
        text("out.safetensors"),
        "is not a safetensors file; only a safetensors file may be replaced",
    ),
    "a directory for a file": (
        "out.safetensors",
        lambda: save_orbax("out.safetensors"),
        "is a directory; only a safetensors file may",
    ),
    "a file for a directory": (
        "out",
        text("out"),
        "is a file; only an Orbax checkpoint may",
    ),
    "a file with a slash": (
        "out/",
        text("out"),
        "is a file; only an Orbax checkpoint may",
    ),
    "a directory of notes": (
        "out",
        directory_of_notes,
        "holds notes, which is not of an Orbax checkpoint",
    ),
    "a checkpoint with notes": ("out", checkpoint_and("notes"), "holds notes, which"),
    "deep in a checkpoint": ("out", checkpoint_and("d/notes"), "holds d/notes, which"),
    "a link in a checkpoint": ("out", checkpoint_and_link, "holds d, which is not of"),
    "a checkpoint of several items": ("run/3", step_of_a_run, "holds default, which"),
    "an item of a checkpoint": ("run/3/default", step_of_a_run, "run/3, a checkpoint"),
    "a run": ("run", step_of_a_run, "holds 3, which is not of"),
    "a store": ("store", store, "holds 28, which is not of"),
    "a step of a store": ("store/3", store, "store, a SnapshotStore"),
    "a snapshot of a store": ("store/28/averages", store, "store/28, a checkpoint"),
    "a backslash": ("q\\x", None, "q\\x has a backslash"),
    "in a file": ("a.safetensors/x", None, "x lies in a.safetensors, an input"),
    "the model of a folder of shards": (
        "other_hf/model.safetensors",
        another_model,
        "whose shards model.safetensors.index.json lists: programs would load one",
    ),
    "a shard of a model": (
        "other_hf/model-00001-of-00001.safetensors",
        another_model,
        "would spoil the model in ",
    ),
    "a shard that is not there": (
        "other_hf/model-00002-of-00002.safetensors",
        another_model,
        "would spoil the model in ",
    ),
    "a shard of any name": (
        "other_hf/part.safetensors",
        lambda: another_model("part.safetensors"),
        "would spoil the model in ",
    ),
    "an index": (
        "other_hf/model.safetensors.index.json",
        another_model,
        "is the name of an index of shards; pass the folder as --out",
    ),
    "a name that is too long": ("x" * 256 + ".safetensors", None, "File name too long"),
    "in a text": ("mine/x/y", text("mine"), "mine is not a directory"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_paths_that_no_result_may_have(name, place, run):
    out, make, said = REFUSED[name]
    models = (make() if make else None) or MODELS
    before = everything(place)
    for options in ([], ["--force"], ["--dry-run"], ["--force", "--dry-run"]):
        code, _, errors = run("merge", "soup", *models, "--out", out, *options)
        assert code == 1
        assert errors.startswith("error: ")
        assert said in errors
        assert "pass --force" not in errors
        assert everything(place) == before


def test_links_that_lead_back_end(run):
    """Every link of a directory to itself would double the way through it."""
    index("hf")
    for name in range(30):
        os.symlink(".", f"hf/again{name}")
    code, _, errors = run("merge", "soup", "hf", "hf", "--out", "out")
    assert code == 0, errors


@pytest.mark.parametrize("name", ["notes.txt", "config.json"])
def test_force_keeps_what_was_edited_in_a_folder(name, run):
    index("hf")
    Path("hf", name).write_text("of the model")
    assert run("merge", "soup", "hf", "hf", "--out", "out")[0] == 0
    again = ("merge", "soup", "hf", "hf", "--out", "out", "--force")
    assert run(*again)[0] == 0
    Path("out", name).write_text("mine")
    code, _, errors = run(*again)
    assert code == 1
    assert f"out holds {name}, which differs from that of hf" in errors
    assert Path("out", name).read_text() == "mine"


@pytest.mark.parametrize("size", ["9" * 400, "0", "5XB", "-1GB", "GB"])
def test_sizes_that_are_none(size, run):
    index("hf")
    code, _, errors = run(
        "merge", "soup", "hf", "hf", "--out", "out", f"--max-shard-size={size}"
    )
    assert code == 2
    assert "a size is a number and a unit" in " ".join(errors.split())


def test_where_a_disk_is_mounted(place, run, monkeypatch):
    Path("disk").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path).endswith("disk"))
    code, _, errors = run(*SOUP, "--out", "disk", "--force")
    assert code == 1
    assert "disk is where a disk is mounted" in errors


@pytest.mark.parametrize("out", ["no/../keep", "keep/", "./keep/.", "../work//keep"])
def test_a_path_is_normalised_before_it_is_checked(out, place, run):
    save_orbax("keep")
    before = everything(place)
    code, _, errors = run(*SOUP, "--out", out)
    assert code == 1
    assert "keep exists; pass --force to replace it" in errors
    assert everything(place) == before


def test_links_on_the_way_are_followed_as_the_system_does(place, run):
    Path("../other/deep").mkdir()
    os.symlink("../other/deep", "link")
    assert run(*SOUP, "--out", "link/../out.safetensors")[0] == 0
    assert (place / "other" / "out.safetensors").exists()
    assert not Path("out.safetensors").exists()


def test_what_is_refused_makes_no_directories(place, run):
    save("odd.safetensors", {"w": np.ones(2)})
    for models in (["a.safetensors", "odd.safetensors"], ["no.safetensors"]):
        assert run("merge", "soup", *models, "--out", "x/y/z")[0] == 1
    assert not Path("x").exists()


# --- what --force replaces ---


@pytest.mark.parametrize(
    ("out", "make"),
    {
        "a file": ("out.safetensors", lambda: save("out.safetensors", {"x": [1.0]})),
        "an empty file": ("out.safetensors", lambda: Path("out.safetensors").touch()),
        "a checkpoint": ("out", lambda: save_orbax("out")),
        "one of another layout": ("out", lambda: save_orbax("out", use_zarr3=True)),
        "an empty directory": ("out", lambda: Path("out").mkdir()),
    }.values(),
)
def test_force_replaces_a_checkpoint(out, make, run):
    make()
    assert "exists; pass --force" in run(*SOUP, "--out", out)[2]
    code, _, errors = run(*SOUP, "--out", out, "--force")
    assert code == 0, errors
    assert number_of(out) == 1
    assert names() == [*MODELS, out]


# --- what comes to the target while the result is made ---


COMING = {
    "a file": text("out"),
    "a directory": directory_of_notes,
    "an empty directory": lambda: Path("out").mkdir(),
    "a link": lambda: os.symlink("no", "out"),
    "a checkpoint": lambda: save_orbax("out"),
}


def meanwhile(monkeypatch, happen):
    """Something happens when the first leaf has been made."""
    write, happened = _output.write_checkpoint, []

    def hooked(target, leaves, load):
        def one(i):
            if not happened:
                happened.append(True)
                happen()
            return load(i)

        write(target, leaves, one)

    monkeypatch.setattr(_output, "write_checkpoint", hooked)


def check_that_it_is_left_alone(what, out, options, place, run, monkeypatch):
    after = {}

    def happen():
        COMING[what]()
        os.rename("out", out)
        after.update(everything(place))

    meanwhile(monkeypatch, happen)
    code, _, errors = run(*SOUP, "--out", out, *options)
    assert code == 1
    assert f"{out} appeared while this was made; it was left as it is" in errors
    kept = {name: x for name, x in after.items() if ".partial" not in name}
    assert everything(place) == kept


@pytest.mark.parametrize("out", ["out", "out.safetensors"])
@pytest.mark.parametrize("what", COMING)
def test_what_appears_at_the_last_moment_is_left_alone(
    what, out, place, run, monkeypatch
):
    """It comes after the last look at the target."""
    monkeypatch.setattr(_commit, "identity", lambda path: None)
    check_that_it_is_left_alone(what, out, [], place, run, monkeypatch)


@pytest.mark.parametrize("out", ["out", "out.safetensors"])
def test_force_is_for_what_was_there_at_first(out, place, run, monkeypatch):
    options = ["--force"]
    check_that_it_is_left_alone("a checkpoint", out, options, place, run, monkeypatch)


@pytest.mark.parametrize("out", ["out", "out.safetensors"])
def test_what_changes_meanwhile_is_left_alone(out, place, run, monkeypatch):
    assert run(*SOUP, "--out", out)[0] == 0
    after = {}

    def happen():
        os.rename(out, "first")
        shutil.copytree("first", out) if out == "out" else shutil.copy("first", out)
        after.update(everything(place))

    meanwhile(monkeypatch, happen)
    code, _, errors = run(*SOUP, "--out", out, "--force")
    assert code == 1
    assert f"{out} changed while this was made" in errors
    kept = {name: x for name, x in after.items() if ".partial" not in name}
    assert everything(place) == kept


def test_notes_that_are_added_meanwhile_are_kept(run, monkeypatch):
    assert run(*SOUP, "--out", "out")[0] == 0
    meanwhile(monkeypatch, lambda: Path("out/d/notes").touch())
    assert run(*SOUP, "--out", "out", "--force")[0] == 1
    assert Path("out/d/notes").exists()


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
@pytest.mark.parametrize("out", ["out", "out.safetensors"])
def test_of_two_merges_one_is_done(out, links, run, monkeypatch):
    """The second one begins and ends while the first one is at work."""
    if not links:

        def refused(*paths):
            raise PermissionError

        monkeypatch.setattr(os, "link", refused)
    codes = []
    other = ["merge", "soup", "b.safetensors", "b.safetensors", "--out", out]
    meanwhile(monkeypatch, lambda: codes.append(run(*other)[0]))
    code, _, errors = run(*SOUP, "--out", out)
    assert (codes, code) == ([0], 1)
    assert "error: " in errors
    merged = opening.open_checkpoint(out)
    where = [leaf.name for leaf in merged.leaves].index("w")
    mine = safetensors.numpy.load_file("b.safetensors")["w"]
    np.testing.assert_array_equal(merged.read([where])[0], mine)
    assert names() == [*MODELS, out]


def test_a_disk_without_hard_links(run, monkeypatch):
    def refused(*paths):
        raise PermissionError

    monkeypatch.setattr(os, "link", refused)
    assert run(*SOUP, "--out", "out.safetensors")[0] == 0
    assert number_of("out.safetensors") == 1
    assert names() == [*MODELS, "out.safetensors"]


# --- what is replaced is never gone ---

CRASHES = """
import os, shutil, signal
from optax_avg.cli import _commit, _targets, _writing

def commit(out, copy, n):
    calls = []

    def counted(real):
        def call(*args, **options):
            if len(calls) == n:
                os.kill(os.getpid(), signal.SIGKILL)
            calls.append(real)
            return real(*args, **options)
        return call

    target = _targets.target_of(out, _writing.format_of, [], True)
    with _commit.partial(target) as folder:
        new = os.path.join(folder, out)
        copy("new_" + out, new)
        for name in ("rename", "replace", "link", "unlink", "mkdir", "rmdir"):
            setattr(os, name, counted(getattr(os, name)))
        _commit.commit(new, target)

def words(path):
    path = os.path.join(path, "_METADATA") if os.path.isdir(path) else path
    return open(path, "rb").read() if os.path.exists(path) else None

def content(path, out):
    if not os.path.lexists(path):
        return "nothing"
    known = [name for name in ("old", "new") if words(f"{name}_{out}") == words(path)]
    return known[0] if known else "other"

for out, copy in (("out", shutil.copytree), ("out.safetensors", shutil.copy)):
    for n in range(100):
        copy("old_" + out, out)
        child = os.fork()
        if not child:
            commit(out, copy, n)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(out, content(out, out), content(out + ".replaced", out))
        for name in os.listdir():
            if name.startswith((out, "." + out)):
                shutil.rmtree(name) if os.path.isdir(name) else os.remove(name)
        if not status:
            break
"""


def python(script):
    """The output of a Python of its own."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-c", script]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout.splitlines()


def test_a_kill_at_any_moment_leaves_the_old_or_the_new():
    save_orbax("old_out")
    shutil.copytree("old_out", "new_out")
    Path("new_out/_METADATA").write_text("new")
    os.rename("a.safetensors", "old_out.safetensors")
    os.rename("b.safetensors", "new_out.safetensors")
    # In the order of the moments; between two names the old one has a third.
    assert list(dict.fromkeys(python(CRASHES))) == [
        "out old nothing",
        "out nothing old",
        "out new old",
        "out new nothing",
        "out.safetensors old nothing",
        "out.safetensors new nothing",
    ]


def test_what_a_killed_run_took_away_is_named(place, run):
    save_orbax("out.replaced")
    before = everything(place)
    for options in ([], ["--force"], ["--dry-run"]):
        code, _, errors = run(*SOUP, "--out", "out", *options)
        assert code == 1
        assert "out.replaced is what was at " in errors
        assert everything(place) == before
    os.rename("out.replaced", "out")
    assert run(*SOUP, "--out", "out", "--force")[0] == 0
    assert names() == [*MODELS, "out"]


def test_what_a_killed_run_left_is_named_and_kept(run):
    Path(".out.x1.partial").mkdir()
    Path(".outer.x1.partial").mkdir()
    code, _, errors = run(*SOUP, "--out", "out")
    assert code == 0
    assert errors.count("warning: ") == 1
    assert ".out.x1.partial belongs to a run that was killed, or to one" in errors
    assert Path(".out.x1.partial").exists()


@pytest.mark.parametrize("moment", ["before", "between", "aside"])
def test_another_run_replaces_the_same_checkpoint(moment, run, monkeypatch):
    """Its result stays, and what was replaced can still be found."""
    assert run(*SOUP, "--out", "out")[0] == 0
    rename, shown = os.rename, Path("out/_METADATA").read_bytes()
    shutil.copytree("out", "theirs")
    Path("theirs/d/notes").touch()

    def late(old, new):
        if moment != "between" and new.endswith(".replaced"):
            rename("out", "old")
            rename("theirs", "out.replaced" if moment == "aside" else "elsewhere")
        if moment == "between" and old.endswith("new") and new.endswith("out"):
            monkeypatch.setattr(os, "rename", rename)
            rename("theirs", "out")
        rename(old, new)

    monkeypatch.setattr(os, "rename", late)
    code, _, errors = run(*SOUP, "--out", "out", "--force")
    assert code == 1
    assert "error: out changed while this was made; it was left as it is" in errors
    if moment == "between":
        assert "warning: what was at " in errors
        assert Path("out/d/notes").exists()
        assert Path("out.replaced/_METADATA").read_bytes() == shown


@pytest.mark.parametrize("suffix", ["", ".safetensors"])
@pytest.mark.parametrize("letter", ["x", "\N{SNOWMAN}"])
def test_the_longest_names(letter, suffix, run):
    out = letter * ((255 - len(suffix)) // len(letter.encode())) + suffix
    for force in ([], ["--force"]):
        code, _, errors = run(*SOUP, "--out", out, *force)
        assert code == 0, errors
    assert number_of(out) == 1
    assert set(names()) == {*MODELS, out}
    # What killed runs leave is still told apart by all of the name.
    aside = Path(_targets.aside_of(out))
    aside.mkdir()
    other = out.replace(letter, "y", 1)
    assert run(*SOUP, "--out", other)[0] == 0
    assert run(*SOUP, "--out", out, "--force")[0] == (0 if suffix else 1)


def test_a_file_of_its_own_beside_shards(run):
    another_model()
    assert run(*SOUP, "--out", "other_hf/soup.safetensors")[0] == 0
    assert run(*SOUP, "--out", "other_hf/new/model.safetensors")[0] == 0


@pytest.mark.parametrize("out", ["out", "out.safetensors"])
def test_what_cannot_be_replaced_is_still_there(out, place, run, monkeypatch):
    assert run(*SOUP, "--out", out)[0] == 0
    before = everything(place)
    rename = os.rename

    def refused(old, new):
        if new == str(place / "work" / out) and not old.endswith(".replaced"):
            raise OSError("the disk is gone")
        rename(old, new)

    monkeypatch.setattr(os, "rename", refused)
    monkeypatch.setattr(os, "replace", refused)
    code, _, errors = run(*SOUP, "--out", out, "--force")
    assert code == 1
    assert "the disk is gone" in errors
    assert everything(place) == before


# --- signals, full disks, closed pipes ---


@pytest.mark.parametrize("out", ["out", "out.safetensors"])
@pytest.mark.parametrize(
    ("number", "wanted"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)],
)
def test_a_signal_leaves_nothing(number, wanted, out, place, run, monkeypatch):
    before = everything(place)
    meanwhile(monkeypatch, lambda: os.kill(os.getpid(), number))
    code, _, errors = run(*SOUP, "--out", f"new/{out}")
    assert code == wanted
    assert errors.endswith("stopped; nothing was written.\n")
    assert everything(place) == before


def test_a_signal_that_is_ignored_stays_so(run, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        meanwhile(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGHUP))
        assert run(*SOUP, "--out", "out")[0] == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def with_signals(function):
    """A function that is hit by three signals."""

    def hit(*args, **options):
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        return function(*args, **options)

    return hit


def test_signals_do_not_disturb_the_cleaning(place, run, monkeypatch):
    before = everything(place)
    monkeypatch.setattr(shutil, "rmtree", with_signals(shutil.rmtree))
    meanwhile(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGHUP))
    assert run(*SOUP, "--out", "out")[0] == 129
    assert everything(place) == before


@pytest.mark.parametrize("force", [[], ["--force"]], ids=["", "force"])
def test_signals_do_not_disturb_the_commit(force, run, monkeypatch):
    if force:
        save_orbax("out")
    monkeypatch.setattr(_commit, "_put", with_signals(_commit._put))
    monkeypatch.setattr(_commit, "_exchange", with_signals(_commit._exchange))
    assert run(*SOUP, "--out", "out", *force)[0] == 0
    assert number_of("out") == 1
    assert names() == [*MODELS, "out"]


@pytest.mark.parametrize("force", [[], ["--force"]], ids=["", "force"])
@pytest.mark.parametrize("out", ["out", "out.safetensors"])
def test_a_full_disk(out, force, place, run):
    if force:
        assert run(*SOUP, "--out", out)[0] == 0
    before = everything(place)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        code, _, errors = run(*SOUP, "--out", out, *force)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 1
    assert f"error: {out} was not written: File too large.\n" in errors
    assert "Traceback" not in errors
    assert everything(place) == before


def test_an_error_of_an_input_is_not_one_of_the_result(place, run, monkeypatch):
    """A file that was cut after its header was read."""
    before = everything(place)

    def cut():
        with open("a.safetensors", "r+b") as file:
            file.truncate(100)

    for out in ("out", "out.safetensors"):
        meanwhile(monkeypatch, cut)
        code, _, errors = run(*SOUP, "--out", out)
        assert code == 1
        assert errors.startswith("error: a.safetensors ")
        Path("a.safetensors").write_bytes(before["work/a.safetensors"])
        assert everything(place) == before


@pytest.mark.parametrize("options", [[], ["--dry-run"]], ids=["", "dry"])
def test_a_disk_that_is_certainly_too_small(options, place, run, monkeypatch):
    before = everything(place)
    disk = types.SimpleNamespace(f_blocks=9, f_bfree=9, f_bavail=9, f_frsize=1000)
    monkeypatch.setattr(os, "statvfs", lambda path: disk)
    monkeypatch.setattr(_targets, "_is_exact", lambda path: True)
    code, _, errors = run(*SOUP, "--out", "out", *options)
    assert code == 1
    said = "error: out needs 240,028 bytes, and its disk has 9,000 free.\n"
    assert errors == said
    assert everything(place) == before
    # A disk that compresses may hold it.
    monkeypatch.setattr(_targets, "_is_exact", lambda path: False)
    code, _, errors = run(*SOUP, "--out", "out", *options)
    assert code == 0
    assert said.replace("error", "warning") in errors
    # And one that says nothing is asked nothing.
    shutil.rmtree("out", ignore_errors=True)
    disk.f_blocks = 0
    assert "needs" not in run(*SOUP, "--out", "out", *options)[2]


ENDS = """
import os, pty, sys, time
from optax_avg import cli
from optax_avg.cli import _output, _signals

soup = ["merge", "soup", "a.safetensors", "b.safetensors", "--out"]
runs = [
    (1, ["inspect", "a.safetensors"]),
    (1, [*soup, "x", "--dry-run"]),
    (2, [*soup, "out"]),
    (2, [*soup, "a.safetensors"]),
]
for number, args in runs:
    if not os.fork():
        sys.argv[1:] = args
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, number)
        cli.main()
        sys.exit()
    print(args[0], args[-1], os.waitstatus_to_exitcode(os.wait()[1]), flush=True)

write = _output.write_checkpoint

def waiting(target, leaves, load):
    def one(i):
        open("begun", "w").close()
        while not _signals.signals:
            time.sleep(0.01)
        return load(i)
    write(target, leaves, one)

child, terminal = pty.fork()
if not child:
    _output.write_checkpoint = waiting
    sys.argv[1:] = [*soup, "stopped"]
    cli.main()
while not os.path.exists("begun"):
    time.sleep(0.01)
os.close(terminal)
print("hang-up", os.waitstatus_to_exitcode(os.wait()[1]), os.path.exists("stopped"))
"""


def test_closed_pipes_and_a_closed_terminal():
    """The result does not depend on whether someone still listens."""
    lines = [line for line in python(ENDS) if line.startswith(("m", "i", "h"))]
    assert lines == [
        "inspect a.safetensors 1",
        "merge --dry-run 1",
        "merge out 0",
        "merge a.safetensors 1",
        "hang-up 129 False",
    ]
    assert number_of("out") == 1
    assert names() == [*MODELS, "begun", "out"]


# --- words ---


def test_errors_of_arguments_come_before_the_bar(run):
    for command, said in (
        (["model-stock", "a.safetensors", "--base", "b.safetensors"], "two models"),
        (["ties", *MODELS, "--base", "a.safetensors", "--density", "2"], "density"),
    ):
        for options in ([], ["--dry-run"]):
            code, _, errors = run("merge", *command, "--out", "out", *options)
            assert code == 1
            assert errors.startswith("error: ")
            assert said in errors


@pytest.mark.parametrize("form", [_writing.SAFETENSORS, _writing.ORBAX])
def test_names_that_would_become_one(form):
    paths = [("a.b",), ("a", "b"), ("c",)]
    leaves = [Leaf(path, (2,), "float32") for path in paths]
    with pytest.raises(ValueError, match=r"2 leaves would be called a\.b"):
        form.check(leaves)
    form.check(leaves[1:])


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["merge", "soup", "", "b.safetensors", "--out", "x"], "path of an input is"),
        (["reconstruct", "", "--window", "2", "--out", "x"], "path of an input is"),
        (["inspect", ""], "the path of a checkpoint is empty"),
        (["inspect", "a.safetensors/"], "no checkpoint at a.safetensors/"),
        (["inspect", "b.safetensors"], "you may not read b.safetensors"),
        ([*SOUP, "--out", "x"], "you may not read b.safetensors"),
        ([*SOUP, "--out", "shut/x"], "you may not write to"),
    ],
)
def test_inputs_and_places_that_are_no_good(args, said, run, monkeypatch):
    Path("shut").mkdir()
    shut = ("b.safetensors", "shut")
    access = os.access
    monkeypatch.setattr(
        os, "access", lambda p, mode: not str(p).endswith(shut) and access(p, mode)
    )
    code, _, errors = run(*args)
    assert code == 1
    assert said in errors
    assert names() == [*MODELS, "shut"]


def test_a_directory_with_the_name_of_a_file(run):
    save_orbax("in.safetensors")
    assert "3, 2" in run("inspect", "in.safetensors")[1]


def test_a_dry_run_says_what_would_be_done(place, run, monkeypatch):
    for path in MODELS:
        leaves = {"w": np.ones((3, 2), np.float32), "n": np.arange(3)}
        safetensors.numpy.save_file(leaves, path)
    opened = opening.open_checkpoint
    unread = lambda *args: opened(*args)._replace(read=None)
    monkeypatch.setattr(_leafwise, "open_checkpoint", unread)
    save_orbax("out")
    before = everything(place)
    code, out, _ = run(*SOUP, "--out", "new/x.safetensors", "--dry-run")
    assert code == 0
    lines = out.splitlines()
    assert lines[:2] == [
        "read     a.safetensors: 48 bytes",
        "read     b.safetensors: 24 bytes",  # integers are those of the first model
    ]
    assert lines[2].startswith("compute  soup from 2 checkpoints: 2 leaves, 1 of int64")
    written = f"write    {place}/work/new/x.safetensors, a safetensors file: 48 bytes; "
    assert lines[3].startswith(written)
    assert lines[3].endswith(" are free on its disk")
    said = "Nothing was written, and no values were read: only the run itself"
    assert lines[4:] == [said, "finds NaN and inf among them."]
    out = run(*SOUP, "--out", "out", "--dry-run", "--force")[1]
    assert "/out, an Orbax checkpoint: 48 bytes; " in out
    assert out.endswith("\nfinds NaN and inf among them.\n")
    assert "; what is there is replaced\nNothing was written" in out
    assert everything(place) == before


COMMANDS = [c.name or c.callback.__name__ for c in _merge.merge.registered_commands]


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_in_help_run(name, run):
    for stem in ("base", "tuned", "fa", "fb", "ha", "hb", "h_base"):
        shutil.copy("a.safetensors", f"{stem}.safetensors")
    for step in (1000, 2000, 3000):
        save_orbax(f"step_{step}")
    shown = run("merge", name, "--help")[1]
    command = re.search(r"Example: optax-avg (merge .*)", shown)
    assert command, shown
    assert command[1].split()[1] == name
    code, _, errors = run(*command[1].split(), "--dry-run")
    assert code == 0, errors


def test_help_says_how_the_command_ends(run):
    shown = run("--help")[1]
    assert "Exit codes: 0 done; 1 not done" in shown
    assert "129, 130 and 143 stopped by a signal" in shown
    for name in ("merge", "reconstruct", "inspect"):
        assert f"Example: optax-avg {name} " in run(name, "--help")[1]
