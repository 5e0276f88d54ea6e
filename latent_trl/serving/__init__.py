"""OpenAI's chat completions in front of a model with latent actions. Needs the extra `serve`."""
