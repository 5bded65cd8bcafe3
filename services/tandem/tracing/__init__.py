"""Recording a timeline in a live process, and bringing those of all processes together.

`buffer` is what hot code calls; `service` is the gRPC door to it; `collect` asks every process of a
cluster; `merge` makes one timeline of the answers.
"""
