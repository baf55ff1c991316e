"""A healthy layer, and twins of it that are each broken in one place: a law that a broken layer passes is no law.

They live here and not in layers/, so that `layers.discover()` never finds them.
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from layers.layer import Einsum, Layer, LayerConfig, Out, Tokens

H, K, TAIL = 2, 8, 2


@dataclasses.dataclass(frozen=True)
class Healthy(LayerConfig):
    """Gated linear attention behind a short convolution, as one scan over tokens."""

    chunk: int = 16
    implementation: str = "auto"
    layer: ClassVar[Any]

    def build(self, D: int, *, rngs: nnx.Rngs) -> "HealthyLayer":
        return type(self).layer(self, D, rngs=rngs)


class State(NamedTuple):
    """tail_BXD: the last inputs of the convolution. memory_BHKV: sum of key value^T, decayed."""

    tail_BXD: Array
    memory_BHKV: Array


class HealthyLayer(Layer):
    def __init__(self, config: Healthy, D: int, *, rngs: nnx.Rngs):
        self.config = config
        self.D = D
        self.filter = nnx.Param(jax.random.normal(rngs.params(), (TAIL + 1, D)) * (TAIL + 1) ** -0.5, axes="XD")
        self.query = Einsum("BTD,DHK->BTHK", D=D, H=H, K=K, rngs=rngs)
        self.key = Einsum("BTD,DHK->BTHK", D=D, H=H, K=K, scale=K**-0.5, rngs=rngs)
        self.value = Einsum("BTD,DHV->BTHV", D=D, H=H, V=K, rngs=rngs)
        self.gate = Einsum("BTD,DH->BTH", D=D, H=H, bias=True, rngs=rngs)
        self.out = Einsum("BTHV,HVD->BTD", H=H, V=K, D=D, rngs=rngs, residual=True)

    def init_state(self, B: int, T: int) -> Any:
        return State(jnp.zeros((B, TAIL, self.D)), jnp.zeros((B, H, K, K)))

    def forgets(self, pos_B: Array) -> Array:
        return pos_B == 0

    def keeps(self, pos_B: Array) -> Array:
        """Rows whose token is padding: the memory stays as it was."""
        return pos_B < 0

    def convolve(self, x_BTD: Array, pos_BT: Array, tail_BXD: Array) -> tuple[Array, Array]:
        w_XD = self.filter[...].astype(tail_BXD.dtype)

        def step(tail_BXD: Array, token: tuple[Array, Array]) -> tuple[Array, Array]:
            x_BD, pos_B = token
            tail_BXD = jnp.where(self.forgets(pos_B)[:, None, None], 0, tail_BXD)
            span_BXD = jnp.concatenate([tail_BXD, x_BD[:, None]], axis=1)
            kept_BXD = jnp.where(self.keeps(pos_B)[:, None, None], tail_BXD, span_BXD[:, 1:])
            return kept_BXD, jnp.einsum("BXD,XD->BD", span_BXD, w_XD)

        # Not in bfloat16: on a CPU XLA widens the whole of a scanned bfloat16 array at every step, T² work.
        tail_BXD, y_TBD = jax.lax.scan(step, tail_BXD, (x_BTD.swapaxes(0, 1).astype(tail_BXD.dtype), pos_BT.T))
        return jax.nn.silu(y_TBD.swapaxes(0, 1)).astype(x_BTD.dtype), tail_BXD

    def recur(self, q: Array, k: Array, v: Array, keep_BTH: Array, pos_BT: Array, memory: Array) -> tuple[Array, Array]:
        def step(memory: Array, token: tuple[Array, ...]) -> tuple[Array, Array]:
            q_BHK, k_BHK, v_BHV, keep_BH, pos_B = token
            old = jnp.where(self.forgets(pos_B)[:, None, None, None], 0, memory)
            new = keep_BH[..., None, None] * old + k_BHK[..., :, None] * v_BHV[..., None, :]
            y_BHV = jnp.einsum("BHK,BHKV->BHV", q_BHK, new)
            return jnp.where(self.keeps(pos_B)[:, None, None, None], old, new).astype(memory.dtype), y_BHV

        tokens = [a.swapaxes(0, 1).astype(memory.dtype) for a in (q, k, v, keep_BTH)]
        memory, y_TBHV = jax.lax.scan(step, memory, (*tokens, pos_BT.T))
        return y_TBHV.swapaxes(0, 1).astype(v.dtype), memory

    def __call__(self, x_BTD: Array, tokens: Tokens, state: Any = None) -> Out:
        start = state
        if state is None:
            precise = jnp.float64 if x_BTD.dtype == jnp.float64 else jnp.float32
            start = jax.tree.map(lambda a: a.astype(precise), self.init_state(*x_BTD.shape[:2]))
        u_BTD, tail_BXD = self.convolve(x_BTD, tokens.pos_BT, start.tail_BXD)
        keep_BTH = jax.nn.sigmoid(self.gate(u_BTD))
        q, k, v = self.query(u_BTD), self.key(u_BTD), self.value(u_BTD)
        y_BTHV, memory = self.recur(q, k, v, keep_BTH, tokens.pos_BT, start.memory_BHKV)
        end = self.hand_back(start, State(tail_BXD, memory))
        return Out(self.out(y_BTHV), None if state is None else end)

    def hand_back(self, start: State, end: State) -> Any:
        return end


Healthy.layer = HealthyLayer
BROKEN: dict[Healthy, tuple[str, ...]] = {}


def fails(*laws: str, chunk: int = 16) -> Any:
    """Turns a layer into a config that builds it, on the list of those that must fail `laws`."""

    def register(layer: type[HealthyLayer]) -> type[HealthyLayer]:
        config = type(layer.__name__, (Healthy,), {"layer": layer, "__doc__": layer.__doc__})
        BROKEN[config(chunk=chunk)] = laws
        return layer

    return register


@fails("a_document_forgets")
class RemembersAcrossDocuments(HealthyLayer):
    """The memory is not masked at a document's start."""

    def forgets(self, pos_B: Array) -> Array:
        return jnp.zeros_like(pos_B, bool)


