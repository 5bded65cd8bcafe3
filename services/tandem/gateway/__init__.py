"""The front door: HTTP and gRPC in, tokens and text out. Knows no Ray and no tensor.

`interfaces` is what the edges and the dispatcher agree on; `service` is the one place that both
edges call; `http` and `grpc` are the edges; `text` turns text into tokens and back; `dispatch`
brings requests to workers and survives their failures; `server` runs all of it in one event loop.
"""
