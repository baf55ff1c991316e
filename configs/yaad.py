"""Yaad: the Huber loss, bytes of Python source; @170M to @1.3B are the paper's."""

from configs.titans_lmm import TITANS, laptop, paper
from layers.miras import Yaad

config = laptop(__doc__, Yaad(H=4), 1_310_224)
sizes = paper(__doc__, lambda H: Yaad(H=H), TITANS, [148_336_128, 416_533_376, 877_244_544, 1_206_991_504])
