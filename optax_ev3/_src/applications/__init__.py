"""Applications, which use the core: growth and distillation."""
