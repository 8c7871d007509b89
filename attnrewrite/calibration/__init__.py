"""``calibrate``: how much a diffusion model's attentions change from step to step."""
