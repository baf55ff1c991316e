"""The report of a study, of rows written by hand: what counts, what is best, what is said; the same when made again."""

import dataclasses
import html.parser
import re
import shlex

import pytest

from configs.studies.memory_layers_smoke import smoke
from probes import study_report
from probes.blocks import Code, Heading, Paragraph, Table, markdown, plain
from probes.charts import At
from probes.matching import Matched, Resolved
from probes.scatter import scatter
from probes.study import Axis, Choice, Claim, Numbers, Reference, Study
from probes.study_numbers import goal, guessers, guessing, ranked, results, verdicts
from probes.study_pictures import spaced
from training.settings import replaced

PICTURES = ("main", "slices", "validation", "settings")
FILES = [f"{stem}{mood}{kind}" for stem in PICTURES for mood in ("", "-dark") for kind in (".png", ".svg")]


def study(names=("a", "b", "c"), rates=(1e-3, 1e-2), seeds=2, **changes) -> Study:
    """A study whose cells have these names; it is never trained."""
    axes = (Axis("memory", tuple(Choice(name) for name in names)),)
    given = {"axes": axes, "match": (), "claims": (), "notes": "", "versus": ""} | changes
    base = replaced(smoke.base, "train.steps", 80)
    return dataclasses.replace(smoke, base=base, rates=rates, seeds=seeds, **given)


def resolved(made: Study, off=(0.0,)) -> list[Resolved]:
    out = []
    for number, cell in enumerate(made.cells):
        costs = {"parameters": 1000, "table_parameters": 0, "state_bytes": 100 * 4**number, "flops": 5e6}
        missed = off[number % len(off)]
        matched = (Matched("parameters", 1000 * (1 + missed), 1000, "model.D", 32),) if missed else ()
        out.append(Resolved(cell, f"digest{number}", matched, costs))
    return out


def row(cell: Resolved, seed: int, test, validation=0.5, rate=1e-2, scores=None, **changes):
    """A row of the ledger: `scores` by pairs, or the test alone in two slices that are as hard."""
    slices = {4: test, 8: test} if scores is None else scores
    name = cell.cell.name
    told = {
        "cell": name,
        "measure": "accuracy",
        "higher": True,
        **cell.costs,
        "length": 64,
        "tokens": 2048,
        "goal": None,
        "goal_step": None,
        "goal_cpu_seconds": None,
        "skipped": 0,
        "steps": 80,
        "device": "cpu",
        "versions": {"python": "3.11.7", "jax": "0.10.2"},
        "command": f"python ablate.py made --only {shlex.quote(name)}",
        "digest": cell.digest,
        "arm": dataclasses.asdict(Numbers(seed, rate)),
        "validation": validation,
        "test": test,
        "scores": [
            {"slice": {"pairs": pairs}, "accuracy": value, "chance": 0.01, "plateau": 1 / pairs if pairs < 9 else None}
            for pairs, value in slices.items()
        ],
        "cpu_seconds": 2.0,
        "curve": [[40, 3.0, validation / 2], [80, 2.0, validation]],
    }
    return told | changes


def text(cell: Resolved, seed: int, test: float, **changes):
    """A row of a study on text: less is better."""
    return row(cell, seed, test, scores={}, measure="bits per byte", higher=False, **changes)


def test_the_best_setting_is_chosen_by_validation_and_not_by_test():
    made = study(("a",))
    (cell,) = resolved(made)
    rows = [
        row(cell, 0, test=0.9, validation=0.4, rate=1e-3),
        row(cell, 1, test=0.9, validation=0.6, rate=1e-3),
        row(cell, 0, test=0.2, validation=0.9, rate=1e-2),
        row(cell, 1, test=0.4, validation=0.3, rate=1e-2),
    ]
    (found,) = results(made, [cell], rows)  # validation: 0.5 of the first rate, 0.6 of the second
    assert found.best == (1e-2, None, 1.0)
    assert found.tests == [0.2, 0.4] and found.test == pytest.approx(0.3) and found.spread == pytest.approx(0.2)
    assert len(found.rows) == 4 and found.arms == 4


