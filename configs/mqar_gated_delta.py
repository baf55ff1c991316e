"""Associative recall (MQAR), 4 pairs in 64 tokens: a gated convolution, then the gated delta rule."""

from configs.mqar import experiment
from layers.gated_deltanet import GatedDeltaNet

config = experiment("the gated delta rule", GatedDeltaNet(H=2, K=32, V=32, gate=False), 38_436)
