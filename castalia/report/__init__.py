"""`castalia report`: how good a run has become, in figures, samples and advice.

Begin with `run_report.py`, which gathers a `Report`; `report_text.py` and `report_page.py` show it. `copied.py` finds
the training text nearest to a sample. The room may import `train` and every room below it.
"""
