"""The study of this project: its plan, its runner and its report, beside its results. `scripts/study.py` runs it."""
