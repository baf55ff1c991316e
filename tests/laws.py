"""The laws of a layer. Each is a function of a LayerConfig that returns in silence or raises AssertionError.

Nothing here knows any layer by name, so that a law judges what it has never seen: every example of every discovered
class (test_laws.py) and the layers broken on purpose (broken_layers.py).
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from reading import (
    QUICK,
    B,
    D,
    Said,
    W,
    apply,
    build,
    cast,
    copy,
    fresh,
    grain,
    is_float,
    length,
    pad,
    pieces_of,
    places,
    pull,
    read,
    repeat_row,
    same,
    same_memory,
    same_tree,
    stack,
    stream,
    tokens,
)

from layers.layer import Layer, LayerConfig, Tokens

MANY, LONG = 512, 4096  # tokens of a long run, in every test run and in `make test-slow`

Law = Callable[[LayerConfig], None]
LAWS: dict[str, Law] = {}


def law(judge: Law) -> Law:
    LAWS[judge.__name__] = judge
    return judge


def double(judge: Law) -> Law:
    """Runs a law in double precision."""

    @functools.wraps(judge)
    def judged(config: LayerConfig) -> None:
        with jax.enable_x64(True):
            judge(config)

    return judged


@law
@double
def any_cut_of_time(config: LayerConfig) -> None:
    """Whole, in aligned pieces, in ragged pieces, one by one, fresh or warm: the same y and the same memory."""
    layer, C, T = copy(stack(config)), grain(config), length(config)
    empty = fresh(layer, config)
    x_BTD = stream(T)
    said = tokens(np.stack([places(T, C // 2 + 3, C // 2 + 4, C + 5), places(T, C, 2 * C - 1)]))
    y_BTD, end = read(layer, x_BTD, said, empty, [T])
    same(pull(layer, x_BTD, said, x_BTD)[0], y_BTD, "training call against fresh state")

    _, warm = read(layer, stream(C, 3), tokens(np.stack([places(C, 5), places(C)])), empty, [C])
    goes_on = Said(said.ids_BT, np.stack([np.where(places(T, 9) == np.arange(T), C - 5, 0), [C] * T]))
    goes_on = Said(goes_on.ids_BT, (goes_on.pos_BT + np.stack([places(T, 9), np.arange(T)])).astype(np.int32))
    warm_y_BTD, warm_end = read(layer, x_BTD, goes_on, warm, [T])

    def judge(pieces: list[int], what: str) -> None:
        for start, tokens_, y, state in ((empty, said, y_BTD, end), (warm, goes_on, warm_y_BTD, warm_end)):
            name = f"{what}, {'fresh' if start is empty else 'warm'}"
            got_y, got_state = read(layer, x_BTD, tokens_, start, pieces)
            same(got_y, y, name)
            same_memory(layer, got_state, state, tokens_.pos_BT[:, -1] + 1, C, f"{name}: final state")

    judge(pieces_of(T, C), "aligned pieces")
    judge([7, 1, *pieces_of(T - 8, C)], "ragged pieces")
    judge([1] * T, "one by one")

    @hypothesis.settings(max_examples=3, deadline=None, database=None, derandomize=True)
    @hypothesis.given(st.lists(st.sampled_from([1, 1, 7, 7, 7, C]), min_size=3, max_size=20))
    def cut_anywhere(drawn: list[int]) -> None:
        ends = np.cumsum(drawn)
        drawn = [n for n, stop in zip(drawn, ends, strict=True) if stop <= T]
        judge(drawn + pieces_of(T - sum(drawn), C)[::-1], f"pieces {drawn}")

    cut_anywhere()


def state_bytes(layer: Any, rows: int, T: int) -> int:
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(jax.eval_shape(lambda: layer.init_state(rows, T))))


@law
def state_keeps_its_shape(config: LayerConfig) -> None:
    """Structure, shapes and dtypes come back as they went; bytes are constant or linear in T, and linear in B."""
    layer = copy(build(config))
    for dtype in (jnp.bfloat16, jnp.float32):
        for n in (1, 7):
            before = jax.eval_shape(lambda: layer.init_state(B, 32))
            x_BTD = jax.ShapeDtypeStruct((B, n, D), dtype)
            said = Said(*[jax.ShapeDtypeStruct((B, n), jnp.int32)] * 2)
            out = jax.eval_shape(lambda state, x, said: layer(x, said, state), before, x_BTD, said)
            structures: list[Any] = [jax.tree.structure(tree) for tree in (before, out.state)]
            assert structures[0] == structures[1], "the state's structure changed"
            shapes = [[(a.shape, a.dtype) for a in jax.tree.leaves(tree)] for tree in (before, out.state)]
            assert shapes[0] == shapes[1], f"the state changed from {shapes[0]} to {shapes[1]}"
            assert (out.y_BTD.shape, out.y_BTD.dtype) == (x_BTD.shape, dtype), f"y is {out.y_BTD}, x {x_BTD}"
            trained = jax.eval_shape(lambda x, said: layer(x, said), x_BTD, said)
            assert trained.state is None, "a training call returned a state"
    sizes = {T: state_bytes(layer, 1, T) for T in (1024, 2048, 4096, 4097)}
    per_token = sizes[4097] - sizes[4096]
    for T, size in sizes.items():
        expected = sizes[4096] - per_token * (4096 - T)
        assert size == expected, f"bytes of state: {sizes}, neither constant nor linear in T"
    assert state_bytes(layer, 3, 64) == 3 * state_bytes(layer, 1, 64), "bytes of state are not linear in B"


def scene(config: LayerConfig) -> np.ndarray:
    """Positions of two rows: padding on the left, inside, at the end; documents of one token, on and off the grid."""
    C, T = grain(config), length(config)
    first = pad(
        places(T, C // 2, C // 2 + 1, C + 2),
        (0, 2),
        (C // 4, C // 4 + 3),
        (C + 1, C + 2),
        (2 * C, 2 * C + 4),
        (T - 2, T),
    )
    second = pad(places(T, C, 2 * C), (C - 1, C + 3), (T - 1, T))
    return np.stack([first, second])


@functools.cache
def influence(config: LayerConfig) -> tuple[np.ndarray, np.ndarray]:
    """How much each token of each row moves a random read-out of token t of row 0, as [T, B, T]; and the positions."""
    layer, T = copy(stack(config)), length(config)
    said, x_BTD = tokens(scene(config)), stream(T)
    moved = np.zeros((T, B, T))
    for t in range(T):
        dy_BTD = np.zeros((B, T, D))
        dy_BTD[0, t] = np.random.default_rng(t).standard_normal(D)
        _, _, dx_BTD = pull(layer, x_BTD, said, dy_BTD)
        moved[t] = np.abs(np.asarray(dx_BTD)).max(-1)
    return moved, said.pos_BT


def document_of(pos_T: np.ndarray) -> np.ndarray:
    return np.cumsum(pos_T == 0)


@law
@double
def causal(config: LayerConfig) -> None:
    """No token sees a later one or another row, by Jacobian and by perturbation; each sees itself."""
    moved, pos_BT = influence(config)
    valid = pos_BT[0] >= 0
    assert np.isfinite(moved).all(), "the Jacobian is not finite"
    assert not moved[valid][:, 1].any(), "a row sees another row"
    seen = moved[:, 0][valid]
    later = np.arange(len(valid)) > np.flatnonzero(valid)[:, None]
    assert not seen[later].any(), f"a token sees a later one: {seen[later].max():.1e}"
    assert (np.diagonal(moved[:, 0])[valid] > 1e-9).all(), "a token does not see itself"

    layer, C, T = copy(stack(config)), grain(config), length(config)
    said, x_BTD = tokens(pos_BT), stream(T)
    y_BTD, _ = read(layer, x_BTD, said, fresh(layer, config), [T])
    for t in (C, T // 2 + 2):
        other_ids, other_x = said.ids_BT.copy(), x_BTD.copy()
        other_ids[0, t:] = (other_ids[0, t:] + 1) % W
        other_x[0, t:] *= -2
        got_y, _ = read(layer, other_x, Said(other_ids, pos_BT), fresh(layer, config), [T])
        live = pos_BT >= 0
        same(got_y[0, :t][live[0, :t]], y_BTD[0, :t][live[0, :t]], f"y before a change at {t}", 1e-14)
        same(got_y[1][live[1]], y_BTD[1][live[1]], "y of a row beside a changed one", 1e-14)


@law
@double
def a_document_forgets(config: LayerConfig) -> None:
    """Packed documents read as each alone, from a fresh or a used state; the last one alone is remembered."""
    moved, pos_BT = influence(config)
    valid, documents = pos_BT[0] >= 0, document_of(pos_BT[0])
    earlier = documents[:, None] > documents[None, :]
    leak = moved[:, 0][valid][earlier[valid]].max(initial=0) / moved.max()
    # A difference of running sums cancels what came before to the last digit or two, not always exactly.
    assert leak <= 1e-12, f"a token sees an earlier document: {leak:.1e} of the largest influence"

    layer, C, T = copy(stack(config)), grain(config), length(config)
    empty, x_BTD = fresh(layer, config), stream(T)
    starts = [(0, 3, 4, C, C + C // 2), (0, C - 1, 2 * C)]
    said = tokens(np.stack([places(T, *row) for row in starts]))
    y_BTD, end = read(layer, x_BTD, said, empty, [T])
    _, used = read(layer, stream(C, 3), tokens(np.stack([places(C)] * B)), empty, [C])
    used_y_BTD, used_end = read(layer, x_BTD, said, used, [T])
    same(used_y_BTD, y_BTD, "documents after a used state")
    same_memory(layer, used_end, end, said.pos_BT[:, -1] + 1, C, "memory of documents after a used state")
    for row, row_starts in enumerate(starts):
        for start, stop in zip(row_starts, (*row_starts[1:], T), strict=True):
            alone_x = np.repeat(x_BTD[row : row + 1, start:stop], B, axis=0)
            alone = Said(*(np.repeat(a[row : row + 1, start:stop], B, axis=0) for a in said))
            alone_y, alone_end = read(layer, alone_x, alone, empty, pieces_of(stop - start, C))
            same(y_BTD[row, start:stop], alone_y[row], f"document {start}:{stop} of row {row}")
        last = repeat_row(end, row)
        same_memory(layer, last, alone_end, np.full(B, stop - start), C, f"memory of the last document of row {row}")


@law
@double
def padding_changes_nothing(config: LayerConfig) -> None:
    """Padding anywhere leaves y and memory as if it were not there, whatever it holds."""
    layer, C, T = copy(stack(config)), grain(config), length(config)
    empty, x_BTD, said = fresh(layer, config), stream(T), tokens(scene(config))
    moved, pos_BT = influence(config)
    valid = pos_BT >= 0
    seen = moved[:, 0][valid[0]][:, ~valid[0]]
    assert not seen.any(), f"a token sees padding: {seen.max():.1e}"

    y_BTD, end = read(layer, x_BTD, said, empty, [T])
    assert np.isfinite(y_BTD).all(), "y at padding is not finite"
    after_B = (
        pos_BT.max(axis=1, where=np.arange(T) >= [[np.flatnonzero(row == 0)[-1]] for row in pos_BT], initial=0) + 1
    )
    other = Said(np.where(valid, said.ids_BT, (said.ids_BT + 1) % W), np.where(valid, said.pos_BT, -9).astype(np.int32))
    other_y, other_end = read(layer, np.where(valid[..., None], x_BTD, 9 - x_BTD), other, empty, [T])
    same(other_y[valid], y_BTD[valid], "y under other padding", 0)
    same_memory(layer, other_end, end, after_B, C, "memory under other padding", 0)
    for pieces in ([1] * T, [7, 1, *pieces_of(T - 8, C)]):
        cut_y, cut_end = read(layer, x_BTD, said, empty, pieces)
        same(cut_y[valid], y_BTD[valid], f"y of padded pieces {pieces[:3]}")
        same_memory(layer, cut_end, end, after_B, C, f"memory of padded pieces {pieces[:3]}")
    for row in range(B):
        compact_x = np.repeat(x_BTD[row][valid[row]][None], B, axis=0)
        compact = Said(*(np.repeat(a[row][valid[row]][None], B, axis=0) for a in said))
        compact_y, compact_end = read(layer, compact_x, compact, empty, pieces_of(valid[row].sum(), C))
        same(y_BTD[row][valid[row]], compact_y[row], f"y of row {row} without its padding")
        got = repeat_row(end, row)
        same_memory(layer, got, compact_end, np.repeat(after_B[row], B), C, f"memory of row {row} without its padding")


@jax.jit
def slopes(
    layer: Any, x_BTD: jax.Array, said: Tokens, dy_BTD: jax.Array
) -> tuple[jax.Array, jax.Array, Any, jax.Array]:
    """A training call with its auxiliary losses: the objective, y, and the gradients in the layer and in x."""

    def objective(layer: Any, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = layer(x_BTD, said)
        extra = sum(jnp.sum(a.astype(jnp.float32)) for name, a in out.aux.items() if name.startswith("loss/"))
        return jnp.sum((out.y_BTD * dy_BTD).astype(jnp.float32)) + extra, out.y_BTD

    (value, y_BTD), (d_layer, dx_BTD) = jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)(layer, x_BTD)
    return value, y_BTD, d_layer, dx_BTD


INPUTS = ("usual", "x100", "constant", "positive", "zero")


@functools.lru_cache(maxsize=4)
def long_run(config: LayerConfig, scale: int, T: int = MANY) -> tuple[np.ndarray, Tokens, tuple[Any, ...]]:
    """T bfloat16 tokens, a row for each of INPUTS, through the initial layer with scaled Params: x and slopes."""
    x_BTD = stream(T, rows=len(INPUTS))
    x_BTD[1] *= 100 if scale == 1 else 1
    x_BTD[2], x_BTD[3], x_BTD[4] = x_BTD[2, :1], np.abs(x_BTD[3]), 0
    x_BTD = x_BTD.astype(jnp.bfloat16)
    first = pad(places(T, T // 4 - 24, T // 2), (0, 5), (3 * T // 4 - 72, 3 * T // 4 + 28))
    said = tokens(np.stack([first, *[places(T)] * (len(INPUTS) - 1)]))
    layer = jax.tree.map(lambda a: a * np.asarray(scale, a.dtype), copy(build(config)))
    dy_BTD = stream(T, 1, len(INPUTS)).astype(jnp.bfloat16)
    return x_BTD, said, jax.device_get(slopes(layer, x_BTD, said, dy_BTD))


@law
def finite_gradients(config: LayerConfig, T: int = MANY) -> None:
    """bfloat16, many tokens: large, constant, all-positive and zero inputs; Params tenfold, reversed, or all zero."""
    assert all(is_float(a) for a in jax.tree.leaves(build(config))), "a leaf is no float: it would break every gradient"
    for scale in (1, 10, -10, 0):
        _, _, (value, _, d_layer, dx_BTD) = long_run(config, scale, T)
        finite = np.isfinite(dx_BTD.astype(np.float32)).all((1, 2))
        rows = [name for name, ok in zip(INPUTS, finite, strict=True) if not ok]
        assert not rows, f"Params x{scale}: the gradient in x is not finite for inputs {rows}"
        assert np.isfinite(value), f"Params x{scale}: the objective is not finite"
        for path, slope in jax.tree_util.tree_leaves_with_path(d_layer):
            name = jax.tree_util.keystr(path)
            assert np.isfinite(slope).all(), f"Params x{scale}: the gradient in {name} is not finite"


@law
@double
def implementations_agree(config: LayerConfig) -> None:
    """naive, chunked and what the example uses: the same y, memory and gradients at a length that nothing divides."""
    if not hasattr(config, "implementation"):
        return
    T = length(config)
    x_BTD, dy_BTD = stream(T), stream(T, 1)
    said = tokens(np.stack([places(T, 5, grain(config) + 3), places(T)]))
    results = {}
    for name in ("naive", "chunked", config.implementation):
        chosen = dataclasses.replace(config, **{"implementation": name})
        structure = jax.tree.structure(jax.eval_shape(lambda chosen=chosen: chosen.build(D, rngs=nnx.Rngs(params=0))))
        layer = jax.tree.unflatten(structure, jax.tree.leaves(copy(stack(config))))
        _, end = read(layer, x_BTD, said, fresh(layer, config), [T])
        y_BTD, d_layer, dx_BTD = pull(layer, x_BTD, said, dy_BTD)
        results[name] = {
            "y": y_BTD,
            "dx": dx_BTD,
            "memory": end,
            "gradients": dict(enumerate(jax.tree.leaves(d_layer))),
        }
    for name in ("chunked", config.implementation):
        same_tree(results[name], results["naive"], f"{name} against naive")


@functools.partial(jax.jit, compiler_options=QUICK)
def pull_at(
    layer: Any, x_BTD: jax.Array, said: Tokens, at_BN: jax.Array, dy_BND: jax.Array
) -> tuple[jax.Array, Any, jax.Array]:
    """`pull` of the places at_BN alone."""
    y_BND, back = jax.vjp(lambda layer, x: layer.read(x, said, at_BN).y_BTD, layer, x_BTD)
    return y_BND, *back(dy_BND)


@law
@double
def a_place_reads_as_in_the_whole(config: LayerConfig) -> None:
    """Asked at a few places, in any order: y and gradients of the whole. A pointwise layer needs no other token."""
    layer, T = copy(stack(config)), length(config)
    if type(layer).read is Layer.read and not layer.pointwise:
        return  # the whole itself, gathered
    said, x_BTD = tokens(scene(config)), stream(T)
    rows, at_BN = np.arange(B)[:, None], np.stack([np.random.default_rng(row).permutation(T)[:7] for row in range(B)])
    dy_BND, dy_BTD = stream(7, 1), np.zeros_like(x_BTD)
    dy_BND[said.pos_BT[rows, at_BN] < 0] = 0  # what stands at padding is nobody's business
    dy_BTD[rows, at_BN] = dy_BND
    y_BTD, d_layer, dx_BTD = pull(layer, x_BTD, said, dy_BTD)
    want, live = np.asarray(y_BTD)[rows, at_BN], dy_BND.any(-1)
    y_BND, *slopes_at = pull_at(layer, x_BTD, said, at_BN, dy_BND)
    same(np.asarray(y_BND)[live], want[live], "y at places")
    same_tree(slopes_at, [d_layer, dx_BTD], "gradients at places")
    if layer.pointwise:
        few = Said(*(a[rows, at_BN] for a in said))
        same(np.asarray(pull(layer, x_BTD[rows, at_BN], few, dy_BND)[0])[live], want[live], "y of a few tokens alone")


@functools.partial(jax.jit, compiler_options=QUICK)
def deep(layers_LM: Any, x_MBTD: jax.Array, said: Tokens, dy_MBTD: jax.Array) -> tuple[jax.Array, Any, jax.Array]:
    """`pull` through M residual stacks of L layers: a scan over checkpointed layers, each under vmap."""

    @jax.checkpoint
    def block(x_MBTD: jax.Array, layer_M: Any) -> tuple[jax.Array, None]:
        return x_MBTD + jax.vmap(lambda layer, x: layer(x, said).y_BTD)(layer_M, x_MBTD), None

    y_MBTD, back = jax.vjp(lambda layers, x: jax.lax.scan(block, x, layers)[0], layers_LM, x_MBTD)
    return y_MBTD, *back(dy_MBTD)


@law
@double
def transforms_change_nothing(config: LayerConfig) -> None:
    """Two stacks side by side, by vmap, scan and checkpoint as a model runs them, against the layers one at a time."""
    layers, T = stack(config), length(config)
    assert all(is_float(a) for a in jax.tree.leaves(layers)), "a leaf is no float: it would break every gradient"
    said, x_BTD, dy_BTD = tokens(scene(config)), stream(T), stream(T, 1)
    crossed = jax.tree.map(lambda a: np.stack([a, a[::-1]], axis=1), layers)  # stack 0: copies 0, 1; stack 1: 1, 0
    twice = np.stack([x_BTD, x_BTD]), said, np.stack([dy_BTD, dy_BTD])
    got_y, got_d, got_dx = jax.device_get(deep(crossed, *twice))
    for m in range(2):
        lower, upper = copy(layers, m), copy(layers, 1 - m)
        y_lower, *_ = pull(lower, x_BTD, said, dy_BTD)
        between_BTD = x_BTD + np.asarray(y_lower)
        y_upper, d_upper, dx_upper = pull(upper, between_BTD, said, dy_BTD)
        dy_lower = dy_BTD + np.asarray(dx_upper)
        _, d_lower, dx_lower = pull(lower, x_BTD, said, dy_lower)
        same(got_y[m], between_BTD + np.asarray(y_upper), f"y of stack {m}")
        same(got_dx[m], dy_lower + np.asarray(dx_lower), f"gradient in x of stack {m}")
        for place, want in enumerate((d_lower, d_upper)):
            got = jax.tree.map(lambda a, at=(place, m): a[at], got_d)
            same_tree(got, want, f"gradient of layer {place} of stack {m}")


def lay_out(layer: Any, mesh: Mesh) -> Any:
    """Params over the mesh by their letters: the first of H, G, F that divides goes over `model`, the rest is whole."""
    params = jax.tree.leaves(layer, is_leaf=lambda node: isinstance(node, nnx.Variable))
    values, structure = jax.tree.flatten(layer)
    assert len(params) == len(values), "a layer holds something besides Params"
    placed = []
    for param, value in zip(params, values, strict=True):
        axes = param.get_metadata().get("axes", "")
        assert len(axes) == value.ndim or not axes, f"axes {axes!r} on a Param of shape {value.shape}"
        spread = next((i for i, a in enumerate(axes) if a in "HGF" and value.shape[i] % mesh.shape["model"] == 0), None)
        spec = PartitionSpec(*("model" if i == spread else None for i in range(value.ndim)))
        placed.append(jax.device_put(value, NamedSharding(mesh, spec)))
    return jax.tree.unflatten(structure, placed)


@law
@double
def a_mesh_changes_nothing(config: LayerConfig) -> None:
    """Rows over `data` and heads over `model`: the same y, and no sequence is sent from device to device."""
    layer, T = copy(stack(config)), length(config)
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "model"))
    said, x_BTD = tokens(scene(config)), stream(T)
    by_rows = NamedSharding(mesh, PartitionSpec("data"))
    arguments = (lay_out(layer, mesh), *jax.device_put((x_BTD, said), by_rows), None)
    program = apply.lower(*arguments).compile()
    y_BTD, _ = program(*arguments)
    same(y_BTD, pull(layer, x_BTD, said, x_BTD)[0], "y on a mesh")
    columns = [{0, 1}, {2, 3}]  # the devices that differ in their place on `model` only
    for kind, shape, groups in collectives(program.as_text()):
        partial_sum = kind == "all-reduce" and groups and all(any(g <= c for c in columns) for g in groups)
        # Partial sums over `model` are what the layout asks for. T is odd and no other size: 2.5 chunks and a token.
        assert partial_sum or not any(n % T == 0 for n in shape), f"{kind} of a sequence, {shape}, over {groups}"


def collectives(program: str) -> Iterator[tuple[str, list[int], list[set[int]]]]:
    """Kind, shape and groups of devices (empty where it has none) of every collective in a compiled program."""
    kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter|collective-broadcast"
    for line in program.splitlines():
        if found := re.search(rf" = (.*?) ({kinds})(?:-start)?\(", line):
            for shape in re.findall(r"\w+\[([\d,]+)\]", found[1]):
                yield found[2], [int(n) for n in shape.split(",")], groups_of(line)


def groups_of(line: str) -> list[set[int]]:
    """The replica groups of an HLO instruction, which XLA writes in three ways."""
    if found := re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", line):  # {{0,1},{2,3}}
        return [{int(n) for n in group.split(",")} for group in re.findall(r"\{([\d,]+)\}", found[1])]
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):  # [2,2]<=[2,2]T(1,0)
        shape, sizes = ([int(n) for n in part.split(",")] for part in found.group(1, 2))
        order = [int(n) for n in found[3].split(",")] if found[3] else range(len(sizes))
        devices = np.arange(np.prod(sizes)).reshape(sizes).transpose(order).reshape(shape)
        return [set(group) for group in devices.tolist()]
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):  # mesh['a'=2,'b'=2] {'a'}
        axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
        inside = [i for i, name in enumerate(axes) if f"'{name}'" in found[2]]
        devices = np.arange(np.prod(list(axes.values()))).reshape(*axes.values())
        members = np.prod([devices.shape[i] for i in inside])
        devices = np.moveaxis(devices, inside, range(-len(inside), 0)).reshape(-1, members)
        return [set(group) for group in devices.tolist()]
    return []


def rms(a: Any) -> float:
    return float(np.sqrt(np.mean(np.square(np.asarray(a, np.float64)))))


@law
def bfloat16_stays_close(config: LayerConfig) -> None:
    """A bfloat16 stream through the initial layer errs by at most 2% (RMSE over RMS) of double precision.

    A single rounding errs by 0.17%. Layers whose gates are wide measure 0.2% to 1.0%; the most is 1.7%, of a GLA at
    temperature 1, whose gates come from logits of two bfloat16 products. A sum of decays in bfloat16 goes well beyond.
    """
    T = length(config)
    x_BTD, said, (_, y_BTD, *_) = long_run(config, 1)
    rows = [INPUTS.index("usual"), INPUTS.index("positive")]  # causal: the first T tokens stand alone
    x_BTD, said = x_BTD[rows, :T].astype(np.float64), Said(*(a[rows, :T] for a in said))
    with jax.enable_x64(True):
        want_BTD = np.asarray(pull(cast(copy(build(config)), np.float64), x_BTD, said, x_BTD)[0])
    valid = said.pos_BT >= 0
    error = rms((y_BTD[rows, :T].astype(np.float64) - want_BTD)[valid]) / max(rms(want_BTD[valid]), 1e-6)
    assert error <= 0.02, f"bfloat16 errs by {error:.4f} of the output's RMS"


@law
@double
def initial_output_in_band(config: LayerConfig) -> None:
    """At its initial values a layer answers N(0, 1) with an RMS of 0.05 to 3, or with nothing at all."""
    x_BTD = stream(length(config))
    said = tokens(np.stack([places(length(config))] * B))
    y_BTD, *_ = pull(cast(copy(build(config)), np.float64), x_BTD, said, x_BTD)
    size = rms(y_BTD)
    assert size == 0 or 0.05 <= size <= 3, f"RMS of the initial output is {size:.3g}"
