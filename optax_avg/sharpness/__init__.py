"""Gradients at perturbed parameters: a rule, and three forms in which to use it."""

from optax_avg.sharpness._rule import RuleState, SharpnessRule

__all__ = ["RuleState", "SharpnessRule"]
