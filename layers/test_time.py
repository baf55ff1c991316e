"""Test-time memory, any kind: a small network in each head that learns to answer keys with values as tokens pass.

Four choices make one (Miras, arXiv 2504.13173): the network, the loss it descends, what it retains, and how a step is
taken. Titans (2501.00663; layers/titans.py), Moneta, Yaad and Memora (layers/miras.py) are names for some of them; a
new one is a line in a config:

    TestTimeMemory(loss="huber_norm", retention="elastic", scale=0.01, chunk=32)
"""

import dataclasses
import functools
import math
import warnings
from typing import Any, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from layers.conv import ShortConvs, Tails, check_taps
from layers.heads import head_size
from layers.layer import Einsum, LayerConfig, Out, above_zero, one_of, positive
from layers.norm import RMSNorm, l2_norm
from layers.ops import fast_weights as fw
from layers.ops.precision import wide
from layers.ops.test_time import (
    Gate,
    Implementation,
    Rule,
    State,
    Weights,
    first_state,
    recall,
    rows,
    test_time_memory,
)
from layers.recurrent import LowRank, Maps, Recurrent

Loss = Literal["l2", "dot", "huber_norm", "huber_coord", "huber_mix", "lp"]
Retention = Literal["decay", "kl", "bounded", "lq_printed", "lq_mirror", "elastic"]
Gates = Literal["matrix", "head", "output"]
BLOCK = 128
KEEP = 5.0  # logit of keep at the start: 0.7% is forgotten at a token


class Unstable(UserWarning):
    """A chunk's steps add up to more than a repeated key bears."""


