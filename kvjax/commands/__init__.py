"""The command line: one module per command, each parsing flags, calling the library and printing."""