def test_a_setting_with_fewer_seeds_is_not_compared():
    made = study(("a",))
    (cell,) = resolved(made)
    rows = [row(cell, 0, 0.5, 0.9, 1e-3), row(cell, 0, 0.3, 0.3), row(cell, 1, 0.3, 0.3)]
    assert results(made, [cell], rows)[0].best == (1e-2, None, 1.0)


def test_cells_of_tasks_are_ranked_within_each():
    axes = (Axis("task", (Choice("easy"), Choice("hard"))), Axis("memory", (Choice("a"), Choice("b"))))
    made = study(axes=axes, within="task", seeds=1)
    cells = resolved(made)
    rows = [row(cell, 0, test) for cell, test in zip(cells, (0.8, 0.9, 0.2, 0.1), strict=True)]
    found = results(made, cells, rows)
    assert [r.rank for r in found] == [2, 1, 1, 2]
    assert [r.name for r in ranked(found)] == ["easy, b", "easy, a", "hard, a", "hard, b"]
    said = study_report.summary(found, [])
    assert "easy, b is first with accuracy 0.900, and easy, a is last with 0.800" in said
    assert "hard, a is first with accuracy 0.200, and hard, b is last with 0.100" in said and "The best" not in said


def test_what_guessing_reaches_is_said_of_each_task():
    """By its own answers: an eighth of one task's, half of the other's; a mean of both is of neither."""
    axes = (Axis("task", (Choice("easy"), Choice("hard"))),)
    made = study(axes=axes, within="task", seeds=1)
    easy, hard = resolved(made)
    found = results(made, [easy, hard], [row(easy, 0, 0.9, scores={2: 0.9}), row(hard, 0, 0.9, scores={8: 0.9})])
    assert guessers(ranked(found)) == {
        "guessing, easy": {"": 0.5, "pairs 2": 0.5},
        "guessing, hard": {"": 0.125, "pairs 8": 0.125},
    }
    assert guessing(found) is None and guessing(found[:1]) == 0.5


def test_where_less_is_better_the_least_validation_is_chosen_and_the_least_test_is_first():
    made = study(("a", "b"), seeds=1)
    a, b = resolved(made)
    rows = [
        text(a, 0, 2.0, validation=2.1),
        text(a, 0, 1.5, validation=2.5, rate=1e-3),
        text(b, 0, 1.8, validation=1.9),
    ]
    found = results(made, [a, b], rows)
    assert found[0].best == (1e-2, None, 1.0)
    assert [r.name for r in ranked(found)] == ["b", "a"] and [r.rank for r in found] == [2, 1]
    assert guessing(found) is None


def test_what_is_not_a_number_is_last():
    made = study(("a", "b"), seeds=1)
    a, b = resolved(made)
    nan = float("nan")
    found = results(made, [a, b], [text(a, 0, nan, validation=nan), text(b, 0, 3.0, validation=3.0)])
    assert [r.name for r in ranked(found)] == ["b", "a"]


def test_ranks_are_by_mean_test_and_equal_ones_share():
    made = study(("a", "b", "c", "d"), seeds=2)
    cells = resolved(made)
    tests = {"a": (0.2, 0.4), "b": (0.6, 0.8), "c": (0.3, 0.3), "d": (0.1, 0.1)}
    rows = [row(cell, s, tests[cell.cell.name][s]) for cell in cells for s in (0, 1)]
    assert {r.name: r.rank for r in results(made, cells, rows)} == {"b": 1, "a": 2, "c": 2, "d": 4}


def test_stale_rows_do_not_count():
    """Of another digest, of a seed beyond the study's, of a rate that it has no more."""
    made = study(("a", "b"), seeds=1)
    a, b = resolved(made)
    rows = [row(a, 0, 0.5), row(a, 0, 0.9, digest="another"), row(a, 1, 0.9), row(a, 0, 0.9, 0.99, rate=0.1)]
    found = results(made, [a, b], rows)
    assert found[0].tests == [0.5] and len(found[0].rows) == 1
    assert found[1].rows == [] and found[1].rank is None and found[1].best is None


