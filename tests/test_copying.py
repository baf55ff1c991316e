"""Copying and lookup: the laws of their rows, derived again from what the rows say."""

import collections

import pytest
from said import digest, fits, rows_of

from probes.evaluation import slices
from probes.tasks import copying
from probes.tasks.copying import Copying
from training.data import DataError

LAWS = [
    Copying(),
    Copying("copy", 3, 9, answer=2),
    Copying("copy", 1, 4, ngram=2, letters=2),
    Copying("prefix"),
    Copying("suffix"),
    Copying("prefix", 6, 9, answer=2),
    Copying("suffix", 5, 9, ngram=2, letters=6),
    Copying("suffix", 8, 12, 6, 2, 3),
    Copying("prefix", 40, 40, answer=1),
    Copying("duplicate", 6, 12),
    Copying("duplicate", 4, 6, ngram=2, letters=3),
]


def text(law, ids):
    """A row as the paper writes it."""
    signs = "abcdefghijklmnopqrstuvwxyz"[: law.letters] + "$|."
    return "".join(signs[token] for token in ids)


def count(string, gram):
    return sum(string.startswith(gram, i) for i in range(len(string)))


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_the_answer_is_what_the_string_says(law):
    lengths = collections.Counter()
    for row in rows_of(law, 400):
        said, n = text(law, row.ids), law.ngram
        assert said[0] == "$" and "." not in said
        if law.kind == "prefix":
            gram, string, _ = said[1:].split("|")
            before = n + 2
        else:
            string, rest = said[1:].split("|")
            gram, before = (rest[:n] if law.kind == "suffix" else ""), 1
        first = before + len(string) + (n if law.kind == "suffix" else 0)
        assert law.low <= len(string) <= law.high and set(said) <= set("abcdefghijklmnopqrstuvwxyz$|")
        lengths[len(string)] += 1
        start = 0
        if gram:
            assert len(gram) == n and count(string, gram) == 1
            start = string.index(gram) + n
            assert start < len(string)
        answer = string[start : start + law.answer] if law.answer else string[start:]
        assert not law.answer or len(answer) == law.answer
        assert list(row.labels) == list(range(first, first + len(answer) + 1)) and len(said) == first + len(answer) + 1
        assert text(law, row.labels.values()) == answer + "."
        assert said[first + 1 :] == answer  # read after it was asked for
        for j, (place, about) in enumerate(zip(row.labels, row.about, strict=True)):
            i = start + j
            stands = before + i
            fact = {"answer": 0, "depth": stands}
            if gram or law.low < law.high:
                fact["distance"] = place - stands
            assert about == fact | {"distractors": count(string, string[i - n : i]) - 1 if i >= n else 0}
        if law.kind == "duplicate":
            grams = [string[i : i + n] for i in range(len(string) - n + 1)]
            assert any(gram in grams[i + n :] for i, gram in enumerate(grams))
    if 0 < law.high - law.low < 16:
        assert len(lengths) == law.high - law.low + 1
        fits(list(lengths.values()))


def test_what_is_drawn_is_uniform():
    letters, places = collections.Counter(), collections.Counter()
    for row in rows_of(Copying("copy", 4, 4, letters=3), 4000):
        letters[row.ids[1], row.ids[2], row.ids[4]] += 1
    assert len(letters) == 27
    fits(list(letters.values()))
    for row in rows_of(Copying("duplicate", 6, 6, ngram=2, letters=1000), 4000):
        string = row.ids[1:7]
        twice = [(i, j) for i in range(5) for j in range(i + 2, 5) if string[i : i + 2] == string[j : j + 2]]
        places[twice[0] if len(twice) == 1 else None] += 1
    assert places.pop(None, 0) < 20  # few n-grams stand twice by chance
    assert len(places) == 6
    fits(list(places.values()))


def test_each_unique_ngram_is_as_likely():
    """Of strings of two letters, many n-grams are not unique; those that are share the questions evenly."""
    law = Copying("suffix", 8, 8, 5, 0, 2)
    tally = collections.Counter()
    for row in rows_of(law, 6000):
        string = text(law, row.ids)[1:9]
        may = [i for i in range(3) if count(string, string[i : i + 5]) == 1]
        tally[tuple(may), row.about[0]["depth"] - 1 - 5] += 1
    for may in {may for may, _ in tally}:
        assert all(start in may for other, start in tally if other == may)
        if sum(tally[may, start] for start in may) > 100:
            fits([tally[may, start] for start in may])


def test_strings_without_a_unique_ngram_are_drawn_again():
    law = Copying("suffix", 5, 5, 4, 0, 3)  # aaaaa has none
    strings = collections.Counter(text(law, row.ids)[1:6] for row in rows_of(law, 20_000, seed=9))
    assert len(strings) == 3**5 - 3 and not {"aaaaa", "bbbbb", "ccccc"} & set(strings)
    fits(list(strings.values()))


def test_trials_ask_longer_strings():
    for name in ("copying", "prefix_lookup", "suffix_lookup"):
        data = copying.trials[name].data
        assert [(part.task.low, part.task.high) for part in data.train] == [(5, 20)]
        assert [part.task.high for part in data.test][-4:] == [40, 80, 160, 300]
    tests = copying.trials["copying"].data.test
    assert [part.task.kind for part in tests][:3] == ["copy", "duplicate", "copy"]
    assert slices(tests)[1:3] == [{"kind": "duplicate", "letters": "6 to 20"}, {"kind": "copy", "letters": "40"}]


@pytest.mark.parametrize(
    ("law", "golden"),
    [
        (Copying(), "f6c6c8440b7a8f81"),
        (Copying("prefix"), "6ca7bdc25563f746"),
        (Copying("suffix", answer=2), "60118b8a886454da"),
        (Copying("duplicate", 6), "f57a231e8697d514"),
    ],
    ids=str,
)
def test_golden(law, golden):
    """The same rows on every machine, Python and numpy; others must have another `version`."""
    assert digest(law) == golden


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "reverse"}, "Copying.kind is 'reverse': it must be one of copy, prefix, suffix, duplicate"),
        ({"high": 4}, "Copying.high is 4: it must be at least low, 5"),
        ({"answer": 6}, "Copying.low is 5: n-grams and answers of copy need at least 6"),
        ({"kind": "duplicate"}, "Copying.low is 5: n-grams and answers of duplicate need at least 6"),
        ({"kind": "prefix", "answer": 3}, "Copying.low is 5: n-grams and answers of prefix need at least 6"),
        ({"kind": "prefix", "ngram": 1}, "Copying.ngram is 1: 20 letters hardly have one that is unique"),
        ({"ngram": 5, "low": 2, "high": 4}, "Copying.ngram is 5: it must be at most high, 4"),
        ({"ngram": 9}, "Copying.ngram is 9: letters to its power must be below 2\\^40"),
    ],
)
def test_impossible_laws(fields, message):
    with pytest.raises((DataError, ValueError), match=message) as caught:
        Copying(**fields)
    assert "\n" not in str(caught.value)
