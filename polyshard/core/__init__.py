"""Protocols and plain data that every adapter shares.

Imports only the standard library and torch, never a parallelism library. An adapter in another package implements and
uses the names exported here; see docs/how-to/write-an-adapter.md.
"""

from polyshard.core.adapter import Adapter, StepResult, TrainingEngine
from polyshard.core.attention import AttentionCore, AttentionSpec, PackedSequences
from polyshard.core.batch import BatchResult, CountTokens, MicroBatch, SumLoss
from polyshard.core.capabilities import FEATURES, YES, Capabilities, Rejected, Support, no
from polyshard.core.context import Collectives, GroupContext, ParallelAxis, ParallelContext
from polyshard.core.discovery import adapter_names, load_adapter
from polyshard.core.errors import (
    AdapterError,
    CheckpointError,
    ConfigurationError,
    EngineFailureError,
    LayoutError,
    MissingDependencyError,
    PolyshardError,
    RankFailureError,
    RegistrationError,
    UnsupportedVersionError,
    WeightSyncError,
)
from polyshard.core.linear_adapter import FullLinearAdapter, LinearAdapter
from polyshard.core.optimizer import AdamW, OptimizerFactory, TorchOptimizer
from polyshard.core.parallel_layout import Axis, ParallelLayout
from polyshard.core.parameter_groups import GroupSettings, ParameterGroup
from polyshard.core.pieces import OptimizerState, Piece
from polyshard.core.precision import Precision
from polyshard.core.requirement import Requirement, UntestedVersionWarning
from polyshard.core.weight_sharding import Segment, WeightLayout
from polyshard.core.weight_table import WeightEntry, WeightTable

__all__ = [
    "FEATURES",
    "YES",
    "AdamW",
    "Adapter",
    "AdapterError",
    "AttentionCore",
    "AttentionSpec",
    "Axis",
    "BatchResult",
    "Capabilities",
    "CheckpointError",
    "Collectives",
    "ConfigurationError",
    "CountTokens",
    "EngineFailureError",
    "FullLinearAdapter",
    "GroupContext",
    "GroupSettings",
    "LayoutError",
    "LinearAdapter",
    "MicroBatch",
    "MissingDependencyError",
    "OptimizerFactory",
    "OptimizerState",
    "PackedSequences",
    "ParallelAxis",
    "ParallelContext",
    "ParallelLayout",
    "ParameterGroup",
    "Piece",
    "PolyshardError",
    "Precision",
    "RankFailureError",
    "RegistrationError",
    "Rejected",
    "Requirement",
    "Segment",
    "StepResult",
    "SumLoss",
    "Support",
    "TorchOptimizer",
    "TrainingEngine",
    "UnsupportedVersionError",
    "UntestedVersionWarning",
    "WeightEntry",
    "WeightLayout",
    "WeightSyncError",
    "WeightTable",
    "adapter_names",
    "load_adapter",
    "no",
]
