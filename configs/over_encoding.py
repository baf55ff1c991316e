"""Over-encoding before four blocks of Gated DeltaNet, bytes of Python source; a table as large as Engram's two."""

import dataclasses

from configs.engram import BLOCK
from configs.titans_lmm import laptop
from models.over_encoding import OverEncoding

config = laptop(__doc__, BLOCK[0], 4_298_336)
config = dataclasses.replace(
    config, model=dataclasses.replace(config.model, ngrams=OverEncoding(N=4, H=8, K=16, rows=1 << 13))
)
