"""One hour on a machine that nobody here has: every part that training rests on, measured against what it needs.

`session` runs the checks on all processes and gathers their lines; each other file is one kind of check.
"""
