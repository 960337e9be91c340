"""How fast this is here: `python benchmarks/run.py` (docs/performance.md)."""
