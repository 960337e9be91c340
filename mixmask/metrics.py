"""Names of metrics from configs alone: they carry the protocol. No torch here."""

from __future__ import annotations

from mixmask import registry
from mixmask.config import KNN, Pretrain


def knn_metric(knn: KNN, dim: int) -> str:
    """The k-NN protocol on features of `dim` numbers: knn_k200_t0.1_out128, or knn_k5_euclidean_backbone512.

    A temperature means a weighted vote, and cosine similarity where no distance is named; else it is the majority's.
    """
    weighted = knn.vote == "weighted"
    parts = [f"knn_k{knn.k}"] + [f"t{knn.temperature:g}"] * weighted
    parts += [] if weighted and knn.distance == "cosine" else [knn.distance]
    return "_".join([*parts, f"{'out' if knn.features == 'output' else 'backbone'}{dim}"])


def pretraining_metric(config: Pretrain) -> str:
    """The k-NN accuracy that a pre-training logs and reports."""
    output = config.knn.features == "output"
    return knn_metric(config.knn, config.settings["dim"] if output else registry.features(config.backbone))
