"""The data sets: each file knows the name, source, counts and loading of one."""
