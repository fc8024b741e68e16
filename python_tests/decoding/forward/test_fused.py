"""The fused pass decodes as the model does: what it is for is a GPU, and here its ops' CPU kernels
run, with steps one by one and on the tape.
"""

import pytest
import torch
from torch import nn

from decoding.forward.test_families import MODELS, VARIANTS, InFloat64, made
from helpers.families import FAMILIES, VOCAB, tiny_model
from helpers.runners import ours, plain, prompts, sampled
from msn_ext import DraftTree, generate
from msn_ext.decoding import BestFirst, engine
