"""Associative recall: the law of its rows, derived again from what the rows say."""

import dataclasses
import hashlib
import math
import time
import tracemalloc
from typing import Any

import numpy as np
import pytest
from scipy import stats

from probes.tasks import draws, recall
from probes.tasks.recall import BASED, MQAR, figure2_of_zoology, parts
from probes.tasks.task import Part, Probe
from training.data import NOT_ASKED, DataError

LAW = MQAR(64, 16, 4, filler="conflict_free")
MIXTURE = Probe(
    B=4,
    train=(Part(MQAR(64, 8, 2, filler="conflict_free"), 10), Part(LAW, 5)),
    test=parts((6, 3), (8, 2), (24, 6), vocab=64, filler="conflict_free"),
)
SETTINGS = [(8192, 64, 4), (256, 64, 16), (21, 20, 5), (5, 4, 1), (8192, 1024, 256)]
FILLERS: tuple[recall.Filler, ...] = ("random", "zero", "conflict_free")


def batch(vocab, length, pairs, rows, seed, *, start=0, **law):
    """Ids and labels of rows start..start+rows-1."""
    made = MQAR(vocab, length, pairs, **law).rows(seed, np.arange(start, start + rows))
    return made.ids_NT, made.labels_NT


def places(labels, pairs):
    """Where each row asks, in order of place: [rows, pairs]."""
    asked = labels != NOT_ASKED
    assert (asked.sum(1) == pairs).all()
    return np.nonzero(asked)[1].reshape(-1, pairs)


