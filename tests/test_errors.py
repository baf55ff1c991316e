"""Bad input, and the one line that each is answered with: on standard error, exit code 2, nothing left behind."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import tiny
from flax import nnx

import train
from layers.attention import Attention
from layers.layer import Tokens
from models.decode import Decoder, Sampling
from models.lm import LM, Stage

# (arguments, what the line says) of `python train.py tiny.py ARGUMENTS`
FLAGS = {
    "unknown field": (
        "--model.DD 32",
        r"there is no field --model\.DD: did you mean --model\.D or .* --help lists all",
    ),
    "field of no room": ("--lr 0.1", r"there is no field --lr: did you mean --optimizer\.lr\?"),
    "misspelt room": ("--tran.steps 3", r"there is no field --tran\.steps: did you mean --train\.steps"),
    "wrong type": ("--model.D abc", r"--model\.D: invalid literal for int\(\) .*'abc'"),
    "fraction for an integer": ("--train.steps 2.5", r"--train\.steps: invalid literal for int\(\) .*'2\.5'"),
    "no value": ("--train.steps", r"--train\.steps"),
    "unknown choice": ("--model.dtype float8", r"'float8' .*--model\.dtype.*'float32', 'bfloat16'"),
    "a stray word": ("fast", "fast"),
    "no heads": (
        "--model.stages.0.pattern.0.H 0",
        r"model\.stages\.0\.pattern\.0: LinearAttention\.H is 0: it must be at least 1",
    ),
    "no steps": ("--train.steps 0", r"Train\.steps is 0: it must be at least 1"),
    "rate below zero": ("--optimizer.lr -1", r"AdamW\.lr is -1\.0: it must be above 0"),
    "parts of a batch": ("--train.accumulate 3", r"train\.accumulate is 3, which does not divide data\.B = 2"),
    "too few words": ("--model.W 256", r"model\.W is 256, but the data has 257 words: use --model\.W 257"),
    "mesh beyond the devices": ("--mesh.data 3", r"mesh\.data = 3 do not fit 8 devices"),
    "mesh beyond the batch": ("--mesh.data 4", r"data\.B is 2, which does not divide over mesh\.data = 4"),
    "mesh beyond a part": (
        "--train.accumulate 2 --mesh.data 2",
        r"data\.B is 2, which does not divide over train\.accumulate x mesh\.data = 4: choose a multiple, such as 4",
    ),
    "no such corpus": ("--data.source nowhere", r"Text\.source is 'nowhere': no such file or folder; give"),
    "empty corpus": ("--data.source empty", r"Text\.source is 'empty': an empty corpus; give"),
    "blank corpus": ("--data.source blank", r"Text\.source is 'blank': an empty corpus; give"),
    "nothing held out": ("--data.held_out 0", r"nothing to evaluate on: raise data\.held_out"),
    "longer than the corpus": ("--data.T 100000", r"Text\.T is 100000: longer than the corpus, \d+ training tokens"),
    "no tokenizer": ("--data.tokenizer nowhere.json", r"Text\.tokenizer is 'nowhere\.json': cannot be read"),
    "not a tokenizer": ("--data.tokenizer broken.json", r"Text\.tokenizer is 'broken\.json': not a tokenizer"),
    "resume from nowhere": ("--resume nowhere", r"--resume nowhere: give auto, never, or the folder of a run"),
    "a file for a folder": ("--run file", r"cannot lock .*file"),
}

MODEL = "config = dataclasses.replace(config, model=LM(W=257, D=16, stages=(Stage(({},)),)))"
# (text of a config file, what the line says); WHOLE stands for a config that is right.
FILES = {
    "no config": ("from models.lm import LM", r"own\.py: it has no `config`; end the file in `config = Exp"),
    "config of another type": ("config = 3", r"own\.py: its `config` is of type int; end the file in"),
    "syntax": ("config = (\n\nx = = 1", r"own\.py, line \d: "),
    "unknown name": ("\nconfig = Experimant()", r"own\.py, line 2: NameError: name 'Experimant' is not defined"),
    "no such layer": ("import layers.gla2", r"own\.py, line 1: ModuleNotFoundError: No module named 'layers\.gla2'"),
    "unknown argument": ("from models.lm import LM\nLM(DD=3)", r"own\.py, line 2: TypeError: .*'DD'"),
    "refused value": ("from models.lm import LM\nLM(W=0, D=1, stages=())", r"own\.py, line 2: LM\.W is 0: it must"),
    "heads that do not divide": (
        "WHOLE\nimport dataclasses\nfrom layers.attention import Attention\n" + MODEL.format("Attention(H=3)"),
        r"Attention\.H is 3, which does not divide D = 16",
    ),
    "a class of its own": (
        "WHOLE\nimport dataclasses\nclass Mine(MLP):\n    pass\n" + MODEL.format("Mine()"),
        r"Mine is defined in a config file, .*: move it to a file of its own, such as layers/mine\.py",
    ),
}  # fmt: skip
NAMES = {
    "misspelt": ("quickstar", r"there is no config 'quickstar': did you mean quickstart\? Known: .*mqar"),
    "unknown": ("xyzzy", r"there is no config 'xyzzy': give a \.py file, a run folder, or a name in configs/\."),
    "no such file": ("nowhere.py", r"there is no config 'nowhere\.py'"),
    "a folder that is no run": ("empty", r"there is no config 'empty'"),
    "a flag first": ("--model.D", r"the first argument is a config, not '--model\.D'"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder to stand in: a config, a corpus, and things that are not what they should be."""
    place = tmp_path_factory.mktemp("errors")
    tiny.config_file(place)
    (place / "empty").mkdir()
    (place / "blank").mkdir()
    (place / "blank" / "a.txt").write_text("")
    (place / "broken.json").write_text(json.dumps({"model": None}))
    (place / "file").write_text("")
    return place