@dataclasses.dataclass(frozen=True)
class TestTimeMemory(LayerConfig):
    """y = RMSNorm(memory(q)) ∘ silu(x W_gate), through W_out; the memory's weights are the state.

    H: heads, each with a network. K: width of a head, for keys, queries and values alike; None = D / H.
    memory: "mlp" of `depth` matrices (1: linear) of hidden width F (None = 4 K), or "swiglu".
    norm: the memory answers x + LayerNorm(network(x)) instead of network(x).
    loss: "l2", "dot", "huber_norm", "huber_coord", "huber_mix" (their threshold is read from the token) or "lp".
    power: p of "lp".
    error_max: "lp" takes a step of the printed slope where no channel of a token's error is larger; else one shorter by
        (error / error_max)^(power - 2). The slope then grows no faster than the error, and what lr_max bears does not
        depend on it. None: the printed slope whatever the error, which makes memories chaotic once values have grown.
    retention: "decay" (the weights themselves fade), or a map from what fades to the weights: "kl", "bounded" (both
        with `scale`), "lq_printed", "lq_mirror" (with `power_q`) or "elastic" (with `scale`).
    momentum, keep: whether steps have momentum, and whether weights fade; both are read from the token.
    step: "plain", or "orthogonal": what is applied is S with its singular values set to about 1. Give it several times
        as many tokens as a matrix has rows: of directions that they do not span it makes steps of rounding errors.
    gates: one "matrix" each, one a "head", or one for each "output" channel of each matrix (of rank `rank`).
    chunk: tokens whose gradients are taken at the weights with which their chunk began. It belongs to the model: train
        and serve with the same. 1 is online gradient descent, exactly; more is another function, and many times faster.
    exact: every gradient is taken at the weights of the token before, at full speed: of a memory of one matrix without
        norm, loss "l2" or "dot", plain steps and decay, one gate a head. `chunk` is then how the work is cut, no more.
    update: "chunk": one step for all tokens of a chunk, taken when the next one begins; they read the weights from
        before (LaCT, arXiv 2505.23884, with chunks of thousands of tokens). Nothing fades: say keep=False, and maybe
        `renorm`: the weights into each unit keep the length with which the document began.
    grad_at: with `exact`, whether those weights have faded first ("decayed", as in the gated delta rule) or not yet.
    lr_max, momentum_max: bounds of the gates. lr_max None: (1 - momentum_max) / chunk, half of what a key repeated
        through a chunk bears (for "lp", whose slope is steeper, over power · (power - 1) · error_max^(power - 2)); 1
        with `exact`.
    read: the memory answers after ("post") or before ("pre") the token is learned.
    persistent: learned tokens that each document's memory has read before its first token.
    conv: width of the short convolution on query, key and value; 0: none. gate: the output gate.
    implementation: as in layers.ops.test_time.

    Where the papers are silent: gates are sigmoids, of a logit that starts at 0, for keep at 5; the initial weights are
    learned, and start where a step of 1 moves an answer by about its error; convolution, then SiLU, then unit queries
    and keys.
    """

    H: int = 4
    K: int | None = None
    F: int | None = None
    memory: Literal["mlp", "swiglu"] = "mlp"
    depth: int = 2
    norm: bool = True
    loss: Loss = "l2"
    power: float = 3.0
    error_max: float | None = 1.0
    retention: Retention = "decay"
    power_q: float = 4.0
    scale: float = 1.0
    momentum: bool = True
    keep: bool = True
    step: Literal["plain", "orthogonal"] = "plain"
    gates: Gates = "matrix"
    rank: int = 32
    chunk: int = 16
    update: Literal["token", "chunk"] = "token"
    renorm: bool = False
    exact: bool = False
    grad_at: Literal["undecayed", "decayed"] = "undecayed"
    lr_max: float | None = None
    momentum_max: float = 0.9
    read: Literal["post", "pre"] = "post"
    persistent: int = 0
    conv: int = 4
    gate: bool = True
    implementation: Implementation = "auto"

    def __post_init__(self):
        positive(self, "H", "K", "F", "depth", "rank", "chunk")
        one_of(self)
        check_taps(self)
        name = type(self).__name__
        if self.persistent < 0:
            raise ValueError(f"{name}.persistent is {self.persistent}: it must be at least 0")
        if not 0 < self.momentum_max < 1:
            raise ValueError(f"{name}.momentum_max is {self.momentum_max}: it must lie between 0 and 1")
        above_zero(self, "lr_max", "error_max")
        if self.exact:
            needs = {"memory": "mlp", "depth": 1, "norm": False, "retention": "decay", "step": "plain"}
            for field, value in needs.items():
                if getattr(self, field) != value:
                    raise ValueError(f"{name}.exact needs {field} = {value!r}, not {getattr(self, field)!r}")
            if self.loss not in ("l2", "dot") or self.gates == "output":
                raise ValueError(f"{name}.exact needs loss 'l2' or 'dot', and gates 'matrix' or 'head'")
        elif self.grad_at == "decayed":
            raise ValueError(f"{name}.grad_at is 'decayed', which needs exact = True")
        if self.update == "chunk":
            for field, value in {"exact": False, "keep": False, "retention": "decay"}.items():
                if getattr(self, field) != value:
                    raise ValueError(f"{name}.update = 'chunk' needs {field} = {value!r}, not {getattr(self, field)!r}")
        elif self.renorm:
            raise ValueError(f"{name}.renorm is True, which needs update = 'chunk'")
        span = 1 if self.exact else self.chunk
        load = span * self.largest_step * self._curvature / (1 - (self.momentum_max if self.momentum else 0))
        said = " · power · (power - 1)" if self.loss == "lp" else ""
        said += " · error_max^(power - 2)" if said and self.error_max not in (None, 1) else ""
        if load > 2 and span > 1:
            warnings.warn(
                f"{name}: chunk · lr_max{said} / (1 - momentum_max) is {load:.3g}: above 2 a key repeated through a "
                f"chunk makes the memory diverge. Lower lr_max ({2 * self.largest_step / load:.3g} is safe), or the "
                "chunk.",
                Unstable,
                stacklevel=3,
            )

    @property
    def largest_step(self) -> float:
        if self.lr_max is not None:
            return self.lr_max
        if self.exact:
            return 1.0
        return (1 - (self.momentum_max if self.momentum else 0)) / self.chunk / self._curvature

    @property
    def _curvature(self) -> float:
        """Of the loss at most; of "lp" as printed, which knows no most, for errors of about 1."""
        if self.loss != "lp":
            return 1.0
        return max(1.0, self.power * (self.power - 1) * (self.error_max or 1.0) ** max(self.power - 2, 0.0))

    def build(self, D: int, *, rngs: nnx.Rngs) -> "TestTimeLayer":
        return TestTimeLayer(self, D, rngs=rngs)

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        return (
            cls(H=2, K=8, F=6, chunk=4),
            cls(H=2, K=8, chunk=4, depth=1, loss="huber_norm", retention="bounded", gates="output", rank=4, read="pre"),
            cls(H=2, K=8, F=6, chunk=4, persistent=3, gates="head"),
            cls(H=2, K=8, F=6, chunk=32, update="chunk", keep=False, memory="swiglu", step="orthogonal", renorm=True),
            cls(H=2, K=8, chunk=16, exact=True, depth=1, norm=False, persistent=2),
        )


