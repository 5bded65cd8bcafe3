"""What prefill and decode workers share: the engine thread, the event loop, status and metrics."""
