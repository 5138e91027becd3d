"""How fast aneuron is, as ratios to two hand-written loops: `python -m benchmarks`. See README.md beside this file."""