class TestTimeState(NamedTuple):
    """learner: weights and what learning carries, float32 (layers.ops.memory_forms). tails: of the convolutions."""

    learner: State
    tails: Tails


def fresh(rule: Rule, start: tuple[Weights, Weights | None], B: int, tails: Tails) -> TestTimeState:
    """The state with which B documents begin; start: weights and momentum, [H, inputs, outputs] each."""
    start = jax.tree.map(lambda w: w.astype(jnp.float32), start)
    return TestTimeState(first_state(rule, *rows(jnp.ones(B, bool), start)), tails)


def answer_norm(H: int, K: int) -> nnx.Dict:
    """Scale and shift of the layer norm that ends a memory, its `outer`."""
    return nnx.Dict(
        {
            "scale": nnx.Param(jnp.ones([H, K], jnp.float32), axes="HV", decay=False),
            "shift": nnx.Param(jnp.zeros([H, K], jnp.float32), axes="HV", decay=False),
        }
    )


class TestTimeLayer(Recurrent):
    def __init__(self, config: TestTimeMemory, D: int, *, rngs: nnx.Rngs):
        c, H, K = config, config.H, head_size(config, "K", D)
        self.config, self.K = config, K
        self.sizes = fw.sizes(c.memory, K, K, c.F or 4 * K, c.depth)
        linear = functools.partial(Einsum, D=D, H=H, K=K, V=K, rngs=rngs)
        self.query = linear("BTD,DHK->BTHK")
        key, value = linear("BTD,DHK->BTHK"), linear("BTD,DHV->BTHV")
        self.convs = ShortConvs("HK", "HK", "HV", taps=c.conv, activation=jax.nn.silu, H=H, K=K, V=K, rngs=rngs)
        self.widths = {"head": [1], "matrix": [1] * len(self.sizes), "output": [b for _, b in self.sizes.values()]}[
            c.gates
        ]
        M, low = sum(self.widths), c.gates == "output"
        narrow = Einsum("BTD,DR->BTR", D=D, R=c.rank, rngs=rngs) if low else None
        gate = functools.partial(
            Einsum, "BTR,RHM->BTHM" if low else "BTD,DHM->BTHM", D=D, R=c.rank, H=H, M=M, bias=True, rngs=rngs
        )
        wanted = {"lr": True, "keep": c.keep, "momentum": c.momentum}
        gates = Maps(**{name: gate() for name, is_wanted in wanted.items() if is_wanted})
        maps = {"key": key, "value": value, "gates": gates if narrow is None else LowRank(narrow, gates)}
        if c.loss.startswith("huber"):
            maps["threshold"] = Einsum("BTD,DH->BTH", D=D, H=H, bias=True, rngs=rngs)
        self.written = Maps(**maps)
        self.start = nnx.Dict(
            {
                name: nnx.Param(
                    jax.random.normal(rngs.params(), [H, a, b], jnp.float32) * self._spread(name),
                    axes=f"H{'K' if name in ('w0', 'gate', 'up') else 'F'}{'V' if i == len(self.sizes) - 1 else 'F'}",
                    decay=False,
                )
                for i, (name, (a, b)) in enumerate(self.sizes.items())
            }
        )
        self.outer = answer_norm(H, K) if c.norm else nnx.Dict({})
        P = c.persistent
        self.persistent = nnx.Param(jax.random.normal(rngs.params(), [P, D], jnp.float32), axes="SD") if P else None
        self.gate = linear("BTD,DHV->BTHV") if c.gate else None
        self.norm = RMSNorm(K, axes="V")
        self.out = linear("BTHV,HVD->BTD", residual=True)
        self.rule = rule_of(config)

    def _spread(self, name: str) -> float:
        """Standard deviation of an initial matrix, such that a step of 1 moves an answer by about the error.

        Keys are of unit length. Under a layer norm a step moves the answer by 1 / variance of the last matrix, and of
        the first: 1 for both. Without, it moves it by the squared length of what the last matrix reads, and the mean
        square gain of those behind the first: both small for 1 / F, and for a linear memory any will do.
        """
        c, hidden = self.config, self.sizes[next(iter(self.sizes))][1]
        if c.norm or c.retention == "kl":
            return 1.0
        return hidden**-0.25 if name in ("gate", "up") else hidden**-0.5

    def init_state(self, B: int, T: int) -> TestTimeState:
        """The memory with which a document starts."""
        return fresh(self.rule, self.begin(jnp.dtype(jnp.float32)), B, self.convs.init_tails(B))

    def learn(self, x_BTD: Array, pos_BT: Array, state: TestTimeState | None = None, chunks: int | None = None) -> Out:
        """The call itself, for layers around this one. chunks: how many a row holds at most, if that is known."""
        y, state, aux = self.run(self.query(x_BTD), self.written(x_BTD), pos_BT, state, chunks)
        return Out(self.finish(y, x_BTD), state, aux)

    def finish(self, y_BTHV: Array, x_BTD: Array) -> Array:
        return self.out(self.norm(y_BTHV, None if self.gate is None else self.gate(x_BTD)))

    def run(
        self,
        q: Array,
        written: dict[str, Any],
        pos_BT: Array,
        state: TestTimeState | None = None,
        chunks: int | None = None,
    ) -> tuple[Array, TestTimeState | None, dict[str, Array]]:
        learner, tails = (None, None) if state is None else state
        dtype = wide(q)
        if state is None or self.persistent is None:
            start = self.begin(dtype)
        else:  # a piece in which no document begins, such as a token that is decoded, need not read the persistent ones
            start = jax.lax.cond(jnp.any(pos_BT == 0), lambda: self.begin(dtype), lambda: self._blank(dtype))
        y, after, tails, said = self._learn(q, written, pos_BT, learner, tails, start, chunks=chunks)
        return y, None if after is None else TestTimeState(after, tails), said

    def recall(self, q_BTHK: Array, weights: Weights) -> Array:
        """What a memory of `weights` [B, H, inputs, outputs] answers to queries, made of unit length; y_BTHV."""
        dtype = next(iter(weights.values())).dtype
        outer = {name: p[...].astype(dtype) for name, p in self.outer.items()}
        return recall(self.rule, l2_norm(q_BTHK), weights, outer).astype(q_BTHK.dtype)

    def begin(self, dtype: jnp.dtype) -> tuple[Weights, Weights | None]:
        """Weights and momentum at a document's start: the initial ones, after the persistent tokens."""
        weights, momentum = self._blank(dtype)
        if self.persistent is None:
            return weights, momentum
        x_BTD = self.persistent[...].astype(dtype)[None]
        pos_BT = jnp.arange(x_BTD.shape[1], dtype=jnp.int32)[None]
        q, written = self.query(x_BTD), self.written(x_BTD)
        _, after, _, _ = self._learn(q, written, pos_BT, None, None, (weights, momentum), True)
        assert after is not None
        return jax.tree.map(lambda w: w[0], (after.weights, after.momentum))

    def _blank(self, dtype: jnp.dtype) -> tuple[Weights, Weights | None]:
        weights = {name: w[...].astype(dtype) for name, w in self.start.items()}
        return weights, jax.tree.map(jnp.zeros_like, weights) if self.config.momentum else None

    def _learn(
        self,
        q: Array,
        written: dict[str, Any],
        pos_BT: Array,
        learner: State | None,
        tails: Tails | None,
        start: tuple[Weights, Weights | None],
        wanted: bool = False,
        chunks: int | None = None,
    ) -> tuple[Array, State | None, Tails, dict[str, Array]]:
        c, dtype = self.config, wide(q)
        logits = {name: logit.astype(dtype) for name, logit in written["gates"].items()}
        lr = c.largest_step * jax.nn.sigmoid(logits["lr"])
        keep = jax.nn.log_sigmoid(logits["keep"] + KEEP) if c.keep else None
        momentum = jax.nn.log_sigmoid(logits["momentum"]) + math.log(c.momentum_max) if c.momentum else None
        threshold = None
        if "threshold" in written:
            threshold = jax.nn.softplus(written["threshold"].astype(dtype))[..., None]
        (q, k, v), tails = self.convs((q, written["key"], written["value"]), pos_BT, tails)
        outer = {name: p[...].astype(dtype) for name, p in self.outer.items()}
        y, after = test_time_memory(
            self.rule,
            l2_norm(q),
            l2_norm(k),
            v,
            self._gates(lr, keep, momentum),
            start,
            outer,
            threshold=threshold,
            state=learner,
            pos=pos_BT,
            implementation=c.implementation,
            wanted=wanted or learner is not None,
            chunks=chunks,
        )
        said = {"lr": lr, "keep": None if keep is None else jnp.exp(keep)}
        said |= {"momentum": None if momentum is None else jnp.exp(momentum)}
        return y, after, tails, {n: jnp.mean(a).astype(jnp.float32) for n, a in said.items() if a is not None}

    def _gates(self, lr: Array, keep: Array | None, momentum: Array | None) -> dict[str, Gate]:
        """[B, T, H, M] each -> by matrix."""
        gates, at = {}, 0
        widths = self.widths * len(self.sizes) if self.config.gates == "head" else self.widths
        for name, width in zip(self.sizes, widths, strict=True):
            part = slice(at, at + width)
            keep_, momentum_ = (None if a is None else a[..., part] for a in (keep, momentum))
            gates[name] = Gate(lr[..., part], keep_, momentum_)
            at += 0 if self.config.gates == "head" else width
        return gates


