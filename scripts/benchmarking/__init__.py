"""The sections of `scripts/benchmark.py`, each a function from its options to groups of cases that took turns."""
