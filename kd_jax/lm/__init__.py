"""Language models: weights, sampling, scoring, distillation, and the experiment."""
