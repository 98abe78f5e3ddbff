"""What people run: agents at work together, the demo, the command line.

`cli` and the modules whose `command` it takes load at each start, also for a TAB in the shell. So they import nothing heavy at
the top: a function that needs Ray, llama.cpp, aiohttp, NumPy or the configuration imports it, after what can fail without it.
"""
