"""The KV cache of one worker: who owns which block, and the tensors that blocks index.

Importing this package pulls in no torch: hashing and the block pool are pure, and only
`tandem.kvcache.storage` holds tensors.
"""
