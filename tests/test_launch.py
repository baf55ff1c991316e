"""What the launchers print, whole; that it does what --run does, and that nothing is done without it."""

import dataclasses
import math
import os
import pathlib
import re
import shlex
import subprocess
import sys
import textwrap

import pytest

from tpu import chips
from tpu.launch import main
from tpu.options import TARGETS
from training.settings import ROOT, ConfigError

GOLDEN = pathlib.Path(__file__).parent / "golden" / "launch"
REWRITE = "ENGRAX_REWRITE_GOLDEN" in os.environ
CLOUD = ("gcloud", "kubectl", "sbatch", "scancel", "squeue", "scontrol", "srun")
PROGRAMS = (*CLOUD, "git", "make", "sudo", "gcsfuse", "tail")

CODE = ["--repository", "https://example.org/engrax.git", "--commit", "0123456789abcdef0123456789abcdef01234567"]
NAMED = ["--name", "small", *CODE]
PLACE = ["--project", "my-project", "--zone", "us-west4-a", "--accelerator", "v5litepod-8"]
TPU = [*NAMED, *PLACE, "--bucket", "my-runs"]
SHARED = "/shared/runs/small"
ASKED = {
    "vm": ["vm", "quickstart", *TPU],
    "queued": ["queued", "titans_mac@340M", *TPU, "--spot"],
    "gke": ["gke", "quickstart", *NAMED, "--accelerator", "v6e-8", "--bucket", "my-runs", "--spot"],
    "slurm": ["slurm", "quickstart", *NAMED, "--folder", SHARED, "--gpus", "4", "--partition", "long"],
}
ODD = """it's "odd": $HOME `date` $(date) \\ {x} ü  #1 !"""
HARD = ["--train.steps", "500", "--description", ODD, "--sample", "", "--data.source", "*"]
CASES = [(target, action) for target, kind in TARGETS.items() for action in kind.actions]


@pytest.fixture
def stubs(tmp_path, monkeypatch):
    """Programs that write what they were called with to a file, one line a call, and do nothing else. The file."""
    calls, folder = tmp_path / "calls", tmp_path / "stubs"
    folder.mkdir()
    for name in PROGRAMS:
        # A call is recorded as bash would say it. `fail` holds a word: calls with it in their line fail.
        (folder / name).write_text(
            f'#!/bin/bash\nline=$(printf "%q " {name} "$@")\necho "$line" >> {calls}\n'
            f'word=$(cat {tmp_path}/fail 2> /dev/null) && [[ "$line" == *"$word"* ]] && exit 3\nexit 0\n'
        )
        (folder / name).chmod(0o755)
    shared = folder / "mkdir"  # there is no shared disk here
    shared.write_text(f'#!/bin/bash\n[[ "$*" == */shared/* ]] && echo mkdir "$@" >> {calls} || exec /bin/mkdir "$@"\n')
    shared.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return calls


def said(capsys, *arguments):
    """What a call prints, having ended well."""
    assert main(list(arguments)) == 0
    return capsys.readouterr().out


def refused(capsys, *arguments):
    """The one line of an error, without its beginning."""
    assert main(list(arguments)) == 2
    answer = capsys.readouterr()
    assert answer.out == ""
    assert re.fullmatch("error: .+\n", answer.err)
    return answer.err.removeprefix("error: ").rstrip("\n")


def files(script):
    """The files that a printed script writes, by name."""
    return {
        pathlib.Path(path).name: text
        for path, text in re.findall(r"^cat > (\S+) <<'END_OF_FILE'\n(.*?)^END_OF_FILE$", script, re.M | re.S)
    }


def bash(text, **options):
    return subprocess.run(["bash", "-c", text], capture_output=True, text=True, timeout=20, **options)


