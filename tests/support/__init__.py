"""What tests build on: small model files and looks into llama.cpp."""
