"""The tuner: tries kernels on a device and writes what it finds into a tuning file.

Measuring (`bench`, `worker`) and enumeration (`space`) need no Optuna; only `study` and what stands
on it (`search`, `run`) do.
"""
