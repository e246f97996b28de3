"""A small language model of bytes, and all that its training takes: what `train_lm.py` and `scaling.py` share.

| file | what is in it |
|---|---|
| `model.py` | the model; its feed-forward layers are dense or mixtures |
| `routers.py` | the layers of `--router`, one function each |
| `settings.py` | all that decides the numbers of a run, and the options of the command line |
| `corpus.py` | text: whole files in, windows of bytes out |
| `trainee.py` | one model in training, and what happened to it |
| `training.py` | a run that can be stopped at any moment, and its checkpoint |
| `spread.py`, `ranks.py` | the same run on several processes, each with a part of the experts |
| `report.py` | a table for the terminal, and a picture |
"""
