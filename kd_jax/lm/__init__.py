"""Language models: SmolLM2 and other Llama-architecture checkpoints."""
