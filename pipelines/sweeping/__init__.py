"""What pipelines/sweep.py is made of: the grid and its rules, accuracy and cost of a setting, tuning, the front."""
