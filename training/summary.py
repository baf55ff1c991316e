"""What a run is about to do, told before it does it."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from layers.layer import Tokens
from models.lm import LanguageModel
from models.loss import score_tokens
from models.parameters import Spec, Structure
from training.experiment import Experiment
from training.flops import count_flops
from training.layout import Layout

MIB = 2**20
# Dense bf16 FLOP/s of a device, from its vendor's data sheet (cloud.google.com/tpu/docs/v5p and so on), by what its
# `device_kind` holds; the first that it holds counts. JAX calls a v5p "TPU v5", and a chip of TPU7x is two devices.
PEAKS = {
    "H200": 989e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12,
    "TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5e": 197e12, "TPU v5": 459e12, "TPU v6": 918e12,
    "TPU7x": 2307e12 / 2,
}  # fmt: skip


def peak_flops(mesh: jax.sharding.Mesh) -> float | None:
    """Of all devices of a mesh together; None where their kind is not known."""
    kind = mesh.devices.flat[0].device_kind
    peak = next((flops for name, flops in PEAKS.items() if name in kind), None)
    return None if peak is None else peak * mesh.devices.size


def bytes_of(tree: Any) -> int:
    return sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


def state_bytes(model: LanguageModel, T: int) -> int:
    """Of one sequence's memory of at most T tokens, measured from its arrays."""
    return bytes_of(jax.eval_shape(lambda model: model.init_state(1, T), model))


def flops_per_token(experiment: Experiment, structure: Structure, labelled: int | None, prefix: bool = False) -> float:
    """Of a training step (forward and backward, no recomputation: three times the forward pass), by token.

    prefix: whether rows have a region that is read ahead.
    """
    T = experiment.data.T
    params = {name: jax.ShapeDtypeStruct(spec.shape, jnp.float32) for name, spec in structure.specs.items()}
    row = jax.ShapeDtypeStruct((1, T), jnp.int32)
    region = jax.ShapeDtypeStruct((1, T), jnp.bool_) if prefix else None

    def forward(params: Any, ids: Any, pos: Any, labels: Any, region: Any) -> Any:
        model = structure.module(params)
        return score_tokens(model, Tokens(ids, pos), labels, labelled=labelled, prefix_BT=region)[0].nll

    return 3 * count_flops(forward, params, row, row, row, region) / T


def parameter_count(specs: dict[str, Spec]) -> int:
    return sum(math.prod(spec.shape) for spec in specs.values())


class Held(NamedTuple):
    """Bytes of a device. stream: of the residual stream, whole at one place of the model. kept: of it, by the blocks
    whose backward pass begins from it."""

    state: int
    gradients: int
    stream: int
    kept: int


def held(experiment: Experiment, layout: Layout, specs: dict[str, Spec], state: Any) -> Held:
    """What a device holds of a step, as far as shapes say it; what layers need in between is not there.

    state: of arrays or ShapeDtypeStructs with shardings.
    """
    model, parts = experiment.model, layout.params(specs)
    own = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(state))
    slopes = 4 * sum(math.prod(parts[name].shard_shape(spec.shape)) for name, spec in specs.items())
    stream = math.prod(_stream(experiment, layout)) * jnp.dtype(model.dtype).itemsize
    return Held(own, slopes, stream, stream * sum(stage.repeats for stage in model.stages))


def _stream(experiment: Experiment, layout: Layout) -> tuple[int, ...]:
    model, data = experiment.model, experiment.data
    streams = (model.streams,) if model.streams > 1 else ()
    return layout.stream(data.B // experiment.train.accumulate, data.T, *streams, model.D)


def where(experiment: Experiment, layout: Layout, specs: dict[str, Spec], state: Any) -> dict[str, str]:
    """What to say of where a training state, a batch and activations lie, and of what a device holds of them."""
    found = held(experiment, layout, specs, state)
    shape = " x ".join(map(str, _stream(experiment, layout)))
    blocks = sum(stage.repeats for stage in experiment.model.stages)
    kept = f"kept by each of {blocks} blocks: {found.kept / MIB:,.1f} MiB"
    if experiment.model.remat != "block":
        kept += f", and what model.remat {experiment.model.remat!r} keeps within them"
    said = {
        "memory": f"{found.state / MIB:,.1f} MiB a device for parameters and optimiser, "
        f"{found.gradients / MIB:,.1f} for gradients",
        "activations": f"residual stream {shape} a device, {kept}",
    }
    if layout.mesh.size > 1:
        spread = layout.sharded(specs).items()
        said["layout"] = "; ".join(f"{over}: {found['parameters']:,} parameters" for over, found in spread)
        rows, tokens = layout.batch.shard_shape((experiment.data.B, experiment.data.T))
        over = [f"{what} over {axes}" for what, axes in zip(("rows", "tokens"), layout.batch_axes, strict=True) if axes]
        said["batch"] = f"{rows} x {tokens} tokens a device; {', '.join(over) or 'whole on every device'}"
    return said


def show(
    console: Console, experiment: Experiment, model: LanguageModel, structure: Structure, layout: Layout, facts: dict
) -> None:
    """model: of ShapeDtypeStructs. facts: what else to say, by name."""
    config, specs = experiment.model, structure.specs
    table = Table("layer", "repeats", "parameters", "state, bytes a sequence", title=escape(experiment.description))
    table.add_row("embedding", "", f"{config.W * config.D:,}", "")
    states = jax.eval_shape(lambda model: model.init_state(1, experiment.data.T), model)
    if config.ngrams is not None:
        count = parameter_count({n: p for n, p in specs.items() if n.startswith("ngrams.")})
        table.add_row("n-grams", "", f"{count:,}", f"{bytes_of(states[-1]):,}")
    if config.streams > 1:
        count = parameter_count({n: p for n, p in specs.items() if ".connections." in n})
        table.add_row(f"connections of {config.streams} streams", "", f"{count:,}", "")
    for s, stage in enumerate(config.stages):
        for i, layer in enumerate(stage.pattern):
            count = parameter_count({n: p for n, p in specs.items() if n.startswith(f"stages.{s}.layers.{i}.")})
            held = sum(bytes_of(states[s][r][i]) for r in range(stage.repeats))
            table.add_row(type(layer).__name__, str(stage.repeats), f"{count:,}", f"{held:,}" if held else "-")
    if not config.tied:
        table.add_row("head", "", f"{config.W * config.D:,}", "")
    console.print(table)
    grid = Table.grid(padding=(0, 2))
    for name, value in facts.items():
        grid.add_row(name, value)
    console.print(grid)
    for line in layout.report(specs):
        console.print(f"note: {line}", highlight=False)
