"""What README and docs say: their code runs, their links and names exist."""

import inspect
import operator
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest

import optax_avg as oa

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def names_in(text):
    """What a page calls ``oa.name`` or ``oa.family.name``."""
    return set(re.findall(r"\boa((?:\.[a-zA-Z_]\w*)+)", text))


@each_page
def test_names_exist(page):
    for name in names_in(page.read_text()):
        # A name that does not exist raises AttributeError, which names it.
        assert operator.attrgetter(name[1:])(oa) is not None


@each_page
def test_links_lead_to_files(page):
    for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert link.startswith("https://") or (page.parent / link).is_file(), link


@each_page
def test_commands_name_files_that_exist(page):
    text = page.read_text()
    for name in re.findall(
        r"\b(?:examples|benchmarks|notebooks|tests|optax_avg)/[\w/]+\.\w+", text
    ):
        assert (ROOT / name).is_file(), name


def test_every_function_stands_in_the_methods():
    text = (ROOT / "docs" / "methods.md").read_text()
    functions = [
        name
        for family in (oa, oa.optimizers)
        for name in family.__all__
        if inspect.isfunction(getattr(family, name))
    ]
    missing = [name for name in functions if not re.search(rf"\b{name}\b", text)]
    assert not missing


def loss(params, batch):
    return jnp.sum((jnp.broadcast_to(params["w"], batch.shape) - batch) ** 2)


def test_code_of_the_readme_runs():
    blocks = re.findall(r"```python\n(.*?)```", PAGES[0].read_text(), re.DOTALL)
    assert len(blocks) == 3
    batch = jnp.arange(6.0).reshape(3, 2)
    spaces = {"jax": jax, "jnp": jnp, "loss": loss, "batch": batch}
    spaces["params"] = {"w": jnp.ones(2)}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), spaces)
    assert spaces["averaged"]["w"].tolist() == [1.0, 1.0]
    # The first step of Adam is as long as its learning rate.
    assert jnp.abs(spaces["updates"]["w"]).tolist() == pytest.approx(
        [1e-3] * 2, rel=1e-4
    )


def test_workers_of_the_page_of_many_processes_meet():
    page = (ROOT / "docs" / "many_processes.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert '"workers", 500' in block
    spaces = {"jax": jax, "jnp": jnp, "optax": optax, "oa": oa, "loss": loss}
    spaces |= {"P": jax.sharding.PartitionSpec, "params": {"w": jnp.ones(3)}}
    exec(compile(block.replace("500", "2"), "many_processes.md", "exec"), spaces)
    params, state = spaces["params"], spaces["state"]
    # Adam's first step has the sign of the gradient alone: some go up, others down.
    batches = jnp.linspace(-9.0, 9.0, jax.device_count() * 6).reshape(-1, 2, 3)
    params, state = spaces["step"](params, state, batches)
    assert jnp.ptp(params["w"], axis=0).max() > 0
    params, _ = spaces["step"](params, state, batches)
    assert jnp.ptp(params["w"], axis=0).max() < 1e-6


def test_the_training_from_start_to_end_runs(tmp_path, capsys):
    (block,) = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "choosing.md").read_text(), re.DOTALL
    )
    batches = [jnp.full(3, value) for value in (0.0, 1.0, 0.0, 1.0)]
    spaces = {"batches": batches, "loss": loss, "params": {"w": jnp.full(3, 2.0)}}
    spaces["folder"] = tmp_path
    exec(compile(block, "choosing.md", "exec"), spaces)
    assert re.fullmatch(r"live \S+ averaged \S+\n", capsys.readouterr().out)
    # The average lags behind Adam, whose four steps are at most 0.01 long.
    live, averaged = spaces["run"]["params"]["w"], spaces["averaged"]["w"]
    assert jnp.all((live >= 1.96) & (live < averaged) & (averaged < 2))
