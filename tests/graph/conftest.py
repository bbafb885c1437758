from graphs import granularity, small, tracer  # noqa: F401
