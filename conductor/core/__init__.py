"""Pure policy: values in, decisions out. No Ray, no GPU, no clock, no logging, no await, no llama.cpp."""
