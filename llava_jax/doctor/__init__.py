"""Checks of a machine before training: every part that training depends on, measured against what it needs.

`session` runs the checks on all processes and gathers their lines; each other file is one kind of check.
"""
