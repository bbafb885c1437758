from fast_interpreter import patched_once_a_launch  # noqa: F401
