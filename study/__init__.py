"""The study of this project: plan, runner, report and results. `scripts/study.py` runs it."""
