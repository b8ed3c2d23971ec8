"""`castalia start`: from a folder of text to a config, a tokenizer and a corpus that suit it, the machine and the time.

`start_run.py` is the way from the folder to the report. Begin with `choose.py`, a pure function of what `look.py` found
in the folder and `measure.py` on the machine; `measured.py` holds what was measured once, with its source. The room may
import `train`, `report` and every room below them.
"""
