r"""Brings requests to decode workers and their tokens back, whatever happens to the workers.

::

    Dispatcher --- ClusterView       who is in the cluster (Cluster.Watch)
        |     \--- DecodePool        one DecodeStream per decode worker (Decode.Serve)
        |               \--- Watchdog    silence, lack of progress
        \--- Traffic                 every request in flight: a Flight each
                 \--- Router, Suspects

Knows token ids only: no HTTP, no text, no tensor. Everything runs in one event loop and no handler
awaits, so each sees a consistent state. Invariant: the tokens of a request reach its consumer
exactly once and in order, and everything that a request holds is released exactly once.
"""

from tandem.gateway.dispatch.dispatcher import Dispatcher

__all__ = ["Dispatcher"]
