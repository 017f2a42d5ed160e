"""What a model is trained for. ``task_of`` is imported with torch; the package itself is not."""