def line(capsys) -> str:
    """What was said: one line, on standard error."""
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and said.err.count("\n") == 1, said.err
    assert "Traceback" not in said.out
    return said.err


@pytest.mark.parametrize("name", FLAGS)
def test_flags(name, place, monkeypatch, capsys):
    arguments, expected = FLAGS[name]
    monkeypatch.chdir(place)
    before = sorted(place.iterdir())
    assert train.main(["tiny.py", *arguments.split()]) == 2
    assert re.search(expected, said := line(capsys)), said
    assert [path.name for path in sorted(place.iterdir()) if path not in before and path.name != "store"] == []


@pytest.mark.parametrize("name", FILES)
def test_config_files(name, place, tmp_path, monkeypatch, capsys):
    text, expected = FILES[name]
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(text.replace("WHOLE", (place / "tiny.py").read_text()))
    assert train.main(["own.py"]) == 2
    assert re.search(expected, said := line(capsys)), said
    assert not Path("runs").exists()


@pytest.mark.parametrize("name", NAMES)
def test_names(name, place, monkeypatch, capsys):
    argument, expected = NAMES[name]
    monkeypatch.chdir(place)
    assert train.main([argument]) == 2
    assert re.search(expected, said := line(capsys)), said


def test_more_tokens_than_the_memory_has_room_for():
    layer = Attention(H=2).build(16, rngs=nnx.Rngs(0))
    x_BTD, ids_BT = jnp.zeros([1, 9, 16]), jnp.zeros([1, 9], jnp.int32)
    tokens = Tokens(ids_BT, jnp.arange(9)[None])
    jax.eval_shape(layer, x_BTD, tokens, layer.init_state(1, 9))
    with pytest.raises(ValueError, match="Attention reads a piece of 9 tokens into a state for 8: say a larger T"):
        jax.eval_shape(layer, x_BTD, tokens, layer.init_state(1, 8))
    model = LM(W=50, D=16, stages=(Stage((Attention(H=2),)),)).build(rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="capacity is 8, but the longest prompt and 6 steps need 9 tokens"):
        next(Decoder(model).generate([[1, 2, 3]], 6, Sampling(), capacity=8))


def test_a_checkpoint_of_another_model_at_the_door(place, monkeypatch, capsys):
    """It says so itself: the run's config.py is gone."""
    monkeypatch.chdir(place)
    tiny.trained(place, "run", train__steps=4)
    (place / "run" / "config.py").unlink()
    assert train.main(["tiny.py", "--run", "run", "--model.D", "32"]) == 2
    expected = r"run was made with model\.D = 16, not 32: change that back, or choose another --run"
    assert re.search(expected, said := line(capsys)), said


def test_a_process_says_the_same_and_no_more(place):
    """Without pytest around it: the exit code, and both streams."""
    done = tiny.run(place / "tiny.py", "--model.DD", 32)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: there is no field --model.DD") and done.stderr.count("\n") == 1


def test_a_reader_that_leaves(place):
    """`python train.py --help | head`: no traceback."""
    process = tiny.start("--help")
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 141
    process.stderr.close()
