"""The command line: one file for each verb, which parses words, calls a function of another room and prints.

Begin with `main.py`, whose `VERBS` lists the verbs; `render.py` has tables and progress bars. A verb imports what it
needs inside its function, so that `castalia --help` stays fast. The room may import every other one; none imports it.
"""
