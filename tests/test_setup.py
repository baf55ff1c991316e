"""The two commands on a fresh machine: what they install is pinned, and they say what they do."""

import os
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
LOCKS = ("requirements.lock", "requirements-cuda.lock", "requirements-tpu.lock")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PIN = re.compile(r"([a-z0-9][a-z0-9.-]*)==[\w.+!]+(?: ; [^\\#]+?)?((?: --hash=sha256:[0-9a-f]{64})+)")


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs make at the root without the variables that an enclosing make, or its user, set."""
    path = {"PATH": str(pathlib.Path(sys.executable).parent) + ":/usr/local/bin:/usr/bin:/bin"}
    return subprocess.run(["make", *arguments], cwd=ROOT, env=path, capture_output=True, text=True, timeout=60)


def pins(text: str) -> dict[str, set[str]]:
    """A lock's requirements by name, their hashes cut off. ValueError at a line that is not a pin with hashes."""
    found: dict[str, set[str]] = {}
    for line in filter(None, text.replace("\\\n", " ").splitlines()):
        match = PIN.fullmatch(re.sub(r" +", " ", line).strip())
        if match is None:
            raise ValueError(f"not a pinned requirement with hashes: {line[:100]}")
        found.setdefault(match[1], set()).add(line.split(" --hash")[0].strip())
    return found


def packages(requirements: list[str]) -> set[str]:
    return {re.split(r"[^\w.-]", r, maxsplit=1)[0].lower().replace("_", "-") for r in requirements}


@pytest.mark.parametrize("lock", LOCKS)
def test_every_line_of_a_lock_is_a_pin_with_hashes(lock):
    assert pins((ROOT / lock).read_text())


@pytest.mark.parametrize(
    "line",
    [
        "jax==0.10.2",
        "jax>=0.10 --hash=sha256:" + 64 * "0",
        "jax @ https://example.org/jax.whl --hash=sha256:" + 64 * "0",
        "--index-url https://example.org/simple",
        "-e .",
        "jax==0.10.2 --hash=sha256:0123",
    ],
)
def test_an_unpinned_line_is_seen(line):
    with pytest.raises(ValueError, match="not a pinned requirement"):
        pins(line + "\n")


def test_the_lock_holds_what_the_project_asks_for():
    extras = PROJECT["project"]["optional-dependencies"]
    locked = set(pins((ROOT / "requirements.lock").read_text()))
    wanted = PROJECT["project"]["dependencies"] + extras["dev"] + extras["text"] + extras["data"]
    assert packages(wanted) - {"engrax"} <= locked
    assert packages(PROJECT["build-system"]["requires"]) <= locked


@pytest.mark.parametrize("lock", LOCKS[1:])
def test_an_accelerator_adds_to_the_lock_and_repeats_nothing(lock):
    assert not set(pins((ROOT / lock).read_text())) & set(pins((ROOT / "requirements.lock").read_text()))


@pytest.mark.parametrize("package", ["jaxlib", "jax-cuda12-plugin", "jax-cuda12-pjrt"])
def test_jax_and_its_wheels_come_in_one_version_for_each_python(package):
    locked = {name: found for lock in LOCKS for name, found in pins((ROOT / lock).read_text()).items()}
    assert {pin.removeprefix(package) for pin in locked[package]} == {pin.removeprefix("jax") for pin in locked["jax"]}
    assert {pin.split(" ; ")[1] for pin in locked["jax"]} == {
        "python_full_version < '3.12'",
        "python_full_version >= '3.12'",
    }


def test_help_lists_every_target():
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    listed = re.findall(r"^  ([a-z-]+) +\S", make().stdout, re.MULTILINE)
    assert set(listed) == targets >= {"env", "train", "test", "lint", "bench", "lock"}
    assert len(listed) == len(set(listed))


def test_an_unknown_accelerator_is_one_line():
    answer = make("env", "ACCELERATOR=gpu")
    assert answer.returncode != 0
    assert "ACCELERATOR is 'gpu': it must be cpu, cuda or tpu" in answer.stderr
    assert len(answer.stderr.splitlines()) == 1


def test_a_python_too_old_is_refused_before_anything_changes(tmp_path):
    old = tmp_path / "python3.10"
    old.write_text('#!/bin/sh\ntest "$1" = -V && echo Python 3.10.0 || exit 1\n')
    old.chmod(0o755)
    answer = make("env", f"PYTHON={old}")
    assert answer.returncode != 0
    assert "Python 3.10.0; Python 3.11 or newer is needed: make env PYTHON=" in answer.stderr
    assert answer.stdout == ""


def test_ci_runs_the_same_command():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    assert script.read_text().splitlines()[-1] == "make test"


def test_the_licence_is_apache_2():
    text = (ROOT / PROJECT["project"]["license-files"][0]).read_text()
    assert PROJECT["project"]["license"] == "Apache-2.0"
    assert "Apache License" in text and "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text


def test_the_project_is_not_for_an_index():
    assert "Private :: Do Not Upload" in PROJECT["project"]["classifiers"]


# Put together here, so that this file does not hold what it looks for.
MACHINE = re.compile("|".join(["/" + "(root|home|work|opt|tmp)/[a-z]", "py" + "pi[.]org", "python" + "hosted"]))


@pytest.mark.parametrize("text", ["cd /" + "home/someone", "https://py" + "pi.org/simple", "--find-links=/" + "opt/w"])
def test_a_machine_or_a_registry_is_seen(text):
    assert MACHINE.search(text)


def test_no_file_names_a_machine_or_a_registry():
    hidden = re.compile(r"[.](?!ci$|gitignore$).*|__pycache__|runs|build|dist|.*[.]egg-info")
    files = []
    for folder, subfolders, names in os.walk(ROOT):
        subfolders[:] = [name for name in subfolders if not hidden.fullmatch(name)]
        files += [pathlib.Path(folder, name) for name in names if not hidden.fullmatch(name)]
    assert {ROOT / "Makefile", ROOT / ".ci" / "run", ROOT / "layers" / "layer.py"} <= set(files)
    traces = {p: MACHINE.search(p.read_bytes().decode("utf-8", errors="replace")) for p in files}
    assert not [f"{p.relative_to(ROOT)}: {match[0]}" for p, match in traces.items() if match]


@pytest.mark.xdist_group("together")
def test_tests_of_a_group_stay_together(request):
    """Several workers tell a group by the name of its tests; a plugin that is too old for pytest says nothing."""
    assert "PYTEST_XDIST_WORKER" not in os.environ or request.node.nodeid.endswith("@together")
