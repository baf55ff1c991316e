"""MAD's six tasks: the laws of their rows, derived again from what the rows say; and the published settings."""

import collections
import dataclasses
import itertools

import numpy as np
import pytest
from said import digest, fits, near, rows_of

from probes.tasks import draws, mad
from probes.tasks.compression import Compression
from probes.tasks.fuzzy import Fuzzy
from probes.tasks.in_context import InContext
from probes.tasks.memorize import Memorize
from probes.tasks.selective_copy import SelectiveCopy
from training.data import NOT_ASKED, DataError

RECALL = InContext(vocab=9, length=24)
NOISY = InContext(vocab=14, length=32, noise=0.4, noise_words=5)
FUZZY = Fuzzy(vocab=10, length=40)
SPARSE = dataclasses.replace(NOISY, noise=0.9)
NARROW = [Fuzzy(vocab=7, length=12), Fuzzy(vocab=9, key=1, value=4), Fuzzy(vocab=9, key=4, value=1)]


@pytest.mark.parametrize(
    "law", [RECALL, NOISY, InContext(length=4), InContext(), dataclasses.replace(NOISY, noise=0.9)]
)
def test_recall_is_of_what_was_said(law):
    keys, values = law.keys, law.keys + law.values
    for row in rows_of(law, 100):
        meaning, order, last, asked = {}, [], {}, {}
        for t in range(0, law.length, 2):
            key, value = row.ids[t : t + 2]
            if key >= values:  # noise
                assert value >= values and t < law.length - 2
                continue
            assert key < keys <= value < values
            if key in meaning:
                assert meaning[key] == value
                asked[t] = (value, {"pair": order.index(key), "distance": t - last[key]})
            else:
                meaning[key] = value
                order.append(key)
            last[key] = t
        assert law.length - 2 in asked
        assert row.labels == {t: value for t, (value, _) in asked.items()}
        assert row.about == [facts for _, facts in asked.values()]


@pytest.mark.parametrize("law", [NOISY, RECALL, FUZZY])
def test_all_next_tokens(law):
    """As MAD trains: the same rows, every next token asked for."""
    every, asked = (dataclasses.replace(law, targets=targets).rows(3, np.arange(90)) for targets in ("all", "asked"))
    assert (every.ids_NT == asked.ids_NT).all() and every.about == {}
    assert (every.labels_NT[:, :-1] == every.ids_NT[:, 1:]).all() and (every.labels_NT[:, -1] == NOT_ASKED).all()
    where = asked.labels_NT != NOT_ASKED
    assert (every.labels_NT[where] == asked.labels_NT[where]).all()
    law = dataclasses.replace(law, targets="all")
    ours, theirs = (law.rows(seed, np.arange(3000)).labels_NT[:, :-1] for seed in (5, 6))
    assert abs(np.mean(ours == theirs) - law.chance) < 0.01


def test_recall_is_uniform():
    rows = NOISY.rows(0, np.arange(10_000))
    first, values = NOISY.keys, NOISY.keys + NOISY.values
    pair = rows.ids_NT[:, ::2] < values
    # One of the 15 pairs before the last is spared; the others are noise 2 times in 5.
    near(pair[:, :-1].mean(1), (1 + 14 * 0.6) / 15)
    fits(pair[:, :-1].sum(0))
    assert pair[:, -1].all() and pair[:, :-1].any(1).all()
    fits(np.bincount(rows.ids_NT[:, 0][pair[:, 0]], minlength=first))
    fits(np.bincount(rows.ids_NT[:, 1][pair[:, 0]] - first, minlength=NOISY.values))
    fits(np.bincount(rows.ids_NT[:, 0][~pair[:, 0]] - values, minlength=5))
    # The last key, by the order in which the keys were said: each as likely, however many.
    said = [len(set(row[:-2:2][there[:-1]])) for row, there in zip(rows.ids_NT, pair, strict=True)]
    last = np.take_along_axis(rows.about["pair"], (rows.about["pair"] >= 0).sum(1)[:, None] - 1, 1)[:, 0]
    for D in (3, 4):
        fits(np.bincount(last[np.array(said) == D], minlength=D))


