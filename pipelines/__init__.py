"""The commands, and what they share.

The imports of a command take seconds. Ctrl-C meanwhile would end in a trace through other people's modules, or in an
ImportError. Nothing has begun by then, so it ends the process at once, as `kill -INT` ends a program without a handler;
`pipelines.entry` gives `main` Python's own handler back. Every command imports this package before anything large.
"""

import signal
import sys
from pathlib import Path

_script = getattr(sys.modules["__main__"], "__file__", None)
_is_command = _script is not None and Path(_script).resolve().parent == Path(__file__).resolve().parent
if _is_command and signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # ignored where a shell's `&` says so
    signal.signal(signal.SIGINT, signal.SIG_DFL)
