"""The decode worker: owns requests inside the cluster, receives their KV, decodes continuously."""
