"""Runs a model: one forward pass over a ragged batch, and the next token of each sequence in it.

Decides nothing about what runs when (`tandem.scheduler`) or who owns a block (`tandem.kvcache`).
"""

from tandem.engine.engine import Engine, LayerGroup
from tandem.engine.launched import IterationOutput, Launched
from tandem.engine.spec import ModelSpec, load_spec

__all__ = ["Engine", "IterationOutput", "Launched", "LayerGroup", "ModelSpec", "load_spec"]
