"""Measures whole models: decoding against a model of attention, and the training step against the machine's peak."""

import statistics
from collections.abc import Iterator
from functools import partial
from typing import Any

from benchmarks.ops import Lane
from benchmarks.pair import Contestant, interleave
from benchmarks.report import Row, at_least, at_most, number

SIZE = {"depth": 12, "D": 256}
SHAPE = f"{SIZE['depth']} layers, D {SIZE['D']}"
KV_GOALS = {512: None, 2048: 2.0, 8192: None}  # capacity of the cache, carried in the loop: times as fast, at least
KV_BURST = 4  # a token may take a tenth of a second
BURST = 16  # words drawn in one call
LONG = 2048  # tokens decoded to see whether the end is as fast as the start


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
    """Tokens a second of GatedDeltaNet: flat over capacity and time, by the loop that drives it, against a KV cache."""
    name, section = "GatedDeltaNet", "Decoding"
    with contestant(lane) as ours:

        def load(capacity: int, burst: int = BURST) -> dict[str, float]:
            return ours.load(f"{capacity} {burst}", op="decode", model="gdn", **SIZE, capacity=capacity, burst=burst)

        short, long = load(512), load(32768)
        yield Row(
            section,
            f"{name}, {SHAPE}: state bytes at 512 and 32,768 tokens",
            result=f"{short['state_bytes']:,.0f}, {long['state_bytes']:,.0f}",
            goal="identical",
            met=short["state_bytes"] == long["state_bytes"],
            compile_s=short["compile_s"],
        )
        times = interleave([(ours, f"512 {BURST}"), (ours, f"32768 {BURST}")], max(lane.rounds, 9), seconds=0.0)
        yield Row(
            section,
            f"{name}: time a token with room for 32,768 over 512",
            ours_ms=times.median(1) / BURST,
            **flat(times.ratio(1)),
        )
        load(512, 1)
        times = interleave([(ours, f"512 {BURST}"), (ours, "512 1")], max(lane.rounds, 5), seconds=0.05)
        yield Row(
            section,
            f"{name}: a loop in Python over a loop of {BURST} in the program, time a token",
            ours_ms=times.median(1),
            peer="in-program loop",
            peer_ms=times.median(0) / BURST,
            **at_most(BURST * times.ratio(1), 1.25),
        )
        facts = load(LONG + 2 * BURST)
        stream = f"{LONG + 2 * BURST} {BURST}"
        bursts = [ours.milliseconds(stream, 0.0) / BURST for _ in range(int(facts["bursts"]))]
        tenth = len(bursts) // 10
        start, end = statistics.median(bursts[:tenth]), statistics.median(bursts[-tenth:])
        yield Row(
            section,
            f"{name}: {len(bursts) * BURST:,} tokens in one stream, time a token at the end over the start",
            ours_ms=end,
            note=f"{number(1e3 / start)} tokens/s at the start, {number(1e3 / end)} at the end",
            **flat(end / start),
        )
        for capacity, goal in KV_GOALS.items():
            with contestant(lane) as cached:
                facts = cached.load("kv", op="decode", model="attention", **SIZE, capacity=capacity, burst=KV_BURST)
                times = interleave([(ours, stream), (cached, "kv")], lane.rounds, seconds=0.05)
            token_ms = times.median(0) / BURST, times.median(1) / KV_BURST
            speed = [number(1e3 / ms) for ms in token_ms]
            yield Row(
                section,
                f"{name}: tokens a second against attention with a cache of {capacity:,}",
                ours_ms=token_ms[0],
                peer="own attention",
                peer_ms=token_ms[1],
                note=f"{speed[0]} against {speed[1]} tokens/s; cache {facts['state_bytes'] / 1e6:.1f} MB",
                **at_least(times.ratio(1) * BURST / KV_BURST, goal),
            )


def flat(ratio: float) -> dict[str, Any]:
    return {"result": f"{ratio:.2f}x", "goal": "0.95 to 1.05", "met": 0.95 <= ratio <= 1.05}


TASKS = (
    ("decode", 40, decoding),
    ("train.gdn", 30, partial(utilisation, "gdn", "GatedDeltaNet", 0.30)),
    ("train.linear", 20, partial(utilisation, "linear", "linear attention", 0.35)),
    ("host", 10, host),
)
