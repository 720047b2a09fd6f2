"""Units and small helpers without dependencies inside the package."""
