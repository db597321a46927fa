"""The commands of ``python -m fastce``, one module each, imported only when chosen."""
