"""What touches the world: llama.cpp, the device, files. It decides nothing."""