@fails("a_document_forgets")
class TailCrossesDocuments(HealthyLayer):
    """The memory forgets, the convolution does not."""

    def convolve(self, x_BTD: Array, pos_BT: Array, tail_BXD: Array) -> tuple[Array, Array]:
        return super().convolve(x_BTD, jnp.where(pos_BT == 0, 1, pos_BT), tail_BXD)


@fails("causal", "any_cut_of_time")
class SeesOneAhead(HealthyLayer):
    """The causal mask is off by one: a token is mixed with the next."""

    def convolve(self, x_BTD: Array, pos_BT: Array, tail_BXD: Array) -> tuple[Array, Array]:
        ahead_BTD = jnp.concatenate([x_BTD[:, 1:], x_BTD[:, -1:]], axis=1)
        return super().convolve(x_BTD + ahead_BTD / 4, pos_BT, tail_BXD)


@fails("causal")
class BlindToItself(HealthyLayer):
    """Off by one the other way: the diagonal is dead, though every cut of time agrees."""

    def convolve(self, x_BTD: Array, pos_BT: Array, tail_BXD: Array) -> tuple[Array, Array]:
        self_BTD = jax.nn.silu(x_BTD * self.filter[...].astype(x_BTD.dtype)[None, -1:])
        y_BTD, tail_BXD = super().convolve(x_BTD, pos_BT, tail_BXD)
        return y_BTD - self_BTD + jax.lax.stop_gradient(self_BTD), tail_BXD


@fails("any_cut_of_time")
class HandsBackStaleState(HealthyLayer):
    """The state that came is the state that goes."""

    def hand_back(self, start: State, end: State) -> Any:
        return start


@fails("any_cut_of_time")
class DropsTail(HealthyLayer):
    """The convolution starts each piece from zeros."""

    def hand_back(self, start: State, end: State) -> Any:
        return end._replace(tail_BXD=jnp.zeros_like(end.tail_BXD))


@fails("any_cut_of_time")
class GatesOneStepLate(HealthyLayer):
    """Each token decays by its predecessor's gate; the first of a piece, having none, by nothing."""

    def recur(self, q: Array, k: Array, v: Array, keep_BTH: Array, pos_BT: Array, memory: Array) -> tuple[Array, Array]:
        late_BTH = jnp.concatenate([jnp.ones_like(keep_BTH[:, :1]), keep_BTH[:, :-1]], axis=1)
        return super().recur(q, k, v, late_BTH, pos_BT, memory)


