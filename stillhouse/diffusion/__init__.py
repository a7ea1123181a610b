"""Diffusion: forward processes, denoisers, exact scores, score distillation, LoRA as a second voice."""
