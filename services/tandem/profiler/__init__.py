"""Measures what a cluster's iterations and links cost, from outside, and fits a profile to it.

The requests go through the gateway like anybody's, one experiment at a time, so whatever a user
would wait for is in the figures. Nothing here decides anything about serving.
"""

from tandem.profiler.measure import measure_profile
from tandem.profiler.target import Target, find_target

__all__ = ["Target", "find_target", "measure_profile"]
