"""
What can be said about resolved stages. Needs neither a GPU, nor torch, nor a recording in progress.

Sees batches and nothing else; may not reach the recording side.
"""
