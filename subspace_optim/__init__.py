"""Train large models with little memory: gradient-projection optimizers for PyTorch."""

from .engine import SubspaceOptimizer
from .groups import param_groups
from .importer import import_checkpoint
from .kernels.select import available as backends
from .layerwise import ProjectedBackward, average_gradients, project_in_backward
from .monitor import LayerReport
from .optimizers import APOLLO, OPTIMIZERS, Flora, GaLore, GradNormLoRP, Grams, OnlineSubspaceDescent, create
from .planner import MemoryPlan, plan
from .projectors import SVD, OnlinePCA, Projector, RandomProjection
from .rules import Adafactor, Adam, Apollo, CompressedAdafactor, Lion, Momentum, Rule, WeightNormAdam
from .spectrum import LayerSpectrum, LoRA, export_lora, spectral_report

__version__ = "0.1.0"

__all__ = [
    "APOLLO",
    "OPTIMIZERS",
    "SVD",
    "Adafactor",
    "Adam",
    "Apollo",
    "CompressedAdafactor",
    "Flora",
    "GaLore",
    "GradNormLoRP",
    "Grams",
    "LayerReport",
    "LayerSpectrum",
    "Lion",
    "LoRA",
    "MemoryPlan",
    "Momentum",
    "OnlinePCA",
    "OnlineSubspaceDescent",
    "ProjectedBackward",
    "Projector",
    "RandomProjection",
    "Rule",
    "SubspaceOptimizer",
    "WeightNormAdam",
    "average_gradients",
    "backends",
    "create",
    "export_lora",
    "import_checkpoint",
    "param_groups",
    "plan",
    "project_in_backward",
    "spectral_report",
]
