"""Speed and memory on a GPU, beside the kernels of fla, SDPA and titans-pytorch in the same run.

    python -m benchmarks.gpu                             all rows; writes results/bench_gpu.md
    python -m benchmarks.gpu --only linear,train         some: their table, and no file
    python -m benchmarks.gpu --torch-python PYTHON       an interpreter with torch, triton, fla-core, titans-pytorch

Kernels of the peers are compiled and tuned when first used, which takes minutes and is kept by Triton.
"""

import argparse
import functools
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from benchmarks import cases, peers, report
from benchmarks.cpu import option
from benchmarks.pair import ROOT, Contestant, Failed, interleave, relative
from benchmarks.report import Row, at_least

METHOD = """\
bfloat16 query, key, value and beta, float32 decays; H 16, K = V = 128. One process a contestant, on one GPU, in turn;
the clock is the wall's over bursts of five calls, so that the host's part is hidden where the device is the slower.
Milliseconds are medians over rounds, ratios medians of the ratios within a round; `result` against a peer: how many
times as fast as the peer. `error`: outputs and all gradients of 1,024 tokens and 4 heads against the definition in
float32, the largest relative difference; the peer's is in the note. Temporary memory: ours XLA's account, the peer's
what its allocator held at most beyond the inputs, outputs and gradients among it."""
H, D = 16, 128
TOLERANCE = 0.02  # of bfloat16 operands, as fla's tests bound it
NAMES = cases.MEMORY | {"delta": "DeltaNet", "attention": "causal attention"}
MEMORIES = ("linear", "scalar", "channel", "delta", "gated_delta", "kda")
# Half as fast as fla is the goal of XLA alone, a quarter over one long row; attention is cuDNN's on both sides.
GOALS = {"attention": 0.9}
TRAIN = {"depth": 24, "D": 1024, "dtype": "bfloat16", "words": 32_768, "scan": "auto"}


class Lane(NamedTuple):
    folder: Path
    rounds: int
    ours: Contestant
    torch: Contestant | None
    missing: str
    options: dict[str, str | int]  # given to our operations, e.g. chunk


def operation(op: str, lane: Lane) -> Iterator[Row]:
    inputs = cases.write_inputs(op, 1, 4096, lane.folder, H, D)
    for B, T in ((8, 4096), (1, 65_536)):
        for mode in ("fwd", "fwd+bwd"):
            if T > 4096 and (op not in ("linear", "gated_delta") or mode != "fwd"):
                continue
            row = Row("Operations", f"{NAMES[op]} {mode}, B {B}, T {T:,}", peer="fla" if op in MEMORIES else "SDPA")
            goal = GOALS.get(op, 0.5 if T == 4096 else 0.25)
            try:
                yield from _operation(lane, op, mode, inputs, B, T, row, goal)
            except Failed as why:
                yield replace(row, met=False, note=str(why))


def _operation(lane: Lane, op: str, mode: str, inputs: str, B: int, T: int, row: Row, goal: float) -> Iterator[Row]:
    asked: dict[str, Any] = {"kind": "operation", "op": op, "mode": mode, "inputs": inputs}
    small, whole = {"B": 1, "T": 1024, "H": 4}, {"B": B, "T": T, "H": H}
    lane.ours.load("judge", **asked, **small, judge=True)
    judge = lane.ours.outputs("judge", lane.folder)

    def error(who: Contestant, **options: Any) -> float:
        who.load("small", **asked, **small, **options)
        found = who.outputs("small", lane.folder)
        return max(relative(found[name], judge[name]) for name in judge)

    mine = error(lane.ours, **lane.options)
    if mine > TOLERANCE:
        raise Failed(f"accuracy gate: {mine:.1e} of the definition")
    facts = lane.ours.load("whole", **asked, **whole, **lane.options)
    row = replace(row, error=mine, temp_mb=facts["temp_mb"], compile_s=facts["compile_s"])
    try:
        if lane.torch is None:
            raise Failed(lane.missing)
        note = f"the peer's error: {error(lane.torch):.0e}"
        theirs = lane.torch.load("whole", **asked, **whole)
    except Failed as why:
        times = interleave([(lane.ours, "whole")], lane.rounds)
        yield replace(row, ours_ms=times.median(0) / facts["calls"], note=f"no peer: {why}")
        return
    times = interleave([(lane.ours, "whole"), (lane.torch, "whole")], lane.rounds)
    yield replace(
        row,
        ours_ms=times.median(0) / facts["calls"],
        peer_ms=times.median(1) / theirs["calls"],
        peer_temp_mb=theirs["temp_mb"],
        note=note,
        **at_least(times.ratio(1), goal),
    )


def titans(lane: Lane) -> Iterator[Row]:
    """The layer, D 1,024, 8 heads, two matrices of expansion 4, float32 with TF32 products."""
    for mode in ("fwd", "fwd+bwd"):
        shape = {"kind": "titans", "mode": mode, "B": 2, "T": 4096, "D": 1024, "H": 8, "C": 256}
        row = Row("Memory", f"Titans {mode}, B 2, T 4,096, D 1,024, H 8, C 256", peer="titans-pytorch")
        try:
            facts = lane.ours.load("titans", **shape)
            row = replace(row, temp_mb=facts["temp_mb"], compile_s=facts["compile_s"])
            try:
                if lane.torch is None:
                    raise Failed(lane.missing)
                lane.torch.load("titans", **shape)
                lane.torch.milliseconds("titans", 0.0)
            except Failed as why:
                yield replace(row, ours_ms=interleave([(lane.ours, "titans")], lane.rounds).median(0), note=str(why))
                continue
            times = interleave([(lane.ours, "titans"), (lane.torch, "titans")], lane.rounds)
            yield replace(row, ours_ms=times.median(0), peer_ms=times.median(1), **at_least(times.ratio(1), 2.0))
        except Failed as why:
            yield replace(row, met=False, note=str(why))


