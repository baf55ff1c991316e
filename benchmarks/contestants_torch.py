"""Peers in PyTorch: the pure-PyTorch references of flash-linear-attention, scaled_dot_product_attention, and a
vectorised chunk form of GLA of our own (the library has none that runs without a GPU).

Run as `python -m benchmarks.contestants_torch` in an environment with torch and fla-core; imports nothing of ours but
the harness.
"""

import functools
import importlib.util
from importlib.metadata import version
from pathlib import Path

from benchmarks.pair import Loaded, pin, serve

if __name__ == "__main__":
    pin()

import numpy as np
import torch


@functools.cache
def _fla(op: str):
    """A `naive` module of fla by its file: importing the package would need triton, which these functions do not."""
    package = importlib.util.find_spec("fla")
    if package is None or package.origin is None:
        raise ImportError("fla-core is not installed")
    spec = importlib.util.spec_from_file_location(f"fla_{op}", Path(package.origin).parent / "ops" / op / "naive.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def linear(q, k, v):
    return _fla("linear_attn").naive_chunk_linear_attn(q, k, v, scale=1.0)


def scalar(q, k, v, log_decay):
    return _fla("simple_gla").naive_chunk_simple_gla(q, k, v, log_decay, scale=1.0)[0]


def channel_recurrent(q, k, v, log_decay):
    # the reference scales the query by K^-1/2 and offers no choice
    return _fla("gla").naive_recurrent_gla(q * q.shape[-1] ** 0.5, k, v, log_decay)[0]


def channel(q, k, v, log_decay, chunk: int = 64, block: int = 16):
    """GLA in chunks (arXiv 2312.06635, section 4.3): blocks below the diagonal take their decays relative to the
    start of the row's block, the diagonal blocks take differences, so that no exponent is positive."""
    B, T, H, K = q.shape
    V, N, M = v.shape[-1], T // chunk, chunk // block

    def cut(x):
        return x.transpose(1, 2).reshape(B, H, N, chunk, x.shape[-1])

    q, k, v, g = cut(q), cut(k), cut(v), cut(log_decay).cumsum(-2)
    qb, kb, gb = (x.reshape(B, H, N, M, block, K) for x in (q, k, g))
    start = torch.cat([torch.zeros_like(gb[..., :1, -1, :]), gb[..., :-1, -1, :]], -2)  # B H N M K

    rows = qb * (gb - start[..., None, :]).exp()
    gap = start[..., :, None, :] - g[..., None, :, :]  # B H N M chunk K
    before = torch.arange(chunk) < torch.arange(M)[:, None] * block  # M chunk
    columns = k[..., None, :, :] * gap.masked_fill(~before[..., None], -torch.inf).exp()
    scores = (rows @ columns.transpose(-1, -2)).reshape(B, H, N, chunk, chunk)

    causal = torch.ones(block, block, dtype=torch.bool).tril()
    gap = (gb[..., :, None, :] - gb[..., None, :, :]).masked_fill(~causal[..., None], -torch.inf)
    diagonal = torch.einsum("...ik,...jk,...ijk->...ij", qb, kb, gap.exp())
    on_diagonal = torch.eye(M, dtype=q.dtype)[:, None, :, None]
    scores = scores + (diagonal[..., :, :, None, :] * on_diagonal).reshape(B, H, N, chunk, chunk)

    total = g[..., -1:, :]
    added = (k * (total - g).exp()).transpose(-1, -2) @ v
    keep = total.exp().transpose(-1, -2)
    S, entering = q.new_zeros(B, H, K, V), []
    for n in range(N):
        entering.append(S)
        S = keep[:, :, n] * S + added[:, :, n]
    y = (q * g.exp()) @ torch.stack(entering, 2) + scores @ v
    return y.reshape(B, H, T, V).transpose(1, 2)


def gated_delta(q, k, v, beta, log_decay):
    return _fla("gated_delta_rule").naive_chunk_gated_delta_rule(q, k, v, log_decay, beta, scale=1.0)[0]


def attention(q, k, v):  # B H T D, the layout it is made for
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


@functools.cache
def _band(T: int, size: int) -> torch.Tensor:
    gap = torch.arange(T)[:, None] - torch.arange(T)
    return (gap >= 0) & (gap < size)


def window(q, k, v, size: int):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=_band(q.shape[2], size))


HEADS_FIRST = (attention, window)
OPS = {op.__name__: op for op in (linear, scalar, channel, channel_recurrent, gated_delta, attention, window)}


def load(op: str, mode: str, inputs: dict[str, np.ndarray], **options) -> Loaded:
    function = functools.partial(OPS[op], **options)
    swap = OPS[op] in HEADS_FIRST

    def place(x: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(x)
        return tensor.transpose(1, 2).contiguous() if swap else tensor

    def back(x: torch.Tensor) -> np.ndarray:
        return (x.transpose(1, 2) if swap else x).detach().numpy()

    cotangent = place(inputs.pop("cotangent"))
    arguments = {name: place(x) for name, x in inputs.items()}

    def forward():
        with torch.no_grad():
            return function(**arguments)

    def both():
        for x in arguments.values():
            x.requires_grad_()
        y = function(**arguments)
        return y, torch.autograd.grad(y, list(arguments.values()), cotangent)

    def outputs():
        if mode == "fwd":
            return {"y": back(forward())}
        y, gradients = both()
        return {"y": back(y)} | {f"d_{n}": back(g) for n, g in zip(arguments, gradients, strict=True)}

    return Loaded(forward if mode == "fwd" else both, outputs, {})


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve(load, lambda: {"torch": torch.__version__, "fla-core": version("fla-core")})
