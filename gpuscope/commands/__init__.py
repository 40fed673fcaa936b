"""
The commands of `gpuscope`: one file each, with `add_arguments(parser)` and `run(options)`.

`run` returns the exit code, or a function that runs the user's program. Commands use gpuscope as any program would,
through its public names. Only `doctor`, `send`, `run` and `profile` look behind them: what checks an installation,
sends a recording, runs a program or reads a trace has no public name. Only `gpuscope.__main__` imports them, and they
import heavy libraries when they run.
"""
