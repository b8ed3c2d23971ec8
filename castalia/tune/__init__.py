"""Tools that train a little to answer a question: a learning-rate test, the replay of a step, muP's coordinate check.

Each file is one tool; begin with `lr_find.py`, the shortest way to drive a `TrainStep`. May import `train` and every
room below it.
"""
