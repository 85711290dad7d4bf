"""The sections of `scripts/benchmark.py`. Each is a function from the options to groups of cases that were run
alternately."""
