"""`castalia finetune`: from a model and a file of texts, conversations or preferences to a tuned model.

Begin with `finetune_run.py`, which shows the order. `lessons.py` turns files into corpora and holds a part of them out,
`tuning_choice.py` chooses the settings from their sizes, `before_after.py` compares two models on what was held out.
The room may import `train` and everything below it.
"""
