"""What a benchmark times: the worker processes that ``tools/benchmark.py`` starts, one a norm."""
