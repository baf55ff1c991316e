"""Contestants on a GPU: `ours`, and `torch` (fla's Triton kernels, SDPA, titans-pytorch).

    python -m benchmarks.contestants_gpu ours
    python -m benchmarks.contestants_gpu torch

Operations take bfloat16 query, key, value and beta, and float32 decays. A call that is timed is a burst: as many as the
facts say are handed to the device before the host waits. The clock is the wall's.
"""

import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import numpy as np

from benchmarks.pair import Loaded, serve

BURST = 5
WIDE = ("log_decay",)  # stays float32


def cut(x: np.ndarray, B: int, T: int, H: int) -> np.ndarray:
    """[1, t, h, ...] to [B, T, H, ...]: a part, or the whole again and again."""
    again = (B, -(-T // x.shape[1]), *[1] * (x.ndim - 2))
    return np.tile(x[:, : min(T, x.shape[1]), :H], again)[:, :T]


def ours() -> Callable[..., Loaded]:
    import jax
    import jax.numpy as jnp

    from benchmarks import contestants_jax

    operations = contestants_jax.ours()

    def operation(
        op: str, mode: str, inputs: dict[str, np.ndarray], B: int, T: int, H: int, judge: bool = False, **options: Any
    ) -> Loaded:
        """judge: the definition, in float32, of the same rounded inputs."""
        placed = {name: jnp.asarray(cut(x, B, T, H)) for name, x in inputs.items()}
        placed = {n: x if n in WIDE else x.astype(jnp.bfloat16) for n, x in placed.items()}
        if judge:
            placed = {n: x.astype(jnp.float32) for n, x in placed.items()}
            options["implementation"] = "naive"
        cotangent = placed.pop("cotangent")

        def forward(*arguments: Any) -> Any:
            return operations[op](*arguments, **options)

        def both(arguments: Any, cotangent: Any) -> Any:
            y, pullback = jax.vjp(lambda a: forward(*a), arguments)
            return y, pullback(cotangent)[0]

        arguments = tuple(placed.values())
        given = arguments if mode == "fwd" else (arguments, cotangent)
        with jax.default_matmul_precision("highest" if judge else "default"):
            return finish(jax.jit(forward if mode == "fwd" else both), given, list(placed))

    def finish(function: Any, given: tuple[Any, ...], names: list[str]) -> Loaded:
        start = time.perf_counter()
        compiled = function.lower(*given).compile()
        compile_s = time.perf_counter() - start

        def run() -> Any:
            for _ in range(BURST):
                out = compiled(*given)
            return jax.block_until_ready(out)

        def outputs() -> dict[str, np.ndarray]:
            out = compiled(*given)
            y, gradients = out if isinstance(out, tuple) else (out, ())
            arrays = {"y": y} | {f"d_{n}": g for n, g in zip(names, gradients, strict=False)}
            return {n: np.asarray(x.astype(jnp.float32)) for n, x in arrays.items()}

        temp = compiled.memory_analysis().temp_size_in_bytes / 1e6
        return Loaded(run, outputs, {"compile_s": compile_s, "temp_mb": temp, "calls": BURST})

    def product(n: int) -> Loaded:
        """The peak: a product of two bfloat16 squares of random numbers."""
        a, b = (jax.random.normal(jax.random.key(i), (n, n), jnp.bfloat16) for i in range(2))
        return finish(jax.jit(jnp.matmul), (a, b), [])

    def once(loaded: Loaded) -> Loaded:
        return loaded._replace(facts=loaded.facts | {"calls": 1})

    def load(kind: str, **options: Any) -> Loaded:
        if kind == "product":
            return product(**options)
        if kind == "operation":
            return operation(**options)
        if kind == "titans":
            from benchmarks.contestants_memories import layer

            return once(layer(remat=False, **options))
        from benchmarks.contestants_models import train

        return once(train(**options))

    return load


def torch() -> Callable[..., Loaded]:
    import torch

    torch.backends.cuda.matmul.allow_tf32 = True  # as XLA's default does

    def linear(q, k, v):
        from fla.ops.linear_attn import chunk_linear_attn

        return chunk_linear_attn(q, k, v, scale=1.0, normalize=False)[0]

    def scalar(q, k, v, log_decay):
        from fla.ops.simple_gla import chunk_simple_gla

        return chunk_simple_gla(q, k, v, g=log_decay, scale=1.0)[0]

    def channel(q, k, v, log_decay):
        from fla.ops.gla import chunk_gla

        return chunk_gla(q, k, v, g=log_decay, scale=1.0)[0]

    def delta(q, k, v, beta):
        from fla.ops.delta_rule import chunk_delta_rule

        return chunk_delta_rule(q, k, v, beta=beta, scale=1.0)[0]

    def gated_delta(q, k, v, beta, log_decay):
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        return chunk_gated_delta_rule(q, k, v, g=log_decay, beta=beta, scale=1.0)[0]

    def kda(q, k, v, beta, log_decay):
        from fla.ops.kda import chunk_kda

        return chunk_kda(q, k, v, g=log_decay, beta=beta, scale=1.0)[0]

    def attention(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    known = {f.__name__: f for f in (linear, scalar, channel, delta, gated_delta, kda, attention)}

    def burst(one: Callable[[], Any], calls: int = BURST) -> Callable[[], Any]:
        def run() -> Any:
            for _ in range(calls):
                out = one()
            torch.cuda.synchronize()
            return out

        return run

    def operation(op: str, mode: str, inputs: dict[str, np.ndarray], B: int, T: int, H: int) -> Loaded:
        torch.cuda.empty_cache()
        placed = {name: torch.from_numpy(cut(x, B, T, H)).cuda() for name, x in inputs.items()}
        placed = {n: x if n in WIDE else x.bfloat16() for n, x in placed.items()}
        cotangent = placed.pop("cotangent")
        leaves = list(placed.values())

        def forward() -> Any:
            with torch.no_grad():
                return known[op](**placed)

        def both() -> Any:
            for x in leaves:
                x.requires_grad_()
            y = known[op](**placed)
            return y, torch.autograd.grad(y, leaves, cotangent)

        def outputs() -> dict[str, np.ndarray]:
            y, gradients = (forward(), ()) if mode == "fwd" else both()
            arrays = {"y": y} | {f"d_{n}": g for n, g in zip(placed, gradients, strict=False)}
            return {n: x.detach().float().cpu().numpy() for n, x in arrays.items()}

        one = forward if mode == "fwd" else both
        one()  # kernels are compiled and tuned
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        one()
        torch.cuda.synchronize()
        temp = (torch.cuda.max_memory_allocated() - before) / 1e6
        return Loaded(burst(one), outputs, {"temp_mb": temp, "calls": BURST})

    def titans(**options: Any) -> Loaded:
        from benchmarks import contestants_titans

        one = contestants_titans.load(device="cuda", **options).run
        return Loaded(burst(one, 1), dict, {"calls": 1})

    def load(kind: str, **options: Any) -> Loaded:
        kinds: dict[str, Callable[..., Loaded]] = {"operation": operation, "titans": titans}
        return kinds[kind](**options)

    return load


def packages(*names: str) -> dict[str, str]:
    return {name: version(name) for name in names}


if __name__ == "__main__":
    if sys.argv[1] == "ours":
        serve(ours(), lambda: packages("jax"), time.perf_counter)
    else:
        serve(torch(), lambda: packages("torch", "triton", "fla-core"), time.perf_counter)