def calls(path):
    return [shlex.split(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.parametrize(("target", "action"), CASES)
def test_what_is_printed(stubs, capsys, target, action):
    text = said(capsys, *ASKED[target], "--action", action, "--", "--train.steps", "500")
    path = GOLDEN / f"{target}_{action}.txt"
    if REWRITE:
        path.write_text(text)
    assert text == path.read_text()
    assert not calls(stubs) and not (stubs.parent / "runs").exists(), "something was done"


def test_no_golden_text_is_left_over():
    assert {path.stem for path in GOLDEN.iterdir()} == {f"{target}_{action}" for target, action in CASES}


@pytest.mark.parametrize(("target", "action"), CASES)
def test_every_script_is_bash(stubs, capsys, target, action):
    script = said(capsys, *ASKED[target], "--action", action, "--", *HARD)
    scripts = {name: text for name, text in files(script).items() if not name.endswith(".yaml")}
    for text in [script, *scripts.values()]:
        answer = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
        assert answer.returncode == 0 and answer.stderr == ""


def test_start_is_what_happens_unless_said_and_dry_run_may_be_said(stubs, capsys):
    start = said(capsys, *ASKED["vm"], "--action", "start")
    assert said(capsys, *ASKED["vm"]) == start == said(capsys, *ASKED["vm"], "--dry-run")


@pytest.mark.parametrize(("target", "action"), [case for case in CASES if case[1] != "watch"])
def test_run_does_what_is_printed(stubs, capsys, target, action):
    asked = [*ASKED[target], "--action", action]
    script = said(capsys, *asked, "--", *HARD)
    assert bash(script).returncode == 0
    by_hand = calls(stubs)
    written = {path: path.read_text() for path in pathlib.Path("runs").rglob("*.*")}
    stubs.unlink()
    assert main([*asked, "--run", "--", *HARD]) == 0
    assert calls(stubs) == by_hand != []
    assert {path: path.read_text() for path in written} == written
    printed = capsys.readouterr().out
    lines = [line.removesuffix(" || true") for line in re.findall(r"^\+ (.*)$", printed, re.M)]
    commands = [line.removesuffix(" || true") for line in re.findall(r"^(?!mkdir -p runs)\w.*$", rest(script), re.M)]
    assert lines == [line for line in commands if line != "set -e"]


def rest(script):
    """A printed script without its files."""
    return re.sub(r"^cat > .*?^END_OF_FILE$", "", script, flags=re.M | re.S)


def test_run_stops_at_the_first_failure(stubs, capsys):
    (stubs.parent / "fail").write_text("scp")
    assert main([*ASKED["vm"], "--run"]) == 1
    assert [call[4] for call in calls(stubs)] == ["create", "scp"]
    error = capsys.readouterr().err
    assert error.startswith("error: exit status 3 of: gcloud compute tpus tpu-vm scp ")
    assert error.endswith("; nothing after it was run\n") and error.count("\n") == 1


def test_what_is_not_there_to_be_deleted_stops_nothing(stubs, capsys):
    (stubs.parent / "fail").write_text("delete")
    assert main([*ASKED["vm"], "--action", "restart", "--run"]) == 0
    assert [call[4] for call in calls(stubs)] == ["delete", "create", "scp", "ssh", "ssh"]
    assert main([*ASKED["vm"], "--action", "delete", "--run"]) == 1


def test_a_program_that_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert main([*ASKED["gke"], "--run"]) == 1
    assert "error: there is no kubectl on this machine: see tpu/README.md" in capsys.readouterr().err


def trained(script, home, **more):
    """What train.py is called with when a worker's script runs with stubs."""
    folder = home / "engrax-0123456789abcdef0123456789abcdef01234567" / ".venv" / "bin"
    folder.mkdir(parents=True, exist_ok=True)
    python = folder / "python"
    python.write_text(f'#!/bin/bash\nprintf "%s\\0" "$@" > {home}/trained\nexit $(cat {home}/status || echo 0)\n')
    python.chmod(0o755)
    srun = home / "stubs" / "srun"
    srun.write_text('#!/bin/bash\nshift\nexec "$@"\n')
    answer = bash(script, **more)
    return answer, (home / "trained").read_text().split("\0")[:-1]


@pytest.mark.parametrize("target", TARGETS)
def test_flags_reach_the_training_as_they_are(stubs, capsys, target):
    """Through the printed script, its file, and the worker's bash; on a VM through ssh as well."""
    home = stubs.parent
    script = said(capsys, *ASKED[target], "--", *HARD)
    name = {"vm": "train.sh", "queued": "startup.sh", "gke": "jobset.yaml", "slurm": "train.sbatch"}[target]
    text = files(script)[name]
    if target == "gke":
        text = literal(text)
    folder = {"vm": f"{home}/bucket/runs/quickstart", "queued": f"{home}/bucket/runs/titans_mac@340M",
              "gke": "/bucket/runs/quickstart", "slurm": SHARED}[target]  # fmt: skip
    if target == "vm":  # what the remote shell is given, with the file where scp put it
        (home / "train.sh").write_text(text)
        assert bash(script).returncode == 0
        text = next(c for call in calls(stubs) for c in call if "train.sh" in c and c.startswith("--command="))
        text = text.removeprefix("--command=") + " wait"
    answer, got = trained(text, home)
    assert answer.returncode == 0, answer.stderr
    config = "titans_mac@340M" if target == "queued" else "quickstart"
    assert got == ["train.py", config, "--run", folder, *HARD]


def literal(manifest):
    """The script in a manifest, as YAML reads its block: by the indent of the first line."""
    block = re.search(r"^  train\.sh: \|\n((?:    .*\n|\n)+)", manifest, re.M)[1]
    return textwrap.dedent(block)


def bucket(home, naps=""):
    """A gcloud that keeps `launch.status` in a file, and a sleep that does not. naps: what that does instead."""
    (home / "stubs" / "gcloud").write_text(
        f'#!/bin/bash\ncd {home}\ncase "$2" in cat) cat ended ;; cp) cat > ended ;; rm) rm ended ;; esac\n'
    )
    (home / "stubs" / "sleep").write_text(f"#!/bin/bash\necho again >> {home}/tries\n{naps}\n")
    (home / "stubs" / "sleep").chmod(0o755)


def tries(home):
    return (home / "tries").read_text().count("again") + 1 if (home / "tries").exists() else 1


@pytest.mark.parametrize(
    ("status", "times"),
    [(0, 1), (1, 1), (2, 1), (130, 1), (138, 1), (143, 1), (69, 10), (70, 10), (134, 10), (137, 10), (139, 10)],
)
def test_a_queued_tpu_says_how_the_training_ended(stubs, capsys, status, times):
    """Whatever the end: a TPU that nobody knows to be idle is paid for. The same command is tried where it goes on."""
    home = stubs.parent
    bucket(home)
    (home / "status").write_text(str(status))
    answer, _ = trained(files(said(capsys, *ASKED["queued"]))["startup.sh"], home)
    assert answer.returncode == status and (home / "ended").read_text().strip() == str(status)
    assert tries(home) == times


@pytest.mark.parametrize(("before", "after"), [("143", False), ("1", True)])
def test_a_queued_tpu_that_comes_back_was_not_told_to_stop(stubs, capsys, before, after):
    home = stubs.parent
    bucket(home)
    (home / "ended").write_text(before)
    head = files(said(capsys, *ASKED["queued"]))["startup.sh"].partition("ending() {")[0]
    assert bash(head).returncode == 0 and (home / "ended").exists() == after


@pytest.mark.parametrize("target", ["queued", "slurm"])
def test_tries_are_counted_anew_after_a_checkpoint(stubs, capsys, target):
    """Of the fifth try, and one that is no newer of the seventh."""
    home = stubs.parent
    name, run = {"queued": ("startup.sh", "bucket/runs/titans_mac@340M"), "slurm": ("train.sbatch", "run")}[target]
    script = files(said(capsys, *ASKED[target]))[name].replace(f" {SHARED}", f" {home}/run")
    steps = f"case $(wc -l < {home}/tries) in 4) mkdir -p $at/20 ;; 6) mkdir $at/10 ;; esac"
    bucket(home, f"at={home}/{run}/checkpoints\n{steps}")
    (home / "status").write_text("137")
    answer, _ = trained(script, home)
    assert answer.returncode == 137 and tries(home) == 4 + 10


def test_a_setup_that_fails_says_where(stubs, capsys):
    (stubs.parent / "fail").write_text("make")
    answer = bash(files(said(capsys, *ASKED["slurm"]))["setup.sh"])
    assert answer.returncode == 75
    assert answer.stderr == 'error: setup stopped at: make env ACCELERATOR="$accelerator" PYTHON="$python"\n'


@pytest.mark.parametrize(
    ("status", "times", "queued"),
    [(0, 1, False), (2, 1, False), (143, 1, False), (138, 1, True), (69, 10, False), (70, 10, False), (253, 10, False)],
)
def test_a_slurm_job_that_ran_out_of_time_queues_again(stubs, capsys, status, times, queued):
    """One that lost a process tries again within its time."""
    home = stubs.parent
    bucket(home)
    (home / "status").write_text(str(status))
    script = files(said(capsys, *ASKED["slurm"]))["train.sbatch"]
    answer, _ = trained(script, home, env=os.environ | {"SLURM_JOB_ID": "17"})
    assert answer.returncode == status and tries(home) == times
    assert calls(stubs) == ([["scontrol", "requeue", "17"]] if queued else [])


@pytest.mark.parametrize(
    ("states", "done", "status"),
    [
        (["NOT_FOUND", "WAITING_FOR_RESOURCES", "ACTIVE", "ended"], ["create", "delete"], 0),
        (["ACTIVE", "SUSPENDED", "PROVISIONING", "network", "ACTIVE", "ended"], ["delete", "create", "delete"], 0),
        (["FAILED"], [], 1),
        (["ACTIVE", "stopped", "ACTIVE", *["stopped"] * 9, "ACTIVE", "ended"], ["delete"], 0),
        (["stopped"] * 10 + ["SUSPENDED", "ACTIVE", "ended"], ["delete", "create", "delete", "create", "delete"], 0),
        (["killed"], ["delete"], 137),
    ],
)
def test_the_watch_asks_again_until_the_training_has_ended(stubs, capsys, states, done, status):
    """Each look is answered by the next state; `ended`, `killed`, `stopped`: an exit status is in the bucket."""
    home = stubs.parent
    (home / "states").write_text("\n".join(states) + "\n")
    (home / "stubs" / "gcloud").write_text(
        f"""#!/bin/bash
cd {home}
case "$*" in
  *describe*) state=$(head -n 1 states); sed -i 1d states; echo "$state" > now; echo "WARNING: old" >&2
    case "$state" in
      NOT_FOUND|network) echo "ERROR: $state" >&2; exit 1 ;; ended|killed|stopped) echo ACTIVE ;;
      *) echo $state ;; esac ;;
  *cat*) case $(cat now) in ended) echo 0 ;; killed) echo 137 ;; stopped) echo 143 ;; *) exit 1 ;; esac ;;
  *rm*) ;;
  *create*|*delete*) test "$4 $(cat now)" != "delete NOT_FOUND" || exit 1; echo "$4" >> done ;;
esac
"""
    )
    (home / "stubs" / "sleep").write_text("#!/bin/bash\n")
    (home / "stubs" / "sleep").chmod(0o755)
    answer = bash(files(said(capsys, *ASKED["queued"], "--action", "watch"))["watch.sh"])
    assert answer.returncode == status, answer.stdout + answer.stderr
    assert ((home / "done").read_text().split() if done else []) == done
    assert (home / "states").read_text() == ""


def test_the_manifest_is_yaml_as_far_as_we_write_it(stubs, capsys):
    """Two documents; every line a key, an item or part of the script; indents grow by two; no key twice in a map."""
    manifest = files(said(capsys, *ASKED["gke"], "--", *HARD))["jobset.yaml"]
    text = re.sub(r"^  train\.sh: \|\n(?:    .*\n|\n)+", "  train.sh: script\n", manifest, flags=re.M)
    assert "\t" not in text
    documents = text.split("---\n")
    assert [re.search("^kind: (.*)$", document, re.M)[1] for document in documents] == ["ConfigMap", "JobSet"]
    for document in documents:
        opened, before, opens = {0: set()}, 0, False
        for line in document.splitlines():
            match = re.fullmatch(r'( *)(- )?([A-Za-z0-9./-]+):( (\S+|".*"|\[.*\]))?', line)
            assert match, line
            indent = len(match[1])
            assert indent % 2 == 0 and (indent <= before or (opens and indent - before in (2, 4))), line
            for deeper in [at for at in opened if at > indent]:
                del opened[deeper]
            at = indent + len(match[2] or "")
            keys = opened.setdefault(at, set()) if not match[2] else opened.update({at: set()}) or opened[at]
            assert match[3] not in keys, line
            keys.add(match[3])
            before, opens = at, match[4] is None
    facts = dict(re.findall(r"^ *(?:- )?([\w./-]+): (.+)$", documents[1], re.M))
    assert facts["cloud.google.com/gke-tpu-topology"] == "2x4" and facts["google.com/tpu"] == "8"
    assert facts["parallelism"] == facts["completions"] == "1"
    assert set(re.findall("^ *name: (.*)$", manifest, re.M)) == {'"small"'}, "YAML would read true or null as its own"


def test_several_hosts_run_the_same_command(stubs, capsys):
    """One process a host, which train.py joins: every host by what its own surroundings say."""
    big = [a if a != "v6e-8" else "v6e-16" for a in ASKED["gke"]]
    text = said(capsys, *big)
    assert "parallelism: 4\n          completions: 4\n" in text and "google.com/tpu: 4\n" in text
    text = said(capsys, *ASKED["slurm"], "--nodes", "2")
    assert "#SBATCH --nodes=2\n#SBATCH --ntasks-per-node=1\n" in text
    assert "export JAX_LOCAL_DEVICE_IDS=0,1,2,3\n" in text and "\n  srun --kill-on-bad-exit=1 .venv/bin/python" in text


VM, SLURM = ASKED["vm"], ASKED["slurm"]
BARE = ["vm", "quickstart", *NAMED, *PLACE]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pod"], "there is no target 'pod': it must be one of vm, queued, gke, slurm"),
        (["vm"], "a config comes after the target"),
        (["vm", "--name", "x"], "a config comes after the target"),
        (["vm", "quickstrat", *TPU], "there is no config 'quickstrat': did you mean quickstart?"),
        (["vm", "/elsewhere/mine.py", *TPU], "there is no config"),
        (["vm", "quick start", *TPU], "the config is 'quick start'"),
        ([*VM, "--zoen", "x"], "there is no field --zoen: did you mean --zone?"),
        ([*VM, "--train.steps", "5"], "--train.steps is for train.py, whose flags follow --: ... -- --train.steps"),
        ([*VM, "--", "--run", "x"], "the run's folder is said before --, by --folder"),
        ([*VM, "--", "--description", "a\nb"], "holds a line break"),
        ([*VM, "--action", "watch"], "action is 'watch': it must be one of start, resume, logs, restart, delete"),
        ([*VM, "--run", "--dry-run"], "give one of them"),
        ([*VM, "--zone", ""], "zone is empty: give --zone, a zone, such as us-west4-a"),
        ([*VM, "--zone", "west"], "zone is 'west': give --zone"),
        ([*VM, "--project", ""], "project is empty: give --project"),
        ([*VM, "--name", "-rf"], "name"),
        ([*VM, "--name", "Small; rm"], "name is 'Small; rm': give --name, lower-case letters"),
        ([*VM, "--commit", "main"], "commit is 'main': give --commit, all 40 digits"),
        ([*VM, "--repository=--upload-pack=x"], "repository is '--upload-pack=x': give --repository"),
        ([*VM, "--bucket", "gs://my-runs"], "bucket is 'gs://my-runs': give --bucket, a bucket's name without gs://"),
        ([*VM, "--accelerator", "v5e-16"], "accelerator is 'v5e-16': v5e is written v5litepod"),
        ([*VM, "--accelerator", "h100"], "accelerator is 'h100': give a TPU type such as v5litepod-8"),
        ([*VM, "--accelerator", "v6e-12"], "accelerator is 'v6e-12': v6e comes in 1, 4, 8, 16, 32, 64, 128, 256"),
        ([*VM, "--folder", "/mnt/x"], "folder is '/mnt/x': on a TPU it lies in the bucket"),
        ([*VM, "--folder", "../x"], "give it without .."),
        ([*BARE, "--spot"], "would be on the TPU's own disk, but a spot TPU's disk goes with it: give --bucket"),
        ([*BARE, "--action", "restart"], "restart deletes the TPU, and the run on its disk"),
        (["queued", *BARE[1:]], "bucket is empty: give --bucket"),
        (
            ["vm", "quickstart", "--name", "x", *CODE],
            "accelerator, project, zone are empty: give --accelerator, a ",
        ),
        (
            ["slurm", "quickstart"],
            "name, repository, commit, folder are empty: give --name, lower-case letters",
        ),
        (
            ["vm", "laptop", *TPU, "--accelerator", "v5litepod-16"],
            "accelerator v5litepod-16 has 16 devices: data.B is 8, "
            "which does not divide over mesh.data = 16: choose a multiple, such as 16, in a flag after --",
        ),
        ([*VM, "--accelerator", "v3-8", "--", "--data.B", "4"], "v3-8 has 8 devices: data.B is 4, which"),
        ([*VM, "--accelerator", "v3-8", "--", "--train.accumulate", "4"], "over train.accumulate x mesh.data = 32"),
        ([*VM, "--accelerator", "v6e-16", "--", "--mesh.data", "4"], "leave process 1 without a device: make their"),
        ([*SLURM, "--nodes", "3"], "--nodes 3 --gpus 4 has 12 devices: data.B is 16, which does not divide over"),
        ([*VM, "--", "--train.stesp", "5"], "there is no field --train.stesp: did you mean --train.steps"),
        ([*VM, "--", "--data.B", "many"], "data.B"),
        (["gke", "quickstart", *NAMED, "--accelerator", "v3-8", "--bucket", "my-runs"], "on gke take v6e"),
        ([*ASKED["gke"], "--image", 'x" y'], "image is"),
        ([*ASKED["gke"], "--restarts", "-1"], "restarts is -1"),
        ([*SLURM, "--folder", ""], "folder is empty: give --folder"),
        ([*SLURM, "--folder", "runs/x"], "folder is 'runs/x': it must lie on a disk that every node sees"),
        ([*SLURM, "--folder", "/" + "tmp/x"], "it must lie on a disk that every node sees"),
        ([*SLURM, "--nodes", "0"], "nodes is 0: it must be at least 1"),
        ([*SLURM, "--gpus", "many"], "gpus"),
        ([*SLURM, "--time", "a day"], "time is 'a day': give --time, hours:minutes:seconds"),
    ],
)
def test_what_cannot_be_launched_is_one_line(stubs, capsys, arguments, words):
    assert words in refused(capsys, *arguments)
    assert not calls(stubs)


