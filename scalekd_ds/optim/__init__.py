"""Optimizers and schedules, right under every ZeRO stage."""
