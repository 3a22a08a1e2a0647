"""Activations to explain: their sources, and a store so that none is computed twice.

plan_activations(activations, layer, root)      what is stored and what is missing; no torch
table = ensure(activations, layer, root)        read from the store what exists, compute the rest
table.vectors(0, 100), table.column("document")
"""

from ksweep.activations.caching import ActivationPlan, activations_key, ensure, fill, plan_activations
from ksweep.activations.datasets import TextRow, read_documents
from ksweep.activations.source import ActivationUnit, UnitSource, activation_key
from ksweep.activations.store import ActivationStore, ActivationTable, estimate_bytes, free_disk_bytes
from ksweep.activations.vector_source import VectorsSidecar, read_vectors_sidecar

__all__ = [
    "ActivationPlan",
    "ActivationStore",
    "ActivationTable",
    "TextRow",
    "ActivationUnit",
    "UnitSource",
    "VectorsSidecar",
    "activation_key",
    "activations_key",
    "ensure",
    "estimate_bytes",
    "fill",
    "free_disk_bytes",
    "plan_activations",
    "read_documents",
    "read_vectors_sidecar",
]
