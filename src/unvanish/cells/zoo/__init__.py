"""Cells of the literature, a file each: the equations, the paper, and what the gradient does in them."""

from unvanish.cells.zoo.antisymmetric import AntisymmetricRNN
from unvanish.cells.zoo.brc import BRC
from unvanish.cells.zoo.cifg import CIFG
from unvanish.cells.zoo.cornn import CoRNN
from unvanish.cells.zoo.indrnn import IndRNN
from unvanish.cells.zoo.janet import JANET
from unvanish.cells.zoo.leaky import Leaky
from unvanish.cells.zoo.lem import LEM
from unvanish.cells.zoo.lif import LIF
from unvanish.cells.zoo.ligru import LiGRU
from unvanish.cells.zoo.mgu import MGU
from unvanish.cells.zoo.mingru import MinGRU
from unvanish.cells.zoo.minlstm import MinLSTM
from unvanish.cells.zoo.peephole import Peephole
from unvanish.cells.zoo.slstm import SLSTM
from unvanish.cells.zoo.star import STAR
from unvanish.cells.zoo.ur_lstm import URLSTM

__all__ = [
    "BRC",
    "CIFG",
    "JANET",
    "LEM",
    "LIF",
    "MGU",
    "SLSTM",
    "STAR",
    "URLSTM",
    "AntisymmetricRNN",
    "CoRNN",
    "IndRNN",
    "Leaky",
    "LiGRU",
    "MinGRU",
    "MinLSTM",
    "Peephole",
]
