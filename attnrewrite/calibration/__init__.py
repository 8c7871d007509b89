"""``calibrate``: how much a diffusion model's attentions change from step to step, and what may be reused.

calibrate    a run without reuse, in which every value is compared with earlier ones
calibration  the result, and the config that is proposed
proposals    skip ranges and timesteps from differences
render       tables and a plot
"""
