"""The prefill worker: runs prompts in chunks and sends each chunk's KV on as it is made."""
