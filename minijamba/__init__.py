"""minijamba: Jamba, the hybrid of Transformer, Mamba and mixture of experts, built from first principles."""

from .budget import budget
from .cache import Cache
from .checkpoint import load, save
from .config import JambaConfig, preset
from .generate import generate
from .model import Jamba, Trace
from .moe import balance_loss
from .rungs import use_rung
from .scan import selective_scan, selective_step

__version__ = "0.1.0"

__all__ = [
    "Cache",
    "Jamba",
    "JambaConfig",
    "Trace",
    "balance_loss",
    "budget",
    "generate",
    "load",
    "preset",
    "save",
    "selective_scan",
    "selective_step",
    "use_rung",
]