@pytest.mark.parametrize("law", [RECALL, NOISY, InContext(vocab=6, length=8, noise=0.7, noise_words=2)])
def test_recall_plateau(law):
    """A model that says the value of an earlier pair, drawn: its share right, summed over what it might draw."""
    right = asked = 0
    for row in rows_of(law, 2000):
        said = [(t, row.ids[t + 1]) for t in range(0, law.length, 2) if row.ids[t] < law.keys]
        for t, label in row.labels.items():
            earlier = [value for s, value in said if s < t]
            right += sum(value == label for value in earlier) / len(earlier)
            asked += 1
    assert abs(right / asked - law.plateau) < 0.012


def sayings(law, ids):
    """A fuzzy row taken apart: (start, key, value) of each saying, by what its words may be."""
    start = next(t for t, word in enumerate(ids) if word != law.vocab - 1)
    said, t = [], start
    while t < len(ids):
        key = list(itertools.takewhile(lambda word: word < law.keys, ids[t:]))
        value = list(itertools.takewhile(lambda word: law.keys <= word < law.vocab - 1, ids[t + len(key) :]))
        assert key and value
        said.append((t, tuple(key), tuple(value)))
        t += len(key) + len(value)
    return start, said


@pytest.mark.parametrize(
    "law", [FUZZY, Fuzzy(), Fuzzy(vocab=12, shortest=3), Fuzzy(vocab=9, length=10, key=4, value=1, shortest=2)]
)
def test_fuzzy_is_of_what_was_said(law):
    padded = set()
    for row in rows_of(law, 100):
        start, said = sayings(law, row.ids)
        padded.add(start)
        meaning, order, last, labels, about = {}, [], {}, {}, []
        for t, key, value in said:
            assert law.shortest <= len(key) == len(set(key)) <= law.key and len(value) == len(set(value)) <= law.value
            if key in meaning:
                assert meaning[key] == value
                answer = 1 + max((facts["answer"] for facts in about), default=-1)
                for n, word in enumerate(value):
                    labels[t + len(key) - 1 + n] = word
                    about.append({"answer": answer, "pair": order.index(key), "distance": t - last[key]})
            else:
                order.append(key)
            meaning[key] = value
            last[key] = t
        assert said[-1][1] in {key for _, key, _ in said[:-1]}
        assert row.labels == labels and row.about == about
        # No other pair would have fitted in front of the last, whatever their sizes.
        room = law.length - 2 * (law.key + law.value)
        assert said[-2][0] - start <= room < said[-1][0] - start
    assert len(padded) > 1


def test_fuzzy_is_uniform():
    """First pairs: the sizes, and the motifs of each size; and which pair is asked for last."""
    law = Fuzzy(vocab=9, length=30, key=3, value=2)
    keys, sizes, last = collections.Counter(), collections.Counter(), collections.Counter()
    for row in rows_of(law, 8000):
        _, said = sayings(law, row.ids)
        sizes[len(said[0][1]), len(said[0][2])] += 1
        keys[said[0][1]] += 1
        if len(said) == 7 and len({key for _, key, _ in said[:-1]}) == 6:
            last[[key for _, key, _ in said].index(said[-1][1])] += 1
    fits([sizes[k, v] for k in (1, 2, 3) for v in (1, 2)])
    fits([last[n] for n in range(6)])
    for size in (1, 2, 3):
        fits([keys[motif] for motif in itertools.permutations(range(law.keys), size)])


def test_motifs():
    """All orders of different integers, each as likely, below a number of each group's own."""
    made = draws.motifs(3, 0, np.arange(12_000), 2, 3, np.array([4, 5]))
    for group, below in enumerate((4, 5)):
        counts = collections.Counter(map(tuple, made[:, group].tolist()))
        fits([counts[motif] for motif in itertools.permutations(range(below), 3)])
    assert (draws.motifs(3, 0, np.arange(50), 1, 2, 3)[:, 0] < 3).all()


