"""Assignments out of the chapters: built for students, and graded when they come back.

`catalogue` says which there are; `build` cuts a chapter down to one; `repair` mends what comes back; `grade` runs
nbgrader over it (`course`). What a student wrote runs in a process of its own (`worker`, `sandbox`), never in the one
that holds the tests (`isolation`, `execute`).
"""
