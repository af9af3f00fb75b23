"""What people use today, measured beside kvjax in the same process."""