@pytest.mark.parametrize("law", [SelectiveCopy(), SelectiveCopy(vocab=5, length=21, tokens=10, blanks="before")])
def test_copying_is_in_order(law):
    M = law.tokens
    for row in rows_of(law, 100):
        context, mark, blanks = row.ids[: -M - 1], row.ids[-M - 1], row.ids[-M:]
        said = [(t, word) for t, word in enumerate(context) if word < law.vocab - 2]
        assert len(said) == M and mark == law.vocab - 1
        assert set(blanks) == {law.vocab - 2} >= {word for word in context if word >= law.vocab - 2}
        at = law.length - M
        assert row.labels == {at + n: word for n, (_, word) in enumerate(said)}
        assert row.about == [{"pair": n, "distance": at + n - t, "depth": t} for n, (t, _) in enumerate(said)]


@pytest.mark.parametrize("blanks", ["before", "anywhere"])
def test_blanks_fall_into_gaps(blanks):
    law = SelectiveCopy(vocab=8, length=11, tokens=3, blanks=blanks)  # 4 blanks
    gaps, words, right = collections.Counter(), collections.Counter(), []
    for row in rows_of(law, 6000):
        places = [t for t, word in enumerate(row.ids[:7]) if word < 6]
        gaps[tuple(b - a - 1 for a, b in itertools.pairwise([-1, *places, 7]))] += 1
        words.update(row.labels.values())
        right.append(np.mean([label == other for label in row.labels.values() for other in row.labels.values()]))
    fits([words[n] for n in range(6)])
    near(right, law.plateau)
    last = range(5) if blanks == "anywhere" else (0,)
    cells = [(a, b, c, d) for a in range(5) for b in range(5) for c in range(5) for d in last if a + b + c + d == 4]
    assert set(gaps) <= set(cells)
    share = collections.Counter(itertools.product(range(4 if blanks == "anywhere" else 3), repeat=4))
    ways = collections.Counter(tuple(draw.count(gap) for gap in range(4)) for draw in share)
    fits([gaps[cell] for cell in cells], [ways[cell] / len(share) for cell in cells])


def test_harder():
    law = SelectiveCopy(length=33, tokens=8)
    assert law.harder() == SelectiveCopy(length=33, tokens=16) and law.harder().harder() is None


def test_compression_is_of_the_row_itself():
    law = Compression(vocab=6, length=9)
    assert law.bottleneck and not RECALL.bottleneck
    counts = np.zeros([8, 5])
    for row in rows_of(law, 3000):
        assert row.ids[-1] == 5 and max(row.ids[:-1]) < 5
        assert row.labels == dict(enumerate(row.ids[:-1]))
        assert row.about == [{"depth": t} for t in range(8)]
        counts[np.arange(8), row.ids[:-1]] += 1
    fits(counts)


def test_memorisation_is_of_one_map():
    law = Memorize(vocab=24, length=12)
    meaning, counts = {}, np.zeros(law.keys)
    for seed in (0, 1):
        for row in rows_of(law, 300, seed):
            assert row.ids[1::2] == [23] * 6 and list(row.labels) == [1, 3, 5, 7, 9, 11]
            assert row.about == [{"slot": n} for n in range(6)]
            for t, label in row.labels.items():
                assert meaning.setdefault(row.ids[t - 1], label) == label
                counts[row.ids[t - 1]] += 1
    assert sorted(meaning) == list(range(11)) and len(set(meaning.values())) == 11
    assert min(meaning.values()) >= 11 and max(meaning.values()) < 23
    fits(counts)
    other = dataclasses.replace(law, map=1).value_of()
    assert (other != law.value_of()).any() and law.name != dataclasses.replace(law, map=1).name
    # Each value is some key's in 11 maps of 12.
    used = np.zeros(12)
    for seed in range(500):
        used[dataclasses.replace(law, map=seed).value_of() - 11] += 1
    assert (np.abs(used - 500 * 11 / 12) < 4 * (500 * 11 / 12 / 12) ** 0.5).all()