def test_steps_to_the_goal_are_medians_of_those_that_reached_it():
    made = study(("a",), seeds=3)
    (cell,) = resolved(made)
    reached = [{"goal": 0.9, "goal_step": step, "goal_cpu_seconds": step / 10} for step in (40, 80, 60)]
    (found,) = results(made, [cell], [row(cell, s, 0.9, **reached[s]) for s in range(3)])
    assert dataclasses.astuple(goal(found)) == (60, 6, 3, 3)
    (found,) = results(made, [cell], [row(cell, s, 0.9, **(reached[s] if s else {"goal": 0.9})) for s in range(3)])
    assert dataclasses.astuple(goal(found)) == (70, 7, 2, 3)
    (found,) = results(made, [cell], [row(cell, 0, 0.9)])
    assert goal(found) is None


@pytest.mark.parametrize(
    ("more", "less", "changes", "said"),
    [
        ((0.60, 0.70), (0.50, 0.55), {}, "seen"),
        ((0.51, 0.51), (0.50, 0.50), {}, "seen"),  # just as much as counts
        ((0.505, 0.505), (0.50, 0.50), {}, "not seen"),  # too little
        ((0.60, 0.49), (0.50, 0.50), {}, "not seen"),  # seeds disagree
        ((0.60, 0.50), (0.50, 0.50), {}, "not seen"),  # one seed says nothing
        ((0.50, 0.55), (0.60, 0.70), {}, "the opposite"),
        ((0.60, 0.70), (0.50, 0.55), {"least": 0.2}, "not seen"),
        ((0.995, 1.0), (0.99, 0.99), {}, "not testable here"),  # both at the ceiling
        ((0.995, 1.0), (0.97, 0.98), {}, "seen"),
        ((0.18, 0.17), (0.02, 0.03), {}, "seen"),  # nor better than that, but not both alike
        ((0.20, 0.20), (0.10, 0.10), {}, "not testable here"),  # guessing: (1/4 + 1/8) / 2 = 0.1875, and 0.02 more
        ((0.22, 0.22), (0.10, 0.10), {}, "seen"),
        ((0.9, 0.9), (0.1, 0.1), {"untestable": "too small a model"}, "not testable here"),
        ((0.9, 0.9), (), {}, "not trained yet"),
        ((), (0.9,), {}, "not trained yet"),
    ],
)
def test_verdicts(more, less, changes, said):
    claim = dataclasses.replace(Claim("A beats B.", "a paper", more="a", less="b"), **changes)
    made = study(("a", "b"), claims=(claim,))
    a, b = resolved(made)
    rows = [row(a, s, x) for s, x in enumerate(more)] + [row(b, s, x) for s, x in enumerate(less)]
    (verdict,) = verdicts(made, results(made, [a, b], rows))
    assert verdict.said == said
    if said != "not trained yet" and not claim.untestable:
        assert verdict.more == pytest.approx(sum(more) / 2) and verdict.less == pytest.approx(sum(less) / 2)
        assert verdict.difference == pytest.approx((sum(more) - sum(less)) / 2)


def test_verdicts_on_a_slice():
    """By its own accuracy and its own guessing: the plateau, or chance where there is none."""
    claims = [Claim("", "", more="a", less="b", slice=f"pairs {pairs}") for pairs in (4, 16, 5)]
    made = study(("a", "b"), claims=tuple(claims))
    a, b = resolved(made)
    rows = [row(cell, s, 0.5, scores={4: x, 16: x}) for cell, x in ((a, 0.26), (b, 0.20)) for s in (0, 1)]
    said = verdicts(made, results(made, [a, b], rows))
    assert [v.said for v in said] == ["not testable here", "seen", "not testable here"]
    assert said[1].more == 0.26 and said[1].less == 0.20 and "'pairs 5'" in said[2].why


