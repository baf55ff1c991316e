"""Lizard: linear attention that forgets, beside a window with learned scalars, bytes of Python source."""

from configs.titans_lmm import laptop
from layers.lizard import Lizard

config = laptop(__doc__, Lizard(H=4, window=64), 935_876)
