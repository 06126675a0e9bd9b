"""What ghostpool costs, measured against what else could be done: `python -m bench` as root.

One module per question (slope, start, mounts, many, …); rivals run alternately in one run, so that
only ratios of that run are compared. Everything that mounts does so in private mount namespaces.
"""
