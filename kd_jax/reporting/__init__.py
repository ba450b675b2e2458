"""Pages and figures, and what a knob costs, for all experiments."""
