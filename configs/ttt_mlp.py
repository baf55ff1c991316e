"""TTT-MLP, bytes of Python source; @125M to @1.3B are the paper's."""

from configs.titans_lmm import laptop, paper
from configs.ttt_linear import TTT
from layers.ttt import TTTMLP

config = laptop(__doc__, TTTMLP(H=4), 1_060_816)
sizes = paper(__doc__, lambda H: TTTMLP(H=H), TTT, [139_092_048, 382_543_616, 807_385_344, 1_372_998_784], T=2048)