def test_claims_at_equal_bytes_are_read_between_cells():
    """a has 100, 400 and 1,600 bytes, b 6,400, 25,600 and 102,400: halfway by the logarithm is half of both cells."""
    widths = Axis("width", (Choice("1"), Choice("2"), Choice("3")))
    memory = Axis("memory", (Choice("a"), Choice("b")))
    sizes = (200, 6_400, 51_200)
    claims = tuple(Claim("", "", more="a", less="b", at=size) for size in sizes)
    points = (Reference("theirs", 0.5, 200, "a"), Reference("theirs, large", 0.7, 5_000, "a"))
    made = study(axes=(memory, widths), claims=claims, references=points)
    cells = resolved(made)
    costs = [
        dict(cell.costs, state_bytes=size) for cell, size in zip(cells, (100, 400, 1600, 25, 400, 6400), strict=True)
    ]
    cells = [dataclasses.replace(cell, costs=cost) for cell, cost in zip(cells, costs, strict=True)]
    values = ((0.4, 0.6, 0.8), (0.2, 0.3, 0.4))
    rows = [row(cells[3 * m + w], s, values[m][w] + s / 10) for m in (0, 1) for w in (0, 1, 2) for s in (0, 1)]
    found = results(made, cells, rows)
    inside, beyond, absent = verdicts(made, found)
    assert inside.said == "seen" and inside.more == pytest.approx(0.55) and inside.less == pytest.approx(0.325)
    assert inside.differences == pytest.approx((0.225, 0.225))
    assert beyond.said == absent.said == "not testable here" and "do not both have about 6,400 bytes" in beyond.why
    assert study_report._claim(inside).lines[1].startswith("a at 200 bytes: 0.550; b at 200 bytes: 0.325.")
    table = study_report._published(made, found)
    assert [line[:4] for line in table.rows] == [
        ("theirs", "0.500", "0.550", "+0.050"),
        ("theirs, large", "0.700", "", ""),
    ]
    assert {line[-1] for line in table.rows} == {"100 to 1,600"} and "Ours is read between cells" in table.caption
    assert [v.said for v in verdicts(made, results(made, cells, rows[:1]))] == ["not trained yet"] * 3


def test_one_seed_says_nothing_of_the_next():
    made = study(("a", "b"), seeds=1, claims=(Claim("", "", more="a", less="b"),))
    a, b = resolved(made)
    (verdict,) = verdicts(made, results(made, [a, b], [row(a, 0, 0.9), row(b, 0, 0.5)]))
    assert verdict.said == "not testable here" and verdict.why.startswith("one seed")
    assert verdict.difference == pytest.approx(0.4)


def test_seeds_are_compared_with_the_same_seed_of_the_other():
    made = study(("a", "b"), seeds=3, claims=(Claim("", "", more="a", less="b"),))
    a, b = resolved(made)
    rows = [row(a, s, x) for s, x in ((0, 0.5), (1, 0.7), (2, 0.0))] + [row(b, s, x) for s, x in ((1, 0.6), (0, 0.4))]
    (verdict,) = verdicts(made, results(made, [a, b], rows))
    assert verdict.differences == pytest.approx((0.1, 0.1)) and verdict.said == "seen"


def test_the_better_text_model_is_the_one_with_fewer_bits():
    claims = (Claim("", "", more="a", less="b"), Claim("", "", more="b", less="a"))
    made = study(("a", "b"), claims=claims)
    a, b = resolved(made)
    rows = [text(cell, s, bits) for cell, bits in ((a, 1.5), (b, 1.7)) for s in (0, 1)]
    said = verdicts(made, results(made, [a, b], rows))
    assert [v.said for v in said] == ["seen", "the opposite"]
    assert said[0].difference == pytest.approx(0.2)


