"""The control plane: who is in the cluster, who watches them, and how Ray starts them.

`roster` decides and is pure; `manager` acts on its decisions; `service` publishes them over gRPC;
`actors` and `launcher` put all of it into Ray. Nothing here is on the path of a token.
"""
