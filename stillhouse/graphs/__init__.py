"""Labelled graphs: sets by name or of your own, as rows that the engine can split, and networks on them."""

from stillhouse.graphs.named import of, read
from stillhouse.graphs.networks import GraphClassifier, classifier, depth, flat, measure
from stillhouse.graphs.sets import Collection, Graphs, Labels

__all__ = ["Collection", "GraphClassifier", "Graphs", "Labels", "classifier", "depth", "flat", "measure", "of", "read"]
