"""The language-model experiment: its stages, its arms, what it costs and what came out."""
