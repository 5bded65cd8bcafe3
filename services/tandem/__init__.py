"""Tandem: a serving cluster for large language models that keeps prefill and decode apart."""

__version__ = "0.1.0"
