"""A cluster under a virtual clock: real decisions, modelled machines."""

from tandem.simulator.cluster import ClusterSpec, simulate
from tandem.simulator.profile import Profile, load_profile
from tandem.simulator.report import Report
from tandem.simulator.trace import TraceRequest, read_trace

__all__ = [
    "ClusterSpec",
    "Profile",
    "Report",
    "TraceRequest",
    "load_profile",
    "read_trace",
    "simulate",
]
