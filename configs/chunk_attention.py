"""Hierarchical chunk attention with a window, bytes of Python source."""

from configs.titans_lmm import laptop
from layers.chunk_attention import ChunkAttention

config = laptop(__doc__, ChunkAttention(H=4, chunk=16, top=4, window=32), 951_680)
