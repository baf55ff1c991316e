"""titans-pytorch's NeuralMemory, ready to be timed; lives in the peers' environment (benchmarks/peers.py)."""

import os
from importlib.metadata import version

from benchmarks.pair import Loaded, pin, serve

if __name__ == "__main__":
    pin()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
from titans_pytorch import MemoryMLP, NeuralMemory


def load(mode: str, B: int, T: int, D: int, H: int, C: int, device: str = "cpu") -> Loaded:
    """Width D, H heads, a memory of two matrices of expansion 4, momentum and decay, steps of C tokens."""
    torch.manual_seed(0)
    model = MemoryMLP(D // H, depth=2, expansion_factor=4.0)
    memory = NeuralMemory(dim=D, dim_head=D // H, heads=H, chunk_size=C, model=model).to(device)
    x = torch.randn(B, T, D, device=device, requires_grad=mode != "fwd")

    def run():
        if mode == "fwd":
            with torch.no_grad():
                return memory(x)[0]
        for parameter in (x, *memory.parameters()):
            parameter.grad = None
        y = memory(x)[0]
        y.square().sum().backward()
        return y

    return Loaded(run, dict, {"parameters": float(sum(p.numel() for p in memory.parameters()))})


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve(load, lambda: {"torch": version("torch"), "titans-pytorch": version("titans-pytorch")})
