"""What people look at: figures drawn from a sweep's labelled means."""
