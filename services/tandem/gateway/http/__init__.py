"""The HTTP edge: OpenAI's API, a few extensions, and what operators probe."""
