"""Subcommands of `psim`, one file per group.

Each reads its inputs, calls one function and shows the result. Modules that load slowly or need the
extra are imported inside the functions, so that `--help` needs none of them.
"""
