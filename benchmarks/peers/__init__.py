"""Runs the tools in use today beside kvjax in the same process."""