def rule_of(config: TestTimeMemory) -> Rule:
    """What the words of a config stand for."""
    c = config
    slopes: dict[str, Any] = {"lp": functools.partial(fw.lp, c.power, largest=c.error_max)} | {
        name: getattr(fw, name) for name in ("l2", "dot", "huber_norm", "huber_coord", "huber_mix")
    }
    retentions = {
        "decay": None,
        "kl": functools.partial(fw.kl, c.scale),
        "bounded": functools.partial(fw.bounded, c.scale),
        "lq_printed": functools.partial(fw.lq_printed, c.power_q),
        "lq_mirror": functools.partial(fw.lq_mirror, c.power_q),
        "elastic": functools.partial(fw.elastic, c.scale),
    }
    step = fw.newton_schulz if c.step == "orthogonal" else None
    network = fw.network(c.memory, c.depth)
    exact: Any = c.loss if c.exact else None
    whole = c.chunk if c.update == "chunk" else None
    # How the work is cut where that changes nothing: C by C tables, and tokens laid out by C, are best kept small.
    chunk = c.chunk if whole is None else max(n for n in range(1, min(whole, BLOCK) + 1) if whole % n == 0)
    return Rule(
        network,
        slopes[c.loss],
        retentions[c.retention],
        step,
        chunk,
        c.read,
        exact=exact,
        decayed=c.grad_at == "decayed",
        whole=whole,
        renorm=c.renorm,
    )
