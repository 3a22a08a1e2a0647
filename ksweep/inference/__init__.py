"""Sample continuations of prompts with a vector in them: engines, KV cache, attention, memory."""
