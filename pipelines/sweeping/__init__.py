"""The parts of pipelines/sweep.py: the grid and its rules, accuracy and cost of a setting, tuning, the front."""
