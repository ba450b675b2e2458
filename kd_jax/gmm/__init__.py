"""Distillation in a mixture of Gaussians: mixtures, EM, and the experiment."""
