"""The phone book: the law of its rows, derived again from what the rows say."""

import collections

import numpy as np
import pytest
from said import completed, digest, fits, near, rows_of

from probes.tasks import phonebook
from probes.tasks.phonebook import Phonebook
from training.data import DataError

LAWS = [Phonebook(), Phonebook(3, names=2), Phonebook(64), Phonebook(5, shots=0, number=3), Phonebook(1, shots=0)]


def read(law, row):
    """The book, and the entries said again: (first, last, digits)."""
    ask, size = law.vocab - 1, 2 + law.number
    end = row.ids.index(ask)
    book = [tuple(row.ids[t : t + size]) for t in range(0, end, size)]
    again, t = [], end
    while t < len(row.ids):
        assert row.ids[t] == ask
        again.append(tuple(row.ids[t + 1 : t + 1 + size]))
        t += 1 + size
    return book, again


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_the_answer_is_the_number_of_the_name(law):
    for row in rows_of(law):
        book, (*shots, question) = read(law, row)
        assert len(book) == law.entries and len(shots) == law.shots and len(row.ids) == law.length
        numbers = {entry[:2]: entry[2:] for entry in book}
        assert len(numbers) == law.entries
        assert all(law.digits <= token < law.digits + law.names for name in numbers for token in name)
        assert all(token < law.digits for number in numbers.values() for token in number)
        assert all(numbers[shot[:2]] == shot[2:] for shot in shots)
        assert len({entry[:2] for entry in [*shots, question]}) == law.shots + 1
        answer = numbers[question[:2]]
        assert question[2:] == answer[:-1]  # each digit is read after it was asked for
        first = law.length - law.number
        assert row.labels == {first + s: digit for s, digit in enumerate(answer)}
        assert row.ids[first - 1 : first + 1] == list(question[:2])
        pair = [entry[:2] for entry in book].index(question[:2])
        depth = pair * (2 + law.number)
        assert row.about == [{"answer": 0, "depth": depth}] * law.number


def test_what_is_drawn_is_uniform():
    law = Phonebook(4, shots=1, number=2, names=3, digits=3)
    names, numbers, asked = (collections.Counter() for _ in range(3))
    for row in rows_of(law, 4000):
        book, again = read(law, row)
        names[book[0][:2], book[3][:2]] += 1
        numbers[book[1][2:], book[2][2]] += 1
        asked[tuple(book.index(next(e for e in book if e[:2] == a[:2])) for a in again)] += 1
    for counts, cells in ((names, 72), (numbers, 27), (asked, 12)):
        assert len(counts) == cells
        fits(list(counts.values()))


@pytest.mark.parametrize("law", LAWS[:2], ids=str)
def test_plateau(law):
    """Completion without the name: as most numbers go on that agree with the answer so far."""
    hits = []
    for row in rows_of(law, 2000):
        numbers = [list(entry[2:]) for entry in read(law, row)[0]]
        hits.append(np.mean(completed(numbers, list(row.labels.values()))))
    near(hits, law.plateau)
    assert LAWS[-1].plateau is None


def test_sizes():
    assert Phonebook().length == 16 * 9 + 2 * 10 + 9
    assert [part.task.entries for part in phonebook.trials["phonebook"].data.test] == [4, 8, 16, 32, 64]
    assert all(part.rows == 3 * 32 for part in phonebook.trials["phonebook@large"].data.test)


@pytest.mark.parametrize(
    ("law", "golden"),
    [
        (Phonebook(), "ac8cdb78039299af"),
    ],
    ids=str,
)
def test_golden(law, golden):
    """The same rows on every machine, Python and numpy; others must have another `version`."""
    assert digest(law) == golden


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"number": 0}, "Phonebook.number is 0: it must be at least 1"),
        ({"entries": 2}, "Phonebook.entries is 2: it must be above shots, 2"),
        ({"names": 3}, "Phonebook.names is 3: 16 names of two tokens need more"),
    ],
)
def test_impossible_laws(fields, message):
    with pytest.raises(DataError, match=message) as caught:
        Phonebook(**fields)
    assert "\n" not in str(caught.value)
