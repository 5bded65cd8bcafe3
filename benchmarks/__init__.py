"""What the README's figures come from: `python -m benchmarks.serving`; see docs/benchmarks.md."""
