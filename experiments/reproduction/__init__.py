"""The runs that repeat published figures, how long they take, and their table."""
