"""
Offline analysis: files of the `file` exporter become a `Recording`, and a recording becomes reports.

`read` is the way in. `figures`, `verdict`, `compare`, `timeline`, `perfetto` and `jaeger` each make one report. Nothing
here needs a GPU or torch, and nothing here may import what records: the files are all that the two sides share.
"""
