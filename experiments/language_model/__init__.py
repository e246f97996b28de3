"""A small byte-level language model and its training, which `train_lm.py` and `scaling.py` share.

| file | contents |
|---|---|
| `model.py` | the model, whose feed-forward layers are dense or mixtures |
| `routers.py` | one function for each layer that `--router` offers |
| `settings.py` | the settings that determine a run's results, and the command-line options |
| `corpus.py` | text: converts files to windows of bytes |
| `trainee.py` | a model in training, and its history |
| `training.py` | a run that can be stopped at any time, and its checkpoint |
| `expert_parallel.py`, `ranks.py` | the same run on several processes, each with a part of the experts |
| `report.py` | a table for the terminal, and a picture |
"""
