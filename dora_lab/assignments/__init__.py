"""Assignments out of the chapters: built for students, and graded when they come back.

`catalogue` says which there are; `build` cuts a chapter down to one. `collect` finds what comes back, `repair` mends
it, `grade` runs nbgrader over it (`course`, `execute`), `copies` compares, `table` writes the points down. What a
student wrote runs in a process of its own (`worker`), shut off by `sandbox`, `fence` and `guard`, never in the one that
holds the tests (`isolation`). Assignment 04 reads records: `experiment`, `likelihoods`, `difference`.
"""
