"""What people run: agents at work together, the demo, the command line."""
