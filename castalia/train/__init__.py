"""Training: from a config to a folder with a trained model.

Begin with `loop.py`, the loop over steps; `setup.py` and `resolve.py` say how a run comes to be, `step.py` what one
optimizer step is. `optimizer.py`, `update_rules.py` and `schedule.py` belong to the step, `preference.py` and
`trainable.py` to fine-tuning, `run_folder.py`, `run_header.py` and `status.py` to what a run leaves in its folder and
shows. May import `tasks` and every room below it.
"""
