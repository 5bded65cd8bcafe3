"""Plain data that every other package shares. Imports nothing of ours."""
