"""Contestants in JAX: `ours`, and two peers that XLA compiles for the CPU.

    python -m benchmarks.contestants_jax ours             "reference OP" is the definition that ours must agree with
    python -m benchmarks.contestants_jax tokamax          needs tokamax, so Python 3.12, in an environment of its own
    python -m benchmarks.contestants_jax maxtext PATH     PATH: a checkout of MaxText; one function of it is read

The MaxText function runs in our environment, on the same XLA as ours.
"""

import ast
import functools
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.pair import Loaded, pin, serve

if __name__ == "__main__":
    pin()

import jax
import jax.numpy as jnp
import numpy as np

LOWER_BOUND = -5.0  # of tokamax's gate: log_decay = LOWER_BOUND * sigmoid(gate)


def ours() -> dict[str, Callable]:
    from layers.ops.delta import delta_recurrence
    from layers.ops.linear import linear_recurrence

    def linear(q, k, v, **options):
        return linear_recurrence(q, k, v, **options)[0]

    def decayed(q, k, v, log_decay, **options):
        return linear_recurrence(q, k, v, log_decay, **options)[0]

    def delta(q, k, v, beta, log_decay=None, **options):
        return delta_recurrence(q, k, v, beta, log_decay, **options)[0]

    def kda_gate(q, k, v, beta, gate, **options):
        return delta(q, k, v, beta, LOWER_BOUND * jax.nn.sigmoid(gate), **options)

    def causal(q, k, v, **options):
        from layers.ops.attention import attention

        return attention(q, k, v, **options)

    return {
        "linear": linear,
        "scalar": decayed,
        "channel": decayed,
        "delta": delta,
        "gated_delta": delta,
        "kda": delta,
        "kda_gate": kda_gate,
        "attention": causal,
        "window": lambda q, k, v, size, **options: causal(q, k, v, window=size, **options),
    }


def reference() -> dict[str, Callable]:
    ops: dict[str, Callable] = {
        name: functools.partial(op, implementation="naive")
        for name, op in ours().items()
        if name not in ("attention", "window")
    }

    def softmax(q, k, v, size=None):
        T = jnp.arange(q.shape[1])
        gap = T[:, None] - T[None, :]
        seen = (gap >= 0) & (gap < (size or q.shape[1]))
        scores = jnp.einsum("BTHK,BSHK->BHTS", q, k) * q.shape[-1] ** -0.5
        weights = jax.nn.softmax(jnp.where(seen[None, None], scores, -jnp.inf))
        return jnp.einsum("BHTS,BSHV->BTHV", weights, v)

    ops |= {"attention": softmax, "window": softmax}
    return {f"reference {name}": op for name, op in ops.items()}


def tokamax() -> dict[str, Callable]:
    from tokamax._src.ops.kda.api import kimi_delta_attention

    def kda_gate(query, key, value, beta, gate):  # H B T .
        a_log = jnp.zeros(query.shape[0])
        return kimi_delta_attention(
            query,
            key,
            value,
            gate,
            beta,
            a_log=a_log,
            scale=1.0,
            use_gate_in_kernel=True,
            lower_bound=LOWER_BOUND,
            implementation="xla_chunked",
        )[0]

    return {"kda_gate": kda_gate}


def maxtext(checkout: str) -> dict[str, Callable]:
    name, file = "jax_chunk_gated_delta_rule", "src/maxtext/models/qwen3.py"
    source = (Path(checkout) / file).read_text()
    body: list[ast.stmt] = [
        node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name == name
    ]
    if not body:
        raise LookupError(f"no {name} in {file} of this checkout of MaxText")
    names: dict[str, Any] = {"jax": jax, "jnp": jnp, "lax": jax.lax, "Array": jax.Array}
    exec(compile(ast.Module(body, []), file, "exec"), names)  # the module itself imports all of MaxText
    rule = names[name]

    def gated_delta(q, k, v, beta, log_decay):
        # it scales the query itself
        return rule(q * q.shape[-1] ** 0.5, k, v, log_decay, beta, compute_dtype=jnp.float32)[0]

    return {"gated_delta": gated_delta}


def revision(checkout: str) -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=checkout, capture_output=True, text=True)
    return found.stdout.strip() or "of unknown revision"


def loader(ops: dict[str, Callable], heads_first: bool) -> Callable[..., Loaded]:
    def place(x: np.ndarray) -> jax.Array:
        return jnp.asarray(np.moveaxis(x, 2, 0) if heads_first else x)

    def back(x: jax.Array) -> np.ndarray:
        return np.moveaxis(np.asarray(x), 0, 2) if heads_first else np.asarray(x)

    def load(op: str, mode: str, inputs: dict[str, np.ndarray], T: int | None = None, **options) -> Loaded:
        placed = {name: place(x[:, :T]) for name, x in inputs.items()}
        cotangent = placed.pop("cotangent")
        function = functools.partial(ops[op], **options)

        def both(arguments, cotangent):
            y, pullback = jax.vjp(lambda a: function(*a), arguments)
            return y, pullback(cotangent)[0]

        arguments = tuple(placed.values())
        start = time.process_time()
        if mode == "fwd":
            compiled = jax.jit(function).lower(*arguments).compile()
        else:
            compiled = jax.jit(both).lower(arguments, cotangent).compile()
        compile_s = time.process_time() - start
        given = arguments if mode == "fwd" else (arguments, cotangent)

        def run():
            return jax.block_until_ready(compiled(*given))

        def outputs():
            if mode == "fwd":
                return {"y": back(run())}
            y, gradients = run()
            return {"y": back(y)} | {f"d_{n}": back(g) for n, g in zip(placed, gradients, strict=True)}

        memory = compiled.memory_analysis()
        assert memory is not None
        io = memory.argument_size_in_bytes + memory.output_size_in_bytes
        facts = {"compile_s": compile_s, "temp_mb": memory.temp_size_in_bytes / 1e6, "io_mb": io / 1e6}
        return Loaded(run, outputs, facts)

    return load


if __name__ == "__main__":
    who, *rest = sys.argv[1:]
    if who == "ours":
        serve(loader(ours() | reference(), False), lambda: {"jax": version("jax")})
    elif who == "maxtext":
        serve(loader(maxtext(*rest), False), lambda: {"MaxText": revision(*rest)})
    elif who == "tokamax":
        serve(loader(tokamax(), True), lambda: {"tokamax": f"{version('tokamax')} on jax {version('jax')}"})
    else:
        raise SystemExit(f"no contestant {who}")
