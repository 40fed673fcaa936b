"""
The commands of `gpuscope`: one file each, with `add_arguments(parser)` and `run(options)`.

`run` returns the exit code, or a function that runs the user's program. Commands use gpuscope as any program would,
through its public names; only `doctor` and what runs a program look behind them. Nothing imports them but
`gpuscope.__main__`, and what is heavy they import when they run.
"""