@pytest.mark.parametrize(
    ("law", "golden"),
    [
        (InContext(), "75ec8e405b3403af"),
        (dataclasses.replace(mad.NOISY, targets="all"), "4c4a4f161ca31719"),
        (Fuzzy(), "3fdc83f69b66e051"),
        (Fuzzy(vocab=64, shortest=3), "76404115543d5cc5"),
        (SelectiveCopy(), "72035cdaa49bdb7b"),
        (SelectiveCopy(blanks="before"), "0c1deb2511d264aa"),
        (Compression(), "708f5b814ab617c9"),
        (Memorize(), "4ecd4196089df0ee"),
    ],
    ids=str,
)
def test_golden(law, golden):
    """The same rows on every machine, Python and numpy; others must have another `version`."""
    assert digest(law) == golden


def test_published_settings():
    """Facts of MAD's paper and configs: what is varied, by how much, and how long it is trained."""
    sweep = mad.sweep()
    counts = collections.Counter(name.partition("@")[0] for name in sweep)
    names = ("mad_recall", "mad_fuzzy", "mad_noisy", "mad_copy", "mad_compress", "mad_memorize")
    assert [counts[name] for name in names] == [11, 11, 14, 13, 11, 6] and len(sweep) == 66
    assert len({(trial.data.train, trial.data.test) for trial in sweep.values()}) == 66
    for name, trial in sweep.items():
        (train,), (test,) = trial.data.train, trial.data.test
        assert (test.rows, trial.data.B, trial.D, trial.blocks, trial.conv, trial.mlp) == (
            1280,
            128,
            128,
            2,
            False,
            True,
        )
        assert trial.steps == 200 * np.ceil(train.rows / 128)
        assert train.rows == int(name.partition("rows=")[2] or (256 if "memorize" in name else 12_800))
        if name.startswith(("mad_recall", "mad_noisy", "mad_fuzzy")):
            assert (train.task.targets, test.task.targets) == ("all", "asked")
        change = name.partition("@")[2].partition("=")
        if change[0] not in ("", "rows"):
            assert all(str(getattr(law, change[0])) == change[2] for law in (train.task, test.task))
    sizes = {name: (sweep[name].data.test[0].task.vocab, sweep[name].data.test[0].task.length) for name in names}
    assert list(sizes.values()) == [(16, 128), (16, 128), (32, 128), (16, 256), (16, 32), (256, 32)]
    assert {"mad_noisy@noise=0.8", "mad_copy@tokens=96", "mad_memorize@vocab=8192", "mad_fuzzy@length=1024"} <= set(
        sweep
    )
    assert all(mad.trials[f"{name}@paper"] == sweep[name] for name in names)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: InContext(length=5), "InContext.length is 5: it must be even"),
        (lambda: InContext(vocab=3, noise_words=2), "InContext.vocab is 3: it must be at least noise_words"),
        (lambda: InContext(noise=1.0, noise_words=4), "InContext.noise is 1.0: it must be at least 0 and below 1"),
        (lambda: InContext(noise=0.5), "InContext.noise_words is 0: noise needs at least 1"),
        (lambda: InContext(targets="some"), "InContext.targets is 'some': it must be one of asked, all"),
        (lambda: Fuzzy(shortest=4), "Fuzzy.shortest is 4: it must be at most key, 3"),
        (lambda: Fuzzy(vocab=6), "Fuzzy.vocab is 6: motifs of different words need at least 7"),
        (lambda: Fuzzy(length=11), "Fuzzy.length is 11: a pair said twice needs at least 12"),
        (lambda: SelectiveCopy(length=32), "SelectiveCopy.length is 32: to say 16 twice it needs 33"),
        (lambda: SelectiveCopy(vocab=2), "SelectiveCopy.vocab is 2: it must be at least 3"),
        (lambda: Compression(length=1), "Compression.length is 1: it must be at least 2"),
        (lambda: Memorize(length=7), "Memorize.length is 7: it must be even"),
    ],
)
def test_what_cannot_be(make, message):
    with pytest.raises((DataError, ValueError), match=message):
        make()


@pytest.mark.parametrize(
    "law", [Fuzzy(vocab=7, length=12), Fuzzy(vocab=9, key=1, value=4), Fuzzy(vocab=9, key=4, value=1)]
)
def test_the_smallest_vocabulary_will_do(law):
    assert len(list(rows_of(law, 50))) == 50
