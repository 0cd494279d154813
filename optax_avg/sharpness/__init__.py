"""Gradients at perturbed parameters: a rule, and three forms to use it."""
