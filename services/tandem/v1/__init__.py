"""Generated protobuf and gRPC code (`make proto`). Never edited by hand."""
