"""Measures whole models: decoding against a model of attention, and the training step against the machine's peak."""

import statistics
from collections.abc import Iterator
from functools import partial

from benchmarks.ops import Lane
from benchmarks.pair import Contestant, interleave
from benchmarks.report import Row, at_least, at_most, number

SIZE = {"depth": 12, "D": 256}
SHAPE = f"{SIZE['depth']} layers, D {SIZE['D']}"
KV_GOALS = {512: None, 2048: 2.0, 8192: None}  # capacity of the cache: times as fast as attention, at least
LONG = 4096  # tokens decoded to see whether the end is as fast as the start


def contestant(lane: Lane) -> Contestant:
    return Contestant("benchmarks.contestants_models", core=lane.core)


def utilisation(model: str, title: str, goal: float, lane: Lane) -> Iterator[Row]:
    with contestant(lane) as ours:
        peak = ours.load("peak", op="matmul", n=1024)
        facts = ours.load("step", op="train", model=model, **SIZE, B=2, T=256)
        times = interleave([(ours, "step"), (ours, "peak")], max(lane.rounds, 3), seconds=0.3)
        part = statistics.median(facts["flops"] / step / (peak["flops"] / matmul) for step, matmul in times.rounds)
        yield Row(
            "Training",
            f"{title}, {SHAPE}, B 2, T 256, AdamW: utilisation",
            ours_ms=times.median(0),
            compile_s=facts["compile_s"],
            note=f"{facts['parameters'] / 1e6:.1f} M parameters, {facts['flops'] / 1e9:.1f} GFLOP a step in products "
            f"with weights ({facts['all_flops'] / 1e9:.1f} in all); peak {peak['flops'] / times.best(1) / 1e6:.0f} "
            f"GFLOP/s; trace {facts['trace_s']:.1f} s",
            **at_least(100 * part, 100 * goal, "%"),
        )


def host(lane: Lane) -> Iterator[Row]:
    """A model so small that a step is all overhead: an upper bound of what the host spends."""
    with contestant(lane) as ours:
        facts = ours.load("step", op="train", model="linear", depth=12, D=8, H=1, B=1, T=2)
        times = interleave([(ours, "step")], max(lane.rounds, 3))
        goal = 1.5 + 0.025 * facts["leaves"]
        yield Row(
            "Training",
            "host overhead: a whole step of 12 layers, D 8, T 2",
            ours_ms=times.median(0),
            compile_s=facts["compile_s"],
            note=f"{facts['leaves']:.0f} parameters' leaves, {facts['state_leaves']:.0f} of the whole state, "
            "split once; goal 1.5 ms + 25 us a leaf",
            **at_most(times.median(0), goal, " ms"),
        )


def decoding(lane: Lane) -> Iterator[Row]:
    """Tokens a second of GatedDeltaNet: flat over capacity, against a KV cache, and by the loop that drives it."""
    section, name = "Decoding", "GatedDeltaNet"
    with contestant(lane) as ours:
        short, long = (ours.load(f"{T}", op="decode", model="gdn", **SIZE, capacity=T, burst=16) for T in (512, 32768))
        times = interleave([(ours, "512"), (ours, "32768")], max(lane.rounds, 5), seconds=0.0)
        ratio = statistics.median(b / a for a, b in times.rounds)
        yield Row(
            section,
            f"{name}, {SHAPE}: state bytes at 512 and 32,768 tokens",
            result=f"{short['state_bytes']:,.0f}, {long['state_bytes']:,.0f}",
            goal="identical",
            met=short["state_bytes"] == long["state_bytes"],
        )
        yield Row(
            section,
            f"{name}: time a token, capacity 32,768 to 512",
            ours_ms=times.median(1) / 16,
            result=f"{ratio:.2f}x",
            goal="0.95 to 1.05",
            met=0.95 <= ratio <= 1.05,
            compile_s=short["compile_s"],
        )
        ours.load("python", op="decode", model="gdn", **SIZE, capacity=512, burst=1)
        loops = interleave([(ours, "512"), (ours, "python")], max(lane.rounds, 3), seconds=0.1)
        yield Row(
            section,
            f"{name}: a loop in Python over a loop of 16 in the program, time a token",
            ours_ms=loops.median(1),
            peer="in-program loop",
            peer_ms=loops.median(0) / 16,
            **at_most(16 * loops.ratio(1), 1.25),
        )
        yield from _to_the_end(ours, section, name)
    for capacity, goal in KV_GOALS.items():
        with contestant(lane) as ours, contestant(lane) as attention:
            ours.load("ours", op="decode", model="gdn", **SIZE, capacity=capacity, burst=16)
            facts = attention.load("kv", op="decode", model="attention", **SIZE, capacity=capacity, burst=16)
            times = interleave([(ours, "ours"), (attention, "kv")], lane.rounds, seconds=0.1)
            yield Row(
                section,
                f"{name}: tokens a second against attention with a cache of {capacity:,}",
                ours_ms=times.median(0) / 16,
                peer="own attention",
                peer_ms=times.median(1) / 16,
                note=f"{16e3 / times.median(0):,.0f} against {16e3 / times.median(1):,.0f} tokens/s; "
                f"cache {facts['state_bytes'] / 1e6:.1f} MB",
                **at_least(times.ratio(1), goal),
            )


def _to_the_end(ours: Contestant, section: str, name: str) -> Iterator[Row]:
    burst = 64
    facts = ours.load("stream", op="decode", model="gdn", **SIZE, capacity=LONG + 2 * burst, burst=burst)
    bursts = [ours.milliseconds("stream", 0.0) / burst for _ in range(int(facts["bursts"]))]
    tenth = len(bursts) // 10
    start, end = statistics.median(bursts[:tenth]), statistics.median(bursts[-tenth:])
    yield Row(
        section,
        f"{name}: {len(bursts) * burst:,} tokens in one stream, time a token at the end over the start",
        ours_ms=end,
        result=f"{end / start:.2f}x",
        goal="0.95 to 1.05",
        met=0.95 <= end / start <= 1.05,
        note=f"{number(1e3 / start)} tokens/s at the start, {number(1e3 / end)} at the end",
    )


TASKS = (
    ("decode", 40, decoding),
    ("train.gdn", 30, partial(utilisation, "gdn", "GatedDeltaNet", 0.30)),
    ("train.linear", 20, partial(utilisation, "linear", "linear attention", 0.35)),
    ("host", 10, host),
)