def slots_by_pair(inputs, labels, pairs):
    """The slot in which each pair is asked, [rows, pairs], from the rows alone."""
    at = places(labels, pairs)
    asked_keys = np.take_along_axis(inputs, at, 1)
    pair = np.argmax(asked_keys[:, :, None] == inputs[:, None, 0 : 2 * pairs : 2], axis=2)
    slots = np.empty_like(at)
    np.put_along_axis(slots, pair, (at - 2 * pairs) // 2, 1)
    return slots


def fits(counts, probabilities):
    """Chi-square: a law this far off would be accepted once in a thousand."""
    counts, expected = np.asarray(counts, float), np.asarray(probabilities) * np.sum(counts)
    assert expected.min() > 5
    assert math.isclose(expected.sum(), counts.sum(), rel_tol=1e-9)
    statistic = np.sum((counts - expected) ** 2 / expected)
    assert stats.chi2.sf(statistic, len(counts) - 1) > 1e-3, statistic


@pytest.mark.parametrize("order", ["drawn", "shuffled"])
@pytest.mark.parametrize("filler", FILLERS)
@pytest.mark.parametrize(("vocab", "length", "pairs"), SETTINGS)
def test_structure(vocab, length, pairs, filler, order):
    rows = 40
    inputs, labels = batch(vocab, length, pairs, rows, seed=3, filler=filler, order=order)
    assert inputs.shape == labels.shape == (rows, length)
    assert inputs.dtype == labels.dtype == np.int32
    for row, answers in zip(inputs.tolist(), labels.tolist(), strict=True):
        keys, values = row[0 : 2 * pairs : 2], row[1 : 2 * pairs : 2]
        assert len(set(keys)) == len(set(values)) == pairs
        assert all(1 <= key < vocab // 2 for key in keys)
        assert all(vocab // 2 <= value < vocab for value in values)
        asked = [t for t, answer in enumerate(answers) if answer != NOT_ASKED]
        assert all(t >= 2 * pairs and t % 2 == 0 for t in asked)  # the first token of a slot behind the context
        meaning = dict(zip(keys, values, strict=True))
        assert sorted(row[t] for t in asked) == sorted(keys)  # each key once
        assert all(answers[t] == meaning[row[t]] for t in asked)
        rest = [row[t] for t in range(2 * pairs, length) if t not in asked]
        assert all(0 <= token < vocab for token in rest)
        if filler == "zero":
            assert not any(rest)
        if filler == "conflict_free":
            assert not set(rest) & set(keys)


@pytest.mark.parametrize("again", ["same", "shuffled"])
def test_passes(again):
    """The pairs are said twice, and what is known of a question is of the last time."""
    law = MQAR(60, 40, 4, passes=3, again=again)
    rows = law.rows(1, np.arange(200))
    moved = 0
    for n, (ids, labels) in enumerate(zip(rows.ids_NT.tolist(), rows.labels_NT.tolist(), strict=True)):
        said = [list(zip(ids[p : p + 8 : 2], ids[p + 1 : p + 8 : 2], strict=True)) for p in (0, 8, 16)]
        assert sorted(said[0]) == sorted(said[1]) == sorted(said[2])
        moved += said[0] != said[1]
        asked = [t for t, label in enumerate(labels) if label != NOT_ASKED]
        assert len(asked) == 4 and asked[0] >= 24
        for q, t in enumerate(asked):
            pair, slot, distance = (rows.about[name][n, q] for name in ("pair", "slot", "distance"))
            assert said[0][pair] == (ids[t], labels[t]) and t == 24 + 2 * slot
            assert t - distance == 16 + 2 * said[2].index((ids[t], labels[t]))
    assert (moved == 0) if again == "same" else (moved > 180)


def test_filler_leaves_all_else():
    """Fillers differ in nothing but the filler."""
    (a, a_labels), (b, b_labels), (c, c_labels) = (batch(64, 32, 4, 50, 1, filler=filler) for filler in FILLERS)
    assert (a_labels == b_labels).all() and (b_labels == c_labels).all()
    said = b != 0
    assert (a[said] == b[said]).all() and (c[said] == b[said]).all()


def test_slots_are_drawn_one_after_another():
    """Ordered pairs of slots: the first by its weight, the second by its weight among those left."""
    length, pairs, rows = 16, 2, 40_000
    space = (length - 2 * pairs) // 2
    weights = [(g + 1) ** (0.01 - 1) for g in range(space)]
    total = sum(weights)
    cells = [(a, b) for a in range(space) for b in range(space) if a != b]
    exact = [weights[a] / total * weights[b] / (total - weights[a]) for a, b in cells]
    slots = slots_by_pair(*batch(64, length, pairs, rows, seed=11), pairs)
    fits([np.sum((slots == cell).all(1)) for cell in cells], exact)


@pytest.mark.parametrize("exponent", [1.0, 3.0])
def test_exponent(exponent):
    """One pair: the slot's law itself. 1 is uniform, more prefers far slots."""
    slots = slots_by_pair(*batch(64, 12, 1, 20_000, seed=5, exponent=exponent), 1)[:, 0]
    weights = np.arange(1, 6) ** (exponent - 1)
    fits(np.bincount(slots, minlength=5), weights / weights.sum())


@pytest.mark.parametrize(
    ("length", "pairs", "first_used", "median", "ninetieth", "correlation"),
    [
        (64, 4, 0.725, 14, 44, 0.098),
        (64, 8, 0.957, 20, 44, 0.196),
        (64, 16, 1.0, 32, 44, 0.502),
        (128, 8, 0.890, 26, 86, 0.123),
    ],
)
def test_published_statistics(length, pairs, first_used, median, ninetieth, correlation):
    """What Zoology's generator gives in its own settings (measured on it, 20,000 rows)."""
    inputs, labels = batch(8192, length, pairs, 20_000, seed=2)
    slots = slots_by_pair(inputs, labels, pairs)
    assert abs(np.mean((slots == 0).any(1)) - first_used) < 0.012
    distance = 2 * pairs + 2 * slots - 2 * np.arange(pairs)
    assert abs(np.median(distance) - median) <= 2
    assert abs(np.quantile(distance, 0.9) - ninetieth) <= 2

    def correlated(slots):
        return np.corrcoef(np.broadcast_to(np.arange(pairs), slots.shape).ravel(), slots.ravel())[0, 1]

    assert abs(correlated(slots) - correlation) < 0.015
    shuffled = slots_by_pair(*batch(8192, length, pairs, 20_000, seed=2, order="shuffled"), pairs)
    assert abs(correlated(shuffled)) < 0.015
    assert (np.sort(shuffled, 1) == np.sort(slots, 1)).all()  # the same slots, dealt anew


def test_keys_and_values_are_uniform():
    """Ordered pairs of keys, of values, and of a key with its value: all equally likely."""
    inputs, _ = batch(20, 12, 2, 60_000, seed=4)
    for first, second, low, high in ((0, 2, 1, 10), (1, 3, 10, 20)):
        words = range(low, high)
        cells = [(a, b) for a in words for b in words if a != b]
        counts = np.zeros((20, 20), int)
        np.add.at(counts, (inputs[:, first], inputs[:, second]), 1)
        fits([counts[cell] for cell in cells], np.full(len(cells), 1 / len(cells)))
    fits(np.bincount(inputs[:, 0] * 20 + inputs[:, 1]).reshape(-1)[_cells(1, 10, 10, 20)], np.full(90, 1 / 90))


def _cells(a_low, a_high, b_low, b_high):
    return [a * 20 + b for a in range(a_low, a_high) for b in range(b_low, b_high)]


@pytest.mark.parametrize("filler", ["random", "conflict_free"])
def test_filler_is_uniform(filler):
    vocab, pairs = 32, 3
    inputs, labels = batch(vocab, 16, pairs, 20_000, seed=6, filler=filler)
    rest = inputs[:, 7::2].ravel()  # the second tokens of slots are always filler
    if filler == "random":
        fits(np.bincount(rest, minlength=vocab), np.full(vocab, 1 / vocab))
        return
    # The token's rank among the words that are not keys of its row
    keys = np.repeat(inputs[:, None, 0:6:2], 5, 1).reshape(-1, pairs)
    rank = rest - np.sum(keys < rest[:, None], 1)
    fits(np.bincount(rank, minlength=vocab - pairs), np.full(vocab - pairs, 1 / (vocab - pairs)))


def test_false_bindings():
    """With random filler some keys recur before their query with a value behind: the ceiling of a 256-word probe."""

    def share(filler):
        inputs, labels = batch(256, 64, 4, 20_000, seed=8, filler=filler)
        false = 0
        for t in range(8, 63):
            key_again = (inputs[:, t, None] == inputs[:, 0:8:2]) & (labels[:, t] == NOT_ASKED)[:, None]
            asked_later = (inputs[:, None, t + 1 :] == inputs[:, 0:8:2, None]) & (labels[:, None, t + 1 :] != NOT_ASKED)
            false += np.sum(key_again & asked_later.any(2) & (inputs[:, t + 1] >= 128)[:, None])
        return false / (4 * 20_000)

    assert 0.018 < share("random") < 0.028
    assert share("conflict_free") == 0


@pytest.mark.parametrize("order", ["drawn", "shuffled"])
@pytest.mark.parametrize("filler", FILLERS)
def test_a_row_is_a_function_of_seed_and_index(filler, order):
    options = {"filler": filler, "order": order}
    inputs, labels = batch(100, 64, 8, 2500, seed=7, **options)  # crosses the blocks that rows are made in
    for start, rows in ((0, 1), (1023, 3), (2499, 1), (700, 1300)):
        some = batch(100, 64, 8, rows, seed=7, start=start, **options)
        assert (some[0] == inputs[start : start + rows]).all() and (some[1] == labels[start : start + rows]).all()
    picked = np.array([5, 1, 5, 2400])
    assert (MQAR(100, 64, 8, **options).rows(7, picked).ids_NT == inputs[picked]).all()
    assert (batch(100, 64, 8, 2500, seed=8, **options)[0] != inputs).any(1).all()


def test_rows_and_seeds_are_independent():
    inputs, _ = batch(34, 16, 2, 40_000, seed=0)
    other, _ = batch(34, 16, 2, 40_000, seed=1)
    for a, b in ((inputs[:-1, 0], inputs[1:, 0]), (inputs[:, 0], other[:, 0]), (inputs[:, 0], inputs[:, 1] - 17)):
        table = np.zeros((18, 18), int)
        np.add.at(table, (a, b), 1)
        table = table[table.sum(1) > 0][:, table.sum(0) > 0]
        assert stats.chi2_contingency(table).pvalue > 1e-3


@pytest.mark.parametrize(
    ("arguments", "options", "digest"),
    [
        ((8192, 64, 4, 100, 0), {}, "cd36fbaf9751a07c"),
        ((8192, 64, 4, 100, 0), {"filler": "zero"}, "140d4c7f0c0d31c1"),
        (
            (256, 128, 32, 50, 12345),
            {"filler": "conflict_free", "order": "shuffled", "start": 10**12},
            "e529c25df79db337",
        ),
        ((8192, 1024, 256, 5, 2**63 - 1), {}, "4de3994d960d5b4d"),
    ],
)
def test_golden(arguments, options, digest):
    """The same rows on every machine, Python and numpy: results of different days can be compared."""
    inputs, labels = batch(*arguments, **options)
    data = inputs.astype("<i4").tobytes() + labels.astype("<i4").tobytes()
    assert hashlib.sha256(data).hexdigest()[:16] == digest


def test_distinct_reads_on():
    """Where a whole population is drawn, the first reading rarely suffices; the row is a permutation all the same."""
    rows = draws.distinct(0, 0, np.arange(5000), 6, 6)
    assert (np.sort(rows, 1) == np.arange(6)).all()
    fits(
        np.bincount(rows[:, 0] * 6 + rows[:, 5])[[a * 6 + b for a in range(6) for b in range(6) if a != b]],
        [1 / 30] * 30,
    )
    with pytest.raises(ValueError, match="7 different integers from 6"):
        draws.distinct(0, 0, np.arange(2), 7, 6)


def test_logarithm():
    words = np.concatenate([draws.bits(1, 2, np.arange(100), 100).ravel(), np.array([0, 2**64 - 1], np.uint64)])
    uniform = ((words >> np.uint64(11)).astype(np.longdouble) + 0.5) * np.longdouble(2.0**-53)
    assert np.max(np.abs(draws.exponential(words) + np.log(uniform))) < 1e-14


def test_fold():
    seeds = {draws.fold(*data) for data in [(0,), (0, 0), (0, 1), (1, 0), (1,), (-1,), (0, 0, 0), (2**63,)]}
    assert len(seeds) == 8 and all(0 <= seed < 2**64 for seed in seeds)


def test_speed_and_memory():
    """The generator must never be what a probe waits for: 100,000 rows a second (5 times that here), no wide tables."""

    def seconds():
        start = time.process_time()
        batch(8192, 64, 4, 10_000, seed=0)
        return time.process_time() - start

    assert min(seconds() for _ in range(5)) < 0.1
    tracemalloc.start()
    batch(8192, 64, 4, 10_000, seed=0)
    batch(8192, 1024, 256, 100, seed=0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16e6  # of which 5 MB are the rows; a row by word table would take 300


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((256, 64, 0, 1, 0), "MQAR.pairs is 0: it must be at least 1"),
        ((256, 63, 4, 1, 0), "length is 63: it must be even"),
        ((256, 64, 17, 1, 0), "length is 64: 17 pairs and their queries need at least 68"),
        ((64, 64, 4, 1, 0), "vocab is 64: it must be above the length, 64"),
    ],
)
def test_impossible_laws(arguments, message):
    with pytest.raises(DataError, match=message) as caught:
        batch(*arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train": ()}, "Probe.train is empty"),
        ({"train": (Part(LAW, 5), Part(LAW))}, "Probe.train has parts with and without a number of rows"),
        ({"test": (Part(LAW),)}, "Part.rows is below 1"),
        ({"test": (Part(MQAR(100, 64), 4),)}, "Probe has laws of 64 and 100 words"),
        ({"T": 15}, "Probe.T is 15: the longest training row needs 16"),
        ({"B": 0}, "Probe.B is 0"),
    ],
)
def test_impossible_probes(fields, message):
    with pytest.raises(DataError, match=message):
        dataclasses.replace(MIXTURE, **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"filler": "ones"}, "MQAR.filler is 'ones': it must be one of random, zero, conflict_free"),
        ({"order": "sorted"}, "MQAR.order is 'sorted': it must be one of drawn, shuffled"),
        ({"passes": 0}, "MQAR.passes is 0"),
        ({"pairs": 5, "passes": 6}, "5 pairs and their queries need at least 70"),
    ],
)
def test_impossible_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        MQAR(**{"vocab": 256, **fields})


