"""What is measured: inputs, rows and goals. Float32; B 2, T 2048, H 4, K = V = 64 unless a row says otherwise."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

H, D = 4, 64
WINDOW = 256
LENGTHS = (512, 4096, 16384)  # the exponent is that of the last two
MEMORY = {  # op: name of the row
    "linear": "linear attention",
    "scalar": "scalar decay (SSD)",
    "channel": "channel decay (GLA)",
    "gated_delta": "GatedDeltaNet",
    "kda": "KDA",
}
TAGS = {"scalar": "ssd", "channel": "gla", "gated_delta": "gdn"}  # shorter names for --only


class Pair(NamedTuple):
    """Ours against a peer on one operation."""

    op: str
    mode: str  # "fwd" | "fwd+bwd"
    peer: str  # "torch" | "maxtext" | "tokamax"
    peer_name: str
    goal: float | None  # how many times as fast as the peer, at least
    peer_op: str = ""  # defaults to op
    B: int = 2
    T: int = 2048
    slow: bool = False  # the peer takes seconds: one round
    temp_goal: float | None = None  # temporary memory, at most this part of the peer's

    @property
    def tag(self) -> str:
        base = self.op.removesuffix("_gate")
        return TAGS.get(base, base)

    @property
    def title(self) -> str:
        names = MEMORY | {"attention": "causal attention", "window": f"window attention ({WINDOW})", "kda_gate": "KDA"}
        shape = "" if self.T == 2048 else f", B {self.B}, T {self.T:,}"
        return f"{names[self.op]} {self.mode}{shape}"


FLA = "fla chunk, torch"
PAIRS = (
    Pair("linear", "fwd", "torch", FLA, 2.5),
    Pair("linear", "fwd+bwd", "torch", FLA, 2.0),
    Pair("scalar", "fwd", "torch", FLA, 1.2),
    Pair("scalar", "fwd+bwd", "torch", FLA, 2.5),
    Pair("channel", "fwd", "torch", "own chunk, torch", 4.0),
    Pair("channel", "fwd+bwd", "torch", "own chunk, torch", None),
    Pair("channel", "fwd+bwd", "torch", "fla recurrent, torch", 30.0, peer_op="channel_recurrent", slow=True),
    Pair("gated_delta", "fwd", "torch", FLA, 1.6),
    Pair("gated_delta", "fwd+bwd", "torch", FLA, 4.0),
    Pair("gated_delta", "fwd+bwd", "maxtext", "MaxText, XLA", 1.2, temp_goal=0.35),
    Pair("gated_delta", "fwd+bwd", "maxtext", "MaxText, XLA", 1.5, B=1, T=16384, temp_goal=0.35),
    Pair("kda_gate", "fwd", "tokamax", "tokamax, XLA", None),
    Pair("kda_gate", "fwd+bwd", "tokamax", "tokamax, XLA", 1.5),
    Pair("attention", "fwd", "torch", "SDPA, torch", 1.3),
    Pair("attention", "fwd+bwd", "torch", "SDPA, torch", 0.7),
    Pair("window", "fwd", "torch", "SDPA with mask, torch", 1.3),
    Pair("window", "fwd+bwd", "torch", "SDPA with mask, torch", 0.7),
)
EXPONENT_GOAL = 1.10
TEMP_GOAL = 1.5  # temporary memory of fwd+bwd, at most this many times inputs + outputs + gradients


def write_inputs(op: str, B: int, T: int, folder: Path, H: int = H, D: int = D) -> str:
    """Inputs of an op and the cotangent of its output, in a file that every contestant reads."""
    path = folder / f"{op}-{B}-{T}-{H}-{D}.npz"
    if path.exists():
        return str(path)
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    def log_sigmoid(x: np.ndarray) -> np.ndarray:
        return -np.logaddexp(np.float32(0), -x)

    q, k, v = normal(B, T, H, D), normal(B, T, H, D), normal(B, T, H, D)
    arrays: dict[str, Any] = {"q": q if op in ("attention", "window") else q * np.float32(D**-0.5), "k": k, "v": v}
    if op in ("delta", "gated_delta", "kda", "kda_gate"):
        arrays["k"] = k / np.linalg.norm(k, axis=-1, keepdims=True)
        arrays["beta"] = np.exp(log_sigmoid(normal(B, T, H)))
    # decays mild enough that a chunk sees the chunks before it: else the gate would not test the state
    if op in ("scalar", "gated_delta"):
        arrays["log_decay"] = log_sigmoid(normal(B, T, H)) / 16
    if op in ("channel", "kda"):
        arrays["log_decay"] = log_sigmoid(normal(B, T, H, D)) / 16
    if op == "kda_gate":
        arrays["gate"] = normal(B, T, H, D) - 4
    np.savez(path, **arrays, cotangent=normal(B, T, H, D))
    return str(path)
