"""Adapters to other libraries: each a thin layer over the public functions, imported only when asked for."""
