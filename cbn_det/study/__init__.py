"""Comparing norms: starts training runs as separate processes and reads the files that they leave.

Nothing here imports an engine: a run is a command line and a folder (`config.yaml`, `metrics.json`,
`result.json`), whatever trained it.
"""
