"""The gRPC edge: `tandem.v1.Inference`, `grpc.health.v1.Health` and server reflection."""
