"""The page of a language-model run."""