ODD = "<a & b> | $x$ *y*"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A report with all that there is: (folder, Markdown, HTML)."""
    made = study(
        (ODD, "b", "c"),
        versus="state_bytes",
        claims=(
            Claim("The first <beats> b.", "paper & table", more=ODD, less="b"),
            Claim("b beats c.", "the same", more="b", less="c"),
            Claim("It scales.", "a page", untestable="models are small"),
        ),
        references=(Reference("b", 0.75, 500), Reference("elsewhere", 0.9)),
        notes="One & only.\n\n1. <b>Two</b>",
    )
    cells = resolved(made, off=(0.0, 0.02, -0.03))
    folder = tmp_path_factory.mktemp("report")
    tests = {(0, 0): 0.8, (0, 1): 0.9, (1, 0): 0.6, (1, 1): 0.5}
    rows = [
        row(cells[c], s, test, validation=rate * 50, rate=rate, skipped=c)
        for (c, s), test in tests.items()
        for rate in (1e-3, 1e-2)
    ]
    path = study_report.write(made, "made", cells, rows, folder)
    assert path == folder / "report.md"
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    study_report.write(made, "made", cells, rows[::-1], folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before, "the same rows make the same files"
    return folder, path.read_text(), (folder / "report.html").read_text()


def test_pictures_are_four_files_each(written):
    folder, said, _ = written
    assert sorted(p.name for p in folder.iterdir()) == sorted([*FILES, "report.html", "report.md"])
    for stem in PICTURES:
        assert f'srcset="{stem}-dark.png"' in said and f'src="{stem}.png"' in said


def test_the_paragraph_says_the_numbers(written):
    paragraph = written[1].split("\n\n")[2]
    first = plain(ODD)
    assert paragraph == (
        "2 cells were trained, 8 of 12 arms: 80 steps of 2,048 tokens each, 1,310,720 tokens in all. "
        "1 cell is not trained yet. "
        f"The best cell is {first}, with accuracy 0.850; the last is b, with 0.550: they are 0.300 apart. "
        "Seeds of a cell are 0.100 apart at the median of cells, and 0.100 at most. "
        "Of 3 claims: 1 seen, 1 not testable here, 1 not trained yet. "
        "Cells were matched in parameters; the largest miss is 3.0% (c, parameters). Training took 16 CPU seconds."
    )


def test_a_study_of_one_has_no_plurals(tmp_path):
    made = study(("a",), seeds=1, rates=(1e-2,))
    cells = resolved(made)
    said = study_report.write(made, "one", cells, [row(cells[0], 0, 0.5, cpu_seconds=1.0)], tmp_path).read_text()
    assert (
        "1 cell was trained, 1 of 1 arm: 80 steps of 2,048 tokens each, 163,840 tokens in all. a has accuracy 0.500. "
        "There is one seed of each setting, so nothing is known of the spread over seeds. "
        "Training took 1 CPU second.\n"
    ) in said
    assert "## Claims" not in said and not (tmp_path / "settings.png").exists()


def test_the_table_and_what_is_the_same_in_all_rows(written):
    lines = written[1].splitlines()
    at = next(n for n, line in enumerate(lines) if line.startswith("| cell |"))
    table = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[at : at + 6]]
    head = [
        "cell", "rank", "accuracy", "pairs 4", "pairs 8", "bytes of state", "matched", "skipped steps", "arms"
    ]  # fmt: skip
    assert table[0] == [name for name in head if name != "arms"]
    both = "0.850 (0.800–0.900)"
    assert table[2] == [plain(ODD), "1", both, both, both, "100", "", "0"]
    assert table[3][:3] == ["b", "2", "0.550 (0.500–0.600)"] and table[3][5:] == [
        "400",
        "parameters +2.0% (model.D 32)",
        "2",
    ]
    assert table[4] == ["c", "", "not trained yet", "", "", "1,600", "parameters -3.0% (model.D 32)", ""]
    assert table[5] == ["(guessing)", "", "0.188", "0.250", "0.125", "", "", ""]
    same = "The same in all rows: learning rate 0.01; parameters 1,000; FLOPs a token 5,000,000; "
    assert same + "tokens of the longest row 64; CPU seconds in all 8.0; seeds 2." in lines


def test_claims_and_published_values_are_there(written):
    said = written[1]
    assert "- **seen**: The first &lt;beats&gt; b. (paper &amp; table)" in said
    assert "0.850; b: 0.550. In favour of the first: +0.300 on average, +0.200 to +0.400 over 2 seeds" in said
    assert "- **not trained yet**: b beats c." in said and "It compares b with c." in said
    assert "- **not testable here**: It scales. (a page)" in said and "Why: models are small." in said
    assert "| b | 0.750 | 0.550 | -0.200 | 500 | 400 |" in said and "| elsewhere | 0.900 |  |  |  |  |" in said
    assert "One &amp; only.\n\n1\\. &lt;b&gt;Two&lt;/b&gt;" in said


class Page(html.parser.HTMLParser):
    """What a page holds; tags that do not close as they opened are an error."""

    EMPTY = {"meta", "img", "source"}

    def __init__(self, source: str):
        super().__init__()
        self.open, self.tags, self.text, self.anchors, self.links = [], [], [], set(), []
        self.feed(source)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.EMPTY:
            self.open.append(tag)
        if "id" in (given := dict(attrs)):
            assert given["id"] not in self.anchors
            self.anchors.add(given["id"])
        self.links += [given[name] for name in ("href", "src", "srcset") if name in given]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)


def test_the_page_is_whole_and_alone(written):
    source = written[2]
    page = Page(source)
    assert not re.search(r"https?:|//[a-z]|@import|url\(|<script|<link|<iframe", source)
    assert "b" not in {tag for tag, _ in page.tags}, "a note's own tag became one of the page"
    for link in page.links:
        assert link.startswith("data:image/svg+xml;base64,") or link.removeprefix("#") in page.anchors
    pictures = [given for tag, given in page.tags if tag == "img"]
    assert len(pictures) == 4 and all(given["alt"] for given in pictures)
    assert sum(tag == "source" for tag, _ in page.tags) == 4
    assert len(source) < 2e6


def test_the_page_says_what_the_markdown_says(written):
    _, said, source = written
    text = "\n".join(Page(source).text)
    for name in (ODD, "The first <beats> b. (paper & table)", "1. <b>Two</b>", "not trained yet", "+2.0% (model.D 32)"):
        assert name in text
    for name in (ODD, "b", "c"):
        command = f"python ablate.py made --only {shlex.quote(name)}"
        assert command in text and command in said
    assert "\npython ablate.py made\n" in text and "```\npython ablate.py made\n```" in said
    headings = re.findall(r"^#+ (.*)$", said, re.MULTILINE)
    assert headings == re.findall(r"<h\d[^>]*>(.*?)</h\d>", source)


def test_nothing_trained_is_said_and_old_pictures_go(tmp_path):
    made = study(claims=(Claim("A beats B.", "a paper", more="a", less="b"),))
    (tmp_path / "main.png").write_bytes(b"old")
    said = study_report.write(made, "none", resolved(made), [], tmp_path).read_text()
    assert "Nothing is trained yet: the study has 3 cells." in said and said.count("not trained yet") == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.md"]


def test_text_along_an_axis(tmp_path):
    axes = (
        Axis("memory", (Choice("delta"), Choice("linear"))),
        Axis("heads", tuple(Choice(str(n)) for n in (1, 4, 16))),
    )
    made = study(axes=axes, versus="heads", seeds=1, rates=(1e-2,))
    cells = resolved(made)
    rows = [text(cell, 0, 2.0 - 0.1 * number) for number, cell in enumerate(cells[:5])]
    said = study_report.write(made, "text", cells, rows, tmp_path).read_text()
    assert "The best cell is linear, 4, with bits per byte 1.600; the last is delta, 1, with 2.000" in said
    assert "(guessing)" not in said and "slices" not in said and "Dotted" not in said


@pytest.mark.parametrize(
    ("names", "places", "log"),
    [
        (("8", "16", "1,024"), [8, 16, 1024], True),
        (("1", "2", "3"), [1, 2, 3], False),
        (("0", "100"), [0, 100], False),
        (("none", "4"), [0, 1], False),
        (("4", "4.0"), [0, 1], False),
    ],
)
def test_choices_stand_at_their_numbers(names, places, log):
    assert spaced(names) == (places, log)


@pytest.mark.parametrize("number", [6, 30])
def test_labels_of_points_do_not_overlap(number):
    """Few have their names beside them, many have numbers; all of them where points are crowded."""
    series = {f"a memory called {n}": [At(1000 + n // 6, 0.5 + 0.01 * (n % 6), 0.4, 0.6)] for n in range(number)}
    figure = scatter("t", series, {"p": [(1000, 0.5)]}, "x", "y", share=True, guess=0.1)(False)
    figure.draw_without_rendering()
    labels = [label for label in figure.axes[0].texts]
    assert len(labels) == number + 1
    boxes = [super(type(label), label).get_window_extent() for label in labels]
    assert not any(a.overlaps(b) for n, a in enumerate(boxes) for b in boxes[:n])


def test_plain_text_stays_plain():
    table = Table("t", ("cell", "x"), (("a|b", "1"),))
    said = markdown([Heading("a_b @ _c_"), Paragraph("# no"), Paragraph("- no"), table, Code(("```",))])
    assert said.startswith("## a_b @ \\_c\\_\n\n\\# no\n\n\\- no\n\n") and "| a\\|b | 1 |" in said
    assert said.endswith("````\n```\n````\n")
