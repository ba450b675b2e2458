"""Files and folders, written whole or not at all, and the errors that name them."""