@pytest.mark.parametrize("target", TARGETS)
def test_help_teaches(capsys, target):
    assert "usage: python -m tpu.launch TARGET CONFIG" in said(capsys, "--help")
    with pytest.raises(SystemExit) as end:
        main([target, "--help"])
    assert end.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert all(f"--{field.name.replace('_', '-')}" in printed for field in dataclasses.fields(TARGETS[target]))
    assert printed.count("(required)") == len(TARGETS[target].required())


def test_required_are_those_that_have_no_value_of_their_own():
    code = ["name", "repository", "commit"]
    assert TARGETS["vm"].required() == [*code, "accelerator", "project", "zone"]
    assert TARGETS["queued"].required() == [*code, "accelerator", "bucket", "project", "zone"]
    assert TARGETS["gke"].required() == [*code, "accelerator", "bucket"]
    assert TARGETS["slurm"].required() == [*code, "folder"]


def test_what_divides_nowhere_can_still_be_followed_and_deleted(stubs, capsys):
    for action in ("logs", "delete"):
        assert said(capsys, "vm", "laptop", *TPU, "--accelerator", "v5litepod-16", "--action", action)


def test_slices():
    """A name's number counts chips or cores; up to a generation's largest host there is one."""
    known = {"v5litepod-1": (1, 1), "v5litepod-8": (8, 1), "v5litepod-16": (16, 4), "v6e-8": (8, 1), "v5p-8": (4, 1),
             "v5p-16": (8, 2), "v4-8": (4, 1), "v4-32": (16, 4), "v3-8": (4, 1), "v2-32": (16, 4)}  # fmt: skip
    assert {name: (chips.read(name).chips, chips.read(name).hosts) for name in known} == known
    for generation in chips.GENERATIONS.values():
        for number, topology in generation.topologies.items():
            assert math.prod(map(int, topology.split("x"))) == number
    assert [chips.read(name).devices for name in ("v3-8", "v5p-8", "v6e-8")] == [8, 4, 8]
    with pytest.raises(ConfigError):
        chips.read("v5litepod-2")


def test_the_page_names_what_exists():
    """tpu/README.md: every target and action has its word, and every command in it is accepted."""
    page = (ROOT / "tpu" / "README.md").read_text()
    for target, kind in TARGETS.items():
        assert f"`{target}`" in page
        assert all(f"`{action}`" in page for action in kind.actions)
    blocks = "".join(re.findall(r"```\n(.*?)```", page, re.S)).replace("\\\n", " ")
    commands = re.findall(r"^python -m tpu\.launch (.*)$", blocks, re.M)
    assert len(commands) >= 4
    for command in commands:
        words = shlex.split(command.replace("$(git rev-parse HEAD)", CODE[-1]))
        assert main([word for word in words if word != "--run"]) == 0, command


def test_it_starts_without_jax():
    code = "import sys, tpu.launch; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
