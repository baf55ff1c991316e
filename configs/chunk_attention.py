"""Hierarchical chunk attention with a window, bytes of Python source; @568M to @2.1B are MoBA's, with its weights."""

from configs.titans_lmm import laptop, paper
from layers.chunk_attention import ChunkAttention

# Rotary places, since the window reads text too: with the paper's, which count within a chunk and say nothing of the
# query's, the same steps end at 2.92 bits a byte, with these at 2.07.
config = laptop(__doc__, ChunkAttention(H=4, chunk=16, top=4, window=32, position="rope"), 951_680)

# Blocks, width, heads, peak learning rate, billions of tokens, pod: the models of MoBA's scaling laws (arXiv
# 2502.13189), rows of 8,192, chunks of 512, 3 of them a token, of which its own is one. Their names are 12 D² a block
# to within 6%: they leave the vocabulary out. They were not checked against the paper again, and the learning rates are
# ours. The other two papers have no size for this house:
# hierarchical chunk attention was published for agents (4 layers), not for text, and native sparse attention in a
# mixture of experts of 27B, with keys and values shared by 16 heads; this layer shares none. Its three branches are
# ChunkAttention(weight="gated", chunk=64, top=16, window=512).
PAPER = {
    "568M": (14, 1792, 14, 1e-3, 10.8, "v6e:4x8"),
    "822M": (16, 2048, 16, 1e-3, 15.3, "v6e:4x8"),
    "1.1B": (18, 2304, 18, 7e-4, 20.6, "v6e:4x8"),
    "1.5B": (20, 2560, 20, 7e-4, 27.4, "v6e:8x8"),
    "2.1B": (22, 2816, 22, 5e-4, 36.9, "v6e:8x8"),
}
sizes = paper(
    __doc__,
    lambda H: ChunkAttention(H=H, chunk=512, top=2, weight="union", position="rope"),
    PAPER,
    [655_837_952, 940_640_256, 1_294_159_104, 1_740_085_760, 2_281_762_560],
    T=8192,
)
