"""Examine checkpoints: what is inside one, how two differ, and whether two are the same model.

Begin with `inspect`, which needs no torch; it takes the architecture from `facts`. `diff` compares any two checkpoints
and gives a verdict; `verify` proves that a conversion is exact, and runs both models. May import `streaming`, `loading`
and every room below them; the verbs of the command line print what these modules return.
"""
