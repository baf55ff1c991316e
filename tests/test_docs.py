"""The tutorial's code runs as it stands: its layer keeps every law, its config builds."""

import importlib.util
import pathlib
import re
import sys

import jax
import laws
import pytest
from flax import nnx

from probes import report
from probes.tasks import task
from training import settings

ROOT = pathlib.Path(__file__).parents[1]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "add_a_memory.md").read_text(), re.DOTALL)

pytestmark = pytest.mark.xdist_group("docs")


@pytest.fixture(scope="module")
def fading(tmp_path_factory):
    """The tutorial's first block, imported as the file that it asks for."""
    path = tmp_path_factory.mktemp("docs") / "fading.py"
    path.write_text(BLOCKS[0])
    spec = importlib.util.spec_from_file_location("layers.fading", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.parametrize("judge", laws.LAWS.values(), ids=laws.LAWS.keys())
def test_the_layer_keeps_the_laws(fading, judge):
    judge(fading.Fading.examples()[0])


def test_the_config_builds(fading, tmp_path):
    path = tmp_path / "my_fading.py"
    path.write_text(BLOCKS[1])
    experiment = settings.load(path)
    assert settings.describe(path) == experiment.description
    jax.eval_shape(lambda key: experiment.model.build(rngs=nnx.Rngs(params=key)), jax.random.key(0))


def test_the_memories_on_paper_are_memories(tmp_path):
    """The configs that docs/test_time_memory.md lists are accepted without a warning."""
    block = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "test_time_memory.md").read_text(), re.DOTALL)[0]
    path = tmp_path / "memories.py"
    path.write_text(block)
    spec = importlib.util.spec_from_file_location("memories", path)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert block.count("TestTimeMemory(") == 5


def test_the_readme_names_what_exists():
    """Configs, files and targets that the README's commands mention."""
    text = (ROOT / "README.md").read_text()
    for name in re.findall(r"python train\.py (\w+)", text):
        assert name in settings.config_files() or name == "runs", name
    for path in re.findall(r"\]\(([\w/.]+)\)", text):
        assert (ROOT / path).is_file(), path
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE)) <= targets


def line(name, trials):
    """A probe's line in the table of the page on probes."""
    data = trials[name].data
    trained = sorted({part.task.length for part in data.train})
    first = data.test[0].task
    sizes = [other.partition("@")[2] for other in trials if other.startswith(f"{name}@")]
    cells = [
        f"`{name}`",
        report.about(name),
        " to ".join(f"{T:,}" for T in dict.fromkeys((trained[0], trained[-1]))),
        f"{max(part.task.length for part in data.test):,}",
        f"{first.chance:.2g}",
        "" if first.plateau is None else f"{first.plateau:.2g}",
        ", ".join(size for size in sizes if size != "smoke"),
    ]
    return f"| {' | '.join(cells)} |"


def test_the_page_on_probes_says_what_the_trials_are():
    text = (ROOT / "docs" / "probes.md").read_text()
    trials = task.discover()
    probes = [name for name in trials if "@" not in name]
    assert [at for at in text.splitlines() if at.startswith("| `")] == [line(name, trials) for name in probes]
