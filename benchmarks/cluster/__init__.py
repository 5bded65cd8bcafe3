"""Serving systems under a sweep of load: ours apart, lending and colocated, and vLLM's."""
