"""What a data set is like: its imbalance, and what is odd about its classes and files."""
