"""
The commands of `gpuscope`: one file each, with `add_arguments(parser)` and `run(options) -> exit code`.

They use gpuscope as any program would, through its public names; only `doctor` looks behind them. Nothing imports
them but `gpuscope.__main__`, and what is heavy they import when they run.
"""
