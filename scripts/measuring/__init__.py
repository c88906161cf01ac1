"""What `scripts/bench.py` measures with: work, runs of it, the hooks' share, a figure."""