def test_an_epoch_visits_every_row():
    dataset = MIXTURE.build()
    assert (dataset.words, dataset.labelled, MIXTURE.T) == (64, 6, 16)
    steps = 3 + 2  # 10 rows and 5 rows in batches of 4
    orders = []
    for epoch in range(3):
        seen: dict[int, list[bytes]] = {8: [], 16: []}
        for step in range(epoch * steps, (epoch + 1) * steps):
            b = dataset.batch(0, step)
            assert all(x.shape == (4, 16) and x.dtype == np.int32 for x in b[:3])
            (length,) = set(np.sum(b.pos_BT >= 0, 1).tolist())  # a batch never mixes segments
            assert (b.pos_BT == np.where(np.arange(16) < length, np.arange(16), -1)).all()
            assert (np.sum(b.labels_BT != NOT_ASKED, 1) == length // 4).all()
            assert (b.labels_BT[:, length:] == NOT_ASKED).all()
            seen[length] += [row.tobytes() for row in b.ids_BT]
        assert len(set(seen[8])) == 10 and len(seen[8]) == 12
        assert len(set(seen[16])) == 5 and len(seen[16]) == 8
        orders.append(seen[8] + seen[16])
    assert set(orders[0]) == set(orders[1]) == set(orders[2])  # the same rows each epoch
    assert orders[0] != orders[1] != orders[2]  # in another order


def test_batches_are_functions_of_seed_and_step():
    one, two = MIXTURE.build(), MIXTURE.build()
    late = one.batch(5, 123)
    for step in range(7):
        for x, y in zip(one.batch(5, step)[:3], two.train(5)[step][:3], strict=True):
            assert (x == y).all()
    assert (two.batch(5, 123).ids_BT == late.ids_BT).all()
    assert (two.batch(5, 123, slice(1, 3)).ids_BT == late.ids_BT[1:3]).all()
    assert (two.batch(6, 123).ids_BT != late.ids_BT).any()


def test_held_out():
    dataset = MIXTURE.build()
    batches = list(dataset.held_out())
    assert [int(np.sum(b.pos_BT[0] >= 0)) for b in batches] == [8, 24, 8]  # by turns
    assert all(x.shape == (4, 24) for b in batches for x in b[:3])
    assert [int(np.sum((b.pos_BT >= 0).any(1))) for b in batches] == [4, 3, 2]  # 6 and 3 rows
    for b in batches:
        padding = b.pos_BT < 0
        assert (b.labels_BT[padding] == NOT_ASKED).all()
        assert (b.ids_BT[padding] == 0).all()
    assert len(list(dataset.held_out(2))) == 2
    for whole, part in zip(dataset.held_out(), dataset.held_out(rows=slice(1, 3)), strict=True):
        assert (whole.ids_BT[1:3] == part.ids_BT).all() and (whole.labels_BT[1:3] == part.labels_BT).all()
    short = next(dataset.questions(MIXTURE.test[0]))
    assert short.ids_BT.shape == (4, 8) and (short.ids_BT == batches[0].ids_BT[:, :8]).all()
    trained = {row[:8].tobytes() for step in range(30) for row in dataset.batch(0, step).ids_BT}
    assert not trained & {row[:8].tobytes() for row in short.ids_BT}


def test_digest():
    digest = MIXTURE.build().digest
    assert digest == MIXTURE.build().digest and len(digest) == 64
    changes: list[dict[str, Any]] = [
        {"T": 17},
        {"B": 5},
        {"train": MIXTURE.train[1:]},
        {"train": MIXTURE.train + MIXTURE.test[:1], "test": MIXTURE.test[1:]},
        {"test": (Part(LAW, 3),)},
        {"test": (Part(dataclasses.replace(LAW, exponent=0.5), 3),)},
    ]
    digests = [dataclasses.replace(MIXTURE, **change).build().digest for change in changes]
    assert len({digest, *digests}) == 7


def test_published_mixtures():
    figure2 = [(c.train[0].task, c.train[0].rows, c.test[0].rows, c.B) for c in figure2_of_zoology()]
    assert [(law.length, law.pairs, B) for law, *_, B in figure2] == [
        (64, 4, 512), (128, 8, 512), (256, 16, 256), (512, 64, 128)
    ]  # fmt: skip
    assert all((c.vocab, c.filler, c.order, c.exponent) == (8192, "zero", "drawn", 0.01) for c, *_ in figure2)
    assert all((train, test) == (100_000, 3_000) for _, train, test, _ in figure2)
    steps = [recall.trials[f"mqar@zoology{n}"].steps for n in (1, 2, 3, 4)]
    assert steps == [64 * n for n in (196, 196, 391, 782)]  # 64 epochs
    assert sum(-(-part.rows // BASED.B) for part in BASED.train) == 707  # steps an epoch, as published
    assert sum(part.rows for part in BASED.test) == 7000 and BASED.T == 256
    assert {(p.task.vocab, p.task.filler) for p in BASED.train + BASED.test} == {(8192, "random")}
    lengths = [int(np.sum(b.pos_BT[0] >= 0)) for b in BASED.build().held_out(7)]
    assert lengths == [64, 64, 64, 128, 256, 512, 1024]


def test_text():
    dataset = MIXTURE.build()
    assert dataset.decode(dataset.encode("3 14 15")) == "3 14 15"
