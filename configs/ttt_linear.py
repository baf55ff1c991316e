"""TTT-Linear, bytes of Python source; @125M to @1.3B are the paper's."""

from configs.titans_lmm import laptop, paper
from layers.ttt import TTTLinear

# Blocks, width, heads, peak learning rate, billions of tokens, 20 a parameter (Sun et al. 2024, arXiv 2407.04620), pod.
TTT = {
    "125M": (12, 768, 12, 3e-3, 2.5, "v5e:4x4"),
    "350M": (24, 1024, 16, 1.5e-3, 7, "v5e:4x8"),
    "760M": (24, 1536, 16, 1.25e-3, 15, "v5e:8x8"),
    "1.3B": (24, 2048, 32, 1e-3, 26, "v6e:8x8"),
}
config = laptop(__doc__, TTTLinear(H=4), 944_080)
sizes = paper(__doc__, lambda H: TTTLinear(H=H), TTT, [134_926_416, 371_435_264, 782_465_280, 1_350_782_080], T=2048)
