"""The parts of pipelines/sweep.py: the grid and its rules, accuracy and cost of a setting, tuning, the front."""

import os

# Tune reads these when it is imported, so they are set before any module of this package imports it. The sweep handles
# Ctrl-C and the terminal; nobody reads Tune's CSV and TensorBoard files.
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