@fails("any_cut_of_time")
class RightOnTheGridOnly(HealthyLayer):
    """Pieces of whole chunks, and single tokens, are right; a ragged piece ends as if its last token were not there."""

    def recur(self, q: Array, k: Array, v: Array, keep_BTH: Array, pos_BT: Array, memory: Array) -> tuple[Array, Array]:
        y_BTHV, end = super().recur(q, k, v, keep_BTH, pos_BT, memory)
        ragged = q.shape[1] % self.config.chunk
        if 1 < ragged < self.config.chunk // 2:
            s = slice(-1)
            _, end = super().recur(q[:, s], k[:, s], v[:, s], keep_BTH[:, s], pos_BT[:, s], memory)
        return y_BTHV, end


@fails("state_keeps_its_shape")
class StateChangesDtype(HealthyLayer):
    """The memory comes back in the dtype of the stream."""

    def __call__(self, x_BTD: Array, tokens: Tokens, state: Any = None) -> Out:
        out = super().__call__(x_BTD, tokens, state)
        return out._replace(state=jax.tree.map(lambda a: a.astype(x_BTD.dtype), out.state))


@fails("state_keeps_its_shape")
class StateGrowsInSteps(HealthyLayer):
    """A buffer whose size is neither constant nor linear in T."""

    def init_state(self, B: int, T: int) -> Any:
        state = super().init_state(B, T)
        return state if T < 2000 else state._replace(memory_BHKV=jnp.zeros((B, H, K, K * 2)))


@fails("causal", "any_cut_of_time")
class MixesRows(HealthyLayer):
    """The stream is centred by the mean over the batch and over time."""

    def convolve(self, x_BTD: Array, pos_BT: Array, tail_BXD: Array) -> tuple[Array, Array]:
        return super().convolve(x_BTD - x_BTD.mean((0, 1), keepdims=True), pos_BT, tail_BXD)


@fails("causal", "a_mesh_changes_nothing")
class MixesRowsInstant(HealthyLayer):
    """Each row sees its neighbour in the batch, at the same instant; no cut of time shows it."""

    def convolve(self, x_BTD: Array, pos_BT: Array, tail_BXD: Array) -> tuple[Array, Array]:
        return super().convolve(x_BTD + jnp.roll(x_BTD, 1, axis=0) / 4, pos_BT, tail_BXD)


@fails("padding_changes_nothing")
class PaddingMovesTheState(HealthyLayer):
    """Padding is written to the memory like any token."""

    def keeps(self, pos_B: Array) -> Array:
        return jnp.zeros_like(pos_B, bool)


@fails("padding_changes_nothing")
class PaddingDecaysTheState(HealthyLayer):
    """Padding writes nothing, but its gate still applies."""

    def recur(self, q: Array, k: Array, v: Array, keep_BTH: Array, pos_BT: Array, memory: Array) -> tuple[Array, Array]:
        k = jnp.where(pos_BT[..., None, None] < 0, 0, k)
        return super().recur(q, k, v, keep_BTH, jnp.where(pos_BT < 0, 1, pos_BT), memory)


@fails("finite_gradients")
class GradientThroughMaskedExp(HealthyLayer):
    """where(small, exp(x), x): right forward, inf * 0 backward."""

    def convolve(self, x_BTD: Array, pos_BT: Array, tail_BXD: Array) -> tuple[Array, Array]:
        y_BTD = x_BTD.astype(tail_BXD.dtype)
        y_BTD = jnp.where(y_BTD < 1, jnp.exp(y_BTD), y_BTD)
        return super().convolve(y_BTD.astype(x_BTD.dtype), pos_BT, tail_BXD)


@fails("finite_gradients")
class NormWithoutEpsilon(HealthyLayer):
    """A norm of zeros has no gradient."""

    def convolve(self, x_BTD: Array, pos_BT: Array, tail_BXD: Array) -> tuple[Array, Array]:
        size_BT1 = jnp.maximum(jnp.linalg.norm(x_BTD, axis=-1, keepdims=True), jnp.asarray(1e-3, x_BTD.dtype))
        return super().convolve(x_BTD / size_BT1 * 8, pos_BT, tail_BXD)


