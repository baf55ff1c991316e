"""Modular arithmetic: values by Python's own parser, shapes of expressions, and shares of answers."""

import ast
import collections
import dataclasses
import itertools
import operator
import re

import numpy as np
import pytest
from said import digest, fits, near, rows_of

from probes.tasks.arithmetic import Arithmetic, trials
from training.data import DataError

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.USub: operator.neg}


def value(text):
    """What Python makes of an expression of whole numbers and + - * ( )."""

    def of(node):
        match node:
            case ast.Constant():
                return node.value
            case ast.UnaryOp():
                return OPERATORS[type(node.op)](of(node.operand))
            case ast.BinOp():
                return OPERATORS[type(node.op)](of(node.left), of(node.right))

    return of(ast.parse(text, mode="eval").body)


def text(law, ids):
    words = [*map(str, range(law.modulus)), "+", "-", "*", "=", "(", ")"]
    return " ".join(words[word] for word in ids)


@pytest.mark.parametrize(
    "law",
    [
        Arithmetic(),
        Arithmetic(modulus=13, length=16, shortest=8, times=False),
        Arithmetic(brackets=True),
        Arithmetic(brackets=True, times=False, length=64, shortest=33),
        Arithmetic(modulus=11, brackets=True, length=9),
        Arithmetic(length=2),
        Arithmetic(length=3, brackets=True),
    ],
)
def test_the_answer_is_what_python_says(law):
    for row in rows_of(law, 150):
        assert law.shortest <= len(row.ids) <= law.length
        said = text(law, row.ids)
        assert said.endswith("=") and said.count("=") == 1
        assert law.times or "*" not in said
        assert row.labels == {len(row.ids) - 1: value(said[:-1]) % law.modulus}
        assert row.about == [{}]
        if not law.brackets:
            assert re.fullmatch(r"\d+( [-+*] \d+)* =", said)
            continue
        # Brackets around every sign between two numbers: fold from the inside until one token is left.
        folded = "".join("n" if word < law.modulus else text(law, [word]) for word in row.ids[:-1])
        while (shorter := re.sub(r"\((n|-n|(n|-n)[-+*](n|-n))\)", "n", folded, count=1)) != folded:
            folded = shorter
        assert folded in ("n", "-n")


def test_rows_are_uniform():
    law = Arithmetic(modulus=3, length=8, shortest=4)
    rows = law.rows(2, np.arange(9000))
    fits(np.bincount(rows.length_N)[4::2])
    first = rows.ids_NT[:, :3] @ (49, 7, 1)  # all number, sign, number
    cells = [a * 49 + (3 + sign) * 7 + b for a in range(3) for sign in range(3) for b in range(3)]
    assert set(first) <= set(cells)
    some = rows.length_N > 4
    fits([np.sum(first[some] == cell) for cell in cells])


def parts(law, ids):
    """(x, sign, y) of an expression ( x o y ), in words."""
    depth = 0
    for t, word in enumerate(ids):
        depth += (word == law.modulus + 4) - (word == law.modulus + 5)
        # The sign behind a whole x: not in front of it.
        if depth == 1 and t > 1 and law.modulus <= word < law.modulus + 3:
            return ids[1:t], word, ids[t + 1 : -1]
    raise AssertionError(ids)


def test_brackets_are_split_uniformly():
    law = Arithmetic(modulus=4, length=12, shortest=12, brackets=True)  # expressions of 11 tokens
    sizes, signs, inner = collections.Counter(), collections.Counter(), collections.Counter()
    for row in rows_of(law, 3000):
        x, sign, y = parts(law, row.ids[:-1])
        assert len(x) + len(y) == 8
        sizes[len(x)] += 1
        signs[sign] += 1
        if len(x) == 7:
            inner[len(parts(law, x)[0])] += 1
    fits([sizes[n] for n in range(1, 8)])
    fits([signs[4 + n] for n in range(3)])
    fits([inner[n] for n in range(1, 4)])
    lengths = [len(row.ids) for row in rows_of(Arithmetic(length=11, shortest=5, brackets=True), 3000)]
    fits(np.bincount(lengths)[5:])


@pytest.mark.parametrize("times", [True, False])
def test_chance_of_all_expressions(times):
    """Every expression of up to three numbers below 3, each as likely as another of its length."""
    share = np.zeros(3)
    for n in (1, 2, 3):
        signs = list(itertools.product("+-*" if times else "+-", repeat=n - 1))
        for numbers in itertools.product("012", repeat=n):
            for some in signs:
                said = "".join(itertools.chain(*zip(numbers, (*some, ""), strict=True)))
                share[value(said) % 3] += 1 / (3 * 3**n * len(signs))
    assert np.isclose(Arithmetic(modulus=3, length=6, times=times).chance, np.sum(share**2))


def test_chance_with_brackets():
    law = Arithmetic(modulus=3, length=24, shortest=9, brackets=True)
    one, two = (law.rows(seed, np.arange(60_000)).labels_NT.max(1) for seed in (1, 2))
    near(one == two, law.chance)
    assert law.chance > 1 / 3 + 0.01  # products are often 0, and the test would see it


@pytest.mark.parametrize(
    ("law", "golden"),
    [
        (Arithmetic(), "feea0e430f40606d"),
        (Arithmetic(brackets=True, length=64), "96254099872a732d"),
    ],
    ids=str,
)
def test_golden(law, golden):
    """The same rows on every machine, Python and numpy; others must have another `version`."""
    assert digest(law) == golden


def test_trials():
    for name in ("mod_arithmetic", "mod_brackets"):
        assert [part.task.length for part in trials[name].data.test] == [40, 80, 160, 320]
        (train,), (near_, far) = trials[f"{name}@paper"].data.train, trials[f"{name}@paper"].data.test
        assert (train.task.modulus, train.task.length, train.task.shortest) == (5, 40, 2)
        assert near_.task == dataclasses.replace(train.task, shortest=12)
        asked = [part.task for size in ("", "@smoke", "@paper") for part in trials[f"{name}{size}"].data.test]
        assert min(law.shortest for law in asked) == 12  # no row of few
        assert (far.task.shortest, far.task.length, far.rows) == (40, 256, 8192)


@pytest.mark.parametrize(
    ("law", "message"),
    [
        ({"modulus": 1}, "Arithmetic.modulus is 1: it must be at least 2"),
        ({"length": 4, "shortest": 6}, "Arithmetic.shortest is 6: it must be at most length, 4"),
        ({"length": 7}, "Arithmetic.length is 7: without brackets it must be even"),
        ({"shortest": 3}, "Arithmetic.shortest is 3: without brackets it must be even"),
    ],
)
def test_what_cannot_be(law, message):
    with pytest.raises(DataError, match=message):
        Arithmetic(**law)
