"""Bindings of the ops to other frameworks; each module imports its framework, nothing else in `mem1_core`
does.
"""