def train(lane: Lane) -> Iterator[Row]:
    """A step of AdamW of 0.3 billion parameters, tokens a step held constant."""
    n = 8192
    peak = 2.0 * n**3 / 1e9
    facts = lane.ours.load("product", kind="product", n=n)
    best = min(lane.ours.milliseconds("product", 0.3) for _ in range(lane.rounds)) / facts["calls"]
    speed: dict[tuple[str, int], float] = {}
    yield Row("Training", f"bfloat16 product of {n:,} x {n:,}", ours_ms=best, result=f"{peak / best:,.0f} TFLOP/s")
    for T, tokens, goal, remat in ((4096, 16_384, 0.85, "none"), (32_768, 32_768, 2.0, "block")):
        for model, title in (("attention", "attention"), ("gdn", "GatedDeltaNet"), ("linear", "linear attention")):
            row = Row("Training", f"{title}, 24 layers, D 1,024, T {T:,}, {tokens:,} tokens a step")
            try:
                shape = TRAIN | {"B": tokens // T, "T": T, "H": 8, "model": model, "remat": remat}
                facts = lane.ours.load("step", kind="train", **shape)
                ms = interleave([(lane.ours, "step")], lane.rounds, seconds=0.5).median(0)
                speed[model, T] = tokens / ms * 1e3
                used = 100 * facts["all_flops"] / 1e9 / ms / (peak / best)
                note = (
                    f"{facts['parameters'] / 1e6:.0f} M parameters, {speed[model, T]:,.0f} tokens a second, "
                    f"{used:.0f}% of the product's rate ({100 * facts['flops'] / 1e9 / ms / (peak / best):.0f}% in "
                    f"products with weights), remat {remat}"
                )
                known = at_least(used, 40, "%") if model == "attention" and T == 4096 else {}
                if model != "attention" and ("attention", T) in speed:
                    known = at_least(speed[model, T] / speed["attention", T], goal)
                    row = replace(row, peer="own attention")
                yield replace(row, ours_ms=ms, compile_s=facts["compile_s"], note=note, **known)
            except Failed as why:
                yield replace(row, met=False, note=str(why))
            lane.ours.load("step", kind="product", n=8)  # lets the model go


def tasks() -> dict[str, Callable[[Lane], Iterator[Row]]]:
    rows = {op: functools.partial(operation, op) for op in (*MEMORIES, "attention")}
    return {**rows, "titans": titans, "train": train}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help=f"comma-separated: {', '.join(tasks())}")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds a row (default 5)")
    parser.add_argument("--ours", type=option, nargs="*", default=[], help="options of our operations, e.g. chunk=128")
    parser.add_argument("--torch-python", help="an interpreter with the peers (default: that of make bench-peers)")
    parser.add_argument("--output", type=Path, help="default, for a full run: results/bench_gpu.md")
    arguments = parser.parse_args()
    selected = arguments.only.split(",") if arguments.only else list(tasks())
    for name in selected:
        if name not in tasks():
            parser.error(f"--only {name}: choose among {', '.join(tasks())}")
    start, console = time.time(), Console(width=None if sys.stdout.isatty() else 240)
    rows: list[Row] = []
    try:
        gpu = subprocess.run(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"],
                             capture_output=True, text=True, check=True).stdout.strip()  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        raise SystemExit("no NVIDIA GPU answers: nvidia-smi failed") from None
    peer, torch = peers.find("torch", arguments.torch_python), None
    versions: dict[str, str] = {}
    module, half = "benchmarks.contestants_gpu", {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    with tempfile.TemporaryDirectory() as folder, Contestant(module, "ours", accelerator=half) as ours:
        missing = peer.missing
        if not missing:
            try:
                torch = Contestant(module, "torch", python=peer.python, accelerator={})
                versions.update(torch.versions)
            except Failed as why:
                missing = str(why)
        lane = Lane(Path(folder), arguments.rounds, ours, torch, missing, dict(arguments.ours))
        for name in selected:
            for row in tasks()[name](lane):
                rows.append(row)
                ms = f"{row.ours_ms or 0:.2f} ms, {row.peer} {row.peer_ms or 0:.2f}"
                console.print(f"[dim]{row.item}: {ms}: {row.result} {row.note}")
        if torch is not None:
            torch.close()
    report.show(rows, console)
    command = shlex.join(["python", "-m", "benchmarks.gpu", "--rounds", str(arguments.rounds)])
    known = report.facts(command, versions, arguments.rounds, "", time.time() - start)
    known = {"command": known["command"], "GPU": gpu} | {
        n: known[n] for n in ("date", "commit", "machine", "ours", "peers", "rounds", "took")
    }
    output = arguments.output or (None if arguments.only else ROOT / "results" / "bench_gpu.md")
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(report.markdown(rows, known, "GPU benchmark", METHOD))
        console.print(f"written: {output}")


if __name__ == "__main__":
    main()