@fails("implementations_agree")
class ForgetsTheGradient(HealthyLayer):
    """The fast path is right forward but drops the gradient through the memory of earlier pieces."""

    def recur(self, q: Array, k: Array, v: Array, keep_BTH: Array, pos_BT: Array, memory: Array) -> tuple[Array, Array]:
        if self.config.implementation == "naive":
            return super().recur(q, k, v, keep_BTH, pos_BT, memory)
        s = slice(1)
        y_first, memory = super().recur(q[:, s], k[:, s], v[:, s], keep_BTH[:, s], pos_BT[:, s], memory)
        s, memory = slice(1, None), jax.lax.stop_gradient(memory)
        y_rest, memory = super().recur(q[:, s], k[:, s], v[:, s], keep_BTH[:, s], pos_BT[:, s], memory)
        return jnp.concatenate([y_first, y_rest], axis=1), memory


@fails("transforms_change_nothing")
class HoldsIntegers(HealthyLayer):
    """An integer constant among the leaves: no gradient can be taken."""

    def __init__(self, config: Healthy, D: int, *, rngs: nnx.Rngs):
        super().__init__(config, D, rngs=rngs)
        self.taps = nnx.Param(jnp.arange(TAIL + 1))


@fails("transforms_change_nothing")
class FollowsTheTransform(HealthyLayer):
    """Looks at how it is being traced: under vmap it reads its own weights otherwise."""

    def convolve(self, x_BTD: Array, pos_BT: Array, tail_BXD: Array) -> tuple[Array, Array]:
        batched = "Batch" in type(self.filter[...]).__name__
        return super().convolve(x_BTD * 2 if batched else x_BTD, pos_BT, tail_BXD)


@fails("a_mesh_changes_nothing")
class SortsTheBatch(HealthyLayer):
    """Right in every value, but all tokens of all rows pass through one sorted queue: a mesh has to gather them."""

    def convolve(self, x_BTD: Array, pos_BT: Array, tail_BXD: Array) -> tuple[Array, Array]:
        u_BTD, tail_BXD = super().convolve(x_BTD, pos_BT, tail_BXD)
        queue = u_BTD.reshape(-1, self.D)
        order = jnp.argsort(queue[:, 0])
        served = jnp.zeros_like(queue).at[order].set(jax.nn.silu(queue[order]))
        return served.reshape(u_BTD.shape), tail_BXD


@fails("bfloat16_stays_close", chunk=64)
class SumsDecaysInHalfPrecision(HealthyLayer):
    """Each decay is a difference of running sums, and the sums are as precise as the stream."""

    def recur(self, q: Array, k: Array, v: Array, keep_BTH: Array, pos_BT: Array, memory: Array) -> tuple[Array, Array]:
        sum_BTH = jnp.cumsum(jnp.log(keep_BTH), axis=1)
        if v.dtype == jnp.bfloat16:  # said out loud, since XLA may keep more bits than the dtype has
            sum_BTH = jax.lax.reduce_precision(sum_BTH, exponent_bits=8, mantissa_bits=7)
        keep_BTH = jnp.exp(jnp.diff(sum_BTH, axis=1, prepend=jnp.zeros_like(sum_BTH[:, :1])))
        return super().recur(q, k, v, keep_BTH, pos_BT, memory)


@fails("initial_output_in_band")
class ForgetsItsFanIn(HealthyLayer):
    """Weights of unit variance, whatever they sum over."""

    def __init__(self, config: Healthy, D: int, *, rngs: nnx.Rngs):
        super().__init__(config, D, rngs=rngs)
        self.value = Einsum("BTD,DHV->BTHV", D=D, H=H, V=K, scale=D**0.5, rngs=rngs)
        self.out = Einsum("BTHV,HVD->BTD", H=H, V=K, D=D, scale=(H * K) ** 0.5, rngs=rngs, residual=True)


@fails("a_place_reads_as_in_the_whole")
class ReadsTheNextPlace(HealthyLayer):
    """Right as a whole; asked at places, it answers for the token after each."""

    def read(self, x_BTD: Array, tokens: Tokens, at_BN: Array) -> Out:
        return super().read(x_BTD, tokens, jnp.minimum(at_BN + 1, x_BTD.shape[1] - 1))


@fails("a_place_reads_as_in_the_whole")
class SaysItIsPointwise(HealthyLayer):
    """A memory that claims to read each token by itself."""

    pointwise = True
